"""The audit of a preference dataset before training: rows that cannot teach what they should.

A fault is an error if the training cannot mean what it should, and a warning if it likely does not do what was intended. Every finding
lists rows and says what to do about them.
"""

from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

from datasets import Dataset
from tqdm import tqdm
from transformers import ProcessorMixin
from trl import is_conversational, maybe_extract_prompt  # type: ignore[attr-defined]

from contralto.align.monitoring.findings import Finding, Level, RowTally, row_name
from contralto.align.trainers.specials import TAIL, SpecialTokens, contains_none
from contralto.data_gen.dataset import template_options

__all__ = ["audit_dropped", "audit_rows"]

RETOKENISED_ROWS = 1000
"""Rows whose prompts are tokenised once more, to see where the completion begins."""
STREAMED_ROWS = 1000
"""Rows of a stream that are audited."""
AUDITED_COLUMNS = (
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
"""Columns that are read; images are not."""


class Fault(NamedTuple):
    """A kind of fault in rows."""

    level: Level
    text: str
    """The observation, with `{detail}` for what was found first."""
    advice: str
    is_error_in_half: bool = False
    """The fault is an error if half of the rows have it."""


FAULTS = {
    "empty": Fault("error", "a text has no token", "Drop these rows: nothing can be learned from them."),
    "wordless": Fault("warning", "a text says nothing", "Drop these rows, unless silence is the lesson."),
    "same": Fault(
        "warning",
        "chosen and rejected are the same",
        "Drop these rows: they have no preferred text, and their gradients cancel or pull at random.",
        is_error_in_half=True,
    ),
    "cut": Fault(
        "warning",
        "prompt and completion are longer than max_length and lose their end",
        "Raise max_length, or drop these rows: the model is taught to stop nowhere.",
    ),
    "beheaded": Fault(
        "warning",
        "prompt and completion are longer than max_length and lose their beginning",
        "Raise max_length, or drop these rows: the completion answers a prompt that is not seen whole.",
    ),
    "promptless": Fault(
        "warning",
        "the prompt has no token",
        "Give a prompt, or a tokenizer with a token for the beginning: the first token of the completion is not trained.",
    ),
    "endless": Fault(
        "warning",
        "{detail} with an end-of-sequence token",
        "Check the chat template and eos_token, and raise max_new_tokens if the completions were cut off when they were generated: a "
        "model that never sees the end does not learn to stop.",
    ),
    "merged": Fault(
        "warning",
        "the prompt alone is tokenised otherwise than before its completion{detail} is left out of training",
        "Use a chat template that renders a prompt the same in both cases, or end prompts where a token ends.",
    ),
    "rendered": Fault(
        "warning",
        "a message holds {detail}, as text does that a chat template has rendered already",
        "Give the messages as they were before, or texts (strings) in place of messages: the template is applied to messages.",
        is_error_in_half=True,
    ),
    "special": Fault(
        "warning",
        "a message holds {detail}, which is a special token of the tokenizer",
        "Take it out unless it is meant: the model reads it as that token, not as characters.",
    ),
    "begins twice": Fault(
        "warning",
        "the beginning-of-sequence token stands twice at the beginning",
        "Take it out of the texts: the tokenizer puts one before every text.",
        is_error_in_half=True,
    ),
    "ends twice": Fault(
        "warning",
        "an end-of-sequence token stands twice at the end",
        "End the texts with that token and nothing after it, or leave it out: TRL adds it to texts that do not end with it.",
    ),
    "null": Fault(
        "warning",
        "a tool or a call of one holds null",
        "Unless it is meant, read the rows from JSON lines: Arrow and parquet give all rows the keys of each.",
    ),
    "bare": Fault(
        "note",
        "prompt and completion are texts, to which the tokenizer's chat template is not applied",
        "For a chat model give conversations, or make them of texts: --conversations, in a script load_pairs(..., conversations=True).",
    ),
}
"""The kinds of faults, in the order of the findings."""


def audit_rows(
    dataset: Any,
    processing_class: Any,
    *,
    name: str,
    ends: set[int],
    max_length: int | None,
    truncation_mode: str = "keep_start",
    skip: Container[str] = (),
    progress: bool = True,
) -> list[Finding]:
    """Audit every row in the form in which it is trained on; of a stream, the first thousand.

    Args:
        dataset: the dataset as TRL prepared it: with `prompt_ids`, `chosen_ids` and `rejected_ids`, or, with images, with strings.
        processing_class: its tokenizer or processor.
        name: the name of the dataset, for the findings.
        ends: ids of the tokens that end a completion, see `specials.end_tokens`.
        max_length: as in the training's configuration.
        truncation_mode: as in the training's configuration.
        skip: kinds of `FAULTS` that are not reported.
        progress: show a progress bar.

    Returns:
        One finding per kind of fault in `FAULTS` that occurs.
    """
    audit = _RowAudit(processing_class, ends, max_length, truncation_mode)
    size = len(dataset) if isinstance(dataset, Dataset) else None
    audit.retokenised_step = max(1, (size or STREAMED_ROWS) // RETOKENISED_ROWS)
    if dataset.column_names:
        dataset = dataset.select_columns([column for column in AUDITED_COLUMNS if column in dataset.column_names])
    rows = islice(dataset, STREAMED_ROWS if size is None else None)
    for row in tqdm(rows, "audit", size, disable=not progress):
        audit.add(row)
    is_part = size is None and audit.total == STREAMED_ROWS
    for kind in FAULTS:
        if kind in skip:
            audit.tallies.pop(kind, None)
    return list(audit.findings(name, f"{'the first ' if is_part else ''}{audit.total} rows"))


class _RowAudit:
    """The faults of rows, counted by kind."""

    def __init__(self, processing_class: Any, ends: set[int], max_length: int | None, truncation_mode: str) -> None:
        self.processing_class = processing_class
        self.ends, self.max_length, self.truncation_mode = ends, max_length, truncation_mode
        self.specials = SpecialTokens(getattr(processing_class, "tokenizer", processing_class), ends)
        self.tallies: dict[str, RowTally] = defaultdict(RowTally)
        self.details: dict[str, str] = {}
        self.total = 0
        self.retokenised_step = 1

    def add(self, row: Mapping[str, Any]) -> None:
        """Count the faults of a row."""
        self.total += 1
        faults = {*_text_faults(row), *self._template_faults(row)}
        if "prompt_ids" in row:
            faults |= {*self._token_faults(row), *self._edge_faults(row), *self._boundary_faults(row)}
        for fault in faults:
            self.tallies[fault].add(row_name(row, self.total))

    def findings(self, name: str, rows: str) -> Iterator[Finding]:
        """Yield the findings.

        Args:
            name: the name of the dataset.
            rows: the number of rows, in words.
        """
        never = self.tallies["endless"].count == self.total
        self.details["endless"] = "no completion ends" if never else "a completion does not end"
        for kind, fault in FAULTS.items():
            tally = self.tallies[kind]
            if tally.count:
                is_error = fault.is_error_in_half and tally.count * 2 >= self.total
                text = fault.text.format(detail=self.details.get(kind, ""))
                yield tally.finding(
                    "error" if is_error else fault.level, f"{name}: in {tally.count} of {rows} {text}.", fault.advice
                )

    def _template_faults(self, row: Mapping[str, Any]) -> Iterator[str]:
        """Yield faults in the use of the chat template."""
        if token := self.specials.in_messages(row):
            kind = "rendered" if self.specials.is_outer(token) else "special"
            self.details.setdefault("rendered", token)
            self.details.setdefault("special", token)
            yield kind
        has_template = getattr(self.processing_class, "chat_template", None)
        if has_template and isinstance(row.get("prompt"), str) and not self.specials.first([row["prompt"]]):
            yield "bare"

    def _token_faults(self, row: Mapping[str, Any]) -> Iterator[str]:
        """Yield faults in the lengths and ends of token sequences."""
        prompt, sides = row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"])
        if not all(sides):
            yield "empty"
        elif self._truncated(sides[0], prompt) == self._truncated(sides[1], prompt):
            yield "same"
        if not prompt:
            yield "promptless"
        keeps_start = self.truncation_mode == "keep_start"
        too_long = self.max_length is not None and max(map(len, sides)) + len(prompt) > self.max_length
        if too_long:
            yield "cut" if keeps_start else "beheaded"
        is_cut = too_long and keeps_start  # then the end is missing anyway
        if all(sides) and not is_cut and not all(self.ends & set(side[-TAIL:]) for side in sides):
            yield "endless"

    def _truncated(self, completion: list[int], prompt: list[int]) -> list[int]:
        """Return the tokens of a completion that remain after truncation."""
        if self.max_length is None:
            return completion
        if self.truncation_mode == "keep_start":
            return completion[: max(0, self.max_length - len(prompt))]
        return completion[-self.max_length :]

    def _edge_faults(self, row: Mapping[str, Any]) -> Iterator[str]:
        """Yield faults at the beginning and the end of token sequences."""
        sides = (row["chosen_ids"], row["rejected_ids"])
        if any(self.specials.begins_twice(row["prompt_ids"], side) for side in sides):
            yield "begins twice"
        if any(map(self.specials.ends_twice, sides)):
            yield "ends twice"

    def _boundary_faults(self, row: Mapping[str, Any]) -> Iterator[str]:
        """Yield a fault if the end of the prompt is tokenised differently when a completion follows."""
        if self.total % self.retokenised_step or not (rest := _lost_prompt_end(row, self.processing_class)):
            return
        step = self.retokenised_step
        sample = "" if step == 1 else f" (one row of {step} was looked at)"
        self.details.setdefault("merged", f"{sample}; {rest!r}")
        yield "merged"


def _text_faults(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield faults that can be detected without a tokenizer."""
    if "chosen" not in row or "rejected" not in row:
        return
    chosen, rejected = _content_of(row["chosen"]), _content_of(row["rejected"])
    if not chosen.strip() or not rejected.strip():
        yield "wordless"
    if "prompt_ids" not in row and chosen == rejected:
        yield "same"
    messages = [message for side in (row["chosen"], row["rejected"]) if isinstance(side, list) for message in side]
    if any(map(contains_none, (row.get("tools"), *(message.get("tool_calls") for message in messages)))):
        yield "null"


def _content_of(completion: Any) -> str:
    """Return the content of a string or of messages; a call of a tool counts."""
    if not isinstance(completion, list):
        return str(completion or "")
    return "\n".join(
        _joined_parts(message.get("content")) or str(message.get("tool_calls") or "") for message in completion
    )


def _joined_parts(content: Any) -> str:
    if not isinstance(content, list):
        return str(content or "")
    return "".join(str(each.get("text") or "") if isinstance(each, dict) else str(each) for each in content)


def _lost_prompt_end(row: Mapping[str, Any], processing_class: Any) -> str:
    """Return, decoded, the end of the prompt that is missing before the completion."""
    if "prompt" not in row or isinstance(processing_class, ProcessorMixin):
        return ""
    ids = _prompt_ids(row, processing_class)
    kept = len(row["prompt_ids"])
    return str(processing_class.decode(ids[kept:])) if kept < len(ids) else ""


def _prompt_ids(row: Mapping[str, Any], tokenizer: Any) -> list[int]:
    """Return the ids of the prompt without a completion after it."""
    if not is_conversational({"prompt": row["prompt"]}):
        return list(tokenizer(row["prompt"])["input_ids"])
    encoding = tokenizer.apply_chat_template(
        row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=True, **template_options(row)
    )
    return list(encoding["input_ids"])


def audit_dropped(
    original: Any, prepared: Any, processing_class: Any, *, name: str, max_length: int | None, progress: bool = True
) -> list[Finding]:
    """Report the rows that TRL dropped because their prompt alone fills `max_length`.

    Args:
        original: the dataset before its preparation.
        prepared: the dataset after its preparation.
        processing_class: its tokenizer.
        name: the name of the dataset, for the findings.
        max_length: as in the training's configuration.
        progress: show a progress bar.

    Returns:
        One finding, or none.
    """
    if not isinstance(original, Dataset) or max_length is None or len(original) == len(prepared):
        return []
    tally = RowTally()
    rows = () if isinstance(processing_class, ProcessorMixin) else original
    for number, row in enumerate(tqdm(rows, "audit of dropped rows", disable=not progress), 1):
        if len(_prompt_ids(maybe_extract_prompt(dict(row)), processing_class)) >= max_length:
            tally.add(row_name(row, number))
    text = (
        f"{name}: TRL dropped {len(original) - len(prepared)} of {len(original)} rows, whose prompt alone fills max_length "
        f"({max_length})."
    )
    return [tally.finding("warning", text, "Raise max_length, or drop these rows yourself.")]
