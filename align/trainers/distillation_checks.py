"""Checks of the arguments of `DistillationPairTrainer` that need no loaded model."""

# ruff: noqa: TRY004 (a wrong type in somebody's recipe is a ValueError like any other mistake in it)

from collections.abc import Mapping
from typing import Any, cast

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import AutoTokenizer

from contralto.align.trainers.checks import check_adapter, check_model, has_images
from contralto.align.trainers.distillation_config import DistillationConfig
from contralto.common.hub import from_pretrained
from contralto.decoding.vocabulary import differing_tokens, find_tokenizer

__all__ = ["check_distillation", "check_vocabulary_size", "with_unread_rejected"]


def check_distillation(model: Any, teacher: Any, args: DistillationConfig, kwargs: Mapping[str, Any]) -> None:
    """Reject arguments of `DistillationPairTrainer` before a model is loaded.

    Args:
        model: the student, loaded or by name.
        teacher: a loaded teacher, or None.
        args: the options.
        kwargs: the other arguments of the trainer.

    Raises:
        ValueError: an argument is wrong.
    """
    check_model(model)
    _check_teacher(model, teacher, args)
    check_adapter(model, kwargs.get("peft_config"), compares_tokens=True)
    if args.head_in_shards and args.kind.uses_teacher and not args.precompute_teacher:
        raise ValueError(
            "the teacher's whole head is read, which ZeRO 3 and FSDP 1 keep in shards: set precompute_teacher, or use FSDP 2 or ZeRO 2"
        )
    if args.head_in_shards and args.on_policy:
        raise ValueError(
            "on_policy generates with the student, which ZeRO 3 and FSDP 1 keep in shards: use FSDP 2 or ZeRO 2"
        )
    for name, dataset, first in args.checked_pairs(kwargs.get("train_dataset"), kwargs.get("eval_dataset")):
        if args.precompute_teacher:
            _check_can_precompute(name, dataset, first)
        if args.on_policy and has_images(first):
            raise ValueError(f"{name} has images, and on_policy generates from prompts of text alone: leave it at 0")
    if teacher is not None or args.teacher_model_name_or_path is not None:
        _check_tokenizers(model, teacher, args, kwargs.get("processing_class"))


def with_unread_rejected(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a trainer with a column `rejected` in datasets without one, for losses that do not read it.

    TRL tokenizes and pads both columns, so the chosen completion takes its place and the padding stays what it was.

    Args:
        kwargs: keyword arguments of `DistillationPairTrainer`.

    Raises:
        ValueError: rows have neither `rejected` nor `prompt`, and `chosen` is a text, which does not say where its prompt ends.
    """

    def _completed(dataset: Any) -> Any:
        if isinstance(dataset, dict):
            return {name: _completed(each) for name, each in dataset.items()}
        if not isinstance(dataset, Dataset | IterableDataset):
            return dataset
        first: Mapping[str, Any] = next(iter(dataset), {})
        if "chosen" not in first or first.get("rejected") is not None:
            return dataset
        if "prompt" not in first and isinstance(first["chosen"], str):
            raise ValueError(
                "rows without rejected have a prompt, or a conversation as chosen: name the column of the prompt prompt"
            )
        return dataset.map(_with_chosen_twice)

    return {name: _completed(each) if name.endswith("_dataset") else each for name, each in kwargs.items()}


def _with_chosen_twice(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"rejected": row["chosen"]}


def _check_teacher(model: Any, teacher: Any, args: DistillationConfig) -> None:
    (name,) = args.loss_type
    if not args.kind.uses_teacher:
        if teacher is not None:
            raise ValueError(f"{name} learns from the teacher's completions alone: leave the teacher out")
        return
    if teacher is None and args.teacher_model_name_or_path is None:
        raise ValueError(f"{name} needs a teacher: pass a loaded model, or set teacher_model_name_or_path")
    if teacher is not None and args.teacher_model_name_or_path is not None:
        raise ValueError("there are two teachers, the model and teacher_model_name_or_path: give one")
    if teacher is not None and not isinstance(teacher, nn.Module):
        raise ValueError(f"teacher must be a loaded model, not a {type(teacher).__name__}; a name goes into the config")
    if teacher is not None and teacher is model:
        raise ValueError("the teacher is the student itself, and would be trained with it: pass another model")


def _check_can_precompute(name: str, dataset: Any, first: Mapping[str, Any]) -> None:
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"{name} is streamed, and precompute_teacher goes through all rows beforehand: set it to False"
        )
    if has_images(first):
        raise ValueError(
            f"{name} has images, which are read as they come: precompute_teacher is for text, set it to False"
        )


def _check_tokenizers(model: Any, teacher: Any, args: DistillationConfig, processing_class: Any) -> None:
    """Reject a teacher that has another id, or none, for a token of the student; additional tokens are allowed.

    The tokenizer of a loaded teacher is looked for on this machine. If there is none, only sizes are compared, by
    `check_vocabulary_size`.
    """
    student = model if isinstance(model, str) else str(model.config.name_or_path)
    code = args.trust_remote_code
    if teacher is None:
        name = cast(str, args.teacher_model_name_or_path)
        revision = args.teacher_model_revision or "main"
        other = from_pretrained(AutoTokenizer, name, revision=revision, trust_remote_code=code)
    else:
        name = str(getattr(teacher, "name_or_path", "") or "")
        other = find_tokenizer(name)
    if other is None:
        return
    own = getattr(processing_class, "tokenizer", processing_class) or from_pretrained(
        AutoTokenizer, student, trust_remote_code=code
    )
    if differing := differing_tokens(own, other):
        raise ValueError(
            f"{student} and {name} have different tokenizers ({len(differing)} tokens of the student's differ, such as "
            f"{differing[0]!r}), and distillation compares probabilities token by token"
        )


def check_vocabulary_size(processing_class: Any, size: int) -> None:
    """Reject a student's tokenizer with more tokens than the teacher has logits.

    Args:
        processing_class: the student's tokenizer or processor.
        size: the teacher's vocabulary size.

    Raises:
        ValueError: the teacher has fewer.
    """
    tokens = len(getattr(processing_class, "tokenizer", processing_class))
    if tokens > size:
        raise ValueError(
            f"the student's tokenizer has {tokens} tokens, and the teacher's head only {size}: distillation compares "
            "probabilities token by token, so both need the same tokenizer"
        )
