"""What can be wrong with a preference training before its first step: in the data, in the reference, in the adapter.

Each check makes a `Finding`: an error if the training cannot mean what it should, a warning if it likely does not do what was wanted,
with the rows it was seen in and what to do about it. `monitor.Monitor` runs them; all can be called alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import ProcessorMixin
from trl import is_conversational, maybe_extract_prompt  # type: ignore[attr-defined]

from contralto.align.trainers.batches import PairBatch
from contralto.align.trainers.reach import reach
from contralto.align.trainers.specials import TAIL, Specials, end_tokens, holds_null
from contralto.data_gen.dataset import template_options

__all__ = ["Finding", "Level", "audit_dropped", "audit_model", "audit_rows", "end_tokens", "row_name"]

Level = Literal["error", "warning", "note"]
NAMED = 8
"""Rows that a finding names."""
RETOKENISED = 1000
"""Rows whose prompts are tokenised once more, to see where the completion begins."""
STREAMED = 1000
"""Rows of a stream that are looked at."""
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""How far policy and reference may differ before training, in nats per token, by dtype."""
HALF_TOLERANCE = 0.02
"""The same in half precision, where batches of another shape round differently."""
READ = (
    "id",
    "prompt",
    "chosen",
    "rejected",
    "prompt_ids",
    "chosen_ids",
    "rejected_ids",
    "chat_template_kwargs",
    "tools",
)
"""Columns that are looked at: images are not."""
NUDGE = 0.02
"""The standard deviation of the noise that shows what depends on the trained weights."""


class Finding(NamedTuple):
    """Something that an audit found."""

    level: Level
    text: str
    """What was found, one sentence."""
    advice: str
    """What to do, one sentence."""
    rows: tuple[str, ...] = ()
    """The first rows it was seen in: their `id`, or their number from 1."""
    seen: int = 0
    """In how many rows."""

    def __str__(self) -> str:
        if not self.rows:
            return f"{self.text} {self.advice}"
        more = f" and {self.seen - len(self.rows)} more" if self.seen > len(self.rows) else ""
        return f"{self.text} {self.advice} Rows: {', '.join(self.rows)}{more}."


def row_name(row: Mapping[str, Any], at: int) -> str:
    """What a row is called: its `id`, or its number.

    Examples:
        >>> row_name({"id": "a7"}, 3), row_name({}, 3)
        ('a7', '3')
    """
    return str(row.get("id") or at)


# ------------------------------------------------------------------------------------------------------------- the data


@dataclass
class _Noted:
    """Rows in which something was seen."""

    names: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.names) < NAMED:
            self.names.append(name)

    def finding(self, level: Level, text: str, advice: str) -> list[Finding]:
        return [Finding(level, text, advice, tuple(self.names), self.count)] if self.count else []


def audit_rows(
    dataset: Any,
    processing_class: Any,
    *,
    name: str,
    ends: set[int],
    max_length: int | None,
    truncation_mode: str = "keep_start",
    progress: bool = True,
) -> list[Finding]:
    """Look at every row as it will be trained on; of a stream, at the first thousand.

    Args:
        dataset: as TRL prepared it: with `prompt_ids`, `chosen_ids` and `rejected_ids`, or, with images, with texts.
        processing_class: its tokenizer or processor.
        name: of the data set, for the findings.
        ends: of `end_tokens`.
        max_length, truncation_mode: as in the training's configuration.
        progress: show a bar.

    Returns:
        Findings: texts without tokens, without words, that are the same, that are cut off, that never end or end twice; prompts that
        merge with the completion, begin twice, or are empty; special tokens in messages; nulls in tools and calls; texts beside a
        chat template.
    """
    seen: dict[str, _Noted] = {}
    specials = Specials(getattr(processing_class, "tokenizer", processing_class), ends)
    special = ""
    total = 0
    size = len(dataset) if isinstance(dataset, Dataset) else None
    step = max(1, (size or STREAMED) // RETOKENISED)
    merged = ""
    if dataset.column_names:
        dataset = dataset.select_columns([column for column in READ if column in dataset.column_names])
    for at, row in enumerate(
        tqdm(islice(dataset, STREAMED if size is None else None), "audit", size, disable=not progress), 1
    ):
        total += 1
        faults = set(_of_texts(row))
        if token := specials.in_messages(row):
            faults.add("rendered" if specials.is_outer(token) else "special")
            special = special or token
        has_template = getattr(processing_class, "chat_template", None)
        if has_template and isinstance(row.get("prompt"), str) and not specials.first([row["prompt"]]):
            faults.add("bare")
        if "prompt_ids" in row:
            faults |= set(_of_tokens(row, ends, max_length, truncation_mode))
            faults |= set(_of_edges(row, specials))
            if at % step == 0 and (left_over := _left_over(row, processing_class)):
                faults.add("merged")
                merged = merged or repr(left_over)
        for fault in faults:
            seen.setdefault(fault, _Noted()).add(row_name(row, at))
    rows = f"{'the first ' if size is None and total == STREAMED else ''}{total} rows"
    return list(_findings(seen, name, total, merged, step, rows)) + list(
        _of_rendering(seen, name, total, rows, special)
    )


def _of_texts(row: Mapping[str, Any]) -> Iterator[str]:
    """Faults that texts show."""
    if "chosen" not in row or "rejected" not in row:
        return
    chosen, rejected = _words(row["chosen"]), _words(row["rejected"])
    if not chosen.strip() or not rejected.strip():
        yield "wordless"
    if "prompt_ids" not in row and chosen == rejected:
        yield "same"
    calls = [message.get("tool_calls") for side in (row["chosen"], row["rejected"]) for message in _messages(side)]
    if any(map(holds_null, (row.get("tools"), *calls))):
        yield "null"


def _messages(text: Any) -> list[Any]:
    return text if isinstance(text, list) else []


def _of_edges(row: Mapping[str, Any], specials: Specials) -> Iterator[str]:
    """Faults at the beginning and the end of texts."""
    sides = (row["chosen_ids"], row["rejected_ids"])
    if any(specials.begins_twice(row["prompt_ids"], side) for side in sides):
        yield "begins twice"
    if any(map(specials.ends_twice, sides)):
        yield "ends twice"


def _words(text: Any) -> str:
    """What is said, in a text or in messages; a call of a tool counts."""
    if not isinstance(text, list):
        return str(text or "")
    return "\n".join(_part(message.get("content")) or str(message.get("tool_calls") or "") for message in text)


def _part(content: Any) -> str:
    if not isinstance(content, list):
        return str(content or "")
    return "".join(str(each.get("text") or "") if isinstance(each, dict) else str(each) for each in content)


def _of_tokens(row: Mapping[str, Any], ends: set[int], max_length: int | None, truncation_mode: str) -> Iterator[str]:
    """Faults that tokens show."""
    prompt, sides = row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"])
    if not all(sides):
        yield "empty"
    elif _kept(sides[0], prompt, max_length, truncation_mode) == _kept(sides[1], prompt, max_length, truncation_mode):
        yield "same"
    if not prompt:
        yield "promptless"
    too_long = max_length is not None and max(map(len, sides)) + len(prompt) > max_length
    if too_long:
        yield "cut" if truncation_mode == "keep_start" else "beheaded"
    cut = too_long and truncation_mode == "keep_start"  # then its end is missing anyway
    if all(sides) and not cut and not all(ends & set(side[-TAIL:]) for side in sides):
        yield "endless"


def _kept(side: list[int], prompt: list[int], max_length: int | None, truncation_mode: str) -> list[int]:
    """What truncation leaves of a text."""
    if max_length is None:
        return side
    return side[: max(0, max_length - len(prompt))] if truncation_mode == "keep_start" else side[-max_length:]


def _left_over(row: Mapping[str, Any], processing_class: Any) -> str:
    """The end of the prompt that is no beginning of prompt and completion, as a text."""
    if "prompt" not in row or isinstance(processing_class, ProcessorMixin):
        return ""
    ids = _prompt_ids(row, processing_class)
    kept = len(row["prompt_ids"])
    return str(processing_class.decode(ids[kept:])) if kept < len(ids) else ""


def _prompt_ids(row: Mapping[str, Any], tokenizer: Any) -> list[int]:
    """The prompt's tokens, without a completion after them."""
    if not is_conversational({"prompt": row["prompt"]}):
        return list(tokenizer(row["prompt"])["input_ids"])
    said = tokenizer.apply_chat_template(
        row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=True, **template_options(row)
    )
    return list(said["input_ids"])


def _of_rendering(seen: Mapping[str, _Noted], name: str, total: int, rows: str, special: str) -> Iterator[Finding]:
    """What was seen of chat templates and of the tokens that they write."""

    def of(fault: str, level: Level, text: str, advice: str) -> list[Finding]:
        noted = seen.get(fault, _Noted())
        return noted.finding(level, f"{name}: in {noted.count} of {rows} {text}.", advice)

    def most(fault: str) -> Level:
        return "error" if seen.get(fault, _Noted()).count * 2 >= total else "warning"

    yield from of(
        "rendered",
        most("rendered"),
        f"a message holds {special}, as text does that a chat template has rendered already",
        "Give the messages as they were before, or texts (strings) in place of messages: the template is applied to messages.",
    )
    yield from of(
        "special",
        "warning",
        f"a message holds {special}, which is a special token of the tokenizer",
        "Take it out unless it is meant: the model reads it as that token, not as characters.",
    )
    yield from of(
        "begins twice",
        most("begins twice"),
        "the beginning-of-sequence token stands twice at the beginning",
        "Take it out of the texts: the tokenizer puts one before every text.",
    )
    yield from of(
        "ends twice",
        "warning",
        "an end-of-sequence token stands twice at the end",
        "End the texts with that token and nothing after it, or leave it out: TRL adds it to texts that do not end with it.",
    )
    yield from of(
        "null",
        "warning",
        "a tool or a call of one holds null",
        "Unless it is meant, read the rows from JSON lines: Arrow and parquet give all rows the keys of each.",
    )
    yield from of(
        "bare",
        "note",
        "prompt and completion are texts, to which the tokenizer's chat template is not applied",
        "For a chat model give conversations, or make them of texts (conversations).",
    )


def _findings(
    seen: Mapping[str, _Noted], name: str, total: int, merged: str, step: int, rows: str
) -> Iterator[Finding]:
    def of(fault: str, level: Level, text: str, advice: str) -> list[Finding]:
        noted = seen.get(fault, _Noted())
        return noted.finding(level, f"{name}: in {noted.count} of {rows} {text}.", advice)

    half = seen.get("same", _Noted()).count * 2 >= total
    yield from of("empty", "error", "a text has no token", "Drop these rows: nothing can be learned from them.")
    yield from of("wordless", "warning", "a text says nothing", "Drop these rows, unless silence is the lesson.")
    yield from of(
        "same",
        "error" if half else "warning",
        "chosen and rejected are the same",
        "Drop these rows: they have no preferred text, and their gradients cancel or pull at random.",
    )
    yield from of(
        "cut",
        "warning",
        "prompt and completion are longer than max_length and lose their end",
        "Raise max_length, or drop these rows: the model is taught to stop nowhere.",
    )
    yield from of(
        "beheaded",
        "warning",
        "prompt and completion are longer than max_length and lose their beginning",
        "Raise max_length, or drop these rows: the completion answers a prompt that is not seen whole.",
    )
    yield from of(
        "promptless",
        "warning",
        "the prompt has no token",
        "Give a prompt, or a tokenizer with a token for the beginning: the first token of the completion is not trained.",
    )
    never = "no completion ends" if seen.get("endless", _Noted()).count == total else "a completion does not end"
    yield from of(
        "endless",
        "warning",
        f"{never} with an end-of-sequence token",
        "Check the chat template and eos_token: a model that never sees the end does not learn to stop.",
    )
    looked = "" if step == 1 else f" (one row of {step} was looked at)"
    yield from of(
        "merged",
        "warning",
        f"the prompt alone is tokenised otherwise than before its completion{looked}; {merged} is left out of training",
        "Use a chat template that renders a prompt the same in both cases, or end prompts where a token ends.",
    )


def audit_dropped(
    given: Any, prepared: Any, processing_class: Any, *, name: str, max_length: int | None, progress: bool = True
) -> list[Finding]:
    """Which rows TRL left out because their prompt alone fills `max_length`.

    Args:
        given: the data set before its preparation.
        prepared: after it.
        processing_class: its tokenizer.
        name: of the data set, for the findings.
        max_length: as in the training's configuration.
        progress: show a bar.
    """
    if not isinstance(given, Dataset) or max_length is None or len(given) == len(prepared):
        return []
    noted = _Noted()
    named = () if isinstance(processing_class, ProcessorMixin) else given
    for at, row in enumerate(tqdm(named, "audit of dropped rows", disable=not progress), 1):
        if len(_prompt_ids(maybe_extract_prompt(dict(row)), processing_class)) >= max_length:
            noted.add(row_name(row, at))
    text = f"{name}: TRL dropped {len(given) - len(prepared)} of {len(given)} rows, whose prompt alone fills max_length ({max_length})."
    return [Finding("warning", text, "Raise max_length, or drop these rows yourself.", tuple(noted.names), noted.count)]


# ------------------------------------------------------------------------------------------------------------ the model


def audit_model(trainer: Any, batches: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Policy and reference before the first step, on a few pairs.

    Args:
        trainer: a `PreferenceTrainer`, on its device.
        batches: what its collator gives.

    Returns:
        Findings: log-probabilities that are not finite; a policy that is not its reference; an adapter that nothing depends on, or
        that the reference depends on too, although it should be off; one that the learning rates of all steps cannot move. These
        are seen by moving the adapter for a moment.
    """
    policy, reference = _logps(trainer, batches), _reference_logps(trainer, batches)
    for whose, logps in (("policy", policy), ("reference", reference)):
        if logps is not None and not logps.isfinite().all():
            text = f"The log-probabilities of the {whose} are not finite before the first step."
            return [
                Finding("error", text, "Check the weights and the dtype: float16 overflows where bfloat16 does not.")
            ]
    return [*_start(trainer, policy, reference), *_adapter(trainer, batches, policy, reference), *_too_slow(trainer)]


def _too_slow(trainer: Any) -> Iterator[Finding]:
    """The learning rates of all steps are enough to move the adapter."""
    from contralto.align.monitoring.record import IDLE  # which imports this module

    for moved, total in reach(trainer):
        if moved < IDLE:
            text = (
                f"The learning rates of all {trainer.state.max_steps} steps add up to {total:.1g}, which can change texts by no more "
                f"than {moved:.1g} nats per token: nothing is going to move."
            )
            advice = (
                f"Raise learning_rate ({trainer.args.learning_rate:g}), or train longer: an adapter wants ten to a hundred times the "
                "rate of full training."
            )
            yield Finding("warning", text, advice)


def _start(trainer: Any, policy: Tensor, reference: Tensor | None) -> Iterator[Finding]:
    """Policy and reference are the same before the first step."""
    if reference is None:
        return
    gap = float((policy - reference).abs().mean())
    dtype = next(trainer.model.parameters()).dtype if trainer.accelerator.mixed_precision == "no" else None
    if gap <= (TOLERANCE.get(dtype, HALF_TOLERANCE) if dtype else HALF_TOLERANCE):
        return
    text = f"Policy and reference differ before the first step, by {gap:.3g} nats per token."
    if trainer.ref_model is not None:
        advice = (
            "Fine if ref_model is another model on purpose; else give the same weights, dtype and attention to both."
        )
    elif trainer.args.precompute_ref_log_probs:
        advice = "The precomputed reference is of other weights or another precision: empty reference_cache, and compare dtypes."
    else:
        advice = (
            "The reference is the model with its adapter off: start the adapter at zero (init_lora_weights True), since others, "
            "such as PiSSA, also change the weights below."
        )
    yield Finding("warning", text, advice)


def _adapter(
    trainer: Any, batches: Sequence[Mapping[str, Any]], policy: Tensor, reference: Tensor | None
) -> Iterator[Finding]:
    """The policy depends on what is trained, and the reference does not."""
    if not is_peft_model(trainer.unwrap(trainer.model)) or trainer.args.deepspeed_plugin is not None:
        return
    weights = [_local(weight) for weight in trainer.model.parameters() if weight.requires_grad]
    before = [weight.detach().clone() for weight in weights]
    try:
        _nudge(weights)
        moved = (_logps(trainer, batches) - policy).abs().max()
        live = reference is not None and not trainer.args.precompute_ref_log_probs
        again = _reference_logps(trainer, batches) if live else None
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)
    if not moved > 0:
        text = "The policy's log-probabilities do not depend on the weights that are trained."
        yield Finding("error", text, "Check that the adapter is active, and that target_modules names layers in use.")
    if again is not None and reference is not None and (again - reference).abs().max() > 0.01 * moved:
        text = "The reference moves with the weights that are trained: switching the adapter off does not restore it."
        yield Finding(
            "error",
            text,
            'Train no weights outside the adapter (bias "none", no unfrozen layers), or give a ref_model.',
        )


def _local(weight: Tensor) -> Tensor:
    """What FSDP 2 keeps of a weight in this process."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _nudge(weights: Sequence[Tensor]) -> None:
    """Noise from no generator that the training uses."""
    with torch.no_grad():
        for at, weight in enumerate(weights):
            generator = torch.Generator(weight.device).manual_seed(at)
            weight += NUDGE * torch.randn(
                weight.shape, generator=generator, device=weight.device, dtype=torch.float32
            ).to(weight.dtype)


def _logps(trainer: Any, batches: Sequence[Mapping[str, Any]]) -> Tensor:
    """The policy's log-probabilities of all tokens of completions, one after another."""
    found = []
    with torch.no_grad(), trainer.accelerator.autocast():
        for inputs in batches:
            batch = PairBatch.of(trainer.to_device(inputs))
            found.append(trainer.score_tokens(trainer.model, batch).logps[batch.mask].float())
    return torch.cat(found)


def _reference_logps(trainer: Any, batches: Sequence[Mapping[str, Any]]) -> Tensor | None:
    """The reference's, None if there is none."""
    if not trainer.uses_reference:
        return None
    found = []
    for inputs in batches:
        batch = PairBatch.of(trainer.to_device(inputs))
        if batch.ref_token_logps is not None:
            found.append(batch.ref_token_logps[batch.mask].float())
            continue
        with trainer.reference_model() as (model, _):
            found.append(trainer.score_tokens(model, batch).logps[batch.mask].float())
    return torch.cat(found)
