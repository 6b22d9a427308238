"""The model adapter: where a family keeps its decoder blocks, and which tokens are which image patch; everything else
in the package is family-blind. Shapes: B inputs, T positions (padded right)."""

import copy
import math
import re
import shutil
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmsae_helpers.errors import InputError, first_line

CHECKPOINTS = Path(__file__).parent / "tinyworld" / "checkpoints"
EMBEDDED, REAL = "tinyworld/", "real/"
# Tensors that no result hangs on: poolers, buffers of old checkpoints, and what paints Anole's codes.
UNUSED = re.compile(r"pooler|(attn|attention)\.(masked_)?bias|inv_freq|position_ids|vqmodel\.(decoder|post_quant)")


class Geometry(NamedTuple):
    """What each position of a batch shows; all [B, T]."""

    is_image: Tensor  # bool
    patch: Tensor  # patch of the base image, row * columns + column, int64; -1 for text, newlines, class tokens
    part: Tensor  # int64: -1 text, 0 base image, 1 tile, 2 newline


class Adapter:
    """A text-only causal language model (``processor`` None), and the base of the multimodal families."""

    image_token_id: int | None = None
    patch_grid: tuple[int, int] | None = None
    _processing: dict = {}  # options of the family's processor
    _offset = 0  # patch of an image's first token
    _image_ids = torch.tensor([], dtype=torch.int64)  # of image tokens

    def __init__(self, name: str, model, tokenizer, processor=None):
        self.name, self.model, self.tokenizer, self.processor = name, model, tokenizer, processor
        self.family: str = model.config.model_type
        self.config = model.config.get_text_config()
        self.d_model: int = self.config.hidden_size
        self.n_layers: int = self.config.num_hidden_layers
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise InputError(f"the tokenizer of {name} has no pad, eos or unk token: name one as its pad_token")
        tokenizer.padding_side = "right"

    def __getstate__(self) -> dict:
        return self.__dict__ | {"model": _unhooked(self.model)}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        with torch.device("meta"):  # what a class can record transformers notes where one is made
            type(self.model)(self.model.config)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def image_words(self) -> tuple[str, str, str]:
        """What the processor writes for an image: its start, its placeholder (once), its end; empty where none."""
        return "", self.tokenizer.convert_ids_to_tokens(self.image_token_id) if self.image_token_id else "", ""

    @property
    def blocks(self) -> torch.nn.ModuleList:
        """The decoder blocks, in order."""
        decoder = self.model.get_decoder().base_model
        return decoder.layers if hasattr(decoder, "layers") else decoder.h

    def check_layer(self, layer: int) -> int:
        """``layer`` itself; raises InputError when the decoder has no such block."""
        if not 0 <= layer < self.n_layers:
            raise InputError(f"layer {layer} does not exist: {self.name} has blocks 0 to {self.n_layers - 1}")
        return layer

    def prompt(self, question: str = "", image: bool = True) -> str:
        """The chat template around one user turn (an image, if any, then ``question``), ready for the answer."""
        template = getattr(self.processor, "chat_template", None) or self.tokenizer.chat_template
        if template is None:
            raise InputError(f"{self.name} has no chat template: give a model that was trained on chats")
        token = self.image_words[1] if image else ""
        parts = [{"type": "image"}] * bool(token) + [{"type": "text", "text": question}]
        options = dict(chat_template=template, tokenize=False, add_generation_prompt=True)
        for content in (parts, f"{token}\n{question}" if token else question):  # the two forms that templates know
            with suppress(Exception):  # a template may do anything with the form that it does not know
                text = self.tokenizer.apply_chat_template([{"role": "user", "content": content}], **options)
                printed = content is parts and ("{'type'" in text or '{"type"' in text)
                if token in text and question in text and not printed:
                    return text
        raise InputError(f"the chat template of {self.name} fails, or drops the image or the question")

    def raw(self, text: str) -> str:
        """A document in which no word stands for an image or for BOS: a space splits those that would."""
        for word in filter(None, (*self.image_words, self.tokenizer.bos_token)):
            text = text.replace(word, f"{word[0]} {word[1:]}")
        return text

    def image_tokens(self, size: tuple[int, int]) -> int:
        """How many image tokens an image of ``size`` (height, width) has."""
        return math.prod(self.patch_grid) - self._offset

    def written(self, size: tuple[int, int]) -> int:
        """How many tokens stand for an image of ``size`` (height, width) in a text, its start and end among them."""
        start, _, end = self.image_words
        return self.image_tokens(size) + bool(start) + bool(end)

    def lengths(self, texts: Sequence[str]) -> np.ndarray:
        """Tokens of each text as `encode` writes it, a placeholder of an image counting as one, int [B]."""
        found = self.tokenizer(list(texts), add_special_tokens=self._special(texts[0]))["input_ids"]
        return np.array([len(ids) for ids in found])

    def _special(self, text: str) -> bool:
        """Whether the tokenizer is to add BOS, which a template that writes it must not get twice."""
        bos = self.tokenizer.bos_token
        return not (bos and text.startswith(bos))

    def encode(self, texts: Sequence[str], images: Sequence | None = None, fits: bool = True) -> dict[str, Tensor]:
        """Model inputs on the model's device, padded right: ``input_ids`` and ``attention_mask`` [B, T], and pixels of
        ``images``: for each text one, or a list of as many as it has placeholders. Raises InputError where the counts
        differ, and where a text with images is longer than the context, unless ``fits`` is False."""
        options = {"return_tensors": "pt", "padding": True, "add_special_tokens": self._special(texts[0])}
        own = [i if isinstance(i, list) else [i] for i in images] if images is not None else [[]] * len(texts)
        if len(own) != len(texts):
            raise InputError(f"{len(texts)} texts but {len(own)} images: give one image, or a list of images, a text")
        flat = [image.convert("RGB") for some in own for image in some]
        if self.image_token_id is not None:
            token = self.image_words[1]
            for i, (text, some) in enumerate(zip(texts, own, strict=True)):
                if text.count(token) != len(some):
                    given = {0: "no image", 1: "one image"}.get(len(some), f"{len(some)} images")
                    raise InputError(f"text {i} has {text.count(token)} {token} but is given {given}: one each")
        elif flat:
            raise InputError(f"{self.name} reads text alone, but there are {len(flat)} images")
        if flat:
            inputs = self.processor(text=list(texts), images=flat, **self._processing, **options)
            length, context = inputs["attention_mask"].sum(1), self.config.max_position_embeddings
            if fits and length.max() > context:
                long = f"text {int(length.argmax())} of the batch has {int(length.max())} tokens with its images"
                raise InputError(f"{long} but {self.name} reads {context}: shorten it")
        else:
            inputs = self.tokenizer(list(texts), return_token_type_ids=False, **options)
        dtype = self.model.dtype
        return {k: v.to(self.device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}

    def crop(self, image: Image.Image) -> Image.Image:
        """The part of a picture that the patches divide: what its processor cuts from the middle, or all of it."""
        processor = getattr(self.processor, "image_processor", self.processor)
        shortest = (getattr(processor, "size", None) or {}).get("shortest_edge")
        if not (shortest and getattr(processor, "do_center_crop", False)):
            return image
        scale = min(image.size) / shortest
        width = min(round(processor.crop_size["width"] * scale), image.width)
        height = min(round(processor.crop_size["height"] * scale), image.height)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))

    def forward(self, inputs: dict[str, Tensor]):
        """The model's output (``.logits`` [B, T, vocabulary]) without a key-value cache."""
        return self.model(**self._arguments(inputs), use_cache=False)

    def _arguments(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inputs under the names of the model's own arguments."""
        return inputs

    @torch.no_grad()
    def answer(self, inputs: dict[str, Tensor], max_new_tokens: int = 16) -> list[str]:
        """Greedy answers to a batch of prompts, special tokens removed; prompts are padded left for it."""
        mask = inputs["attention_mask"]
        length = mask.shape[1]
        order = (torch.arange(length, device=mask.device) - (length - mask.sum(1))[:, None]) % length
        left = {k: inputs[k].gather(1, order) for k in ("input_ids", "attention_mask")}
        tokens = self.model.generate(**self._arguments(inputs | left), do_sample=False, max_new_tokens=max_new_tokens)
        return [t.strip() for t in self.tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True)]

    def image_mask(self, input_ids: Tensor) -> Tensor:
        """Which positions are image tokens, bool [B, T]."""
        return torch.isin(input_ids, self._image_ids.to(input_ids.device))

    def patch_index(self, input_ids: Tensor) -> Tensor:
        """``row * columns + column`` of the patch each image token shows, int64 [B, T]; -1 elsewhere."""
        mask = self.image_mask(input_ids)
        order = (mask.long().cumsum(1) - 1) % (math.prod(self.patch_grid or (1,)) - self._offset)
        return (order + self._offset).masked_fill(~mask, -1)

    def geometry(self, inputs: dict[str, Tensor], reading: str = "corrected") -> Geometry:
        """Which positions are which part and patch of an image; ``reading`` matters where there are newline tokens."""
        mask = self.image_mask(inputs["input_ids"])
        return Geometry(mask, self.patch_index(inputs["input_ids"]), mask.long() - 1)


class LlavaAdapter(Adapter):
    """LlavaForConditionalGeneration: an image is a grid of patch tokens, without the tower's first token (CLIP's class
    token, SigLIP's first patch) if the strategy is "default". InputError where LLaVA-NeXT's tiles so are no grid."""

    def __init__(self, name, model, tokenizer, processor):
        super().__init__(name, model, tokenizer, processor)
        config, vision = model.config, model.config.vision_config
        self.image_token_id, self._image_ids = config.image_token_id, torch.tensor([config.image_token_id])
        self.patch_grid = (vision.image_size // vision.patch_size,) * 2
        # Processors saved before transformers 4.45 do not carry these three; the config always does.
        processor.patch_size = vision.patch_size
        strategy = processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        weights = model.model.vision_tower.named_parameters()
        n_class = sum(key.endswith(("class_embedding", "cls_token")) for key, _ in weights)
        processor.num_additional_image_tokens, self._offset = n_class, (strategy == "default") - n_class
        if self._offset and self.family == "llava_next":
            misfit = f"{strategy!r} does not fit a tower ({vision.model_type}) of {n_class} class tokens"
            raise InputError(f"{name}: vision_feature_select_strategy {misfit}")

    @torch.no_grad()
    def vision_features(self, images: Sequence[Image.Image]) -> Tensor:
        """The vision tower's patch tokens of the (base) image, averaged over patches, float32 [B, d_vision]."""
        pixels = self.processor.image_processor([i.convert("RGB") for i in images], return_tensors="pt")["pixel_values"]
        pixels = pixels[:, 0] if pixels.dim() == 5 else pixels
        hidden = self.model.model.vision_tower(pixels.to(self.device, self.model.dtype), output_hidden_states=True)
        states = [hidden.hidden_states[i] for i in np.atleast_1d(self.model.config.vision_feature_layer)]
        return torch.cat(states, -1)[:, -math.prod(self.patch_grid) :].mean(1).float().cpu()


class LlavaNextAdapter(LlavaAdapter):
    """LlavaNextForConditionalGeneration: a base image, then the rows of its tiles, each ended by a newline token."""

    def crop(self, image):
        """All of it: a base image and tiles show the whole picture."""
        return image

    def image_tokens(self, size):
        return self._layout(size, "corrected").shape[1]

    def patch_index(self, input_ids):
        """Raises InputError: ids alone do not tell how an image was tiled."""
        raise InputError(f"patches of {self.name} depend on the sizes of its images: use geometry(inputs)")

    def geometry(self, inputs, reading="corrected"):
        """From ``image_sizes``, by transformers' arithmetic; a tile token shows the base image's patch at its centre.
        ``as_published`` takes each row's first token for its newline instead of the last, so that the others count one
        column too far left (METHODS C.4). Raises InputError where the sizes do not fit the number of tokens."""
        ids = inputs["input_ids"]
        mask, patch, part = self.image_mask(ids), torch.full_like(ids, -1), torch.full_like(ids, -1)
        layouts = [self._layout(tuple(size), reading) for size in inputs.get("image_sizes", mask[:0]).tolist()]
        made = torch.cat([torch.empty(2, 0, dtype=torch.int64), *layouts], 1).to(ids.device)
        if made.shape[1] != mask.sum():
            raise InputError(f"{int(mask.sum())} image tokens, but the image sizes of the batch make {made.shape[1]}")
        patch[mask], part[mask] = made
        return Geometry(mask, patch, part)

    def _layout(self, size: tuple[int, int], reading: str) -> Tensor:
        """Patch and part of the tokens of an image of ``size`` (height, width), int64 [2, n]."""
        from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
        from transformers.models.llava_next.modeling_llava_next import unpad_image

        vision, side = self.model.config.vision_config, self.patch_grid[0]
        canvas = select_best_resolution(size, self.model.config.image_grid_pinpoints)
        rows, columns = (edge // vision.image_size * side for edge in canvas)
        cells = unpad_image(torch.arange(rows * columns).view(1, rows, columns), size)[0]
        drawn = get_patch_output_size(np.broadcast_to(0, (*size, 1)), canvas, "channels_last")
        place = [
            (((cell + 0.5) * vision.patch_size - (whole - edge) // 2) / edge * side).long().clamp(0, side - 1)
            for cell, whole, edge in zip((cells // columns, cells % columns), canvas, drawn, strict=True)
        ]
        tile = torch.stack([place[0] * side + place[1], torch.ones_like(cells)])
        newline = torch.tensor([-1, 2])[:, None, None].expand(2, len(cells), 1)
        tile = torch.cat([tile, newline] if reading == "corrected" else [newline, tile], 2)
        base = torch.arange(side**2)
        return torch.cat([torch.stack([base, torch.zeros_like(base)]), tile.flatten(1)], 1)


class CaptionerAdapter(Adapter):
    """VisionEncoderDecoderModel with a GPT-2 decoder: the image is read by cross-attention, so no token is an image's.
    ``input_ids`` are the decoder's, ``patch_grid`` the encoder's. Raises InputError for another decoder."""

    def __init__(self, name, model, tokenizer, processor):
        if not all(hasattr(block, "crossattention") for block in getattr(model.decoder.base_model, "h", [None])):
            raise InputError(f"the decoder of {name} lacks GPT-2 blocks with cross-attention: use a captioner")
        super().__init__(name, model, tokenizer, processor)
        vision = model.config.encoder
        if vision.model_type in ("vit", "deit"):
            self.patch_grid = (vision.image_size // vision.patch_size,) * 2
        options = model.generation_config
        options.max_length = None  # answers give their own limit; transformers warns of two at every call
        if options.pad_token_id is None:
            options.pad_token_id = tokenizer.pad_token_id
        known = (getattr(c, "decoder_start_token_id", None) for c in (options, model.config))
        start = next((token for token in known if token is not None), tokenizer.bos_token_id)
        self._start = tokenizer.convert_ids_to_tokens(start)

    def prompt(self, question: str = "", image: bool = True) -> str:
        """The empty text: a captioner writes about its image alone. Raises InputError for a question."""
        if question or not image:
            raise InputError(f"{self.name} is a captioner: it answers no question and needs an image")
        return ""

    def encode(self, texts, images=None) -> dict[str, Tensor]:
        """Captions to force (empty ones to generate from), after the start token; and pixels of one image each."""
        if images is None or len(images) != len(texts):
            raise InputError(f"{len(texts)} texts but {len(images or [])} images: a captioner needs one image a text")
        inputs = super().encode([self._start + text for text in texts])
        pixels = self.processor([i.convert("RGB") for i in images], return_tensors="pt")["pixel_values"]
        return inputs | {"pixel_values": pixels.to(self.device, self.model.dtype)}

    def answer(self, inputs, max_new_tokens=16):
        """As `Adapter.answer`, prompts of one length at a time: generation here counts positions through padding."""
        lengths = inputs["attention_mask"].sum(1)
        out = [""] * len(lengths)
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero().flatten()
            part = {k: v[rows] if k == "pixel_values" else v[rows, :length] for k, v in inputs.items()}
            for row, text in zip(rows.tolist(), super().answer(part, max_new_tokens), strict=True):
                out[row] = text
        return out

    @contextmanager
    def looking(self, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
        """While open, every forward fills the dict yielded: layer -> cross-attention of its block over the encoder's
        patches (class token left out), averaged over heads, [B, T, rows * columns]."""
        found, n_patches = {}, self.patch_grid[0] * self.patch_grid[1]

        def keep(layer):
            return lambda _module, _inputs, out: found.update({layer: out[1].mean(1)[..., -n_patches:]})

        with attention_weights(self.model.decoder), ExitStack() as hooks:
            for layer in layers:
                hooks.enter_context(self.blocks[layer].crossattention.register_forward_hook(keep(layer)))
            yield found

    def _arguments(self, inputs):
        return {k if k == "pixel_values" else f"decoder_{k}": v for k, v in inputs.items()}


class ChameleonAdapter(Adapter):
    """ChameleonForConditionalGeneration (also Anole): an image is one grid of words of the model's own vocabulary.

    The VQ encoder replaces the processor's placeholders row by row (InputError if not as many as codes); the words of
    start and end around them count as text, and image words that the ids name themselves as image tokens.
    """

    _processing = {"return_for_text_completion": True}  # `prompt` writes the separator; a document has none

    def __init__(self, name, model, tokenizer, processor):
        super().__init__(name, model, tokenizer, processor)
        self.image_token_id = model.config.image_token_id
        shrink = 2 ** (len(model.config.vq_config.channel_multiplier) - 1)
        crop = processor.image_processor.crop_size
        self.patch_grid = (crop["height"] // shrink, crop["width"] // shrink)
        made, written = self.patch_grid[0] * self.patch_grid[1], processor.image_seq_length
        if made != written:
            raise InputError(f"{name} makes {made} codes an image but its processor writes {written} placeholders")
        words = [id for word, id in model.config.vocabulary_map.items() if word.startswith("IMGIMG")]
        self._image_ids = torch.tensor([self.image_token_id, *words])

    def prompt(self, question: str = "", image: bool = True) -> str:
        """As `Adapter.prompt`; without a chat template the original's form: image, question, separator."""
        if getattr(self.processor, "chat_template", None) or self.tokenizer.chat_template:
            return super().prompt(question, image)
        return f"{self.processor.image_token if image else ''}{question}{self.tokenizer.sep_token}"

    @property
    def image_words(self):
        return self.processor.image_start_token, self.processor.image_token, self.processor.image_end_token

    def raw(self, text):
        return super().raw(text).replace("IMGIMG", "IMG IMG")


class PaliGemmaAdapter(Adapter):
    """PaliGemmaForConditionalGeneration (also PaliGemma 2): one picture, then one text, no chat template; patches are
    SigLIP's, which has no class token. Both attend to both, so its image tokens depend on the question."""

    def __init__(self, name, model, tokenizer, processor):
        super().__init__(name, model, tokenizer, processor)
        config, vision = model.config, model.config.vision_config
        self.image_token_id, self._image_ids = config.image_token_id, torch.tensor([config.image_token_id])
        self.patch_grid = (vision.image_size // vision.patch_size,) * 2

    def prompt(self, question: str = "", image: bool = True) -> str:
        """The form of the mixed checkpoints; without a question they write a caption."""
        return self.image_words[1] * image + (question and f"answer en {question}")

    def encode(self, texts, images=None, fits=True):
        """As `Adapter.encode`. The processor writes BOS behind the picture, and the tokenizer none before a text."""
        if images is None and self._special(texts[0]):
            texts = [self.tokenizer.bos_token + text for text in texts]
        inputs = super().encode(texts, images, fits)
        return {key: x for key, x in inputs.items() if key != "labels"}

    @torch.no_grad()
    def vision_features(self, images: Sequence[Image.Image]) -> Tensor:
        """As `LlavaAdapter.vision_features`."""
        pixels = self.processor.image_processor([i.convert("RGB") for i in images], return_tensors="pt")["pixel_values"]
        hidden = self.model.model.vision_tower(pixels.to(self.device, self.model.dtype)).last_hidden_state
        return hidden.mean(1).float().cpu()


@contextmanager
def attention_weights(model) -> Iterator[None]:
    """While open, ``model`` computes attention in the one form (eager) that gives its weights."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


FAMILIES = {"chameleon": ChameleonAdapter, "llava": LlavaAdapter, "llava_next": LlavaNextAdapter}
FAMILIES["paligemma"] = PaliGemmaAdapter
FAMILIES["vision-encoder-decoder"] = CaptionerAdapter


def load(name: str, device: str = "auto", dtype: str = "float32", trust_remote_code: bool = False) -> Adapter:
    """Load a checkpoint (safetensors) with its tokenizer or processor: ``tinyworld/<model>``, shipped with the package,
    ``real/<model>`` (`tinyworld.real.obtain`), a local folder, or a hub id. Raises InputError when there is no such
    model, device or dtype, a file is damaged, or its tensors are not those of the config."""
    import transformers as hf

    from mmsae_helpers.tinyworld import pooled  # noqa: F401  transformers learns of its tower

    path, processor = resolve(name), None
    options = {"trust_remote_code": trust_remote_code}
    family = FAMILIES.get(_read(name, hf.AutoConfig.from_pretrained, path, **options).model_type, Adapter)
    if family is CaptionerAdapter:  # image processor and tokenizer lie side by side
        processor = _read(name, hf.AutoImageProcessor.from_pretrained, path, backend="pil", **options)
    elif family is not Adapter:
        processor = _read(name, hf.AutoProcessor.from_pretrained, path, **options)
        if not hasattr(processor, "image_processor"):
            raise InputError(f"{name} has no image processor: add its preprocessor_config.json")
        # where torchvision is installed it would resize otherwise, by a grey level or two
        processor.image_processor = _read(name, hf.AutoImageProcessor.from_pretrained, path, backend="pil", **options)
    factory = hf.AutoModelForCausalLM if family is Adapter else hf.AutoModelForImageTextToText
    model = _weights(name, factory, path, device, dtype, **options)
    tokenizer = getattr(processor, "tokenizer", None) or _read(name, hf.AutoTokenizer.from_pretrained, path, **options)
    return family(name, model, tokenizer, processor)


@torch.no_grad()
def classify(name: str, batches: Iterable[Sequence[Image.Image]], device: str = "auto", dtype: str = "float32"):
    """A supervised image classifier, the baseline: logits [N, classes] and penultimate features [N, d], float32."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    path = resolve(name)
    model = _weights(name, AutoModelForImageClassification, path, device, dtype)
    processor = _read(name, AutoImageProcessor.from_pretrained, path, backend="pil")
    parts = []
    for images in batches:
        pixels = processor([i.convert("RGB") for i in images], return_tensors="pt")["pixel_values"]
        hidden = model.base_model(pixels.to(model.device, model.dtype)).pooler_output
        parts.append((model.classifier(hidden), hidden.flatten(1)))
    return tuple(torch.cat(some).float().cpu().numpy() for some in zip(*parts, strict=True))


def short_names(names: Iterable[str]) -> dict[str, str]:
    """What tables and figures call each model: the last part of its path or hub id; the whole where two share one."""
    short = {name: name.rstrip("/").split("/")[-1] for name in names}
    shared = Counter(short.values())
    return {name: last if shared[last] == 1 else name for name, last in short.items()}


def resolve(name: str) -> str:
    """The folder or hub id that ``name`` stands for; raises InputError for a folder that is not there."""
    if name.startswith(REAL):
        from mmsae_helpers.tinyworld import real

        return str(real.obtain(name))
    if name.startswith(EMBEDDED):
        folder = CHECKPOINTS / name.removeprefix(EMBEDDED)
        if not (folder / "config.json").is_file():
            known = ", ".join(sorted(f.parent.name for f in CHECKPOINTS.glob("*/config.json"))) or "none yet"
            raise InputError(f"no embedded model {name!r}: there are {known}")
        return str(folder)
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return str(folder)
    if folder.is_dir():
        raise InputError(f"{folder} is not a model folder: it has no config.json")
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise InputError(f"model {name} does not exist: give a folder, a hub id owner/name, or tinyworld/<model>")
    return name


def _unhooked(module: torch.nn.Module) -> torch.nn.Module:
    """The module, its weights shared, without the hooks that transformers adds in the first pass and cannot pickle."""
    twin = copy.copy(module)
    twin._forward_hooks = OrderedDict()
    twin._modules = {k: m if m is None else _unhooked(m) for k, m in module._modules.items()}
    twin.__dict__.pop("_output_capturing_hooks_installed", None)  # so that it adds them anew
    return twin


def pick_device(device: str = "auto") -> str:
    """``auto`` is an accelerator, else cpu; raises InputError for a device that is not there."""
    found, n = torch.accelerator.current_accelerator(check_available=True), torch.accelerator.device_count()
    known = [found.type, *(f"{found.type}:{i}" for i in range(n)), "cpu"] if found else ["cpu"]
    if device not in ("auto", *known):
        raise InputError(f"no device {device!r} here: choose auto, {', '.join(known)}")
    return known[0] if device == "auto" else device


def _weights(name, factory, path, device, dtype, **options):
    from transformers.utils import logging

    logging.disable_progress_bar()
    device, kinds = pick_device(device), ("float32", "bfloat16", "float16", "float64")
    if dtype not in kinds:
        raise InputError(f"no dtype {dtype!r}: choose {', '.join(kinds)}")
    options |= dict(dtype=getattr(torch, dtype), use_safetensors=True)
    options |= dict(output_loading_info=True, ignore_mismatched_sizes=True)  # so that they are told here
    model, info = _read(name, factory.from_pretrained, path, **options)
    tensors = [f"{kind} {key}" for kind in ("missing", "unexpected", "mismatched") for key in info[f"{kind}_keys"]]
    wrong = sorted(tensor for tensor in tensors if not UNUSED.search(tensor))
    if wrong:
        more = f" and {len(wrong) - 4} more" * (len(wrong) > 4)
        raise InputError(f"the tensors of {name} do not fit its config: {', '.join(wrong[:4])}{more}")
    return model.to(device).eval().requires_grad_(False)


def _read(name, read, path, **options):
    try:
        return read(path, **options)
    except Exception as error:  # transformers, safetensors and the hub raise a dozen kinds; all mean "cannot load this"
        why = f"cannot load model {name} ({path}): {first_line(error)}"
        if "safetensors" in why and "no file" in why.lower() or "use_safetensors" in why:
            how = f"python -m mmsae_helpers.models {name} FOLDER converts its .bin"
            why = f"{name} has no safetensors: {how}; then load FOLDER"
        raise InputError(why) from error


def convert(name: str, folder: str | Path) -> Path:
    """Write a checkpoint that has ``pytorch_model*.bin`` alone to a new ``folder`` as safetensors, its other files too.
    Nothing but tensors is unpickled. Raises InputError where there is no such file, or the folder exists."""
    from huggingface_hub import snapshot_download
    from safetensors.torch import save_file

    source, folder = Path(resolve(name)), Path(folder)
    if not source.is_dir():
        source = Path(_read(name, snapshot_download, name, allow_patterns=["*.json", "*.txt", "*.model", "*.bin"]))
    files = sorted(source.glob("pytorch_model*.bin"))
    if not files or folder.exists():
        raise InputError(f"{folder} exists: give a new folder" if files else f"{source} has no pytorch_model.bin")
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.bin", "*.bin.index.json"))
    tensors = {key: x for file in files for key, x in torch.load(file, weights_only=True, map_location="cpu").items()}
    save_file(
        {key: x.clone().contiguous() for key, x in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


if __name__ == "__main__":
    convert(*sys.argv[1:])
