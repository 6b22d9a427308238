"""A word-level tokenizer for the language, as an ordinary fast tokenizer of transformers."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mmsae_helpers.tinyworld.language import vocabulary

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "<start_of_turn>", "<end_of_turn>", "user", "model")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<start_of_turn> ' + ('model' if message['role'] == 'assistant' else message['role']) + ' ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}"
    "{{ ' <end_of_turn> ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn> model ' }}{% endif %}"
)


def make_tokenizer(extra: tuple[str, ...] = (), max_length: int = 256) -> PreTrainedTokenizerFast:
    """The tokenizer of every text model of the world: words, punctuation and nine special tokens; BOS is added.

    ``extra`` words come last, so that the ids of all others are the same in every family.
    """
    vocab = {word: i for i, word in enumerate([*SPECIAL, *vocabulary(), *extra])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<start_of_turn>", "<end_of_turn>"],
        chat_template=CHAT_TEMPLATE,
        padding_side="right",
        model_max_length=max_length,
    )
