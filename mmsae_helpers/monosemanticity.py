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


def purity(activations: sp.csr_matrix, attributes: pd.DataFrame, seed: int | None = None) -> pd.DataFrame:
    """The attribute value each feature stands for best: columns purity, attribute, value, n_images; a row a feature.

    ``attributes`` [S, A] of strings. Of value v of an attribute with V values, p = mean activation over the images with
    v / sum over values of that mean, and purity = (p V - 1) / (V - 1): 0 where all values are alike, 1 where only one
    fires. The best over attributes and values; nan and "" where the feature never fires. ``n_images``: on which it
    fires. ``seed``: the control, with the images' attributes dealt out at random.
    Raises InputError for other than one row an image, or where no attribute varies.
    """
    if len(attributes) != activations.shape[0]:
        raise InputError(f"purity: {activations.shape[0]} images but attributes of {len(attributes)}")
    order = np.arange(len(attributes)) if seed is None else np.random.default_rng(seed).permutation(len(attributes))
    shares, names = [], []
    for attribute, column in attributes.iloc[order].items():
        values, group, count = np.unique(column.to_numpy(str), return_inverse=True, return_counts=True)
        if (v := len(values)) < 2:
            continue
        member = sp.csr_matrix((1 / count[group], (group, np.arange(len(group)))), shape=(v, len(group)))
        mean = (member @ activations).toarray()
        total = mean.sum(axis=0)
        share = np.divide(mean, total, out=np.full(mean.shape, np.nan), where=total > 0)
        shares.append((share * v - 1) / (v - 1))
        names += [(attribute, value) for value in values]
    if not names:
        raise InputError("purity: no attribute takes two values on these images")
    shares, n_images = np.concatenate(shares), np.asarray((activations > 0).sum(axis=0)).ravel()
    fires = n_images > 0
    best = np.where(fires, np.nan_to_num(shares, nan=-np.inf).argmax(axis=0), 0)
    purest = np.where(fires, shares[best, np.arange(len(best))], np.nan)
    named = np.where(fires[:, None], np.array(names, str)[best], "")
    return pd.DataFrame({"purity": purest, "attribute": named[:, 0], "value": named[:, 1], "n_images": n_images})
