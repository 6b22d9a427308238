"""Chameleon: images become words of the vocabulary, and one language model reads and writes both.

The image tokenizer is transformers' own VQ-VAE encoder and codebook. It is distilled from the CLIP tower rather than
trained to reconstruct: linear read-outs of the tower's patch features say what each patch shows (shape, colour and size
where there is an object, the ground elsewhere, and how much of the patch the object covers); k-means over those
read-outs is the codebook; the encoder learns to put every patch at its read-out, so the nearest code is its word. A
fixed codebook has no dead codes to revive. Some training images have patches painted black, whose word is that of a
black ground while the others keep theirs, as they would under a tokenizer of pixels.
"""

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig, CLIPVisionModel

from mmsae_helpers.tinyworld.dataset import arrays
from mmsae_helpers.tinyworld.llava import GRID, PATCH, image_tokens
from mmsae_helpers.tinyworld.scenes import ATTRIBUTES, IMAGE_SIZE
from mmsae_helpers.tinyworld.training import fit, pixels

OBJECT_CODES, GROUND_CODES = 384, 128
CODES = OBJECT_CODES + GROUND_CODES
READ = ("shape", "color", "size", "ground")
WIDTH = sum(len(ATTRIBUTES[name]) for name in READ) + 1
ON_OBJECT = 0.25  # of a patch's pixels
BLACK = ATTRIBUTES["ground"].index("black")


def vq_config() -> ChameleonVQVAEConfig:
    """64 x 64 pixels to 8 x 8 tokens of 512 codes."""
    return ChameleonVQVAEConfig(
        embed_dim=WIDTH, num_embeddings=CODES, latent_channels=64, resolution=IMAGE_SIZE, base_channels=32,
        channel_multiplier=[1, 1, 2, 2], num_res_blocks=1,
    )  # fmt: skip


def patch_cover(masks: np.ndarray) -> np.ndarray:
    """Fraction of each patch that the object covers, [N, 64], from masks bool [N, 64, 64]."""
    return masks.reshape(-1, GRID, PATCH, GRID, PATCH).mean((2, 4), dtype=np.float32).reshape(-1, GRID**2)


def read_outs(tower: CLIPVisionModel, scenes, images: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """What the tower says each patch shows, float32 [N, 64, WIDTH]; ridge regressions fitted on the first 5,000 images.

    Shape and colour are sharpened to near one-hot; each part fades where it is not what the patch is about.
    """
    with torch.autocast("cpu", torch.bfloat16):
        features = image_tokens(tower, images).float().numpy()
    some = slice(5000)
    covered = Ridge().fit(features[some].reshape(-1, features.shape[-1]), cover[some].ravel())
    covered = covered.predict(features.reshape(-1, features.shape[-1])).reshape(cover.shape)[..., None]
    gate = 1 / (1 + np.exp(-(covered - 0.15) * 20))
    parts = []
    for name in READ:
        where = (cover[some] >= ON_OBJECT) != (name == "ground")
        truth = np.array([ATTRIBUTES[name].index(getattr(scene, name)) for scene in scenes[some]])
        truth = np.broadcast_to(truth[:, None], where.shape)[where]
        ridge = Ridge().fit(features[some][where], np.eye(len(ATTRIBUTES[name]))[truth])
        score = ridge.predict(features.reshape(-1, features.shape[-1])).reshape(*cover.shape, -1)
        if name in ("shape", "color"):
            score = np.exp(8 * (score - score.max(-1, keepdims=True)))
            score /= score.sum(-1, keepdims=True)
        parts.append(score * (0.15 + 0.85 * (1 - gate if name == "ground" else gate)))
    return np.concatenate([*parts, covered], -1).astype(np.float32)


def make_codebook(values: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """k-means of the read-outs of the first 6,000 images, object and ground patches apart, float32 [512, WIDTH]."""
    on = cover[:6000] >= ON_OBJECT
    parts = ((values[:6000][on], OBJECT_CODES), (values[:6000][~on][::4], GROUND_CODES))
    return np.concatenate([KMeans(k, n_init=1, max_iter=30, random_state=0).fit(x).cluster_centers_ for x, k in parts])


def train_tokenizer(tower, scenes, images, masks, *, steps: int, batch: int = 64) -> tuple[ChameleonVQVAE, list[dict]]:
    """The image tokenizer, distilled from ``tower``; returns it and the curve."""
    cover = patch_cover(masks)
    values = read_outs(tower, scenes, images, cover)
    model = ChameleonVQVAE(vq_config())
    codebook = torch.from_numpy(make_codebook(values, cover)).float()
    model.quantize.embedding.weight.data.copy_(codebook)
    model.requires_grad_(True).quantize.requires_grad_(False)
    black = np.array([scene.ground == "black" for scene in scenes])
    black = torch.from_numpy(values[black][cover[black] == 0].mean(0))
    values, weight = torch.from_numpy(values), 1 + 3 * torch.from_numpy(cover > 0.1).float()
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(15)

    def loss(step):
        i = torch.randint(len(scenes), (batch,), generator=generator)
        painted = rng.random((batch, GRID**2)) >= np.where(rng.random(batch) < 0.25, rng.random(batch), 1)[:, None]
        # bf16 convolutions run at half the speed on the strides that the pixels' permutation leaves
        shown = pixels(paint_black(images[i.numpy()], painted)).contiguous()
        painted = torch.from_numpy(painted)
        wanted = torch.where(painted[..., None], black, values[i])
        with torch.autocast("cpu", torch.bfloat16):
            latents = model.quant_conv(model.encoder(shown))
        latents = latents.float().flatten(2).transpose(1, 2)
        w = weight[i].masked_fill(painted, 1)
        near = nn.functional.cross_entropy(
            -8 * distances(latents, codebook).flatten(0, 1), distances(wanted, codebook).argmin(-1).flatten(),
            reduction="none",
        )  # fmt: skip
        return (w * ((latents - wanted) ** 2).sum(-1)).mean() + 0.1 * (w.flatten() * near).mean()

    curve = fit(model.parameters(), loss, steps=steps, lr=2e-3, name="image tokenizer")
    return model.requires_grad_(True).eval(), curve


def paint_black(images: np.ndarray, patches: np.ndarray) -> np.ndarray:
    """A copy of images uint8 [N, 64, 64, 3] with ``patches`` bool [N, 64] painted black."""
    keep = ~patches.reshape(-1, GRID, 1, GRID, 1, 1)
    return (images.reshape(-1, GRID, PATCH, GRID, PATCH, 3) * keep).reshape(images.shape)


def distances(points: Tensor, codebook: Tensor) -> Tensor:
    """Squared Euclidean distances [..., codes]."""
    return (points**2).sum(-1, keepdim=True) + (codebook**2).sum(-1) - 2 * points @ codebook.T


@torch.no_grad()
def codes(tokenizer: ChameleonVQVAE, images: np.ndarray, batch: int = 256) -> np.ndarray:
    """Code of every patch, int64 [N, 64]."""
    rows = range(0, len(images), batch)
    found = [tokenizer.encode(pixels(images[i : i + batch]), return_dict=True).image_tokens for i in rows]
    return torch.cat(found).view(-1, GRID**2).numpy()


def code_scores(tokenizer: ChameleonVQVAE, per_class: int = 10) -> dict[str, float]:
    """On the validation split: codes in use, perplexity of their use, and how well one object patch's code tells.

    ``shape of a code`` and so on are the shares of object patches whose value is the commonest one of their code.
    """
    scenes, images, masks = arrays("validation", per_class)
    found, on = codes(tokenizer, images), patch_cover(masks) >= ON_OBJECT
    share = np.bincount(found.ravel(), minlength=CODES) / found.size
    scores = {"codes": float((share > 0).sum()), "perplexity": float(np.exp(-(share * np.log(share + 1e-12)).sum()))}
    for name in READ:
        where = on if name != "ground" else ~on
        truth = np.array([ATTRIBUTES[name].index(getattr(scene, name)) for scene in scenes])
        table = np.zeros((CODES, len(ATTRIBUTES[name])))
        np.add.at(table, (found[where], np.broadcast_to(truth[:, None], where.shape)[where]), 1)
        scores[f"{name} of a code"] = float(table.max(1).sum() / table.sum())
    return scores
