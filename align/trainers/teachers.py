"""The teacher of a distillation: loaded by name, quantised or not, and its hidden states for a cache on disk."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import BitsAndBytesConfig

from contralto.align.caches.blocks import TokenRows
from contralto.align.losses.chunked import Head
from contralto.align.trainers.base import StagedTrainer
from contralto.align.trainers.batches import PairBatch
from contralto.align.trainers.distillation_config import TEACHER, DistillationConfig
from contralto.align.trainers.scoring import Scoring
from contralto.align.trainers.selection import CompletionBatch
from contralto.align.trainers.sharding import loading_whole
from contralto.align.trl_compat import create_model_from_path, gathered
from contralto.common.hashing import content_digest, model_digest, weights_digest
from contralto.common.head import head_of
from contralto.common.hub import adapter_base, locate, with_adapter
from contralto.common.quiet import report_missing_kernel

__all__ = ["load_teacher", "state_bytes", "states_head", "teacher_digest", "teacher_states", "without_adapter"]

STATES_OF = "output layer"
"""The place in the model where precomputed states are taken, for the key of their cache."""


def load_teacher(args: DistillationConfig) -> Any:
    """Load the teacher that the options name.

    Args:
        args: the options.
    """
    name = cast(str, args.teacher_model_name_or_path)
    base = adapter_base(name)
    dtype = args.teacher_dtype or ("float32" if args.device.type == "cpu" else "auto")
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": args.trust_remote_code}
    if args.teacher_model_revision is not None:
        options["revision"] = args.teacher_model_revision
    if args.teacher_load_in_4bit or args.teacher_load_in_8bit:
        bits: dict[str, Any] = {"load_in_8bit": True}
        if args.teacher_load_in_4bit:
            report_missing_kernel()
            bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        options["quantization_config"] = BitsAndBytesConfig(**bits)  # type: ignore[no-untyped-call]
        options["device_map"] = {"": str(args.device)}
    given = cast(dict[str, Any], args.teacher_model_init_kwargs or {})
    with loading_whole(args) if args.precompute_teacher else nullcontext():  # it runs before DeepSpeed could gather it
        teacher = create_model_from_path(locate(base or name), **{"device_map": None} | options | given)
    return teacher if base is None else without_adapter(with_adapter(teacher, name))


def without_adapter(teacher: Any) -> Any:
    """Return the model inside a PEFT model; its adapter remains active.

    Args:
        teacher: a model, perhaps of peft, or None.
    """
    return teacher.get_base_model() if isinstance(teacher, PeftModel) else teacher


def teacher_digest(teacher: Any, args: DistillationConfig, precision: str, sides: Sequence[str]) -> str:
    """Return a hash of everything except the rows that a teacher's states depend on.

    Args:
        teacher: a loaded teacher; None takes the one that the options name.
        args: the options.
        precision: the mixed precision of accelerate.
        sides: the sides of the pairs whose states are computed.
    """
    extra = (precision, args.max_length, args.truncation_mode, list(sides), STATES_OF)
    if teacher is not None:
        return model_digest(teacher, frozen_only=False, extra=extra)
    name = cast(str, args.teacher_model_name_or_path)
    options = [getattr(args, option) for option in TEACHER[1:5]]
    options += [args.teacher_dtype] if args.teacher_dtype else []
    options += [weights_digest(base)] if (base := adapter_base(name)) else []
    return content_digest(repr((weights_digest(name), options, args.device.type, extra)))


def state_bytes(teacher: Any) -> int:
    """Return the size of a hidden state in bytes.

    Args:
        teacher: a loaded teacher.
    """
    size: int = teacher.config.get_text_config().hidden_size
    return int(size * teacher.dtype.itemsize)


def states_head(teacher: Any) -> Head:
    """Return the head that maps the teacher's hidden states to logits.

    Args:
        teacher: a loaded teacher.

    Raises:
        ValueError: the logits are more than a head of the hidden states.
    """
    head = head_of(teacher, gather=gathered)
    if head is None:
        raise ValueError(
            f"precompute_teacher keeps hidden states, and the logits of {type(teacher).__name__} are more than those times its output "
            "layer: set precompute_teacher to False"
        )
    return head


@torch.no_grad()
def teacher_states(
    trainer: StagedTrainer,
    teacher: Any,
    select: Callable[[PairBatch], CompletionBatch],
    rows: TokenRows,
    batch_size: int,
) -> list[tuple[Tensor, list[int]]]:
    """Return the teacher's states of rows, computed in batches of similar length.

    Args:
        trainer: the trainer.
        teacher: a loaded teacher on the device, with its completion head installed.
        select: return the completions of a batch whose states are needed.
        rows: tokenised rows.
        batch_size: rows per forward pass.

    Returns:
        For each row the states of its completions one below the other `(tokens, H)`, and the number of states of each completion.
    """
    by_row: dict[int, tuple[Tensor, list[int]]] = {}
    order = sorted(range(len(rows)), key=lambda i: -sum(map(len, rows[i].values())))
    for start in range(0, len(order), batch_size):
        own = order[start : start + batch_size]
        batch = PairBatch.of(trainer.to_device(trainer.data_collator([dict(rows[i]) for i in own])))
        completions = select(batch)
        with trainer.accelerator.autocast():
            states = trainer.score_tokens(teacher, completions.batch, Scoring(hidden=True)).hidden
        assert states is not None
        lengths = completions.batch.mask.sum(-1).tolist()
        split = dict(enumerate(torch.split(states.cpu(), lengths)))
        for at, i in enumerate(own):
            places = [part.start + at for part in completions.rows.values()]
            by_row[i] = torch.cat([split[place] for place in places]), [lengths[place] for place in places]
    return [by_row[i] for i in range(len(rows))]
