"""Prompts to train on by rewards, and the baselines of contrastive rewards: texts that the model wrote before it was trained."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from contralto.common.column_names import rename_columns

__all__ = ["load_prompts", "with_baselines"]

OTHER_KINDS = ("chosen", "rejected", "messages", "completion")
"""Columns of other kinds of training data."""


def load_prompts(
    source: Any,
    *,
    split: str = "train",
    config: str | None = None,
    conversations: bool = False,
    columns: Mapping[str, str] | None = None,
) -> Any:
    """Return prompts with all their other columns, which reward functions may read.

    Columns of other kinds of training data, such as `chosen`, become `source_chosen` and so on: TRL would mistake the rows for these.

    Args:
        source: as for `contralto.data_gen.load_pairs`.
        split: the split to read, if there are several.
        config: the configuration of a folder or of a data set of the Hub.
        conversations: make a conversation of each text: it becomes the user's turn.
        columns: columns under other names: `{"prompt": "question"}`.

    Raises:
        ValueError: there is no such source; a row has no prompt; some are texts and some are messages.
    """
    from datasets import Dataset

    from contralto.data_gen.sources import records

    name, source_rows = records(source, split, config)
    numbered = ((f"{name}, row {at}", record) for at, record in enumerate(source_rows, 1))
    rows = [
        _row(rename_columns(record, columns or {}, where), where, conversations=conversations)
        for where, record in numbered
    ]
    if not rows:
        raise ValueError(f"{name} has no rows")
    if len({isinstance(row["prompt"], str) for row in rows}) > 1:
        raise ValueError(f"{name}: some prompts are texts and some are messages: bring them into one form")
    names = dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_list([{name: row.get(name) for name in names} for row in rows])


def _row(record: Mapping[str, Any], where: str, *, conversations: bool) -> dict[str, Any]:
    prompt = record.get("prompt")
    is_messages = isinstance(prompt, list) and prompt and all(isinstance(each, Mapping) for each in prompt)
    if not (is_messages or (isinstance(prompt, str) and prompt.strip())):
        raise ValueError(f"{where}: a row needs a column `prompt`, a text or a list of messages, not {prompt!r:.60}")
    others = {f"source_{name}" if name in OTHER_KINDS else name: value for name, value in record.items()}
    if isinstance(prompt, str) and conversations:
        prompt = [{"role": "user", "content": prompt}]
    return {**others, "prompt": prompt}


def with_baselines(rows: Any, model: str, folder: Path, *, count: int, sampling: Mapping[str, Any], seed: int) -> Any:
    """Return the rows with a column `baselines`: texts of the model as it is (Shen et al. 2024, arXiv 2403.07708).

    The texts are kept in `baselines.sqlite`: an interrupted command goes on with what it has, and another training of the model in the
    folder takes the same.

    Args:
        rows: a data set with `prompt`.
        model: a folder, a hub id, or `testbed:NAME`.
        folder: where the texts are kept.
        count: the number of texts per prompt.
        sampling: options of `contralto.data_gen.types.Sampling`.
        seed: of the samples.

    Raises:
        ValueError: `count` is below 1, or a prompt has images, which the model would not see.
    """
    from contralto.data_gen.engines.recorded import recorded_answers
    from contralto.data_gen.engines.transformers import TransformersEngine
    from contralto.data_gen.store import Store
    from contralto.data_gen.types import Ask, Sampling

    if count < 1:
        raise ValueError(f"baselines must be at least 1 per prompt, not {count}")
    if "images" in rows.column_names:
        raise ValueError("baselines are written for texts, and the rows have images: bring a column `baselines`")
    asks, names = [], []
    for at, prompt in enumerate(rows["prompt"]):
        asked = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
        asks += [Ask(role="policy", seed=number, tag="baseline", **asked) for number in range(count)]
        names += [f"row-{at}"] * count
    engine = TransformersEngine(model=model, raw=isinstance(rows["prompt"][0], str))
    folder.mkdir(parents=True, exist_ok=True)
    with Store(folder / "baselines.sqlite") as store:
        answers = recorded_answers(
            engine,
            store,
            asks,
            rows=names,
            strategy="baselines",
            sampling=Sampling(**sampling),
            seed=seed,
            title="baselines",
        )
    texts = ["" if answer is None else answer.text for answer in answers]
    return rows.add_column("baselines", list(_columns(texts, rows["prompt"], count)))


def _columns(texts: Sequence[str], prompts: Sequence[Any], count: int) -> Iterator[list[Any]]:
    """Yield the baselines of each row, in the form of the trainer's completions."""
    for at, prompt in enumerate(prompts):
        own = texts[at * count : (at + 1) * count]
        yield list(own) if isinstance(prompt, str) else [[{"role": "assistant", "content": text}] for text in own]
