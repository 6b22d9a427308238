"""Tiny repositories with random weights in the layouts that the papers' models, SAEs and data have on the hub.

Each function writes one repository of that name into a hub cache, so that it is found under its own id where there is
no network (`HF_HUB_CACHE`, `HF_HUB_OFFLINE`), and returns the folder, which is what a user's copy of it is. What
transformers 5 would write otherwise is rewritten as it lies there: keys of tensors, fields of configs, split files.
Widths, vocabularies, pictures and row counts are tiny, depths no more than profile paper looks
at; names of fields and files, and columns are the hub's.
"""

import gzip
import io
import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import torch
import zstandard
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Pictures
from safetensors.torch import load_file, save_file
from tokenizers import (
    ByteLevelBPETokenizer,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SHA = "0" * 40
CLASSES = ["dolphin", "skyscraper", "boy", "cloud", "apple", "maple_tree"]
SUPERCLASSES = ["mammal", "building", "person", "scene", "fruit", "tree"]
FILLER = "the a picture of with and near shows in on is what one big small main object answer word number".split()
WORDS = [*" ".join(CLASSES).replace("_", " ").split(), *SUPERCLASSES, *FILLER]
WIDTH, SIDE, PATCH = 16, 28, 14  # of models; pixels of a picture and of a patch
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif"
    " %}{% for message in messages %}{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set "
    "role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + "
    "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
PARTS = (
    "{% for message in messages %}{{ START }}{% for content in message['content'] | selectattr('type', 'equalto', "
    "'image') %}{{ '<image>\n' }}{% endfor %}{% for content in message['content'] | selectattr('type', 'equalto', "
    "'text') %}{{ content['text'] }}{% endfor %}{{ END }}{% endfor %}"
)
MISTRAL_TEMPLATE = PARTS.replace("{{ START }}", "{{ '[INST] ' }}").replace("{{ END }}", "{{ ' [/INST]' }}")
VICUNA_TEMPLATE = PARTS.replace("{{ START }}", "{{ 'USER: ' }}").replace("{{ END }}", "{{ ' ASSISTANT:' }}")


def repository(hub: Path, name: str, kind: str = "models") -> Path:
    """An empty snapshot of a repository in a hub cache."""
    root = hub / f"{kind}--{name.replace('/', '--')}"
    folder = root / "snapshots" / SHA
    folder.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs/main").write_text(SHA)
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    return folder


def dump(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2))


def sentences(n: int, seed: int = 0, words: int = 12) -> list[str]:
    """Texts of words that the tokenizers know whole."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, words)) for _ in range(n)]


def picture(label: int, seed: int, size: tuple[int, int] = (32, 32)) -> bytes:
    """A JPEG file of noise around the colour of its class."""
    rng = np.random.default_rng([label, seed])
    color = np.random.default_rng(label).integers(40, 215, 3)
    pixels = np.clip(color + rng.normal(0, 30, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Pictures.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


# Tokenizers ----------------------------------------------------------------------------------------------------------


@cache
def pieces(special: tuple[str, ...]) -> tuple[dict[str, int], list]:
    """Vocabulary and merges of a SentencePiece BPE that knows WORDS whole, after ``special`` tokens and bytes."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    shown = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    alphabet = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789▁.,:?![]/'")
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=shown, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    model = json.loads(core.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def sentencepiece(folder: Path, special: list[str], added: list[str], cls: str, *, prefix: bool, **config) -> int:
    """Write a Llama or Gemma tokenizer, ``added`` last as the multimodal ones have it; returns how many tokens."""
    vocab, merges = pieces(tuple(special))
    bos = config["bos_token"]
    core = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    replace = normalizers.Replace(" ", "▁")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", [(bos, vocab[bos])])
    core.add_special_tokens([*special, *added])
    core.save(str(folder / "tokenizer.json"))
    dump(folder / "tokenizer_config.json", {"tokenizer_class": cls, "add_bos_token": True, "add_eos_token": False,
         "clean_up_tokenization_spaces": False, "model_max_length": 10**30, **config})  # fmt: skip
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    dump(folder / "special_tokens_map.json", {k: {"content": config[k]} for k in names if k in config})
    return core.get_vocab_size()


def gemma_tokenizer(folder: Path, added=(), **config) -> int:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return sentencepiece(folder, special, list(added), "GemmaTokenizer", prefix=False, **names, **config)


def llama_tokenizer(folder: Path, added=(), **config) -> int:
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    own = ["<unk>", "<s>", "</s>"]
    return sentencepiece(folder, own, list(added), "LlamaTokenizer", prefix=True, **names, **config)


# Models --------------------------------------------------------------------------------------------------------------


def text_config(kind: str, vocab: int, blocks: int, **more) -> dict:
    """Fields of a decoder of 2024, with rope_theta where it was."""
    return {"model_type": kind, "vocab_size": vocab, "hidden_size": WIDTH, "intermediate_size": 24,
            "num_hidden_layers": blocks, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
            "max_position_embeddings": 4096, "rope_theta": 10000.0, "hidden_act": "silu", "rms_norm_eps": 1e-5,
            "torch_dtype": "float32", "use_cache": True} | more  # fmt: skip


def clip_config(**more) -> dict:
    return {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
            "num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH, "projection_dim": 16,
            "vocab_size": 32000} | more  # fmt: skip


def clip_processor(cls="CLIPImageProcessor", processor="LlavaProcessor", **more) -> dict:
    return {"crop_size": {"height": SIDE, "width": SIDE}, "do_center_crop": True, "do_convert_rgb": True,
            "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.48, 0.46, 0.41],
            "image_processor_type": cls, "image_std": [0.27, 0.26, 0.28], "processor_class": processor, "resample": 3,
            "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": SIDE}} | more  # fmt: skip


def weights(folder: Path, config: dict, factory: str, rename=lambda key: key, shards: int = 1, seed: int = 0) -> None:
    """Write a config and the random weights of its model, keys renamed, in so many safetensors files."""
    import transformers

    dump(folder / "config.json", config)
    torch.manual_seed(seed)
    model = getattr(transformers, factory)._from_config(getattr(transformers, factory).config_class.from_dict(config))
    for name, tensor in model.named_parameters():
        if tensor.dim() > 1:
            tensor.data = torch.randn_like(tensor) * (0.5 if "embed" in name else 0.08)
    model.save_pretrained(written := folder / "as_saved")
    tensors = {rename(key): x for key, x in load_file(written / "model.safetensors").items()}
    shutil.rmtree(written)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    files = {key: f"model-{1 + i % shards:05d}-of-{shards:05d}.safetensors" for i, key in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({k: tensors[k] for k, at in files.items() if at == file}, folder / file, metadata={"format": "pt"})
    size = sum(x.nbytes for x in tensors.values())
    dump(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": files})


def old_clip(key: str) -> str:
    """The vision tower's tensors had one more level before transformers 5."""
    return key if ".vision_model." in key else key.replace("vision_tower.", "vision_tower.vision_model.")


def gemma(hub: Path, name: str = "google/gemma-2b") -> Path:
    """google/gemma-2b and -2b-it: tied head, Gemma's tokenizer, a chat template of strings in its config."""
    folder = repository(hub, name)
    vocab = gemma_tokenizer(folder, chat_template=GEMMA_TEMPLATE)
    config = text_config("gemma", vocab, 18, hidden_act="gelu", hidden_activation=None, rms_norm_eps=1e-6)
    config |= {"architectures": ["GemmaForCausalLM"], "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    weights(folder, config | {"transformers_version": "4.38.0.dev0"}, "GemmaForCausalLM", shards=2)
    return folder


def llava_gemma(hub: Path, name: str = "Intel/llava-gemma-2b") -> Path:
    """Of transformers 4.39: image_token_index, a short vision_config, no patch_size in the processor, a template of
    strings, embeddings padded to a multiple of 64."""
    folder = repository(hub, name)
    n = gemma_tokenizer(folder, ["<image>"], chat_template=GEMMA_TEMPLATE, processor_class="LlavaProcessor")
    vocab = -(-n // 64) * 64
    text = text_config("gemma", vocab, 18, hidden_act="gelu", rms_norm_eps=1e-6)
    config = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "ignore_index": -100,
              "image_token_index": n - 1, "pad_token_id": 0, "projector_hidden_act": "gelu", "text_config": text,
              "torch_dtype": "float32", "transformers_version": "4.39.0.dev0", "vision_config": clip_config(),
              "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vocab_size": vocab}  # fmt: skip
    weights(folder, config, "LlavaForConditionalGeneration", old_clip, shards=2)
    dump(folder / "preprocessor_config.json", clip_processor())
    return folder


def llava(hub: Path, name: str = "llava-hf/llava-1.5-7b-hf") -> Path:
    """LLaVA-1.5 with Vicuna: chat_template.json and processor_config.json beside the old files."""
    folder = repository(hub, name)
    n = llama_tokenizer(folder, ["<image>", "<pad>"], pad_token="<pad>", processor_class="LlavaProcessor")
    vocab = -(-n // 64) * 64
    config = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "ignore_index": -100,
              "image_token_index": n - 2, "pad_token_id": n - 1, "projector_hidden_act": "gelu", "image_seq_length": 4,
              "text_config": text_config("llama", vocab, 32), "tie_word_embeddings": False, "torch_dtype": "float16",
              "transformers_version": "4.36.0.dev0", "vision_config": clip_config(), "vision_feature_layer": -2,
              "vision_feature_select_strategy": "default", "vocab_size": vocab}  # fmt: skip
    weights(folder, config, "LlavaForConditionalGeneration", old_clip, shards=3)
    dump(folder / "preprocessor_config.json", clip_processor())
    dump(folder / "processor_config.json", {"image_token": "<image>", "num_additional_image_tokens": 1, "patch_size":
         PATCH, "processor_class": "LlavaProcessor", "vision_feature_select_strategy": "default"})  # fmt: skip
    dump(folder / "chat_template.json", {"chat_template": VICUNA_TEMPLATE})
    return folder


def paligemma(hub: Path, name: str = "google/paligemma2-3b-mix-224") -> Path:
    """PaliGemma 2: Gemma 2 under SigLIP, whose processor knows the number of image tokens; no chat template."""
    folder = repository(hub, name)
    n = gemma_tokenizer(folder, ["<image>"], processor_class="PaliGemmaProcessor")
    vocab = -(-(n + 1152) // 64) * 64  # the processor adds words for places and segments
    text = text_config("gemma2", vocab, 18, hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=8,
                       sliding_window=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
                       rms_norm_eps=1e-6, num_image_tokens=4)  # fmt: skip
    del text["hidden_act"]
    vision = clip_config(model_type="siglip_vision_model", num_image_tokens=4, projection_dim=WIDTH,
                         projector_hidden_act="gelu_fast", vision_use_head=False)  # fmt: skip
    config = {"architectures": ["PaliGemmaForConditionalGeneration"], "model_type": "paligemma", "hidden_size": WIDTH,
              "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "image_token_index": n - 1,
              "num_hidden_layers": 18, "projection_dim": WIDTH, "text_config": text, "torch_dtype": "float32",
              "transformers_version": "4.46.0.dev0", "vision_config": vision}  # fmt: skip

    def old(key):
        for of, to in {"language_model.": "language_model.model.", "vision_": "vision_", "multi_": "multi_"}.items():
            key = key.replace(f"model.{of}", to, 1) if key.startswith(f"model.{of}") else key
        return old_clip(key)

    weights(folder, config, "PaliGemmaForConditionalGeneration", old, shards=2)
    square = {"height": SIDE, "width": SIDE}
    images = clip_processor("SiglipImageProcessor", "PaliGemmaProcessor", image_seq_length=4, do_convert_rgb=None,
                            image_mean=[0.5] * 3, image_std=[0.5] * 3, size=square)  # fmt: skip
    del images["crop_size"], images["do_center_crop"]
    dump(folder / "preprocessor_config.json", images)
    return folder


def mistral(hub: Path, name: str = "mistralai/Mistral-7B-Instruct-v0.2") -> Path:
    """The language model that LLaVA-NeXT is made from; no pad token."""
    folder = repository(hub, name)
    vocab = llama_tokenizer(folder, chat_template=MISTRAL_TEMPLATE, additional_special_tokens=[])
    config = text_config("mistral", vocab, 18, rope_theta=1000000.0, sliding_window=None, tie_word_embeddings=False)
    config |= {"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2}
    weights(folder, config | {"transformers_version": "4.36.0"}, "MistralForCausalLM", shards=3)
    return folder


def llava_next(hub: Path, name: str = "llava-hf/llava-v1.6-mistral-7b-hf") -> Path:
    """LLaVA-NeXT with Mistral: anyres, chat_template.json, old rope keys."""
    folder = repository(hub, name)
    n = llama_tokenizer(folder, ["<image>", "<pad>"], pad_token="<pad>", processor_class="LlavaNextProcessor")
    vocab, pinpoints = -(-n // 64) * 64, [[SIDE * a, SIDE * b] for a, b in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    text = text_config("mistral", vocab, 18, rope_theta=1000000.0, sliding_window=None)
    text["_name_or_path"] = "mistralai/Mistral-7B-Instruct-v0.2"
    config = {"architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next", "ignore_index": -100,
              "image_grid_pinpoints": pinpoints, "image_token_index": n - 2, "projector_hidden_act": "gelu",
              "text_config": text, "tie_word_embeddings": False, "torch_dtype": "float16", "vocab_size": vocab,
              "transformers_version": "4.39.0.dev0", "use_image_newline_parameter": True,
              "vision_config": clip_config(), "vision_feature_layer": -2,
              "vision_feature_select_strategy": "default"}  # fmt: skip
    weights(folder, config, "LlavaNextForConditionalGeneration", old_clip, shards=4)
    images = {"aspect_ratio_setting": "anyres", "do_pad": True, "image_grid_pinpoints": pinpoints}
    dump(folder / "preprocessor_config.json", clip_processor("LlavaNextImageProcessor", "LlavaNextProcessor", **images))
    dump(folder / "processor_config.json", {"image_token": "<image>", "patch_size": PATCH, "processor_class":
         "LlavaNextProcessor", "vision_feature_select_strategy": "default"})  # fmt: skip
    dump(folder / "chat_template.json", {"chat_template": MISTRAL_TEMPLATE})
    return folder


def chameleon(hub: Path, name: str = "facebook/chameleon-7b", codes: int = 8) -> Path:
    """Chameleon; as leloy/Anole-7b-v0.1-hf it keeps the tensors of the VQ decoder. No chat template."""
    folder = repository(hub, name)
    words = ["IMGIMG" + "".join(chr(ord("A") + int(d)) for d in str(code)) + "Z" for code in range(codes)]
    added = ["<pad>", "<image>", "<racm3:break>", "<eoss>", "<reserved08706>"]
    n = llama_tokenizer(folder, [*added, *words], pad_token="<pad>", sep_token="<reserved08706>")
    vq = {"attn_resolutions": None, "attn_type": "vanilla", "base_channels": 32, "channel_multiplier": [1, 1, 1, 1, 1],
          "double_latent": False, "dropout": 0.0, "embed_dim": 8, "in_channels": 3, "latent_channels": 8,
          "model_type": "chameleon_vqgan", "num_embeddings": codes, "num_res_blocks": 1, "out_channels": 3,
          "resolution": 32}  # fmt: skip
    known = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    config = text_config("chameleon", n, 10, rope_scaling=None, num_key_value_heads=2, attention_bias=False)
    config |= {"architectures": ["ChameleonForConditionalGeneration"], "bos_token_id": 1, "eos_token_id": 2,
               "pad_token_id": known["<pad>"], "model_parallel_size": 1, "swin_norm": False, "mlp_bias": False,
               "tie_word_embeddings": False, "transformers_version": "4.43.0.dev0", "vocabulary_map": known,
               "vq_config": vq}  # fmt: skip
    del config["head_dim"]
    weights(folder, config, "ChameleonForConditionalGeneration", shards=3)
    if "Anole" in name:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        tensors = {f"model.vqmodel.decoder.{part}": torch.randn(4, 4) for part in ("conv_in.weight", "conv_out.weight")}
        save_file(tensors, folder / "model-vq.safetensors", metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(tensors, "model-vq.safetensors")
        dump(folder / "model.safetensors.index.json", index)
    square = {"height": 32, "width": 32}
    images = clip_processor("ChameleonImageProcessor", "ChameleonProcessor", image_mean=[1.0] * 3, image_std=[1.0] * 3)
    images |= {"crop_size": square, "rescale_factor": 0.0078, "resample": 1, "size": {"shortest_edge": 32}}
    dump(folder / "preprocessor_config.json", images)
    dump(folder / "processor_config.json", {"image_seq_length": 4, "image_token": "<image>", "processor_class":
         "ChameleonProcessor"})  # fmt: skip
    return folder


def vit_gpt2(hub: Path, name: str = "nlpconnect/vit-gpt2-image-captioning") -> Path:
    """pytorch_model.bin alone, configs of transformers 4.15, buffers and a pooler, the tied head under its own key."""
    folder = repository(hub, name)
    words = ByteLevelBPETokenizer()
    words.train_from_iterator([" ".join(WORDS)] * 3, 1000, show_progress=False, special_tokens=["<|endoftext|>"])
    words.save_model(str(folder))
    words.save(str(folder / "tokenizer.json"))
    end = "<|endoftext|>"
    dump(folder / "special_tokens_map.json", dict.fromkeys(["bos_token", "eos_token", "unk_token", "pad_token"], end))
    dump(folder / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "bos_token":
         end, "eos_token": end, "unk_token": end, "model_max_length": 1024})  # fmt: skip
    vocab = words.get_vocab_size()
    old = {"bad_words_ids": None, "do_sample": False, "early_stopping": False, "max_length": 20, "min_length": 0,
           "num_beams": 1, "num_return_sequences": 1, "temperature": 1.0, "top_k": 50, "top_p": 1.0,
           "return_dict": True, "is_encoder_decoder": False, "torch_dtype": None,
           "transformers_version": "4.15.0"}  # fmt: skip
    encoder = old | {"model_type": "vit", "architectures": ["ViTModel"], "hidden_size": 16, "intermediate_size": 24,
                     "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 32, "patch_size": 16,
                     "qkv_bias": True, "num_channels": 3, "layer_norm_eps": 1e-12}  # fmt: skip
    decoder = old | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": WIDTH, "n_head": 2,
                     "n_layer": 12, "n_positions": 1024, "n_ctx": 1024, "vocab_size": vocab, "bos_token_id": 0,
                     "eos_token_id": 0, "add_cross_attention": True, "is_decoder": True,
                     "decoder_start_token_id": 0, "activation_function": "gelu_new"}  # fmt: skip
    config = {"architectures": ["VisionEncoderDecoderModel"], "model_type": "vision-encoder-decoder",
              "bos_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "encoder": encoder,
              "decoder": decoder, "is_encoder_decoder": True, "tie_word_embeddings": False, "torch_dtype": "float32",
              "transformers_version": "4.15.0"}  # fmt: skip
    weights(folder, config, "VisionEncoderDecoderModel")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for block in range(12):
        for part in ("attn", "crossattention"):
            tensors[f"decoder.transformer.h.{block}.{part}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
            tensors[f"decoder.transformer.h.{block}.{part}.masked_bias"] = torch.tensor(-1e4)
    tensors |= {"encoder.pooler.dense.weight": torch.randn(16, 16), "encoder.pooler.dense.bias": torch.zeros(16)}
    tensors["decoder.lm_head.weight"] = tensors["decoder.transformer.wte.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")
    dump(folder / "preprocessor_config.json", {"do_normalize": True, "do_resize": True, "feature_extractor_type":
         "ViTFeatureExtractor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2,
         "size": 32})  # fmt: skip
    return folder


def resnet(hub: Path, name: str = "microsoft/resnet-50") -> Path:
    """A ConvNextFeatureExtractor with crop_pct and a size that is a number."""
    folder = repository(hub, name)
    labels = {str(i): name for i, name in enumerate(CLASSES)}
    config = {"architectures": ["ResNetForImageClassification"], "model_type": "resnet", "depths": [1, 1],
              "embedding_size": 8, "hidden_sizes": [8, 16], "hidden_act": "relu", "layer_type": "bottleneck",
              "num_channels": 3, "id2label": labels, "label2id": {v: int(k) for k, v in labels.items()},
              "downsample_in_first_stage": False, "torch_dtype": "float32",
              "transformers_version": "4.18.0.dev0"}  # fmt: skip
    weights(folder, config, "ResNetForImageClassification")
    dump(folder / "preprocessor_config.json", {"crop_pct": 0.875, "do_normalize": True, "do_resize": True,
         "feature_extractor_type": "ConvNextFeatureExtractor", "image_mean": [0.485, 0.456, 0.406],
         "image_std": [0.229, 0.224, 0.225], "resample": 3, "size": 32})  # fmt: skip
    return folder


# SAEs ----------------------------------------------------------------------------------------------------------------


def directions(model: Path, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a model's residual stream after a block: the unit direction of each word of WORDS, the level that half of its
    occurrences exceed by, and the mean; so that an SAE made of them has features that words name."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, net = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    inputs = tokenizer(sentences(40, 7), return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden = net(**inputs, output_hidden_states=True).hidden_states[layer + 1]
    real = inputs["attention_mask"].bool() & (inputs["input_ids"] != tokenizer.bos_token_id)
    x, ids = hidden[real], inputs["input_ids"][real]
    mean = x.mean(0)
    ways = torch.stack([x[ids == one].mean(0) - mean for one in ids.unique()])
    lengths = ways.norm(dim=1)
    return ways / lengths[:, None], lengths / 2, mean


def sae_tensors(model: Path, layer: int, apply_b_dec: bool, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """A standard SAE that expects its input times ``scale``."""
    ways, level, mean = directions(model, layer)
    bias = -level * scale - (0 if apply_b_dec else ways @ mean * scale)
    return {"W_enc": ways.T.contiguous(), "b_enc": bias, "W_dec": ways.contiguous(), "b_dec": mean * scale}


def sae_cfg(layer: int, tensors: dict, model_name: str, **more) -> dict:
    """cfg.json of sae-lens 2 and 3."""
    d_in, d_sae = tensors["W_enc"].shape
    return {"model_name": model_name, "hook_point": f"blocks.{layer}.hook_resid_post", "hook_point_layer": layer,
            "hook_point_head_index": None, "dataset_path": "HuggingFaceFW/fineweb", "context_size": 1024,
            "use_cached_activations": False, "d_in": d_in, "d_sae": d_sae, "activation_fn": "relu", "dtype":
            "torch.float32", "device": "cpu", "prepend_bos": True, "normalize_activations": "none",
            "l1_coefficient": 5, "lp_norm": 1.0, "lr": 7e-05, "seed": 42, "store_batch_size": 8,
            "train_batch_size": 4096} | more  # fmt: skip


def write_sae(folder: Path, tensors: dict, cfg: dict) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    save_file({"sparsity": torch.full((tensors["W_enc"].shape[1],), -2.0)}, folder / "sparsity.safetensors")
    dump(folder / "cfg.json", cfg)
    return folder


def gemma_res_jb(hub: Path, model: Path, apply_b_dec: bool = False) -> Path:
    """gemma-2b-res-jb: folders by their long names, blocks 0 and 6 with a scaling_factor of ones; block 12 is
    normalised, by a factor that sae-lens knows."""
    folder = repository(hub, "jbloom/Gemma-2b-Residual-Stream-SAEs")
    names = {0: "_anthropic", 6: "_anthropic_fast_lr", 10: "", 12: "", 17: ""}
    for layer, tail in names.items():
        tensors = sae_tensors(model, layer, apply_b_dec, 0.21381938399317255 if layer == 12 else 1.0)
        if layer in (0, 6):
            tensors["scaling_factor"] = torch.ones(tensors["W_enc"].shape[1])
        cfg = sae_cfg(layer, tensors, "gemma-2b", apply_b_dec_to_input=apply_b_dec)
        cfg["normalize_activations"] = "expected_average_only_in" if layer == 12 else layer not in names
        write_sae(folder / f"gemma_2b_blocks.{layer}.hook_resid_post_16384{tail}", tensors, cfg)
    return folder


def gemma_it_res_jb(hub: Path, model: Path) -> Path:
    """gemma-2b-it-res-jb: block 12 alone."""
    folder = repository(hub, "jbloom/Gemma-2b-IT-Residual-Stream-SAEs")
    tensors = sae_tensors(model, 12, False)
    cfg = sae_cfg(12, tensors, "gemma-2b-it", apply_b_dec_to_input=False)
    write_sae(folder / "gemma_2b_it_blocks.12.hook_resid_post_16384", tensors, cfg)
    return folder


def gpt2_res_jb(hub: Path, layers=(8,)) -> Path:
    """gpt2-small-res-jb: the input of a block, b_dec subtracted, cfg.json of sae-lens 2 without an architecture."""
    folder = repository(hub, "jbloom/GPT2-Small-SAEs-Reformatted")
    for layer in layers:
        tensors = random_sae_tensors()
        cfg = sae_cfg(layer, tensors, "gpt2-small", hook_point=f"blocks.{layer}.hook_resid_pre")
        write_sae(folder / f"blocks.{layer}.hook_resid_pre", tensors, cfg)
    return folder


def gemma_scope(
    hub: Path, name: str = "google/gemma-scope-2b-pt-res", place="layer_12/width_16k/average_l0_82"
) -> Path:
    """params.npz with a threshold a feature, and no config: the loader knows it by the folder's name."""
    folder = repository(hub, name)
    (folder / place).mkdir(parents=True)
    tensors = random_sae_tensors() | {"threshold": torch.rand(48) / 5}
    np.savez(folder / place / "params.npz", **{key: x.numpy() for key, x in tensors.items()})
    return folder


def batch_topk(folder: Path, layer: int = 4) -> Path:
    """As sae-lens 6 leaves a BatchTopK SAE for inference: JumpReLU, its metadata nested in cfg.json."""
    tensors = random_sae_tensors() | {"threshold": torch.full((48,), 0.1)}
    metadata = {"sae_lens_version": "6.20.0", "sae_lens_training_version": "6.20.0", "model_name": "gemma-2b",
                "hook_name": f"blocks.{layer}.hook_resid_post", "hook_head_index": None, "prepend_bos": True,
                "context_size": 1024, "dataset_path": "monology/pile-uncopyrighted"}  # fmt: skip
    cfg = {"d_in": WIDTH, "d_sae": 48, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
           "normalize_activations": "none", "reshape_activations": "none", "metadata": metadata,
           "architecture": "jumprelu"}  # fmt: skip
    return write_sae(folder / f"blocks.{layer}.hook_resid_post", tensors, cfg)


def random_sae_tensors(d_sae: int = 48) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ways = torch.nn.functional.normalize(torch.randn(d_sae, WIDTH, generator=generator), dim=1)
    b_dec = torch.randn(WIDTH, generator=generator) / 4
    return {"W_enc": ways.T.contiguous(), "b_enc": torch.linspace(-2, 0, d_sae), "W_dec": ways, "b_dec": b_dec}


# Data ----------------------------------------------------------------------------------------------------------------


def tables(folder: Path, config: str | None, features: dict, parts: dict[str, list[dict]], where="data") -> Path:
    """Parquet files by split in ``where``, and the README's YAML that names them."""
    (folder / where).mkdir(exist_ok=True)
    lines = ["---", "configs:", f"- config_name: {config or 'default'}", "  data_files:"]
    for split, rows in parts.items():
        file = folder / where / f"{split}-00000-of-00001.parquet"
        Dataset.from_list(rows, features=Features(features)).to_parquet(file)
        lines += [f"  - split: {split}", f"    path: {where}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


def labelled(n: int, seed: int, image: str, label: str, size=(32, 32)) -> list[dict]:
    """``n`` rows of each class, the classes in turn."""
    rows = [(c, i) for i in range(n) for c in range(len(CLASSES))]
    return [{image: {"bytes": picture(c, seed + i, size), "path": None}, label: c} for c, i in rows]


def cifar100(hub: Path, n: int = 10) -> Path:
    """uoft-cs/cifar100: img, fine_label and coarse_label; train and test."""
    folder = repository(hub, "uoft-cs/cifar100", "datasets")
    features = {"img": Image(), "fine_label": ClassLabel(names=CLASSES), "coarse_label": ClassLabel(names=SUPERCLASSES)}
    parts = {split: labelled(n, seed, "img", "fine_label") for split, seed in (("train", 0), ("test", 1000))}
    rows = {split: [row | {"coarse_label": row["fine_label"]} for row in part] for split, part in parts.items()}
    return tables(folder, "cifar100", features, rows, "cifar100")


def imagenet(hub: Path, name: str = "ILSVRC/imagenet-1k", n: int = 4, size=(48, 40)) -> Path:
    """ILSVRC/imagenet-1k and timm/mini-imagenet: image and label, train, validation and test; names of many words. The
    large one's test has no labels (-1)."""
    folder = repository(hub, name, "datasets")
    names = [f"{c.replace('_', ' ')}, {s}" for c, s in zip(CLASSES, SUPERCLASSES, strict=True)]
    names += [f"{word}, thing" for word in FILLER[:6]]
    features = {"image": Image(), "label": ClassLabel(names=names)}
    parts = {
        split: labelled(n, 100 * i, "image", "label", size) for i, split in enumerate(["train", "validation", "test"])
    }
    for rows in parts.values():  # the other six classes, so that nine others can be offered
        rows += [row | {"label": row["label"] + 6} for row in rows]
    if name.startswith("ILSVRC"):
        parts["test"] = [row | {"label": -1} for row in parts["test"]]
    return tables(folder, None, features, parts)


def pile(hub: Path, n: int = 120) -> Path:
    """monology/pile-uncopyrighted: .jsonl.zst files of text and meta."""
    folder = repository(hub, "monology/pile-uncopyrighted", "datasets")
    (folder / "train").mkdir()
    files = {"train/00": 0, "train/01": 1, "val": 2, "test": 3}
    for file, seed in files.items():
        rows = [{"text": text, "meta": {"pile_set_name": "Pile-CC"}} for text in sentences(n, seed)]
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (folder / f"{file}.jsonl.zst").write_bytes(zstandard.compress(content))
    return folder


def obelics(hub: Path, site: str, n: int = 60, dead: int = 3) -> Path:
    """HuggingFaceM4/OBELICS: images and texts of one length with null in one of them, metadata; train alone; every
    ``dead``-th row has a link that ``site`` does not answer. The others end in /LABEL/SEED.jpg."""
    folder = repository(hub, "HuggingFaceM4/OBELICS", "datasets")
    rows = []
    for i, text in enumerate(sentences(n, 11)):
        urls = [
            f"{site}/{i % 6}/{i}.jpg",
            f"{site}/gone/{i}.jpg" if i % dead == 0 else f"{site}/{(i + 1) % 6}/{i}b.jpg",
        ]
        about = [{"document_url": "x", "src": url} for url in urls]
        rows.append({"images": [None, urls[0], None, urls[1]], "texts": [text, None, text[::2], None],
                     "metadata": json.dumps([None, about[0], None, about[1]]),
                     "general_metadata": json.dumps({"url": "x"})})  # fmt: skip
    text = List(Value("string"))
    features = {"images": text, "metadata": Value("string"), "general_metadata": Value("string"), "texts": text}
    return tables(folder, None, features, {"train": rows})


def align_anything(hub: Path, n: int = 24) -> Path:
    """PKU-Alignment/align-anything, text-image-to-text: two responses and which is better; one row has no better."""
    folder = repository(hub, "PKU-Alignment/align-anything", "datasets")
    texts = [sentences(n, seed, 6) for seed in (21, 22, 23)]
    rows = [
        {"image_id": str(i), "image": {"bytes": picture(i % 6, i), "path": None}, "question": texts[0][i],
         "response_1": texts[1][i], "response_2": texts[2][i], "overall_response": 1 + i % 2 if i else 0,
         "overall_rationale": "because"} for i in range(n)
    ]  # fmt: skip
    kinds = {"image": Image(), "overall_response": Value("int64")}
    features = {key: kinds.get(key, Value("string")) for key in rows[0]}
    return tables(folder, "text-image-to-text", features, {"train": rows, "val": rows[:4]}, "text-image-to-text")


def rlaif_v(hub: Path, n: int = 24) -> Path:
    """openbmb/RLAIF-V-Dataset: chosen and rejected."""
    folder = repository(hub, "openbmb/RLAIF-V-Dataset", "datasets")
    texts = [sentences(n, seed, 6) for seed in (31, 32, 33)]
    rows = [
        {"ds_name": "rlaif-v", "image": {"bytes": picture(i % 6, i), "path": "a.jpg"}, "question": texts[0][i],
         "chosen": texts[1][i], "rejected": texts[2][i], "origin_dataset": "COCO", "idx": i} for i in range(n)
    ]  # fmt: skip
    kinds = {"image": Image(), "idx": Value("int64")}
    return tables(folder, None, {key: kinds.get(key, Value("string")) for key in rows[0]}, {"train": rows})


def llava_bench(hub: Path, n: int = 6) -> Path:
    """lmms-lab/llava-bench-coco: train alone, gpt_answer and caption."""
    folder = repository(hub, "lmms-lab/llava-bench-coco", "datasets")
    rows = [
        {"question_id": str(i), "question": text, "image": {"bytes": picture(i % 6, i), "path": None},
         "image_id": str(i), "category": ("conv", "detail", "complex")[i % 3], "caption": text, "gpt_answer": text[::2]}
        for i, text in enumerate(sentences(n, 41, 6))
    ]  # fmt: skip
    features = {key: Image() if key == "image" else Value("string") for key in rows[0]}
    return tables(folder, None, features, {"train": rows})


def vqav2(hub: Path, n: int = 4) -> Path:
    """lmms-lab/VQAv2: several questions an image one after the other, ten answers each; validation and test."""
    folder = repository(hub, "lmms-lab/VQAv2", "datasets")
    types = ["what color is the", "is the", "none of the above"]
    rows = [
        {"question_type": types[k], "multiple_choice_answer": text.split()[0], "answers": [
            {"answer": text.split()[0], "answer_confidence": "yes", "answer_id": j} for j in range(1, 11)
        ], "image_id": i // 3, "answer_type": "other", "question_id": 1000 * (i // 3) + k,
         "question": f"{types[k]} {text}?", "image": {"bytes": picture(i // 3 % 6, i // 3), "path": None}}
        for i, text in enumerate(sentences(3 * n, 51, 3)) for k in [i % 3]
    ]  # fmt: skip
    answers = List({"answer": Value("string"), "answer_confidence": Value("string"), "answer_id": Value("int64")})
    kinds = {"image": Image(), "image_id": Value("int64"), "question_id": Value("int64"), "answers": answers}
    return tables(folder, None, {key: kinds.get(key, Value("string")) for key in rows[0]}, {"validation": rows})


def neuronpedia(bucket: Path, place: str, n: int = 20) -> Path:
    """What Neuronpedia's bucket has of a source, <model>/<source>: explanations in batches of gzipped JSON lines, an
    embedding as text in each; some features have none, some two; one has markup in it."""
    folder = bucket / place / "explanations"
    folder.mkdir(parents=True)
    model, layer = place.split("/")
    rows = [
        {"id": f"c{i}", "modelId": model, "layer": layer, "index": str(i), "description": f" {text}", "authorId": "a",
         "triggeredByUserId": None, "notes": None, "scoreV1": None, "umap_x": 0.5, "typeName": "oai_token-act-pair",
         "explanationModelName": "gpt-3.5-turbo", "embedding": "[0.1,0.2]"}
        for i, text in [*enumerate(f"mentions of <b>{word}</b> & more" for word in WORDS[:n]), (3, "second"), (4, None)]
        if i % 5
    ]  # fmt: skip
    for batch in range(2):
        lines = "".join(json.dumps(row) + "\n" for row in rows[batch::2])
        (folder / f"batch-{batch}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder.parent
