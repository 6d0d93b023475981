"""The export of pairs: TRL's explicit-prompt conversational rows with their origin, as parquet and JSON lines, and a card.

dataset/README.md           the card
dataset/data/               the pairs, or the single completions, train.parquet and train.jsonl
dataset/images/             their images, if there are any
dataset/rejected.jsonl      rows without a pair, with the reasons and all answers, and pairs that a filter dropped
dataset/failed.jsonl        rows without an answer, with the reasons

The last two are written even if there is no pair. Then the files of pairs that an earlier run wrote get names that end in
`.earlier`: they do not belong to this recipe and its answers any more. A later export with pairs removes them.
"""

import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from contralto.common.files import earlier, remove_unfinished, replace_file, set_aside
from contralto.common.hashing import content_digest
from contralto.data_gen.dataset import to_dataset
from contralto.data_gen.image_files import check_image
from contralto.data_gen.kept_columns import kept_columns
from contralto.data_gen.pipeline import Result, replay
from contralto.data_gen.recipe import Recipe
from contralto.data_gen.score_memory import noted_scorers, remembered_scores
from contralto.data_gen.store import Store
from contralto.data_gen.strategies.verdicts import verdict_of
from contralto.data_gen.types import Labelled, Pair, Rejected, Row
from contralto.data_gen.votes import summarise_votes

__all__ = ["Exported", "export", "folder_of", "pair_rows", "push_to_hub", "summary"]


DELAY = 3.0
"""Seconds after which a progress bar appears."""
IMAGES = ("images", "rejected_images")
ANSWERS = ("chosen", "rejected", "completion")


class Exported(NamedTuple):
    """The numbers of rows and pairs in the files."""

    pairs: int
    """Or single completions."""
    rejected: int
    failed: int
    dropped: int
    """By filters."""
    pending: int
    """Rows under a strategy that are not finished."""
    cut: int = 0
    """Pairs with an answer that was cut off at its limit of tokens."""
    unread: int = 0
    """Replies of judges without a verdict."""
    votes: str = ""
    """The agreement of annotators in words, if pairs have votes."""
    unit: str = "pair"
    """The word for a row: `pair` or `completion`."""


def export(recipe: Recipe, rows: Sequence[Row], store: Store) -> Exported:
    """Write the data set from the recorded answers. No request is sent; unfinished rows are left out.

    `rejected.jsonl` and `failed.jsonl` are written also if there are no pairs, so that the answers can be read.

    Args:
        recipe: the recipe; the data set is the folder `dataset` of its `output`.
        rows: as `read_rows` returns them.
        store: the recorded answers.

    Raises:
        ValueError: there is no pair, the filters leave none, or some strategies make pairs and others single completions.
    """
    from contralto.data_gen import card, checks

    bar = tqdm(rows, desc="reading answers", unit="row", delay=DELAY, leave=False)
    with noted_scorers() as scorers:
        results = list(replay(recipe, bar, store))
    pairs = [row for result in results for row in pair_rows(result)]
    lost, folder = _lost(results), folder_of(recipe)
    remove_unfinished(folder)
    if not pairs:
        raise ValueError(_without_pairs(recipe, results, lost))
    unit = _unit(recipe, pairs)
    if recipe.checks:
        with remembered_scores(store), noted_scorers() as of_checks:
            pairs = checks.annotate(pairs, recipe.checks)
        scorers |= of_checks
    dropped: list[tuple[dict[str, Any], str]] = []
    if recipe.filters:
        pairs, dropped = checks.select(pairs, recipe.filters)
    dropped_lines = [_dropped(row, reason) for row, reason in dropped]
    if not pairs:
        renamed = _write_without_pairs(folder, lost, dropped_lines)
        reason, count = Counter(reason for _, reason in dropped).most_common(1)[0]
        raise ValueError(
            f"{recipe.path}: the filters drop all {len(dropped)} {unit}s ({count} of them: {reason}); they are in "
            f"{folder / 'rejected.jsonl'}{renamed}"
        )
    _write_lost(folder, lost, dropped_lines)
    _save(pairs, folder)
    unfinished = sum(result.is_pending for result in results)
    cut = sum("length" in [row.get(f"{name}_finish_reason") for name in ("chosen", "rejected")] for row in pairs)
    votes = summarise_votes(pairs)
    exported = Exported(
        len(pairs),
        len(lost["rejected"]),
        len(lost["failed"]),
        len(dropped),
        unfinished,
        cut,
        _unread(results),
        "" if votes is None else str(votes),
        unit,
    )
    about = summary(recipe, results, rows=len(rows), pairs=len(pairs), dropped=dropped_lines)
    card.write(folder, pairs, about | {"scorers": scorers})
    return exported


def _without_pairs(recipe: Recipe, results: Sequence[Result], lost: Mapping[str, list[dict[str, Any]]]) -> str:
    """Write the rows without a pair, and return the error that there are none."""
    folder = folder_of(recipe)
    renamed = _write_without_pairs(folder, lost, [])
    reasons = Counter(_reason(result) for result in results).most_common(3)
    return (
        f"{recipe.output}: there are no pairs: "
        + "; ".join(f"{reason} ({count} times)" for reason, count in reasons)
        + f"; the answers and the reasons are in {folder / 'rejected.jsonl'}" * bool(lost["rejected"])
        + renamed
    )


def _unit(recipe: Recipe, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the word for the rows of a data set.

    Raises:
        ValueError: some are pairs and some single completions, or there are checks of single completions.
    """
    singles = sorted({row["strategy"] for row in rows if "completion" in row})
    if not singles:
        return "pair"
    if len(singles) < len({row["strategy"] for row in rows}):
        raise ValueError(
            f"{recipe.path}: {', '.join(singles)} makes single completions, and another strategy pairs, and a data set holds one kind of rows: "
            "put the strategies into two recipes with outputs of their own"
        )
    if recipe.checks:
        raise ValueError(
            f"{recipe.path}: {', '.join(singles)} makes single completions, and checks measure pairs: leave checks out; filters may read the "
            "strategy's own columns"
        )
    return "completion"


def _unread(results: Iterable[Result]) -> int:
    """Return the number of judges' replies without a verdict, each counted once."""
    verdicts = {t.request.key: answer for each in results for t, answer in each.answered if t.tag == "verdict"}
    return sum(verdict_of(answer) is None for answer in verdicts.values())


def folder_of(recipe: Recipe) -> Path:
    """Return the folder of the data set, beside the answers, so that it can be published without them.

    Args:
        recipe: the recipe.
    """
    return recipe.output / "dataset"


def summary(
    recipe: Recipe, results: Sequence[Result], *, rows: int, pairs: int, dropped: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Return the contents of the card: the recipe, the models, counts, costs, versions of the prompts.

    Args:
        recipe: the recipe.
        results: the results of all rows.
        rows: the number of rows.
        pairs: the number of pairs in the data set.
        dropped: the pairs that filters dropped, with their reasons.
    """
    lost, costs = _lost(results), []
    for name, role in recipe.roles.items():
        answers = {a.request.key: answer for r in results for a, answer in r.answered if a.role == name}.values()
        tokens = sum(a.prompt_tokens for a in answers), sum(a.completion_tokens for a in answers)
        cost = {"role": name, "requests": len(answers), "prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
        costs.append(cost | {"money": role.price.of(*tokens), "currency": role.price.currency})
    counts: dict[str, Any] = {"rows": rows, "pairs": pairs}
    for kind, lines in {**lost, "dropped": dropped}.items():
        counts[kind] = dict(Counter(line["reason"] for line in lines).most_common())
    return {
        "name": recipe.output.resolve().name,
        "recipe": dict(recipe.mapping),
        "models": {name: dict(role.engine.identity) for name, role in recipe.roles.items()},
        "counts": counts,
        "costs": costs,
        "templates": dict(sorted(Counter(a.template for r in results for a, _ in r.answered if a.template).items())),
    }


def pair_rows(result: Result) -> list[dict[str, Any]]:
    """Return the pairs of a result as rows of the data set: prompt, chosen, rejected, images, their origin, the source's own columns.

    Single completions become rows of prompt, completion and label.

    Args:
        result: as `replay` yields it.
    """
    return [_row(made, result) for made in result.outcomes or [] if isinstance(made, Pair | Labelled)]


def _row(pair: Pair | Labelled, result: Result) -> dict[str, Any]:
    images = {name: list(getattr(pair, name)) for name in IMAGES if getattr(pair, name, None)}
    for image in [image for each in images.values() for image in each if isinstance(image, str | Path)]:
        check_image(Path(image), f"row {result.row['id']}")
    made = {
        "id": result.row["id"],
        "prompt": [dict(message) for message in pair.prompt],
        **{name: _assistant(getattr(pair, name)) for name in ANSWERS if hasattr(pair, name)},
        **({"label": pair.label} if isinstance(pair, Labelled) else {}),
        **images,
        **pair.columns,
        **_provenance(result),
    }
    return made | kept_columns(result.row, made)


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _provenance(result: Result) -> dict[str, Any]:
    """Return the columns about the origin of a pair: roles with models, keys of requests, tokens."""
    return {
        "strategy": result.strategy,
        "models": [f"{role}: {model}" for role, model in dict.fromkeys((a.role, a.model) for a, _ in result.answered)],
        "requests": [tracked.request.key for tracked, _ in result.answered],
        "prompt_tokens": sum(answer.prompt_tokens for _, answer in result.answered),
        "completion_tokens": sum(answer.completion_tokens for _, answer in result.answered),
    }


def _lost(results: Iterable[Result]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows without a pair: rejected for their answers, or failed for lack of an answer."""
    lost: dict[str, list[dict[str, Any]]] = {"rejected": [], "failed": []}
    for result in results:
        where = {"id": result.row["id"], "strategy": result.strategy}
        if result.failed is not None:
            lost["failed"].append({**where, "reason": result.failed})
        for outcome in result.outcomes or []:
            if isinstance(outcome, Rejected):
                lost["rejected"].append({**where, "reason": outcome.reason, "answers": _answers(result)})
    return lost


def _answers(result: Result) -> list[dict[str, str]]:
    """Return the answers that a strategy received, in order, so that a reader sees why they make no pair."""
    return [
        {"role": tracked.role, "tag": tracked.tag, "finish_reason": answer.finish_reason, "text": answer.text}
        for tracked, answer in result.answered
    ]


def _dropped(row: Mapping[str, Any], reason: str) -> dict[str, Any]:
    """Return the line of a pair that a filter dropped."""
    return {"id": row["id"], "strategy": row["strategy"], "reason": reason} | {
        name: row[name] for name in ANSWERS if name in row
    }


def _write_lost(folder: Path, lost: Mapping[str, list[dict[str, Any]]], dropped: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows without a pair and the dropped pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_lines(folder / "rejected.jsonl", [*lost["rejected"], *dropped])
    _write_lines(folder / "failed.jsonl", lost["failed"])


def _write_without_pairs(
    folder: Path, lost: Mapping[str, list[dict[str, Any]]], dropped: Sequence[Mapping[str, Any]]
) -> str:
    """Write the rows without a pair, and rename the pairs of an earlier run.

    Returns:
        The end of the error: that they were renamed; empty if there were none.
    """
    _write_lost(folder, lost, dropped)
    old = [path for path in _files_of_pairs(folder) if path.exists()]
    for path in old:
        set_aside(path)
    names = " and ".join(path.name for path in old)
    return f"; {names} of an earlier run got names that end in .earlier" if old else ""


def _files_of_pairs(folder: Path) -> list[Path]:
    return [folder / "data" / "train.parquet", folder / "data" / "train.jsonl"]


def _reason(result: Result) -> str:
    if result.failed is not None:
        return result.failed
    rejected = next((each for each in result.outcomes or [] if isinstance(each, Rejected)), None)
    return rejected.reason if rejected else "not finished"


def push_to_hub(folder: Path, name: str, *, private: bool) -> str:
    """Upload an exported data set with its card to the Hub, and return its address.

    Args:
        folder: the folder of the data set.
        name: `owner/name`. The token is that of `hf auth login`, or HF_TOKEN.
        private: hide it from others.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(name, repo_type="dataset", private=private, exist_ok=True)
    api.upload_folder(folder_path=folder, repo_id=name, repo_type="dataset", ignore_patterns=["*.earlier", "*.part"])
    return f"https://huggingface.co/datasets/{name}"


# ----------------------------------------------------------------------------------------------------------------- files


def _save(pairs: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write parquet with the images inside, and JSON lines that name them as files."""
    parquet, lines = _files_of_pairs(folder)
    parquet.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(parquet) as new:
        to_dataset(pairs).to_parquet(new)
    named = (
        {**pair, **{name: [_file(image, folder) for image in pair[name]] for name in IMAGES if name in pair}}
        for pair in pairs
    )
    _write_lines(lines, named)
    for path in (parquet, lines):  # those of an earlier run, which these replace
        earlier(path).unlink(missing_ok=True)


def _file(image: Any, folder: Path) -> str:
    """Write an image into the data set, named by a hash of its content; return its path relative to the JSON lines."""
    if isinstance(image, str | Path):
        content, suffix = Path(image).read_bytes(), Path(image).suffix
    else:
        png = io.BytesIO()
        image.save(png, format="PNG")
        content, suffix = png.getvalue(), ".png"
    path = folder / "images" / f"{content_digest(content, 32)}{suffix}"
    if not path.exists():
        with replace_file(path) as new:
            new.write_bytes(content)
    return f"../images/{path.name}"


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with replace_file(path) as new, new.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
