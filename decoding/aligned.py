"""Load the tokenizer of an amateur whose vocabulary is mapped, and describe the map."""

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import AutoTokenizer

from contralto.common.hub import from_pretrained
from contralto.common.options import Option, OptionError
from contralto.decoding.branches.aligned import byte_tokens, describe_map, token_map_of
from contralto.decoding.branches.base import unwrap
from contralto.decoding.methods import DecodingConfig
from contralto.decoding.methods.variants import is_variant
from contralto.decoding.vocabulary import check_same_tokenizer, differing_tokens, vocabulary_size

__all__ = ["aligned_tokenizers", "amateur_tokenizer", "vocabulary_note"]


def amateur_tokenizer(config: DecodingConfig, model: str, tokenizer: Any, names: Sequence[str]) -> Any:
    """Return the tokenizer of the amateur with `vocabulary="aligned"`; None after a check that all models share one.

    Args:
        config: the method.
        model: the main model.
        tokenizer: its tokenizer.
        names: the other models that are not variants of the main model.

    Raises:
        OptionError: a model has another tokenizer, and the method could map it.
        ValueError: a model has another tokenizer, or one that cannot be read as bytes.
    """
    own = {name: from_pretrained(AutoTokenizer, name) for name in names}
    if config.parameters.get("vocabulary"):
        return _mapped(tokenizer, own.values())
    for name, found in own.items():
        _check_shared(model, tokenizer, name, found, config)
    return None


def _check_shared(model: str, tokenizer: Any, name: str, other: Any, config: DecodingConfig) -> None:
    try:
        check_same_tokenizer(model, tokenizer, name, other)
    except ValueError as error:
        if "vocabulary" not in config.parameters:
            raise
        raise OptionError(
            "{why}: use an amateur of the same tokenizer, or {option}, which maps its distribution",
            why=str(error),
            option=Option("vocabulary", "aligned"),
        ) from error


def aligned_tokenizers(
    config: DecodingConfig, tokenizer: Any, loaded: dict[str, Any], *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Return the tokenizers with which a processor maps the amateur's vocabulary; none without `vocabulary="aligned"`.

    Args:
        config: the method with its amateur, a name or a model that was loaded from a folder or the hub.
        tokenizer: the tokenizer of the main model.
        loaded: tokenizers by name, to which the amateur's is added.
        trust_remote_code: whether the tokenizer may run code of its repository.

    Raises:
        ValueError: see `amateur_tokenizer`.
    """
    if not config.parameters.get("vocabulary"):
        return {}
    models = [model for model in config.models.values() if not is_variant(model)]
    names = [model if isinstance(model, str) else str(model.name_or_path) for model in models]
    name = next(iter(names), "")
    if name not in loaded:
        own = [from_pretrained(AutoTokenizer, name, trust_remote_code=trust_remote_code)] if name else []
        loaded[name] = _mapped(tokenizer, own)
    return {"tokenizer": tokenizer, "amateur_tokenizer": loaded[name]}


def vocabulary_note(models: Any) -> str | None:
    """Return one line about what the map of the amateur's vocabulary leaves out; None without such a map.

    Args:
        models: a `loading.Models`.
    """
    other = models.amateur_tokenizer
    if other is None or not (differing_tokens(models.tokenizer, other) or differing_tokens(other, models.tokenizer)):
        return None
    made = token_map_of(models.tokenizer, other, unwrap(models.branch_models[0]).model, vocabulary_size(models.main))
    return describe_map(made, len(models.tokenizer))


def _mapped(tokenizer: Any, tokenizers: Iterable[Any]) -> Any:
    """Return the first of the other models' tokenizers, ready for prompts, or that of the main model."""
    other = next(iter(tokenizers), tokenizer)  # without any, the amateur is the main model, weakened
    if not (differing_tokens(tokenizer, other) or differing_tokens(other, tokenizer)):
        return other
    byte_tokens(tokenizer, "the expert")
    byte_tokens(other, "the amateur")
    if other.pad_token is None:
        other.pad_token = other.eos_token
    other.padding_side = "left"
    return other
