"""How much one thing a feature stands for: by an independent image encoder, and by the known attributes of scenes.

Shapes: S images, F features, d width of the encoder's embeddings. Activations are one number an image and feature
(`features.image_maxima`), csr [S, F], zero or more.
"""

import numpy as np
import pandas as pd
import scipy.sparse as sp

from mmsae_helpers.errors import InputError


class Similarity:
    """Activation-weighted mean pairwise cosine of image embeddings (Pach et al. 2025, the monosemanticity score).

    Over pairs of different images n, m: sum a_n a_m cos(e_n, e_m) / sum a_n a_m, where a is min-max normalised over all
    images. The largest cancels; so does the least where it is 0, that is, unless the feature fires on every image.
    In closed form, one pass: (||sum a e||^2 - sum a^2) / ((sum a)^2 - sum a^2), e of length 1. Memory F x d.
    """

    def __init__(self, d_sae: int, d_embedding: int):
        self._n = 0
        self._embedding = np.zeros(d_embedding)
        self._weighted = np.zeros((d_sae, d_embedding))
        self._sum, self._squares = np.zeros((2, d_sae))
        self._least = np.full(d_sae, np.inf)

    def add(self, activations: sp.csr_matrix, embeddings) -> None:
        """``activations`` [S, F] and ``embeddings`` [S, d] of S new images; InputError for a zero embedding."""
        embeddings = np.asarray(embeddings, np.float64)
        length = np.linalg.norm(embeddings, axis=1, keepdims=True)
        if activations.shape != (len(embeddings), len(self._sum)) or not np.all(length > 0):
            raise InputError(f"similarity: {activations.shape} activations need as many embeddings, none of them zero")
        if not len(embeddings):
            return
        a, embeddings = activations.astype(np.float64), embeddings / length
        self._n += len(embeddings)
        self._embedding += embeddings.sum(axis=0)
        self._weighted += a.T @ embeddings
        self._sum += np.asarray(a.sum(axis=0)).ravel()
        self._squares += np.asarray(a.multiply(a).sum(axis=0)).ravel()
        self._least = np.minimum(self._least, a.min(axis=0).toarray().ravel())

    def score(self) -> np.ndarray:
        """[F] in -1 to 1; nan where fewer than two images have weight."""
        n, least = self._n, np.where(self._n, self._least, 0)
        total = self._sum - n * least
        squares = self._squares - 2 * least * self._sum + n * least**2
        pairs = total**2 - squares
        weighted = self._weighted - least[:, None] * self._embedding
        enough = pairs > 1e-10 * np.maximum(self._sum**2, total**2)  # less is rounding
        return np.divide((weighted**2).sum(axis=1) - squares, pairs, out=np.full(len(pairs), np.nan), where=enough)


class Purity:
    """The attribute value each feature stands for best, in one pass; memory V x F for V values of all attributes.

    ``attributes`` [S, A] of strings, of all images. Of value v of an attribute with V values, p = mean activation over
    the images with v / sum over values of that mean, and purity = (p V - 1) / (V - 1): 0 where all values are alike, 1
    where only one fires. The best over attributes and values. ``seed`` (as of numpy): the control, with the attributes
    dealt out at random. ``draws``: as many bootstrap samples of the images (Poisson weights) beside, for `bootstrap`.
    Raises InputError where no attribute varies.
    """

    def __init__(self, attributes: pd.DataFrame, d_sae: int, seed=None, draws: int = 0):
        order = np.arange(len(attributes))
        order = order if seed is None else np.random.default_rng(seed).permutation(order)
        found = {
            name: np.unique(column.to_numpy(str)[order], return_inverse=True) for name, column in attributes.items()
        }
        found = {name: pair for name, pair in found.items() if len(pair[0]) > 1}
        if not found:
            raise InputError("purity: no attribute takes two values on these images")
        self.names = np.array([(name, value) for name, (values, _) in found.items() for value in values], str)
        self._edges = np.cumsum([0, *(len(values) for values, _ in found.values())])
        rows = [first + group for first, (_, group) in zip(self._edges, found.values(), strict=False)]
        of = np.tile(np.arange(len(order)), len(rows))
        self._member = sp.csr_matrix((np.ones(len(of)), (of, np.concatenate(rows))), (len(order), len(self.names)))
        self._weights = np.random.default_rng(0).poisson(1.0, (draws, len(order)))
        self._weights = np.concatenate([np.ones((1, len(order))), self._weights])
        self._sums = np.zeros((1 + draws, len(self.names), d_sae))
        self._counts = np.zeros((1 + draws, len(self.names)))

    def add(self, activations: sp.csr_matrix, ids) -> None:
        """``activations`` csr [S, F] of the images ``ids`` [S], rows of ``attributes``; each image once."""
        member = self._member[ids]
        for weight, sums, counts in zip(self._weights[:, ids], self._sums, self._counts, strict=True):
            part = sp.diags(weight) @ member
            sums += (part.T @ activations).toarray()
            counts += np.asarray(part.sum(axis=0)).ravel()

    def score(self) -> pd.DataFrame:
        """A row a feature: purity (nan where it never fires), attribute and value ("" there)."""
        shares = self._shares(0)
        fires = self._sums[0].any(axis=0)
        best = np.where(fires, np.nan_to_num(shares, nan=-np.inf).argmax(axis=0), 0)
        named = np.where(fires[:, None], self.names[best], "")
        purest = np.where(fires, shares[best, np.arange(len(best))], np.nan)
        return pd.DataFrame({"purity": purest, "attribute": named[:, 0], "value": named[:, 1]})

    def bootstrap(self) -> np.ndarray:
        """Purity [draws, F] on each bootstrap sample of the images; 0 where a feature does not fire in one."""
        drawn = [np.nan_to_num(self._shares(i)).max(axis=0) for i in range(1, len(self._sums))]
        return np.reshape(drawn, (len(drawn), self._sums.shape[2]))

    def _shares(self, draw: int) -> np.ndarray:
        mean, shares = self._sums[draw] / np.maximum(self._counts[draw], 1)[:, None], []
        for lo, hi in zip(self._edges[:-1], self._edges[1:], strict=True):
            total, v = mean[lo:hi].sum(axis=0), np.count_nonzero(self._counts[draw, lo:hi])
            share = np.divide(mean[lo:hi], total, out=np.full((hi - lo, len(total)), np.nan), where=total > 0)
            shares.append((share * v - 1) / max(v - 1, 1))
        return np.concatenate(shares)


def alike(n: pd.Series) -> pd.Series:
    """Classes of counts (images or tokens on which a feature fires) that are alike, within a factor of 1.4."""
    return np.log2(n.clip(lower=1)).mul(2).round()


def beyond_chance(purity: pd.Series, control: pd.Series, n: pd.Series, by=(), level: float = 0.95) -> pd.Series:
    """Whether each purity is above the ``level`` quantile of the controls of features with as large an ``n`` (`alike`).

    All indexed alike; ``by``: series within whose groups alone features are compared.
    """
    return purity > control.groupby([*by, alike(n)]).transform("quantile", level)
