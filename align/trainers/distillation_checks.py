"""Checks of the arguments of `DistillationPairTrainer` that need no loaded model."""

# ruff: noqa: TRY004 (a wrong type in somebody's recipe is a ValueError like any other mistake in it)

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import AutoTokenizer

from contralto.align.trainers.checks import check_adapter, check_model, has_images
from contralto.align.trainers.distillation_config import DISTILLATION_LOSSES, DistillationConfig
from contralto.common.hub import from_pretrained
from contralto.decoding.branches.aligned import byte_tokens
from contralto.decoding.vocabulary import differing_tokens, find_tokenizer

__all__ = [
    "check_distillation",
    "check_vocabulary_size",
    "same_vocabulary",
    "teacher_tokenizer",
    "with_unread_rejected",
]


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
        cache = "" if args.kind.text else "set precompute_teacher, or "
        raise ValueError(
            f"the teacher's whole head is read, which ZeRO 3 and FSDP 1 keep in shards: {cache}use FSDP 2 or ZeRO 2"
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
        if args.kind.text and has_images(first):
            raise ValueError(
                f"{name} has images, and {args.loss_type[0]} compares models by text alone: take another loss, such as jsd"
            )
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
    """Reject a teacher whose tokens cannot be compared with those of the student.

    Losses that compare by text need tokenizers that can be read as bytes. For the others, a teacher that has another id, or none, for a
    token of the student is rejected; additional tokens are allowed. The tokenizer of a loaded teacher is looked for on this machine. If
    there is none, only sizes are compared, by `check_vocabulary_size`.
    """
    student = model if isinstance(model, str) else str(model.config.name_or_path)
    other = teacher_tokenizer(teacher, args)
    if other is None:
        return
    own = getattr(processing_class, "tokenizer", processing_class) or from_pretrained(
        AutoTokenizer, student, trust_remote_code=args.trust_remote_code
    )
    differing = differing_tokens(own, other)
    if differing and args.kind.text:
        byte_tokens(own, student)
        byte_tokens(other, _teacher_name(teacher, args))
    elif differing:
        by_text = [name for name, kind in DISTILLATION_LOSSES.items() if kind.text]
        raise ValueError(
            f"{student} and {_teacher_name(teacher, args)} have different tokenizers ({len(differing)} tokens of the student's differ, such "
            f"as {differing[0]!r}), and {args.loss_type[0]} compares probabilities token by token: take the recipe "
            f"{' or '.join(f'distill_{name}' for name in by_text)} (loss_type {', '.join(by_text)}), which compare by text"
        )


def _teacher_name(teacher: Any, args: DistillationConfig) -> str:
    """Return the folder or the name that the teacher was loaded from; empty if there is none."""
    return str(args.teacher_model_name_or_path or getattr(teacher, "name_or_path", "") or "")


def teacher_tokenizer(teacher: Any, args: DistillationConfig) -> Any:
    """Return the teacher's tokenizer, or None if it is not found.

    Args:
        teacher: a loaded teacher, whose tokenizer is looked for beside its weights; or None.
        args: the options, which may name the teacher.

    Raises:
        ValueError: a loss that compares by text has no tokenizer of the teacher.
    """
    name = _teacher_name(teacher, args)
    if args.teacher_model_name_or_path is not None:
        revision = args.teacher_model_revision or "main"
        return from_pretrained(AutoTokenizer, name, revision=revision, trust_remote_code=args.trust_remote_code)
    found = find_tokenizer(name)
    if found is None and args.kind.text:
        raise ValueError(
            f"{args.loss_type[0]} reads completions in the teacher's tokens, and the loaded teacher has no tokenizer in its folder "
            f"({name or 'it was not loaded from one'}): save the tokenizer there, or set teacher_model_name_or_path"
        )
    return found


def same_vocabulary(processing_class: Any, other: Any) -> bool:
    """Return whether every token of the student has the same id in the teacher's tokenizer.

    Args:
        processing_class: the student's tokenizer or processor.
        other: the teacher's tokenizer.
    """
    return not differing_tokens(getattr(processing_class, "tokenizer", processing_class), other)


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
