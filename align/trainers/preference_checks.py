"""Checks of the arguments of `PreferenceTrainer` that need no loaded model."""

# ruff: noqa: TRY004 (a wrong type in somebody's recipe is a ValueError like any other mistake in it)

import math
from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn
from transformers import AutoConfig

from contralto.align.losses.objective import Objective
from contralto.align.trainers.batches import Arrange
from contralto.align.trainers.checks import check_adapter, check_model, has_images
from contralto.align.trainers.config import PreferenceConfig
from contralto.align.trainers.layout_masks import MASKED
from contralto.align.trainers.layouts import LAYOUTS, unsupported_reason
from contralto.align.trainers.packing import arrangement
from contralto.align.trl_compat import attention_of, default_attention
from contralto.common.hub import from_pretrained
from contralto.decoding.vocabulary import differing_tokens, find_tokenizer, vocabulary_size

__all__ = ["check_preference", "checked_arrangement"]

LAYOUT_OPTIONS = (*LAYOUTS, "packing")
"""Options that select a layout of batches."""


def check_preference(model: Any, ref_model: Any, args: PreferenceConfig, kwargs: Mapping[str, Any]) -> None:
    """Reject arguments of `PreferenceTrainer` before a model is loaded.

    Args:
        model: the policy, loaded or by name.
        ref_model: the reference, or None.
        args: the options.
        kwargs: the other arguments of the trainer.

    Raises:
        ValueError: an argument is wrong.
    """
    objective = args.objective
    names, adapter = ", ".join(objective.loss_types), kwargs.get("peft_config")
    check_model(model)
    _check_reference(model, ref_model, objective)
    _check_reference_tokens(model, ref_model, kwargs.get("processing_class"))
    check_adapter(model, adapter, compares_tokens="kl" in objective.needs)
    _check_head_adapter(adapter)
    if "kl" in objective.needs and args.head_in_shards:
        raise ValueError(
            f"{names} reads the reference's whole head, which ZeRO 3 and FSDP 1 keep in shards: use FSDP 2 or ZeRO 2"
        )
    for name, dataset, first in args.checked_pairs(kwargs.get("train_dataset"), kwargs.get("eval_dataset")):
        _check_margins(name, dataset, first, objective)
        if "images" in objective.needs:
            _check_views(name, first, next(loss.name for loss in objective.losses if "images" in loss.needs))
        if has_images(first):
            _check_image_options(name, dataset, args)


def _check_reference(model: Any, ref_model: Any, objective: Objective) -> None:
    if ref_model is None:
        return
    if not objective.needs & {"reference", "kl"}:
        raise ValueError(f"{', '.join(objective.loss_types)} uses no reference: leave ref_model out")
    if not isinstance(ref_model, nn.Module):
        raise ValueError(f"ref_model must be a loaded model, not a {type(ref_model).__name__}")
    if ref_model is model:
        raise ValueError("ref_model is the model itself, and would be trained with it: leave it out to take a copy")


def _check_reference_tokens(model: Any, ref_model: Any, processing_class: Any) -> None:
    """Reject a reference that has another token for an id of the policy's tokenizer, or no row for it.

    The reference's tokenizer is looked for where its weights come from. Tokens that were added behind all of its own are allowed, since
    both models may have been resized for them.
    """
    if ref_model is None:
        return
    own = getattr(processing_class, "tokenizer", processing_class) or find_tokenizer(_name(model))
    if own is None:
        return
    if isinstance(model, nn.Module) and hasattr(ref_model, "config"):
        size, least = vocabulary_size(ref_model), min(len(own), vocabulary_size(model))
        if size < least:
            raise ValueError(
                f"the policy uses {least} tokens, and the head of ref_model has only {size}: both need the same tokenizer"
            )
    other = find_tokenizer(_name(ref_model))
    ids = own.get_vocab()
    if differing := [token for token in differing_tokens(own, other) if ids[token] < len(other)] if other else []:
        raise ValueError(
            f"ref_model, {_name(ref_model)}, has another tokenizer than the policy ({len(differing)} tokens of the policy's differ, "
            f"such as {differing[0]!r}), and the loss compares their probabilities of the same tokens"
        )


def _name(model: Any) -> str:
    """Return the folder or hub name of a model, loaded or not; empty if there is none."""
    return model if isinstance(model, str) else str(getattr(model, "name_or_path", "") or "")


def _check_head_adapter(adapter: Any) -> None:
    targets = adapter.target_modules if isinstance(adapter, LoraConfig) else None
    if targets and not isinstance(targets, str) and "lm_head" in targets:
        raise ValueError("an adapter on lm_head would not be trained, since only its weight is read: leave lm_head out")


def checked_arrangement(model: Any, args: PreferenceConfig, adapter: Any) -> Arrange | None:
    """Return the layout of batches that the options select, None for padded rows.

    Args:
        model: the policy, loaded or by name.
        args: the options.
        adapter: the argument `peft_config` of the trainer.

    Raises:
        ValueError: the model does not support the layout, as far as its configuration shows it.
    """
    option = next((option for option in LAYOUT_OPTIONS if getattr(args, option)), None)
    if option is None:
        return None
    if isinstance(adapter, PeftConfig) and adapter.is_prompt_learning:
        raise ValueError(
            f"{option} moves tokens, and prompts that are learned stand before each row: leave one of them out"
        )
    model_class, config, attention = _architecture(model, args)
    masked = args.prefix_sharing or (args.packing and attention in MASKED)
    # of code from a model's own repository nothing is known: the first step compares the log-probabilities
    reason = None if model_class is None else unsupported_reason(model_class, config, attention, masked=masked)
    if reason:
        raise ValueError(f"{option} is set, but {reason}: leave {option} out")
    if masked:
        _check_masked(option, args, config, attention)
    elif args.pack_length is not None:
        raise ValueError(
            f"pack_length is set, but attn_implementation {attention} reads a batch as one row without padding: leave pack_length out"
        )
    return arrangement(args, attention)


def _check_masked(option: str, args: PreferenceConfig, config: Any, attention: str) -> None:
    """Reject options that do not support a mask of pairs of tokens."""
    if attention == "flex_attention" and args.device.type == "cpu":
        raise ValueError(
            f"{option} is set with attn_implementation flex_attention, which has no backward pass on a CPU: use sdpa"
        )
    text: Any = config.get_text_config()
    given = args.router_aux_loss_coef
    balance = getattr(text, "router_aux_loss_coef", 0.0) if given is None else given
    if balance and hasattr(text, "output_router_logits"):
        raise ValueError(
            f"{option} is set, and router_aux_loss_coef balances the experts over padded rows, in which a prompt counts twice: set one of "
            "them to 0"
        )


def _architecture(model: Any, args: PreferenceConfig) -> tuple[Any, Any, str]:
    """Return class, configuration and attention of a model, loaded or not; no class if it is not one of transformers."""
    if not isinstance(model, str):
        bare: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        return type(bare), bare.config, attention_of(bare.config)
    options: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    code = options.get("trust_remote_code", args.trust_remote_code)
    config = from_pretrained(AutoConfig, model, revision=options.get("revision"), trust_remote_code=code)
    model_class = getattr(transformers, (config.architectures or [""])[0], None)
    return model_class, config, options.get("attn_implementation") or default_attention(model_class)


def _check_margins(
    name: str, dataset: Dataset | IterableDataset, first: Mapping[str, Any], objective: Objective
) -> None:
    if "margin" in objective.needs and "margin" not in first:
        loss = next(loss.name for loss in objective.losses if "margin" in loss.needs)
        raise ValueError(
            f"{name} has no column margin, which {loss} needs: how much better chosen is, a number per row"
        )
    if isinstance(dataset, Dataset):
        for column in {"margin", "chosen_advantage"} & set(dataset.column_names):
            logarithmic = [loss.name for loss in objective.losses if "positive_margin" in loss.requires]
            _check_numbers(name, column, dataset[column], logarithmic if column == "margin" else [])


def _check_numbers(name: str, column: str, values: Sequence[Any], logarithmic: Sequence[str]) -> None:
    """Reject values that are not finite numbers, and values of at most 0 for losses that take the logarithm."""
    for at, value in enumerate(values, 1):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name}, row {at}, column {column}: {value!r} is not a finite number")
        if logarithmic and value <= 0:
            raise ValueError(
                f"{name}, row {at}, column {column}: {logarithmic[0]} takes its logarithm, so it must be above 0, not {value}"
            )


def _check_image_options(name: str, dataset: Dataset | IterableDataset, args: PreferenceConfig) -> None:
    """Reject options that do not support the images of a data set."""
    if args.precompute_ref_log_probs and isinstance(dataset, IterableDataset):
        raise ValueError(
            f"{name} is streamed and has images, which precompute_ref_log_probs would read twice: load it as a whole, or set it to False"
        )
    if args.precompute_ref_log_probs and "images" in args.objective.needs:
        raise ValueError(
            f"{name} is read under two images and none: precompute_ref_log_probs keeps one of them, set it to False"
        )
    if option := next((option for option in LAYOUT_OPTIONS if getattr(args, option)), None):
        raise ValueError(f"{name} has images, whose tokens {option} cannot move: leave it out")
    if args.monitor_generate:
        raise ValueError(
            f"{name} has images, and monitor_generate writes texts from prompts of text alone: leave it at 0"
        )
    if args.truncation_mode == "keep_end" and args.max_length:
        raise ValueError(f"{name} has images, and truncation_mode keep_end would cut them away: use keep_start")


def _check_views(name: str, row: Mapping[str, Any], loss: str) -> None:
    """Reject rows without the two lists of images that a loss needs."""
    for column in ("images", "rejected_images"):
        if not row.get(column) or not isinstance(row[column], list | tuple):
            raise ValueError(
                f"{name} has no column {column} with a list of images in each row: {loss} needs images, of which chosen is true, and "
                "rejected_images, of which rejected is"
            )
    if not isinstance(row.get("prompt"), list):
        raise ValueError(
            f"{name} has prompts of bare text: {loss} takes the images out of a prompt, which must be a list of messages"
        )
