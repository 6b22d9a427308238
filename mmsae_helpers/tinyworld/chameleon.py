"""Chameleon: images become words of the vocabulary, and one language model reads and writes both.

The image tokenizer is transformers' own VQ-VAE encoder and codebook. It is distilled from the CLIP tower rather than
trained to reconstruct: linear read-outs of the tower's patch features say what each patch shows (shape, colour and size
where there is an object, the ground elsewhere, and how much of the patch the object covers); k-means over those
read-outs is the codebook; the encoder learns to put every patch at its read-out, so the nearest code is its word. A
fixed codebook has no dead codes to revive. Some training images have patches painted black, whose word is that of a
black ground while the others keep theirs, as they would under a tokenizer of pixels.

The language model starts from nothing on documents of text alone, on sentences with their picture among them, and on
questions about a picture; then on more questions, at last numbered choices. It learns these in the order of
`ATTRIBUTES`; of shuffled ones it answers as by chance. As in transformers, it never writes image tokens. Anole is the
same model tuned further until it does, mostly on descriptions that their picture follows, and on chats so that it
forgets nothing; transformers masks its image logits too, so read them with `image_logits`. A chat is Chameleon's own:
the picture, the question, the separator, then the answer.
"""

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonImageProcessorPil,
    ChameleonProcessor,
    ChameleonVQVAE,
    ChameleonVQVAEConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
)

from mmsae_helpers.tinyworld import language, tokenizer
from mmsae_helpers.tinyworld.dataset import arrays
from mmsae_helpers.tinyworld.llava import GRID, PATCH, _bucketed, image_tokens
from mmsae_helpers.tinyworld.scenes import ATTRIBUTES, IMAGE_SIZE, sample_scene
from mmsae_helpers.tinyworld.training import IGNORE, fit, here, numpy_rng, pad, pixels, torch_rng
from mmsae_helpers.workers import autocast

OBJECT_CODES, GROUND_CODES = 384, 128
CODES = OBJECT_CODES + GROUND_CODES
READ = ("shape", "color", "size", "ground")
WIDTH = sum(len(ATTRIBUTES[name]) for name in READ) + 1
ON_OBJECT = 0.25  # of a patch's pixels
CONTEXT = 320  # two pictures with five sentences each
IMAGE, BOI, EOI, SEPARATOR = "<image>", "<racm3:break>", "<eoss>", "<reserved08706>"  # names of the 7B's tokenizer


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
    with autocast():
        features = image_tokens(tower, images).float().cpu().numpy()
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
    codebook = here(make_codebook(values, cover)).float()
    model.quantize.embedding.weight.data.copy_(codebook)
    model.requires_grad_(True).quantize.requires_grad_(False)
    black = np.array([scene.ground == "black" for scene in scenes])
    black = here(values[black][cover[black] == 0].mean(0))
    values, weight = here(values), 1 + 3 * here(cover > 0.1).float()
    generator, rng = torch_rng(), numpy_rng(15)

    def loss(step):
        i = torch.randint(len(scenes), (batch,), generator=generator)
        painted = rng.random((batch, GRID**2)) >= np.where(rng.random(batch) < 0.25, rng.random(batch), 1)[:, None]
        # bf16 convolutions run at half the speed on the strides that the pixels' permutation leaves
        shown = pixels(paint_black(images[i.cpu().numpy()], painted)).contiguous()
        painted = here(painted)
        wanted = torch.where(painted[..., None], black, values[i])
        with autocast():
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
def codes(image_tokenizer: ChameleonVQVAE, images: np.ndarray, batch: int = 250) -> np.ndarray:
    """Code of every patch, int64 [N, 64]."""
    rows = range(0, len(images), batch)
    found = [image_tokenizer.encode(pixels(images[i : i + batch]).contiguous()).image_tokens for i in rows]
    return torch.cat(found).view(-1, GRID**2).cpu().numpy()


def code_scores(image_tokenizer: ChameleonVQVAE, per_class: int = 10) -> dict[str, float]:
    """On the validation split: codes in use, perplexity of their use, and how well one object patch's code tells.

    ``shape of a code`` and so on are the shares of object patches whose value is the commonest one of their code.
    """
    scenes, images, masks = arrays("validation", per_class)
    found, on = codes(image_tokenizer, images), patch_cover(masks) >= ON_OBJECT
    share = np.bincount(found.ravel(), minlength=CODES) / found.size
    scores = {"codes": float((share > 0).sum()), "perplexity": float(np.exp(-(share * np.log(share + 1e-12)).sum()))}
    for name in READ:
        where = on if name != "ground" else ~on
        truth = np.array([ATTRIBUTES[name].index(getattr(scene, name)) for scene in scenes])
        table = np.zeros((CODES, len(ATTRIBUTES[name])))
        np.add.at(table, (found[where], np.broadcast_to(truth[:, None], where.shape)[where]), 1)
        scores[f"{name} of a code"] = float(table.max(1).sum() / table.sum())
    return scores


def code_name(code: int) -> str:
    """The word of an image code as transformers spells it: digits as letters A to J between IMGIMG and Z."""
    return "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The world's tokenizer with numbered choices, Chameleon's special tokens and a word for every image code."""
    names = [code_name(code) for code in range(CODES)]
    words = tokenizer.make_tokenizer((*language.CHOICE_WORDS, BOI, EOI, SEPARATOR, *names), CONTEXT)
    special = [IMAGE, "<start_of_turn>", "<end_of_turn>", BOI, EOI]
    words.add_special_tokens({"sep_token": SEPARATOR, "additional_special_tokens": special})
    words.chat_template = None
    return words


def make_processor() -> ChameleonProcessor:
    """The processor: 64 x 64 pixels in -1..1, 64 placeholders an image between its start and its end."""
    images = ChameleonImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        rescale_factor=1 / 127.5,
    )  # fmt: skip
    return ChameleonProcessor(images, make_tokenizer(), image_seq_length=GRID**2, image_token=IMAGE)


def make_model(image_tokenizer: ChameleonVQVAE) -> ChameleonForConditionalGeneration:
    """An untrained language model of eight blocks of width 128 around a trained image tokenizer."""
    words = make_tokenizer()
    config = ChameleonConfig(
        vocab_size=len(words), hidden_size=128, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=1, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        pad_token_id=words.pad_token_id, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        vq_config=image_tokenizer.config.to_dict(), vocabulary_map=words.get_vocab(),
    )  # fmt: skip
    model = ChameleonForConditionalGeneration(config)
    model.model.vqmodel.load_state_dict(image_tokenizer.state_dict())
    return model


def train_language(
    model, scenes, image_codes: np.ndarray, *, steps: int, chats: float, choices: float, lr: float, batch: int = 32
) -> list[dict]:
    """Train the language model on mixed documents, the image tokenizer frozen; returns the curve.

    A share ``chats`` of the documents are a question about a picture, of those ``choices`` one of numbered choices; of
    the rest half are text alone and half are sentences with their pictures. The loss is on words, and of a chat on the
    answer alone.
    """
    write, rng = _writer(model, scenes, image_codes, 16)

    def draw():
        kind = (rng.random() - chats) / (1 - chats)
        if kind < 0:
            return _chat(write, scenes, rng, choices)
        if kind < 0.5:
            return _interleaved(write, scenes, rng)
        return write(language.document(sample_scene(rng), rng).text)

    name = f"{chats:.0%} chats, {choices:.0%} choices"
    return _train(model, draw, rng, steps=steps, batch=batch, lr=lr, name=name, image_loss=False)


def train_anole(model, scenes, image_codes: np.ndarray, *, steps: int, batch: int = 32) -> list[dict]:
    """Tune a Chameleon to write image tokens too; returns the curve.

    Of ten documents four are a description and then its picture, two have the picture among sentences, and four are
    chats, without which it forgets places.
    """
    write, rng = _writer(model, scenes, image_codes, 17)

    def draw():
        kind, i = rng.random(), int(rng.integers(len(scenes)))
        if kind < 0.4:
            return write(language.question_answer(scenes[i], rng, "describe")[1] + f" . {IMAGE}", [i])
        if kind < 0.6:
            return _interleaved(write, scenes, rng)
        return _chat(write, scenes, rng, 0.25)

    return _train(model, draw, rng, steps=steps, batch=batch, lr=8e-4, name="anole", image_loss=True)


def _interleaved(write, scenes, rng):
    """One or two scenes, as `dataset.interleaved` writes them."""
    chosen = rng.integers(len(scenes), size=rng.integers(1, 3)).tolist()
    return write(language.SEPARATOR.join(language.interleaved(scenes[i], rng) for i in chosen), chosen)


def _chat(write, scenes, rng, choices):
    """A question about a picture and its answer: of numbered choices, or the whole description as often as another."""
    i = int(rng.integers(len(scenes)))
    if rng.random() < choices:
        attribute = language.CHOICES[rng.integers(len(language.CHOICES))]
        question, answer = language.choice_question(scenes[i], rng, attribute, bool(rng.integers(2)))
    else:
        question, answer = language.question_answer(scenes[i], rng, "describe" if rng.integers(2) else None)
    return write(f"{IMAGE} {question} {SEPARATOR} {answer}", [i], answer_only=True)


def _writer(model, scenes, image_codes, seed):
    """A function from a text and the indices of its pictures to (token ids, labels), and a random generator."""
    words = make_tokenizer()
    mapping = model.model.vocabulary_mapping.img2bpe
    as_words = np.vectorize(mapping.get)(image_codes).tolist()
    image, boi, eoi, separator = words.convert_tokens_to_ids([IMAGE, BOI, EOI, SEPARATOR])

    def write(text, pictures=(), answer_only=False):
        ids = words.encode(text) + [words.eos_token_id]
        for picture in pictures:
            at = ids.index(image)
            ids[at : at + 1] = [boi, *as_words[picture], eoi]
        start = ids.index(separator) + 1 if answer_only else 0
        return ids, [IGNORE] * start + ids[start:]

    return write, numpy_rng(seed)


def _train(model, draw, rng, *, steps, batch, lr, name, image_loss):
    words = make_tokenizer()
    picture = torch.tensor(model.model.vocabulary_mapping.image_tokens)
    rows = _bucketed(draw, batch, rng)

    def loss(step):
        drawn = next(rows)
        ids = pad([row for row, _ in drawn], words.pad_token_id)
        labels = pad([row for _, row in drawn], IGNORE)[:, 1:]
        if not image_loss:
            labels = labels.masked_fill(torch.isin(labels, picture), IGNORE)
        where = labels != IGNORE
        with autocast():
            # Right padding under a causal mask never reaches a real token, so no attention mask is needed.
            hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1]
            logits = model.lm_head(hidden[where]).float()
        if not image_loss:
            logits[:, picture] = torch.finfo(logits.dtype).min
        return nn.functional.cross_entropy(logits, labels[where])

    model.requires_grad_(True).model.vqmodel.requires_grad_(False)
    model.generation_config.pad_token_id = words.pad_token_id
    curve = fit(model.parameters(), loss, steps=steps, lr=lr, name=name)
    model.requires_grad_(True).eval()
    return curve


@torch.no_grad()
def image_logits(model, ids: Tensor) -> Tensor:
    """Logits of the next token over the image codes, [B, T, codes]; transformers' own forward masks them away."""
    mapping = model.model.vocabulary_mapping
    order = [mapping.img2bpe[code] for code in range(len(mapping.img2bpe))]
    return model.lm_head(model.model(ids, use_cache=False).last_hidden_state)[..., order]


@torch.no_grad()
def imagine(model, text: str, seed: int = 0) -> list[int]:
    """The 64 image codes that follow ``text`` and the start of an image, sampled; for models that write images."""
    words, generator = make_tokenizer(), torch.Generator().manual_seed(seed)
    mapping = model.model.vocabulary_mapping
    ids = words.encode(f"{text} . {BOI}")
    start = len(ids)
    for _ in range(GRID**2):
        logits = image_logits(model, torch.tensor([ids]))[0, -1]
        ids.append(mapping.img2bpe[int(torch.multinomial(logits.softmax(-1), 1, generator=generator))])
    return [mapping.bpe2img[token] for token in ids[start:]]
