"""The tokenizer of the worlds: one token per word, sign or digit, spaces kept, so that decoding gives the text back."""

from collections.abc import Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from contralto.testbed import worlds

SPECIAL_TOKENS = ["<pad>", "<unk>", "<bos>", "<eos>", "<|user|>", "<|assistant|>"]

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == "user" -%}
        {{- "<|user|>" + message.content -}}
    {%- elif message.role == "assistant" -%}
        {{- "<|assistant|>" -}}
        {%- generation -%}{{- message.content + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- raise_exception("the testbed's models know the roles user and assistant, not " + message.role) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|assistant|>" -}}
{%- endif -%}"""


def build() -> PreTrainedTokenizerFast:
    """Return the tokenizer of the text worlds: words include the space before them ("▁has"), numbers are digits ("▁1", "2")."""
    words = worlds.vocabulary()
    spaced = [w for w in words if w not in ".,:?"]
    bare = [w for w in words if not w.isalpha() and w not in "+-=####"]
    tokens = SPECIAL_TOKENS + sorted(f"▁{w}" for w in spaced) + sorted(bare)
    return word_level(tokens, r"▁?(\d|\p{L}+|#+|[^▁\d\p{L}#])", SPECIAL_TOKENS[4:], chat_template=CHAT_TEMPLATE)


def word_level(
    tokens: Sequence[str], pattern: str, additional: Sequence[str], **options: Any
) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the matches of a pattern, the space before a word written as "▁".

    Args:
        tokens: the vocabulary, special tokens first.
        pattern: a regular expression.
        additional: special tokens besides the first four.
        options: keyword arguments of `PreTrainedTokenizerFast`.
    """
    backend = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always", split=False),
            pre_tokenizers.Split(Regex(pattern), "isolated"),
        ]
    )
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokens.index("<bos>"))]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=list(additional),
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        **options,
    )
