"""The Mistral that LLaVA-NeXT is made from: the Gemma's size and documents, a longer context, digits to choose by."""

from transformers import MistralConfig, PreTrainedTokenizerFast

from mmsae_helpers.tinyworld import language, tokenizer

CONTEXT = 512  # three tiles and two images in one document, with words around them


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The world's tokenizer with the words of numbered choices."""
    return tokenizer.make_tokenizer(language.CHOICE_WORDS, CONTEXT)


def mistral_config() -> MistralConfig:
    """Eight blocks of width 128."""
    words = make_tokenizer()
    return MistralConfig(
        vocab_size=len(words), hidden_size=128, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=CONTEXT, sliding_window=None,
        tie_word_embeddings=True, pad_token_id=words.pad_token_id, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )  # fmt: skip
