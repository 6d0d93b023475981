"""Forms of published preference data that have no columns `chosen` and `rejected`, or keep the prompt elsewhere.

Each form is declared once, with the columns by which its rows are recognized, and a function that makes pairs of a row. Forms whose rows
hold a single answer make pairs of the rows with the same prompt.
"""

# ruff: noqa: TRY004 (a wrong type in somebody's data is a ValueError like any other mistake in it)

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from contralto.common.column_names import rename_columns
from contralto.common.registry import Registry
from contralto.data_gen.conversations import TRANSCRIPT

__all__ = ["COLUMN_NAMES", "PREFERENCE_FORMS", "PreferenceForm", "form_of", "grouped_pairs", "pairs_of", "renamed"]

COLUMN_NAMES = (
    *("prompt", "chosen", "rejected", "images", "rejected_images", "system"),
    *("responses", "scores", "choice", "response", "score", "completion", "label", "candidates", "reference"),
)
"""The names to which the columns of a row can be mapped: those of pairs, and of the general forms below."""
Pairs = Sequence[Mapping[str, Any]]
Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class PreferenceForm:
    """A form of preference data."""

    name: str
    """The data set, or the form in words."""
    columns: tuple[str, ...]
    """The columns by which a row is recognized."""
    read: Callable[[Record, str], Pairs]
    """Makes pairs of a row and the beginning of errors; of a grouped form, the arguments of `grouped_pairs` in its place."""
    is_grouped: bool = False
    """True if a row holds one answer, with `prompt`, `response` and `score` in what `read` returns."""
    is_adjacent: bool = False
    """True if the rows of one prompt follow each other, so that a stream can be grouped."""


PREFERENCE_FORMS: Registry[PreferenceForm] = Registry("form of preference data", group="contralto.preference_forms")
"""The forms by name. Packages add theirs by entry points of the group `contralto.preference_forms`."""


def renamed(record: Any, names: Mapping[str, str], where: str, *, folder: Path | None = None) -> Any:
    """Return a record with mapped columns; one image becomes a list.

    Args:
        record: the record.
        names: columns by the names of `COLUMN_NAMES`.
        where: the beginning of errors.
        folder: the folder that paths of mapped images are relative to; None leaves them as they are.

    Raises:
        ValueError: the record lacks a column.
    """
    record = rename_columns(record, names, where)
    for name in ("images", "rejected_images"):
        if name in names and record[name] is not None:
            images = record[name] if isinstance(record[name], list) else [record[name]]
            record = {
                **record,
                name: [folder / image if folder and isinstance(image, str) else image for image in images],
            }
    return record


def form_of(record: Any, where: str) -> PreferenceForm | None:
    """Return the form of a record; None for one that has `chosen` and `rejected` as `load_pairs` reads them.

    Args:
        record: the record.
        where: the beginning of errors.

    Raises:
        ValueError: its columns fit several forms.

    Examples:
        >>> form_of({"prompt": "Why?", "responses": ["So.", "No."], "scores": [1, 2]}, "row 1").name
        'scored responses'
    """
    if not isinstance(record, Mapping):
        return None
    fitting = [form for form in PREFERENCE_FORMS.values() if all(record.get(name) is not None for name in form.columns)]
    fitting = [f for f in fitting if not any({*f.columns} < {*other.columns} for other in fitting)]
    if "chosen" in record and "rejected" in record:
        if record.get("prompt") is not None or _has_prompt(record["chosen"]):
            return None
        fitting = [form for form in fitting if "chosen" in form.columns]
    if len(fitting) > 1:
        raise ValueError(
            f"{where}: its columns fit {' and '.join(form.name for form in fitting)}: map columns, such as prompt=COLUMN chosen=COLUMN "
            "rejected=COLUMN (columns), or drop some"
        )
    return fitting[0] if fitting else None


def _has_prompt(answer: Any) -> bool:
    """Return True if an answer begins with its prompt: a conversation, or a transcript."""
    if isinstance(answer, str):
        return answer.startswith(TRANSCRIPT)
    first = answer[0] if isinstance(answer, list) and answer else None
    return isinstance(first, Mapping) and first.get("role", first.get("from")) not in ("assistant", "gpt", None)


def pairs_of(record: Record, form: PreferenceForm, where: str) -> Pairs:
    """Return the pairs of a record, [] without a preference, such as equal scores.

    Args:
        record: the record.
        form: its form, which is not grouped.
        where: the beginning of errors.

    Raises:
        ValueError: a mistake in the record.
    """
    return form.read(record, where)


def grouped_pairs(
    records: Iterable[tuple[str, Record]], form: PreferenceForm, *, is_stream: bool = False
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the pairs of each prompt: of its best and worst answer, or, with labels, of each good one with a bad one.

    Args:
        records: with the beginning of errors for each.
        form: a grouped form.
        is_stream: group neighbouring records alone.

    Raises:
        ValueError: the records are a stream, and those of a prompt need not be neighbours.
    """
    if is_stream and not form.is_adjacent:
        raise ValueError(
            f"rows of the form {form.name} hold one answer each, and a stream does not bring those of a prompt together: read them "
            "without streaming"
        )
    read = ((where, form.read(record, where)[0]) for where, record in records)
    if is_stream:
        groups: Iterable[list[tuple[str, Record]]] = (list(group) for _, group in groupby(read, key=_prompt_key))
    else:
        by_prompt: dict[str, list[tuple[str, Record]]] = {}
        for each in read:
            by_prompt.setdefault(_prompt_key(each), []).append(each)
        groups = by_prompt.values()
    for group in groups:
        yield group[0][0], list(_of_group([record for _, record in group]))


def _prompt_key(each: tuple[str, Record]) -> str:
    return json.dumps(each[1]["prompt"], sort_keys=True, default=str)


def _of_group(answers: Sequence[Record]) -> Iterator[dict[str, Any]]:
    if all(isinstance(each["score"], bool) for each in answers):
        sides = [[each for each in answers if each["score"] is label] for label in (True, False)]
        yield from (_pair(good, bad) for good, bad in zip(*sides, strict=False))
        return
    best, worst = (choose(answers, key=lambda each: each["score"]) for choose in (max, min))
    if best["score"] > worst["score"]:
        scores = {"chosen_score": float(best["score"]), "rejected_score": float(worst["score"])}
        yield {**_pair(best, worst), **scores}


def _pair(good: Record, bad: Record) -> dict[str, Any]:
    others = {name: value for name, value in good.items() if name not in ("response", "score")}
    return {**others, "chosen": good["response"], "rejected": bad["response"]}


# ------------------------------------------------------------------------------------------------------------- general forms


def _without(record: Record, *names: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in names}


def _best_and_worst(kept: Record, prompt: Any, responses: Any, scores: Any, where: str) -> Pairs:
    """Return the pair of the best and the worst response; among equal ones the first counts."""
    if not isinstance(responses, list | tuple) or not isinstance(scores, list | tuple) or len(responses) != len(scores):
        raise ValueError(f"{where}: responses and scores must be lists of the same length")
    numbers = [_number(score, where) for score in scores]
    rated = [(number, response) for number, response in zip(numbers, responses, strict=True) if not math.isnan(number)]
    if len(rated) < 2 or max(numbers := [number for number, _ in rated]) == min(numbers):
        return []
    best, worst = (next(each for each in rated if each[0] == end) for end in (max(numbers), min(numbers)))
    scored = {"chosen_score": best[0], "rejected_score": worst[0]}
    return [{**kept, "prompt": prompt, "chosen": best[1], "rejected": worst[1], **scored}]


def _number(value: Any, where: str) -> float:
    """Return a score; published ones may be texts, and missing ones are not a number."""
    if value is None or value in ("N/A", ""):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: a score must be a number, not {value!r:.40}") from error


def _chosen_one(kept: Record, prompt: Any, responses: Any, choice: Any, where: str) -> Pairs:
    """Return the pair of two responses and the index of the better one."""
    if not isinstance(responses, list | tuple) or len(responses) != 2:
        raise ValueError(f"{where}: an index of the better response needs two responses")
    if not str(choice).strip() in ("0", "1"):
        raise ValueError(f"{where}: the index of the better response must be 0 or 1, not {choice!r:.40}")
    at = int(choice)
    return [{**kept, "prompt": prompt, "chosen": responses[at], "rejected": responses[1 - at]}]


def _scored(record: Record, where: str) -> Pairs:
    kept = _without(record, "prompt", "responses", "scores")
    return _best_and_worst(kept, record["prompt"], record["responses"], record["scores"], where)


def _indexed(record: Record, where: str) -> Pairs:
    kept = _without(record, "prompt", "responses", "choice")
    return _chosen_one(kept, record["prompt"], record["responses"], record["choice"], where)


def _labelled(record: Record, where: str) -> Pairs:
    """Read one answer with a label, as for KTO."""
    if not isinstance(record["label"], bool | int) or record["label"] not in (0, 1):
        raise ValueError(f"{where}, column label: must be true or false, not {record['label']!r:.40}")
    kept = _without(record, "completion", "label")
    return [{**kept, "response": record["completion"], "score": bool(record["label"])}]


def _one_scored(record: Record, where: str) -> Pairs:
    return [{**record, "score": _number(record["score"], where)}]


def _named_prompt(record: Record, where: str) -> Pairs:
    """Read a pair whose prompt is in `question`, `instruction`, with `input`, or `query`."""
    present = [name for name in ("question", "instruction", "query", "input") if str(record.get(name) or "").strip()]
    if present == ["instruction", "input"]:
        prompt: Any = f"{record['instruction']}\n\n{record['input']}"
    elif len(present) == 1:
        prompt = record[present[0]]
    else:
        raise ValueError(
            f"{where}, column prompt: it is missing, and {' and '.join(present)} could both be it: name it with prompt=COLUMN (columns)"
        )
    return [{**_without(record, "question", "instruction", "query", "input"), "prompt": prompt}]


# ------------------------------------------------------------------------------------------------------ single published sets


def _ultrafeedback(record: Record, where: str) -> Pairs:
    completions = record["completions"]
    if not all(isinstance(each, Mapping) and "response" in each for each in completions):
        raise ValueError(f"{where}, column completions: must be a list of objects with response and overall_score")
    responses, scores = ([each.get(name) for each in completions] for name in ("response", "overall_score"))
    return _best_and_worst(
        _without(record, "instruction", "completions", "models"), record["instruction"], responses, scores, where
    )


def _alma_r(record: Record, where: str) -> Pairs:
    """Read translations by three systems, best against worst by the mean of two metrics, in each direction.

    A human preference between the two models (`Delta`) counts first, as in the released code. The prompt is the one of the paper.
    """
    row = record["translation"]
    languages = str(row["language_pair"]).split("-")
    wanted = row.get("required_directions") or ""
    pairs: list[Mapping[str, Any]] = []
    for source, target in (languages, languages[::-1]):
        if wanted and f"{source}-{target}" not in wanted:
            continue
        one, other = LANGUAGES.get(source, source), LANGUAGES.get(target, target)
        prompt = f"Translate this from {one} to {other}:\n{one}: {row[source]}\n{other}:"
        responses = [row[target], row.get(f"gpt4_{target}"), row.get(f"alma_{target}")]
        kept = {"source": source, "target": target}
        delta = row.get("Delta") or 0
        if delta:
            pairs += _chosen_one(kept, prompt, responses[1:], int(delta < 0), where)
            continue
        scores = [row.get(f"{system}_{target}_kiwi_xcomet") for system in ("ref", "gpt4", "alma")]
        pairs += _best_and_worst(kept, prompt, responses, scores, where)
    return pairs


LANGUAGES = {"cs": "Czech", "de": "German", "en": "English", "is": "Icelandic", "ru": "Russian", "zh": "Chinese"}


def _mvc(record: Record, where: str) -> Pairs:
    names = ("chosen_response", "rejected_response", "instruction_prompt", "system_prompt", "chosen_images")
    system = {"system": record["system_prompt"]} if record.get("system_prompt") else {}
    return [
        {
            **_without(record, *names),
            **system,
            "prompt": record["instruction_prompt"],
            "chosen": record["chosen_response"],
            "rejected": record["rejected_response"],
            "images": record["chosen_images"],
        }
    ]


def _summaries(record: Record, where: str) -> Pairs:
    """Read two summaries of a post or an article, with the prompt of Stiennon et al. 2020."""
    info = record["info"]
    if info.get("post"):
        prompt = f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\nPOST: {info['post']}\n\nTL;DR:"
    else:
        prompt = f"Article:\n{info['article']}\n\nTL;DR:"
    responses = [summary["text"].strip() for summary in record["summaries"]]
    return _chosen_one(_without(record, "info", "summaries", "choice"), prompt, responses, record["choice"], where)


def _safe_rlhf(record: Record, where: str) -> Pairs:
    """Read two responses of which one is better, and one is safer: which of the two counts is the user's choice."""
    kinds = [name for name in ("better_response_id", "safer_response_id") if record.get(name) is not None]
    choice = record.get("choice", record[kinds[0]] if len(kinds) == 1 else None)
    if choice is None:
        raise ValueError(
            f"{where}: better_response_id and safer_response_id both say which response is preferred: choose one with "
            "choice=better_response_id or choice=safer_response_id (columns)"
        )
    kept = _without(record, "response_0", "response_1", "choice")
    return _chosen_one(kept, record["prompt"], [record["response_0"], record["response_1"]], choice, where)


def _help_steer(record: Record, where: str) -> Pairs:
    return [{**_without(record, "helpfulness"), "score": _number(record["helpfulness"], where)}]


def _strength(prompt: str, first: str, second: str, strength: str) -> Callable[[Record, str], Pairs]:
    """Return a reader of two responses with a signed strength, negative for the first."""

    def read(record: Record, where: str) -> Pairs:
        value = _number(record[strength], where)
        kept = _without(record, prompt, first, second)
        if not value or math.isnan(value):
            return []
        pairs = _chosen_one(kept, record[prompt], [record[first], record[second]], int(value > 0), where)
        return [{**pair, "preference_strength": abs(value)} for pair in pairs]

    return read


def _rlhf_v(record: Record, where: str) -> Pairs:
    """Read a pair from the JSON in the column text."""
    try:
        text = json.loads(record["text"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}, column text: not JSON: {error}") from error
    if not isinstance(text, Mapping) or not {"question", "chosen", "rejected"} <= {*text}:
        raise ValueError(f"{where}, column text: must be an object with question, chosen and rejected")
    kept = _without(record, "text")
    return [{**kept, "prompt": text["question"], "chosen": text["chosen"], "rejected": text["rejected"]}]


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def _share_gpt(record: Record, where: str) -> Pairs:
    """Read a conversation of `from` and `value`, with both answers in the same form."""

    def messages(value: Any, column: str) -> list[dict[str, Any]]:
        turns = value if isinstance(value, list) else [value]
        for turn in turns:
            if not isinstance(turn, Mapping) or turn.get("from") not in ROLES or not isinstance(turn.get("value"), str):
                raise ValueError(
                    f"{where}, column {column}: a turn has from ({', '.join(ROLES)}) and value, not {turn!r:.60}"
                )
        return [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in turns]

    return [
        {
            **_without(record, "conversations"),
            "prompt": messages(record["conversations"], "conversations"),
            "chosen": messages(record["chosen"], "chosen"),
            "rejected": messages(record["rejected"], "rejected"),
        }
    ]


def _nectar(record: Record, where: str) -> Pairs:
    answers, ranks = ([each.get(name) for each in record["answers"]] for name in ("answer", "rank"))
    scores = [None if rank is None else -_number(rank, where) for rank in ranks]
    return _best_and_worst(_without(record, "prompt", "answers"), record["prompt"], answers, scores, where)


def _shp(record: Record, where: str) -> Pairs:
    """Read two comments on a post; the label is 1 if the first is preferred."""
    kept = _without(record, "history", "human_ref_A", "human_ref_B", "labels")
    responses = [record["human_ref_A"], record["human_ref_B"]]
    if record["labels"] not in (0, 1):
        raise ValueError(f"{where}, column labels: must be 0 or 1, not {record['labels']!r:.40}")
    return _chosen_one(kept, record["history"], responses, 1 - int(record["labels"]), where)


def _webgpt(record: Record, where: str) -> Pairs:
    """Read two answers with scores of people, whose sign says which is better."""
    question = record["question"]
    if not isinstance(question, Mapping) or not isinstance(question.get("full_text"), str):
        raise ValueError(f"{where}, column question: must be an object with full_text")
    answers, scores = ([record.get(f"{name}_{at}") for at in (0, 1)] for name in ("answer", "score"))
    kept = _without(record, "question", "answer_0", "answer_1")
    return _best_and_worst(kept, question["full_text"], answers, scores, where)


def _arena(record: Record, where: str) -> Pairs:
    """Read two conversations with the first question in common, and the one that a person preferred."""
    sides = {"model_a": "conversation_a", "model_b": "conversation_b"}
    if record["winner"] not in sides:
        if str(record["winner"]).startswith("tie"):
            return []
        raise ValueError(f"{where}, column winner: must be model_a, model_b or a tie, not {record['winner']!r:.40}")
    chosen = sides[record["winner"]]
    (rejected,) = set(sides.values()) - {chosen}
    kept = _without(record, *sides.values())
    return [{**kept, "chosen": record[chosen], "rejected": record[rejected]}]


def _generations(record: Record, where: str) -> Pairs:
    kept = _without(record, "instruction", "generations", "ratings")
    return _best_and_worst(kept, record["instruction"], record["generations"], record["ratings"], where)


for _form in (
    PreferenceForm(name="scored responses", columns=("prompt", "responses", "scores"), read=_scored),
    PreferenceForm(name="two responses with an index", columns=("prompt", "responses", "choice"), read=_indexed),
    PreferenceForm(
        name="labelled completions (KTO)", columns=("prompt", "completion", "label"), read=_labelled, is_grouped=True
    ),
    PreferenceForm(
        name="one scored response a row", columns=("prompt", "response", "score"), read=_one_scored, is_grouped=True
    ),
    *(
        PreferenceForm(name=f"a pair with {name}", columns=(name, "chosen", "rejected"), read=_named_prompt)
        for name in ("question", "instruction", "query")
    ),
    PreferenceForm(
        name="distilabel-intel-orca-dpo-pairs", columns=("system", "input", "chosen", "rejected"), read=_named_prompt
    ),
    PreferenceForm(name="UltraFeedback", columns=("instruction", "completions"), read=_ultrafeedback),
    PreferenceForm(name="ALMA-R-Preference", columns=("translation",), read=_alma_r),
    PreferenceForm(
        name="MVC", columns=("instruction_prompt", "chosen_response", "rejected_response", "chosen_images"), read=_mvc
    ),
    PreferenceForm(name="summarize_from_feedback", columns=("info", "summaries", "choice"), read=_summaries),
    PreferenceForm(name="PKU-SafeRLHF", columns=("prompt", "response_0", "response_1"), read=_safe_rlhf),
    PreferenceForm(
        name="HelpSteer",
        columns=("prompt", "response", "helpfulness"),
        read=_help_steer,
        is_grouped=True,
        is_adjacent=True,
    ),
    PreferenceForm(
        name="HelpSteer2-Preference",
        columns=("prompt", "response_1", "response_2", "preference_strength"),
        read=_strength("prompt", "response_1", "response_2", "preference_strength"),
    ),
    PreferenceForm(
        name="HelpSteer3-Preference",
        columns=("context", "response1", "response2", "overall_preference"),
        read=_strength("context", "response1", "response2", "overall_preference"),
    ),
    PreferenceForm(name="RLHF-V", columns=("ds_name", "text", "image"), read=_rlhf_v),
    PreferenceForm(name="ShareGPT", columns=("conversations", "chosen", "rejected"), read=_share_gpt),
    PreferenceForm(name="Nectar", columns=("prompt", "answers"), read=_nectar),
    PreferenceForm(name="SHP", columns=("history", "human_ref_A", "human_ref_B", "labels"), read=_shp),
    PreferenceForm(name="webgpt_comparisons", columns=("question", "answer_0", "answer_1", "score_0"), read=_webgpt),
    PreferenceForm(
        name="chatbot_arena_conversations", columns=("conversation_a", "conversation_b", "winner"), read=_arena
    ),
    PreferenceForm(
        name="distilabel, generations", columns=("instruction", "generations", "ratings"), read=_generations
    ),
):
    PREFERENCE_FORMS.register(_form)
