"""Tasks of the testbed's worlds for lm-eval: documents drawn from a split, measured as in the models' cards."""

import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from typing import Any, get_args

from lm_eval.api.task import ConfigurableTask

from contralto.eval import data
from contralto.eval.metrics import chair, openended, pope
from contralto.eval.metrics.vocabulary import ObjectVocabulary
from contralto.testbed import scenes as pictured
from contralto.testbed import worlds
from contralto.testbed.scenes import Negatives, Scene
from contralto.testbed.worlds import Split

VOCABULARY = ObjectVocabulary.of([[name] for name in pictured.OBJECTS])

Row = dict[str, Any]


class AsTrained(ConfigurableTask):  # type: ignore[misc]  # lm-eval has no types
    """A task whose prompts have the form that the embedded models learned, with or without lm-eval's chat template.

    Problems and questions stand between the models' marks, stories stand alone: one run can hold both.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def fewshot_context(self, doc: Any, num_fewshot: int, **kwargs: Any) -> Any:
        """Return the prompt of a document in the training data's format, whatever lm-eval asks for."""
        return super().fewshot_context(doc, num_fewshot, **{**kwargs, "apply_chat_template": False})


def _drawn(draw: Callable[[int, Split], Iterator[Any]], split: Split, n: int, world_seed: int) -> list[Any]:
    """Draw the first `n` items of a split."""
    if split not in get_args(Split):
        raise ValueError(f"split must be {', '.join(get_args(Split))}, not {split!r}")
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"n must be a number of documents, at least 1, not {n!r}")
    return list(islice(draw(world_seed, split), n))


# ---------------------------------------------------------------------------------------------------- arithmetic, stories


def problems(*, split: Split, n: int, world_seed: int, **_: Any) -> Any:
    """Return word problems, each with its steps ("finds 4, loses 2") and their number.

    Args:
        split: train, dev or test.
        n: The number of problems.
        world_seed: The seed of the world.
    """
    rows = [
        {
            "question": problem.question,
            "answer": str(problem.totals[-1]),
            "told": ", ".join(f"{verb} {operand}" for verb, operand in problem.steps),
            "steps": len(problem.steps),
        }
        for problem in _drawn(worlds.problems, split, n, world_seed)
    ]
    return data.dataset({"test": rows})


def solved(doc: Row, responses: list[str]) -> dict[str, float]:
    """Return whether a solution is right, whether a wrong one follows the problem and stops early, and whether it has no answer.

    Args:
        doc: The document.
        responses: The solution, as the only member.
    """
    number = worlds.answer(responses[0])
    right = str(number) == doc["answer"]
    done, steps = re.findall(r"([a-z]+ \d+)[:,]", responses[0]), doc["told"].split(", ")
    stopped = number is not None and not right and len(done) < len(steps) and done == steps[: len(done)]
    return {"exact_match": float(right), "stopped_early": float(stopped), "unparsed": float(number is None)}


def items(*, split: Split, n: int, world_seed: int, **_: Any) -> Any:
    """Return four-way items, each with the place it ends in.

    Args:
        split: train, dev or test.
        n: The number of items.
        world_seed: The seed of the world.
    """
    rows = [
        {
            "context": item.context,
            "choices": list(item.endings),
            "label": item.label,
            "place": re.findall(r"to the (\w+) \w+\.", item.context)[-1],
        }
        for item in _drawn(worlds.items, split, n, world_seed)
    ]
    return data.dataset({"test": rows})


def openings(*, split: Split, n: int, world_seed: int, **_: Any) -> Any:
    """Return first scenes of stories, each with the rest of its story as reference.

    Args:
        split: train, dev or test.
        n: The number of stories.
        world_seed: The seed of the world.
    """
    rows = [
        {"prompt": story.scenes[0].text, "reference": story.text.removeprefix(story.scenes[0].text)}
        for story in _drawn(worlds.stories, split, n, world_seed)
    ]
    return data.dataset({"test": rows})


def story_results(doc: Row, responses: list[str]) -> dict[str, Any]:
    """Return the repetition of a continuation, and the validity of the story that it completes.

    Args:
        doc: The document.
        responses: The continuation, as the only member.
    """
    counts = [openended.ngram_counts(responses[0], n=n) for n in (2, 3, 4)]
    story = worlds.telling(f"{doc['prompt']} {responses[0].strip()}")
    return {
        "diversity": counts,
        **{f"rep_{n}": each for n, each in zip((2, 3, 4), counts, strict=True)},
        "distinct_scenes": story.distinct,
        "scenes": float(len(story.scenes)),
        "valid_events": story.valid,
    }


# ---------------------------------------------------------------------------------------------------------------- scenes


def questions(*, negatives: Negatives, split: Split, n: int, world_seed: int, **_: Any) -> Any:
    """Return six questions on each of `n` pictures; `case` says whether the object is present and typical of the place.

    Args:
        negatives: The strategy to choose objects that are not there.
        split: train, dev or test.
        n: The number of pictures.
        world_seed: The seed of the world.
    """
    shown = _drawn(pictured.scenes, split, n, world_seed)
    rows = [
        {
            "question_id": number,
            "split": split,
            "world_seed": world_seed,
            "image": number // (2 * pictured.PER_KIND),
            "text": question.text,
            "label": "yes" if question.label else "no",
            "case": _case(question.scene, question.name),
        }
        for number, question in enumerate(pictured.questions(shown, negatives))
    ]
    return data.dataset({"test": rows})


def _case(scene: Scene, name: str) -> str:
    home = "at home" if name in pictured.HOMES[scene.place] else "stray"
    lows = [thing.is_low for thing in scene.things if thing.name == name]
    return f"{home}, absent" if not lows else f"{home}, {'lower' if lows[0] else 'upper'} half"


def answered(doc: Row, responses: list[str]) -> dict[str, Any]:
    """Return the values that lm-eval logs for an answer.

    Args:
        doc: The document.
        responses: The answer, as the only member.
    """
    label = doc["label"] == "yes"
    return pope.document_metrics(label, pope.parse_answer(responses[0], label))


def pictures(*, split: Split, n: int, world_seed: int, **_: Any) -> Any:
    """Return pictures to describe.

    Args:
        split: train, dev or test.
        n: The number of pictures.
        world_seed: The seed of the world.
    """
    rows = [
        {
            "split": split,
            "world_seed": world_seed,
            "image": number,
            "text": pictured.DESCRIBE,
            "place": scene.place,
            "objects": sorted(scene.objects),
            "caption": pictured.caption(scene.place, scene.objects),
        }
        for number, scene in enumerate(_drawn(pictured.scenes, split, n, world_seed))
    ]
    return data.dataset({"test": rows})


def described(doc: Row, responses: list[str]) -> dict[str, Any]:
    """Return the values that lm-eval logs for a caption.

    Args:
        doc: The document.
        responses: The caption, as the only member.
    """
    return chair.document_metrics(responses[0], chair.count(responses[0], doc["objects"], VOCABULARY))


def images(doc: Row) -> list[Any]:
    """Return the picture of a question, or the one to describe.

    Args:
        doc: The document.
    """
    return [_image(doc["split"], doc["world_seed"], doc["image"])]


@cache
def _image(split: Split, world_seed: int, number: int) -> Any:
    shown, more = _scenes(split, world_seed)
    while len(shown) <= number:
        shown.append(next(more))
    return shown[number].image()


@cache
def _scenes(split: Split, world_seed: int) -> tuple[list[Scene], Iterator[Scene]]:
    """Return the scenes generated so far, and an iterator over further ones."""
    return [], pictured.scenes(world_seed, split)
