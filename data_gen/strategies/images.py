"""Pairs of two images and two texts that differ in one detail, for training that contrasts what is seen (MVC, S-VCO)."""

from collections.abc import Mapping, Sequence
from typing import Any

from contralto.common.hub import from_pretrained
from contralto.data_gen import templates
from contralto.data_gen.ranges import check_batch
from contralto.data_gen.strategies.pairs import user
from contralto.data_gen.types import Answer, Ask, Message, Pair, Rejected, Row, Strategy
from contralto.decoding.pictures import open_image

__all__ = ["image_similarity", "mvc"]


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
    """A pair of two images and two minimally different texts (MVC, Wu et al. 2025, arXiv 2502.13928).

        ((image_w, y_w), (image_l, y_l)):  each text is true of its own image and wrong of the other one

    A rewriter turns the captions into texts in two stages: a question with its answer for the first image; then that answer for
    the second image, with no more words changed than have to be. S-VCO trains on the row as it is (`images`,
    `rejected_images`). Trainers of one image per row read `chosen` and `rejected` as answers about the first image; for them
    `symmetric` adds the mirrored pair, about the second image.

    Args:
        row: with two `images`, and their captions in two columns; with `rewriter=None` also with a `prompt` that the captions
            answer as they are.
        rewriter: the role that writes both texts, or None. It sees both images.
        caption, contrast_caption: the columns of the captions.
        describe: the first stage's template, with `caption` and `contrast_caption`; its reply has `{question}`, `{answer}`.
        contrast: the second stage's template, with `question` and `answer` too; its reply has `{answer}`.
        symmetric: also the pair with both images and texts exchanged.

    Raises:
        ValueError: not two images, or no captions.

    Examples:
        >>> captions = {"caption": "A red cup.", "contrast_caption": "A blue cup."}
        >>> row = {"id": "1", "images": ("a.png", "b.png"), "prompt": [{"role": "user", "content": "What is it?"}], **captions}
        >>> try:
        ...     next(mvc(row, rewriter=None))
        ... except StopIteration as end:
        ...     [pair] = end.value
        >>> (pair.chosen, pair.images), (pair.rejected, pair.rejected_images)
        (('A red cup.', ('a.png',)), ('A blue cup.', ('b.png',)))
    """
    texts: dict[str, Any] = {"caption": row.get(caption), "contrast_caption": row.get(contrast_caption)}
    if len(row["images"]) != 2:
        raise ValueError(f"mvc contrasts two images, and row {row['id']} has {len(row['images'])}")
    if not all(isinstance(text, str) and text for text in texts.values()):
        raise ValueError(f"row {row['id']} needs a caption in each of its columns {caption} and {contrast_caption}")
    if rewriter is None:
        answers = [Answer(text=texts["caption"]), Answer(text=texts["contrast_caption"])]
        return _mirrored(row["prompt"], row["images"], answers, "", symmetric)
    first = templates.load(describe, "caption", "contrast_caption")
    second = templates.load(contrast, "caption", "contrast_caption", "question", "answer")
    reply = yield _ask(row, rewriter, first, **texts)
    described = templates.sections(reply.text, "question", "answer")
    if not {"question", "answer"} <= described.keys():
        return Rejected(f"the first stage has no {{question}} or no {{answer}} (it ended by {reply.finish_reason})")
    question, answer = described["question"], described["answer"]
    other = yield _ask(row, rewriter, second, **texts, question=question, answer=answer)
    contrasted = templates.sections(other.text, "answer")
    if "answer" not in contrasted:
        return Rejected(f"the second stage has no {{answer}} (it ended by {other.finish_reason})")
    answers = [
        Answer(text=answer, finish_reason=reply.finish_reason),
        Answer(text=contrasted["answer"], finish_reason=other.finish_reason),
    ]
    return _mirrored(user(question), row["images"], answers, f"{first.label} {second.label}", symmetric)


def _ask(row: Row, role: str, template: templates.Template, **values: Any) -> Ask:
    return Ask(
        role=role,
        messages=user(template.render(**values)),
        images=row["images"],
        tag=template.name,
        template=template.label,
    )


def _mirrored(
    prompt: Sequence[Message], images: Sequence[Any], answers: Sequence[Answer], template: str, symmetric: bool
) -> list[Pair | Rejected]:
    pairs: list[Pair | Rejected] = []
    for at in (0, 1) if symmetric else (0,):
        chosen, rejected = answers[at], answers[1 - at]
        known = {
            "strategy": "mvc",
            "template": template,
            "chosen_finish_reason": chosen.finish_reason,
            "rejected_finish_reason": rejected.finish_reason,
        }
        pairs.append(
            Pair(
                prompt=prompt,
                chosen=chosen.text,
                rejected=rejected.text,
                images=(images[at],),
                rejected_images=(images[1 - at],),
                columns=known,
            )
        )
    return pairs


def image_similarity(
    rows: Sequence[Mapping[str, Any]], *, model: str, column: str = "image_similarity", batch_size: int = 16
) -> dict[str, list[float | None]]:
    """The cosine between the embeddings of a row's two images, a check for `checks.annotate`.

    MVC keeps counterfactual pairs that mean nearly the same and look different: CLIP similarity above 0.7 and DINOv2 similarity
    below 0.5. So run this twice, with a model and a column each, and filter by both columns.

    Args:
        rows: with `images` and `rejected_images`; None is written for rows that lack either.
        model: a folder or hub id of CLIP, SigLIP, DINOv2 or another image encoder that pools.
        column: the column's name.
        batch_size: pairs of images at once.

    Returns:
        `{column: values}`, in [-1, 1].
    """
    check_batch(batch_size)
    values: list[float | None] = [None] * len(rows)
    paired = [i for i, row in enumerate(rows) if row.get("images") and row.get("rejected_images")]
    if not paired:
        return {column: values}
    import torch
    from torch.nn.functional import cosine_similarity
    from tqdm import tqdm
    from transformers import AutoImageProcessor, AutoModel

    encoder, processor = from_pretrained(AutoModel, model).eval(), from_pretrained(AutoImageProcessor, model)
    embed = getattr(encoder, "get_image_features", encoder)
    for start in tqdm(range(0, len(paired), batch_size), desc=column, unit="batch"):
        batch = paired[start : start + batch_size]
        pictures = [open_image(rows[i][name][0]) for name in ("images", "rejected_images") for i in batch]
        with torch.inference_mode():
            found = embed(**processor(images=pictures, return_tensors="pt"))
        first, second = getattr(found, "pooler_output", found).float().chunk(2)
        for i, similarity in zip(batch, cosine_similarity(first, second).tolist(), strict=True):
            values[i] = similarity
    return {column: values}
