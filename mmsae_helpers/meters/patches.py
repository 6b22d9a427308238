"""Image patches: their scores, which of them to keep, and images without the others (paper C, METHODS C.4).

S samples, P patches in reading order, scores [S, P]. A patch may be shown by several tokens (in LLaVA-NeXT by one of
the base image and one of a tile): its score is the mean over them. Tokens with patch -1, such as text and the newlines
of a tiling, show none.
"""

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
import torch
from PIL import Image

from mmsae_helpers.errors import InputError
from mmsae_helpers.meters.crossmodal import active_features
from mmsae_helpers.meters.feed import Meter
from mmsae_helpers.models import attention_weights


def scores(features: sp.csr_matrix, sample, patch, is_image, weights, n_patches: int) -> dict[str, np.ndarray]:
    """Scores of all patches by the four methods of the paper (Algorithms 4 to 7), from one pass: {method: [S, P]}.

    ``features`` csr [N, d_sae] of all tokens of whole samples, text too; ``sample`` [N] ids (rows of the result are
    these ascending), ``patch`` [N], ``is_image`` [N], ``weights`` [d_sae] from `crossmodal.CrossModal`, nan counts 0.
    Of a token's active (> 0) features: ``l0`` their number, ``l1`` the sum of their activations, ``cooccurrence`` the
    number that is also active on a text token of the sample, ``cosine`` the sum of their weights. A sample without
    text has cooccurrence 0, one without image 0 everywhere.
    """
    weights = np.nan_to_num(np.asarray(weights, np.float64))
    if features.shape[1] != len(weights):
        raise InputError(f"features of an SAE of width {features.shape[1]} but {len(weights)} weights: use one SAE")
    ids, rows = np.unique(np.asarray(sample), return_inverse=True)
    on_text = active_features(features, rows, len(ids), is_image)[0]
    entry_row = np.repeat(rows, np.diff(features.indptr))

    def like(values):
        return sp.csr_matrix((values, features.indices, features.indptr), shape=features.shape, copy=False)

    active, one = (features.data > 0).astype(np.float64), np.ones(features.shape[1])
    per_token = {
        "l0": like(active) @ one,
        "l1": features.astype(np.float64) @ one,
        "cooccurrence": like(active * on_text[entry_row, features.indices]) @ one,
        "cosine": like(active) @ weights,
    }
    return {method: average(values, rows, patch, len(ids), n_patches) for method, values in per_token.items()}


def average(values, rows, patch, n_samples: int, n_patches: int) -> np.ndarray:
    """Mean of ``values`` [N] over the tokens that show each patch, float64 [S, P]; 0 where no token shows it.

    ``rows`` [N] sample row and ``patch`` [N] of the tokens. Of the residuals' norms it is the raw-norm baseline.
    """
    values, rows, patch = (np.asarray(a).reshape(-1) for a in (values, rows, patch))
    shown = patch >= 0
    if shown.any() and patch.max() >= n_patches:
        raise InputError(
            f"a token shows patch {patch.max()} but there are {n_patches}: give the grid of the base image"
        )
    cell = rows[shown] * n_patches + patch[shown]
    size = n_samples * n_patches
    total = np.bincount(cell, weights=values[shown], minlength=size)
    return (total / np.maximum(np.bincount(cell, minlength=size), 1)).reshape(n_samples, n_patches)


class PatchScores(Meter):
    """`scores` of one SAE on prompts, and ``norm``, that of the residuals, which needs no SAE: {method: [S, P]}.

    ``patch`` [samples, positions]: what each token shows in one reading of the newline tokens (`Adapter.geometry`).
    """

    def __init__(self, sae, layer: int, weights, patch, n_patches: int):
        super().__init__(sae, layer)
        self.weights, self.patch, self.n_patches, self.parts = weights, patch, n_patches, []

    def add(self, batch, features: sp.csr_matrix) -> None:
        patch, norm = self.patch[batch.sample, batch.position], batch.acts[self.layer].norm(dim=1)
        found = scores(features, batch.sample, patch, batch.is_image, self.weights, self.n_patches)
        rows = np.unique(batch.sample, return_inverse=True)[1]
        self.parts.append(found | {"norm": average(norm, rows, patch, len(found["l0"]), self.n_patches)})

    def result(self) -> dict[str, np.ndarray]:
        return {method: np.concatenate([part[method] for part in self.parts]) for method in self.parts[0]}


def share_on_object(features: sp.csr_matrix, sample, patch, object_patch_mask, wanted) -> tuple[np.ndarray, np.ndarray]:
    """Activation of each feature of ``wanted`` summed over the object's patches, and over all; sums of chunks add up.

    ``patch`` [tokens]: patch index, -1 for tokens that show none (left out of both sums). ``object_patch_mask``
    [samples, patches]: row = sample id; bool, or the covered fraction of each patch.
    """
    patch = np.asarray(patch)
    shown = (patch >= 0).astype(np.float64)
    cover = np.asarray(object_patch_mask)[np.asarray(sample), np.maximum(patch, 0)] * shown
    of_feature = features[:, np.asarray(wanted, np.int64)].T
    return of_feature @ cover, of_feature @ shown


# ---------------------------------------------------------------- baselines that look at no SAE


def gradient_times_input(adapter, inputs: dict, target) -> torch.Tensor:
    """Gradient of the log probability of the next token ``target`` [B] times the embedding, summed over d_model.

    Float32 [B, T], signed, for what enters the first block at every position of the (right-padded) prompts: average it
    over the tokens of each patch. One forward and one backward.
    """
    entering = []

    def before(_block, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        entering.append(hidden.detach().requires_grad_())
        return ((entering[0], *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": entering[0]})

    handle = adapter.blocks[0].register_forward_pre_hook(before, with_kwargs=True)
    try:
        with torch.enable_grad():
            logits = adapter.forward(inputs).logits
            last = inputs["attention_mask"].sum(dim=1) - 1
            answer = torch.arange(len(last), device=last.device), last
            target = torch.as_tensor(target, device=logits.device)
            chosen = logits[answer].float().log_softmax(dim=1).gather(1, target[:, None]).sum()
            (gradient,) = torch.autograd.grad(chosen, entering)
    finally:
        handle.remove()
    return (gradient * entering[0].detach()).sum(dim=2).float().cpu()


@torch.no_grad()
def encoder_attention(adapter, inputs: dict) -> np.ndarray | None:
    """Attention that each patch gets in the last layer of the vision tower, mean over heads, float64 [B, P].

    From the class token, or the mean over patches in a tower that has none. Of a tiled image, in its base image. None
    for a family without such a tower (Chameleon's tokenizer is convolutional): this baseline does not exist there.
    """
    tower = getattr(getattr(adapter.model, "model", None), "vision_tower", None)
    if tower is None or adapter.patch_grid is None:
        return None
    pixels, n_patches = inputs["pixel_values"], adapter.patch_grid[0] * adapter.patch_grid[1]
    with attention_weights(tower):
        output = tower(pixels[:, 0] if pixels.ndim == 5 else pixels, output_attentions=True)
    attention = output.attentions[-1].double().mean(dim=1)
    class_token = attention.shape[-1] > n_patches
    return (attention[:, 0, -n_patches:] if class_token else attention.mean(dim=1)).cpu().numpy()


# ---------------------------------------------------------------- keeping patches


def keep_top(scores, share) -> np.ndarray:
    """The ``share`` (one number, or one a sample [S]) of highest patches, bool [S, P]; ties go to the lower index.

    The number of patches is rounded to the nearest, halves up. Random scores give the random baseline.
    """
    scores = np.asarray(scores, np.float64)
    rank = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1)
    return rank < np.floor(np.broadcast_to(share, len(scores)) * scores.shape[1] + 0.5)[:, None]


def paint(images: Sequence[Image.Image], keep, patch_grid: tuple[int, int]) -> list[Image.Image]:
    """The images (RGB, sizes kept) with every patch black that ``keep`` [S, P] drops.

    The grid (rows, columns) spans the whole image, whatever its size: edges are rounded down to pixels. For a model
    that sees the middle of a picture only, give that (`Adapter.crop`).
    """
    rows, columns = patch_grid
    out = []
    for image, kept in zip(images, np.asarray(keep, bool).reshape(-1, rows, columns), strict=True):
        heights, widths = (
            np.diff(np.arange(n + 1) * size // n) for n, size in ((rows, image.height), (columns, image.width))
        )
        mask = kept.repeat(heights, axis=0).repeat(widths, axis=1)
        out.append(Image.fromarray(np.asarray(image.convert("RGB")) * mask[..., None]))
    return out


def hide(inputs: dict, patch, keep) -> dict:
    """The inputs with the tokens of dropped patches masked from attention: masking at token level.

    ``patch`` [B, T] of every position, ``keep`` [B, P] bool. For `Adapter.forward`: the last position stays where it
    is, so the answer is read from its logits; not for `Adapter.answer`, which shifts prompts by their mask.
    """
    patch = torch.as_tensor(patch)
    keep = torch.as_tensor(keep, device=patch.device)
    dropped = (patch >= 0) & ~keep.gather(1, patch.clamp(min=0))
    mask = inputs["attention_mask"]
    return inputs | {"attention_mask": mask.masked_fill(dropped.to(mask.device), 0)}


def iou(keep, cover) -> np.ndarray:
    """Intersection over union of the kept patches with the object, by area, float64 [S]; nan where both are empty.

    ``keep`` [S, P] bool, ``cover`` [S, P] the fraction of each patch that the object covers (`ImageData.object_cover`).
    """
    keep, cover = np.asarray(keep, np.float64), np.asarray(cover, np.float64)
    both, either = np.minimum(keep, cover).sum(axis=1), np.maximum(keep, cover).sum(axis=1)
    return np.divide(both, either, out=np.full(len(keep), np.nan), where=either > 0)
