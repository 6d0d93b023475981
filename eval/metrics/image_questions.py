"""Score short answers to questions about images, where questions that belong together count as one.

This is how MME (arXiv 2306.13394), MMVP (arXiv 2401.06209), AMBER (arXiv 2311.07397) and HallusionBench (arXiv 2310.14566) score.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from contralto.eval.metrics import pope

__all__ = [
    "PERCEPTION",
    "all_right",
    "mme_cognition",
    "mme_perception",
    "mme_score",
    "parse_choice",
    "parse_start",
    "results",
]

PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "ocr"),
)
"""MME's categories of perception; all others are of cognition."""


def parse_start(text: str) -> bool | None:
    """Read yes or no as MME's released code: from the first four characters of the answer.

    Args:
        text: The answer.

    Examples:
        >>> parse_start("Yes, it is."), parse_start("no"), parse_start("It is. Yes")
        (True, False, None)
    """
    start = text.strip().lower()[:4]
    return True if "yes" in start else False if "no" in start else None


def parse_choice(text: str) -> str | None:
    """Read the letter of a choice between (a) and (b) (MMVP, Tong et al. 2024, arXiv 2401.06209).

    It is the answer's only one in parentheses, or else its first word.

    MMVP's authors let GPT-4 compare the answer with the right one; a rule can be repeated by everybody.

    Args:
        text: The answer.

    Examples:
        >>> parse_choice("The answer is (b)."), parse_choice("A"), parse_choice("(a) or (b)")
        ('b', 'a', None)
    """
    letters = set(re.findall(r"\(([ab])\)", text.lower()))
    if letters:
        return letters.pop() if len(letters) == 1 else None
    word = re.match(r"\W*(\w+)", text.lower())
    return word[1] if word and word[1] in ("a", "b") else None


def results(doc: Mapping[str, Any], answer: str, *, parser: str = "words") -> dict[str, Any]:
    """Return the values that lm-eval logs for an answer, those of AMBER among them (Wang et al. 2023, arXiv 2311.07397).

    Args:
        doc: The document: `label`, `groups`, `category`.
        answer: The text.
        parser: `words` (yes or no as a word), `start` (MME's rule), or `choice` for (a) and (b).

    Returns:
        `acc`; `unparsed`; for each group `NAME_acc`, a pair of the group's name and whether the answer is right; for questions of yes and no
        `precision`, `recall` and `f1`, pairs in which **no** is positive, as in AMBER: it asks about what is not there.
    """
    label = doc["label"]
    if parser == "choice":
        found: Any = parse_choice(answer)
        is_right = found == label
    else:
        found = parse_start(answer) if parser == "start" else pope.parse_answer(answer, label == "yes")
        is_right = found is (label == "yes")
    values: dict[str, Any] = {"acc": float(is_right), "unparsed": float(found is None)}
    values |= {f"{name}_acc": (group, float(is_right)) for name, group in doc["groups"].items()}
    values["mme"] = (doc["category"], doc["groups"].get("image", ""), float(is_right))
    if parser != "choice":
        pair = (label == "no", None if found is None else not found)
        values |= {"precision": pair, "recall": pair, "f1": pair}
    return values


def all_right(values: Sequence[tuple[str, float]]) -> float:
    """Return the share of groups whose questions are all answered right (HallusionBench, Guan et al. 2024, arXiv 2310.14566).

    Questions of no group (an empty name) are left out.

    Args:
        values: The name of the group and 1.0 or 0.0, for each question.

    Examples:
        >>> all_right([("a", 1.0), ("a", 0.0), ("b", 1.0), ("", 0.0)])
        0.5
    """
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for name, value in values:
        groups[name].append(value)
    groups.pop("", None)
    return sum(min(each) for each in groups.values()) / len(groups) if groups else 0.0


def mme_score(values: Sequence[tuple[str, str, float]]) -> dict[str, float]:
    """Return MME's score of each category, 100 (accuracy + accuracy+), at most 200 (Fu et al. 2023, arXiv 2306.13394).

    Accuracy+ is the share of images whose two questions are both answered right.

    Args:
        values: Category, image, and 1.0 or 0.0, for each question.

    Examples:
        >>> mme_score([("count", "1", 1.0), ("count", "1", 1.0), ("count", "2", 1.0), ("count", "2", 0.0)])
        {'count': 125.0}
    """
    categories: defaultdict[str, list[tuple[str, float]]] = defaultdict(list)
    for category, image, value in values:
        categories[category].append((image, value))
    return {
        name: 100 * (sum(value for _, value in each) / len(each) + all_right(each)) for name, each in categories.items()
    }


def mme_perception(values: Sequence[tuple[str, str, float]]) -> float:
    """Return the sum of MME's scores over its ten categories of perception, at most 2000.

    Args:
        values: See `mme_score`.
    """
    return sum(score for name, score in mme_score(values).items() if name.lower() in PERCEPTION)


def mme_cognition(values: Sequence[tuple[str, str, float]]) -> float:
    """Return the sum of MME's scores over its four categories of cognition, at most 800.

    Args:
        values: See `mme_score`.
    """
    return sum(score for name, score in mme_score(values).items() if name.lower() not in PERCEPTION)
