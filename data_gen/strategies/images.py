"""Pairs of two images and two texts that differ in one detail, for training on visual contrast (MVC, S-VCO)."""

from collections.abc import Sequence
from typing import Any

from contralto.data_gen import templates
from contralto.data_gen.strategies.shared import ask_template, pair_columns
from contralto.data_gen.types import Answer, Message, Pair, Rejected, Row, Strategy

__all__ = ["mvc"]


def mvc(
    row: Row,
    *,
    rewriter: str | None = "rewriter",
    caption: str = "caption",
    contrast_caption: str = "contrast_caption",
    describe: str = "mvc_describe",
    contrast: str = "mvc_contrast",
    symmetric: bool = False,
) -> Strategy:
    """Make a pair of two images and two minimally different texts (MVC, Wu et al. 2025, arXiv 2502.13928).

        ((image_w, y_w), (image_l, y_l)):  each text is true of its own image and false of the other one

    A rewriter turns the captions into texts in two stages: a question with its answer for the first image; then that answer for
    the second image, with no more words changed than necessary. S-VCO trains on the row as it is (`images`, `rejected_images`).
    Trainers of one image per row take both answers as about the first image; for them `symmetric` adds the mirrored pair.

    Args:
        row: with two `images`, and their captions in two columns; with `rewriter=None` also with a `prompt` that the captions
            answer as they are.
        rewriter: the role that writes both texts, with both images; None uses the captions.
        caption: the column of the first image's caption.
        contrast_caption: the column of the second image's caption.
        describe: the template of the first stage, with `caption` and `contrast_caption`; its reply has `{question}`, `{answer}`.
        contrast: the template of the second stage, with `question` and `answer` too; its reply has `{answer}`.
        symmetric: also make the pair with images and texts exchanged.

    Raises:
        ValueError: the row has not two images, or lacks a caption.
    """
    captions = _captions(row, caption, contrast_caption)
    if rewriter is None:
        answers = [Answer(text=text) for text in captions.values()]
        return _pairs(row["prompt"], row["images"], answers, "", symmetric)
    first = templates.load(describe, "caption", "contrast_caption")
    second = templates.load(contrast, "caption", "contrast_caption", "question", "answer")
    described = yield ask_template(row, rewriter, first, tag=first.name, **captions)
    texts = templates.sections(described.text, "question", "answer")
    if not {"question", "answer"} <= texts.keys():
        return Rejected(
            f"the first stage has no {{question}} or no {{answer}} (finish_reason {described.finish_reason})"
        )
    question, answer = texts["question"], texts["answer"]
    other = yield ask_template(row, rewriter, second, tag=second.name, **captions, question=question, answer=answer)
    other_answer = templates.sections(other.text, "answer").get("answer")
    if other_answer is None:
        return Rejected(f"the second stage has no {{answer}} (finish_reason {other.finish_reason})")
    written = ((answer, described), (other_answer, other))
    answers = [Answer(text=text, finish_reason=reply.finish_reason) for text, reply in written]
    prompt, labels = templates.user_messages(question), f"{first.label} {second.label}"
    return _pairs(prompt, row["images"], answers, labels, symmetric)


def _captions(row: Row, caption: str, contrast_caption: str) -> dict[str, str]:
    """Return the captions of a row's two images, by the fields of the templates.

    Raises:
        ValueError: not two images, or no caption in one of the columns.
    """
    captions: dict[str, Any] = {"caption": row.get(caption), "contrast_caption": row.get(contrast_caption)}
    if len(row["images"]) != 2:
        raise ValueError(f"mvc needs two images, but row {row['id']} has {len(row['images'])}")
    if not all(isinstance(text, str) and text for text in captions.values()):
        raise ValueError(f"row {row['id']} needs a caption in each of its columns {caption} and {contrast_caption}")
    return captions


def _pairs(
    prompt: Sequence[Message], images: Sequence[Any], answers: Sequence[Answer], template: str, symmetric: bool
) -> list[Pair | Rejected]:
    """Return the pair of the first image's answer against the second's, and the mirrored one if `symmetric`."""
    pairs: list[Pair | Rejected] = []
    for at in (0, 1) if symmetric else (0,):
        chosen, rejected = answers[at], answers[1 - at]
        columns = {"strategy": "mvc", "template": template} | pair_columns("mvc", chosen, rejected)
        pairs.append(
            Pair(
                prompt=prompt,
                chosen=chosen.text,
                rejected=rejected.text,
                images=(images[at],),
                rejected_images=(images[1 - at],),
                columns=columns,
            )
        )
    return pairs
