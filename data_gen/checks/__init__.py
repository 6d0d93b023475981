"""Checks write what they find beside the rows; filters, named separately, drop rows by what is written there.

    checks:
      contrast: {}                                       # length_ratio, jaccard, levenshtein, no_op
      finish: {}                                         # finished, empty
      duplicates: {threshold: 0.8}                       # duplicate_of, near_duplicate_of
      contamination: {against: [gsm8k, my_test.jsonl]}   # contamination, contaminated_by
      ches: {model: my-model}                            # ches, ln_ches
      reward: {scorer: "my_module:reward"}               # chosen_score, rejected_score, reward_margin
    filters:
      no_op: false                     # this value
      length_ratio: [0.5, 2.0]         # a band, both ends included; null is open
      direction: [chosen, unclear]     # one of these
      duplicate_of: null               # nothing written there
      ln_ches: {lowest: 0.5}           # the half with the lowest values

Checks see all rows at once and in their order, because duplicates are a matter between rows.
"""

# ruff: noqa: TRY004 (a wrong type in a recipe is a ValueError like any other mistake in it)

import inspect
import json
import math
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rapidfuzz.distance import Levenshtein
from tqdm import tqdm

from contralto.common.files import read_json_lines, read_lines, read_text
from contralto.data_gen.ranges import check_batch, check_number
from contralto.data_gen.strategies.images import image_similarity
from contralto.data_gen.strategies.pairs import checked_scores
from contralto.data_gen.templates import as_text, content_text

__all__ = ["CHECKS", "annotate", "answer_text", "check_settings", "jaccard", "select"]

Rows = Sequence[Mapping[str, Any]]
Columns = dict[str, list[Any]]


def answer_text(row: Mapping[str, Any], name: str) -> str:
    """The text of `chosen` or `rejected`, all of its turns."""
    return "\n\n".join(content_text(message.get("content") or "") for message in row[name])


# --------------------------------------------------------------------------------------------------------------- checks


def contrast(rows: Rows, *, tokenizer: str | None = None) -> Columns:
    """How much the two answers differ (the measures of D'Oosterlinck et al. 2024, arXiv 2408.06266).

    - `jaccard`: shared tokens over all tokens, as sets; for the paper, more is more contrastive: less differs.
    - `levenshtein`: how many characters have to be changed, put in or left out; fewer is more contrastive.
    - `length_ratio`: characters of chosen over characters of rejected; None if rejected is empty.
    - `no_op`: nothing differs but white space at the ends.

    Args:
        rows: the rows.
        tokenizer: whose tokens the Jaccard similarity counts: a folder, a hub id, or testbed:NAME. None splits at white space.
            The paper does not say which it took, and the figure depends on it.
    """
    split = str.split if tokenizer is None or not rows else _tokenize(tokenizer)
    both = [(answer_text(row, "chosen"), answer_text(row, "rejected")) for row in rows]
    return {
        "length_ratio": [len(chosen) / len(rejected) if rejected else None for chosen, rejected in both],
        "jaccard": [jaccard(split(chosen), split(rejected)) for chosen, rejected in both],
        "levenshtein": [Levenshtein.distance(chosen, rejected) for chosen, rejected in both],
        "no_op": [chosen.strip() == rejected.strip() for chosen, rejected in both],
    }


def jaccard(first: Sequence[Any], second: Sequence[Any]) -> float:
    """|A and B| / |A or B| of the sets of tokens; 1 if both are empty.

    Examples:
        >>> jaccard("a b b c".split(), "b c d".split())
        0.5
    """
    one, other = set(first), set(second)
    return len(one & other) / len(one | other) if one | other else 1.0


def _tokenize(name: str) -> Callable[[str], list[str]]:
    from transformers import AutoTokenizer

    from contralto.common.hub import from_pretrained

    return from_pretrained(AutoTokenizer, name).tokenize  # type: ignore[no-any-return]


def finish(rows: Rows) -> Columns:
    """Whether both answers were ended by their models, and whether one is empty.

    `finished` is None where it is not known: the row has no `chosen_finish_reason` and `rejected_finish_reason`.
    """
    reasons = [[row.get(f"{name}_finish_reason") for name in ("chosen", "rejected")] for row in rows]
    return {
        "finished": [None if None in both else both == ["stop", "stop"] for both in reasons],
        "empty": [not (answer_text(row, "chosen").strip() and answer_text(row, "rejected").strip()) for row in rows],
    }


def duplicates(
    rows: Rows, *, threshold: float = 0.8, of: str = "pair", shingle: int = 5, permutations: int = 128
) -> Columns:
    """Rows that were there before: the same, or nearly the same.

    - `duplicate_of`: the id of the first row that is the same but for case and white space, or None.
    - `near_duplicate_of`: the id of an earlier row whose runs of words are nearly the same, or None.

    Candidates for the latter come from MinHash with locality-sensitive hashing (datasketch), and are then compared by the true
    Jaccard similarity of their runs of words; so whatever is reported is right, and little is missed.

    Args:
        rows: the rows, with `id`.
        threshold: the similarity from which rows count as nearly the same, in (0, 1).
        of: `pair` compares prompt and both answers; `prompt` the prompt alone, of which pooled strategies have several rows.
        shingle: words in a run.
        permutations: of MinHash; more miss less.

    Raises:
        ValueError: `threshold` or `of` outside of what is said above.
    """
    check_number("duplicates: shingle", shingle, least=1, most=10_000, whole=True)
    check_number("duplicates: permutations", permutations, least=2, most=65_536, whole=True)
    if isinstance(threshold, bool | str) or not 0 < threshold < 1:
        raise ValueError(f"duplicates: threshold must lie between 0 and 1, not {threshold}")
    if of not in ("pair", "prompt"):
        raise ValueError(f"duplicates: of must be pair or prompt, not {of!r}")
    if not rows:
        return {"duplicate_of": [], "near_duplicate_of": []}
    from datasketch import MinHash, MinHashLSH
    from xxhash import xxh32_intdigest

    index = MinHashLSH(threshold=threshold, num_perm=permutations, weights=(0.05, 0.95))  # miss little: all is verified
    blank = MinHash(num_perm=permutations, hashfunc=xxh32_intdigest)  # its permutations take a while to draw
    first: dict[str, Any] = {}
    kept: dict[int, set[str]] = {}
    exact: list[Any] = []
    near: list[Any] = []
    for at, row in enumerate(tqdm(rows, desc="duplicates", unit="row")):
        words = _compared(row, of).casefold().split()
        text = " ".join(words)
        exact.append(first.get(text))
        near.append(None)
        if text in first:
            continue
        first[text] = row["id"]
        runs = {" ".join(words[i : i + shingle]) for i in range(max(1, len(words) - shingle + 1))}
        sketch = blank.copy()
        sketch.update_batch([run.encode() for run in sorted(runs)])
        alike = [i for i in sorted(index.query(sketch)) if jaccard(list(runs), list(kept[i])) >= threshold]
        if alike:
            near[at] = rows[alike[0]]["id"]
        else:
            kept[at] = runs
            index.insert(at, sketch)
    return {"duplicate_of": exact, "near_duplicate_of": near}


def _compared(row: Mapping[str, Any], of: str) -> str:
    prompt = as_text(row["prompt"])
    return prompt if of == "prompt" else "\n\n".join([prompt, answer_text(row, "chosen"), answer_text(row, "rejected")])


BENCHMARKS = {"gsm8k": ("openai/gsm8k", "main", "test"), "hellaswag": ("Rowan/hellaswag", None, "validation")}
"""Test sets of the Hub by their usual names: repository, configuration, split."""


def contamination(rows: Rows, *, against: Sequence[str], n: int = 13) -> Columns:
    """Runs of n words that a row shares with a test set (Brown et al. 2020, arXiv 2005.14165, appendix C: n = 13).

    - `contamination`: how many different runs the prompt and the answers share with the test sets.
    - `contaminated_by`: the first test set with such a run, or None.

    Words are compared in lower case without ASCII punctuation. That is what lm-eval's Janitor does to test sets; to the texts
    it cleans it does it after cutting them into runs, so that a dash between two words hides a copy from it. Texts of fewer
    than n words have no run.

    Args:
        rows: the rows.
        against: `gsm8k`, `hellaswag` (from the Hub), or files: .jsonl and .json (every text in them), .parquet, .txt (a text per
            line).
        n: words in a run, at least 1.

    Raises:
        ValueError: no such file, one that cannot be read, or `n` below 1.
    """
    check_number("contamination: n", n, least=1, most=10_000, whole=True)
    if isinstance(against, str) or not against:
        raise ValueError(
            f"contamination: against must be a list of files or of {', '.join(BENCHMARKS)}, not {against!r}"
        )
    for name in against:
        if name not in BENCHMARKS and not Path(name).is_file():
            raise ValueError(f"contamination: there is no file {name}; known by name are {', '.join(BENCHMARKS)}")
    if not rows:
        return {"contamination": [], "contaminated_by": []}
    tests = {name: {run for text in _test_texts(name) for run in _runs(text, n)} for name in against}
    counts, names = [], []
    for row in tqdm(rows, desc="contamination", unit="row"):
        texts = [as_text([message]) for message in row["prompt"]] + [
            answer_text(row, "chosen"),
            answer_text(row, "rejected"),
        ]
        runs = {run for text in texts for run in _runs(text, n)}
        counts.append(len(set().union(*(runs & of_test for of_test in tests.values()))))
        names.append(next((name for name, of_test in tests.items() if runs & of_test), None))
    return {"contamination": counts, "contaminated_by": names}


_PLAIN = str.maketrans("", "", string.punctuation)


def _runs(text: str, n: int) -> Iterator[str]:
    words = text.lower().translate(_PLAIN).split()
    return (" ".join(words[i : i + n]) for i in range(len(words) - n + 1))


def _test_texts(name: str) -> Iterator[str]:
    """Every text of a test set."""
    path = Path(name)
    if name in BENCHMARKS:
        from datasets import load_dataset

        repository, configuration, split = BENCHMARKS[name]
        yield from (text for row in load_dataset(repository, configuration, split=split) for text in _texts(row))
    elif path.suffix == ".parquet":
        from datasets import Dataset

        yield from (text for row in Dataset.from_parquet(name) for text in _texts(row))
    elif path.suffix == ".json":
        yield from _texts(_parsed(read_text(path), name))
    elif path.suffix == ".jsonl":
        for _, row in read_json_lines(path):
            yield from _texts(row)
    else:
        yield from read_lines(path)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"contamination: {where}: not JSON: {error}") from error


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def ches(
    rows: Rows,
    *,
    model: str,
    device: str | None = None,
    dtype: str = "auto",
    batch_size: int = 8,
    max_length: int | None = None,
) -> Columns:
    """`ches` and `ln_ches` under the model that is to be trained: the higher, the likelier training lowers both answers.

    The paper (arXiv 2410.08847) trains on the pairs with the lowest ln-CHES, in one run on 5%: `ln_ches: {lowest: 0.05}`. Minimal
    revisions score high by their nature; for them a loss that holds the chosen answer in place (`apo_zero`, an SFT term) does
    what dropping them would undo.

    Args:
        rows: the rows; for the formulas see the module `ches`.
        model: a folder, a hub id, or testbed:NAME.
        device: None is a GPU if there is one.
        dtype: of the weights.
        batch_size: answers per forward.
        max_length: longer texts are cut off at their end.
    """
    from contralto.common.hub import from_pretrained, locate

    locate(model)
    check_batch(batch_size, max_length)
    if not rows:
        return {"ches": [], "ln_ches": []}
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from contralto.data_gen.checks.ches import score_rows

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    network = from_pretrained(AutoModelForCausalLM, model, dtype=dtype).to(where).eval()
    tokenizer = from_pretrained(AutoTokenizer, model)
    found = score_rows(network, tokenizer, rows, batch_size=batch_size, max_length=max_length)
    return {"ches": found.ches.tolist(), "ln_ches": found.ln_ches.tolist()}


def reward(rows: Rows, *, scorer: Any) -> Columns:
    """What a scorer or reward model says of both answers: `chosen_score`, `rejected_score`, `reward_margin` = their difference.

    A band on the margin is a common filter: AIR (arXiv 2504.03612) finds moderate margins better than maximal ones.

    Args:
        rows: the rows.
        scorer: see `pairs.scorer_of`: `module:function`, or `{reward_model: NAME}`.
    """
    from contralto.data_gen.strategies.pairs import scorer_of

    if not isinstance(scorer, Mapping):
        scorer_of(scorer)
    both = [
        checked_scores(scorer, row, [answer_text(row, "chosen"), answer_text(row, "rejected")])
        for row in tqdm(rows, desc="reward", unit="row", disable=not rows)
    ]
    return {
        "chosen_score": [chosen for chosen, _ in both],
        "rejected_score": [rejected for _, rejected in both],
        "reward_margin": [chosen - rejected for chosen, rejected in both],
    }


CHECKS: dict[str, Callable[..., Columns]] = {
    "contrast": contrast,
    "finish": finish,
    "duplicates": duplicates,
    "contamination": contamination,
    "ches": ches,
    "reward": reward,
    "image_similarity": image_similarity,
}
WRITES = {
    "contrast": ("length_ratio", "jaccard", "levenshtein", "no_op"),
    "finish": ("finished", "empty"),
    "duplicates": ("duplicate_of", "near_duplicate_of"),
    "contamination": ("contamination", "contaminated_by"),
    "ches": ("ches", "ln_ches"),
}
"""The columns that only one check writes."""


def annotate(rows: Rows, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows with the columns that checks write. Nothing is dropped.

    Args:
        rows: with `id`, and `prompt`, `chosen`, `rejected` as messages, in the order of the data set.
        settings: the checks by name, each with its settings.

    Raises:
        ValueError: no such check, no such setting, or a check's own complaint.

    Examples:
        >>> row = {"prompt": [], "chosen": [{"content": "It is 4."}], "rejected": [{"content": "It is 5."}]}
        >>> [found] = annotate([row], {"contrast": {}})
        >>> found["jaccard"], found["levenshtein"], found["length_ratio"], found["no_op"]
        (0.5, 1, 1.0, False)
    """
    annotated = [dict(row) for row in rows]
    for name, given in settings.items():
        _check_check(name, given)
        for column, values in CHECKS[name](rows, **(given or {})).items():
            for row, value in zip(annotated, values, strict=True):
                row[column] = value
    return annotated


# -------------------------------------------------------------------------------------------------------------- filters


def select(rows: Rows, filters: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[tuple[dict[str, Any], str]]]:
    """The rows that pass every filter, and the others, each with the first reason.

    Args:
        rows: annotated rows.
        filters: by column: a value (null: nothing is written there); a list of values; a band `[low, high]`, both included, null
            for an open end; or `{lowest: share}`, `{highest: share}` of the rows that have a number there. A row without a
            value in the column passes only where null is allowed.

    Returns:
        What is kept, in order, and what is dropped, each with a reason that names the column.

    Raises:
        ValueError: a filter of another form, or a column that no row has.

    Examples:
        >>> kept, dropped = select([{"id": "a", "levenshtein": 3}, {"id": "b", "levenshtein": 900}], {"levenshtein": [1, 800]})
        >>> [row["id"] for row in kept], [reason for _, reason in dropped]
        (['a'], ['levenshtein above 800'])
    """
    tests = {column: _test(rows, column, given) for column, given in filters.items()}
    kept: list[dict[str, Any]] = []
    dropped: list[tuple[dict[str, Any], str]] = []
    for row in map(dict, rows):
        reason = next((found for column, test in tests.items() if (found := test(row.get(column)))), None)
        if reason:
            dropped.append((row, reason))
        else:
            kept.append(row)
    return kept, dropped


def _test(rows: Rows, column: str, given: Any) -> Callable[[Any], str | None]:
    """A function of a value: the reason to drop it, or None."""
    _check_filter(column, given)
    if rows and not any(column in row for row in rows):
        known = ", ".join(sorted({name for row in rows for name in row}))
        raise ValueError(f"filter {column}: no row has such a column; there are {known}")
    if isinstance(given, Mapping):
        ((which, share),) = given.items()
        numbers = sorted((row[column] for row in rows if row.get(column) is not None), reverse=which == "highest")
        if not numbers:
            return lambda value: f"{column} is not known"
        last = numbers[max(1, math.ceil(share * len(numbers))) - 1]
        low, high = (None, last) if which == "lowest" else (last, None)
        return _band(column, low, high, outside=f"{column} not among the {which} {share:g}")
    if _is_band(given):
        return _band(column, *given)
    allowed = given if isinstance(given, list) else [given]
    return lambda value: None if value in allowed else f"{column} is {'not known' if value is None else value}"


def _band(column: str, low: float | None, high: float | None, outside: str = "") -> Callable[[Any], str | None]:
    def reason(value: Any) -> str | None:
        if value is None:
            return f"{column} is not known"
        if not isinstance(value, int | float):
            raise ValueError(f"filter {column}: a band of numbers, and a row has {value!r} there")
        if low is not None and value < low:
            return outside or f"{column} below {low:g}"
        return outside or f"{column} above {high:g}" if high is not None and value > high else None

    return reason


def _is_band(given: Any) -> bool:
    """Two numbers, or a number and null: the ends of a band. Everything else in a list is a choice of values."""
    if not isinstance(given, list) or len(given) != 2 or given == [None, None]:
        return False
    return all(end is None or (isinstance(end, int | float) and not isinstance(end, bool)) for end in given)


def check_settings(checks: Mapping[str, Any], filters: Mapping[str, Any]) -> None:
    """Find the mistakes in a recipe's checks and filters before anything is spent.

    Raises:
        ValueError: no such check or setting, a value out of range, a file that is not there, a filter of another form, or one on
            a column whose check is not asked for.

    Examples:
        >>> check_settings({"contrast": {}}, {"ln_ches": [None, 0]})
        Traceback (most recent call last):
            ...
        ValueError: filter ln_ches reads what the check ches writes: name that check too
    """
    for name, given in checks.items():
        _check_check(name, given)
        CHECKS[name]([], **(given or {}))
    for column, given in filters.items():
        _check_filter(column, given)
        needed = next((check for check, columns in WRITES.items() if column in columns), None)
        if needed and needed not in checks:
            raise ValueError(f"filter {column} reads what the check {needed} writes: name that check too")


def _check_check(name: str, given: Any) -> None:
    if name not in CHECKS:
        raise ValueError(f"there is no check {name!r}; there are {', '.join(CHECKS)}")
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"check {name}: its settings are a mapping, such as {{}}, not {given!r}")
    _, *known = inspect.signature(CHECKS[name]).parameters.values()
    names = [parameter.name for parameter in known]
    if unknown := [setting for setting in given or {} if setting not in names]:
        raise ValueError(f"check {name} has no setting {unknown[0]!r}; it has {', '.join(names) or 'none'}")
    if missing := [p.name for p in known if p.default is p.empty and p.name not in (given or {})]:
        raise ValueError(f"check {name} needs {', '.join(missing)}")


def _check_filter(column: str, given: Any) -> None:
    allowed = "a value, a list of values, a band [low, high], or {lowest: share}"
    if isinstance(given, Mapping):
        if list(given) not in (["lowest"], ["highest"]):
            raise ValueError(f"filter {column} must be {allowed}, not {dict(given)!r}")
        ((which, share),) = given.items()
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
            raise ValueError(f"filter {column}: {which} is a share in (0, 1], not {share!r}")
    elif isinstance(given, list):
        if not given or given == [None, None]:
            raise ValueError(f"filter {column} must be {allowed}, not {given!r}: it would keep nothing, or all")
        if _is_band(given) and None not in given and given[0] > given[1]:
            raise ValueError(f"filter {column}: the band {given!r} is empty, its low end lies above its high end")
    elif not isinstance(given, str | int | float | bool | None):
        raise ValueError(f"filter {column} must be {allowed}, not {given!r}")
