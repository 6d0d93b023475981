"""Checks that run a model: reward models, the model that is to be trained, image encoders."""

from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from contralto.common.hub import from_pretrained, locate
from contralto.data_gen.checks.base import Columns, PairRows, answer_text, writes
from contralto.data_gen.ranges import check_batch
from contralto.data_gen.scorers import resolve_scorer, score_answers

__all__ = ["ches", "image_similarity", "reward"]


@writes("ches", "ln_ches")
def ches(
    rows: PairRows,
    *,
    model: str,
    device: str | None = None,
    dtype: str = "auto",
    batch_size: int = 8,
    max_length: int | None = None,
) -> Columns:
    """Compute the CHES scores of pairs (Razin et al. 2024, arXiv 2410.08847): the estimated likelihood displacement.

    The higher they are, the more likely does training lower the likelihood of both answers. The paper trains on the pairs with
    the lowest ln-CHES, in one run on 5%: `ln_ches: {lowest: 0.05}`. Minimal revisions have high scores by their nature; a loss
    that keeps the chosen answer likely (`apo_zero`, an SFT term) prevents for them what dropping them would.

    Args:
        rows: the pairs.
        model: the model that is to be trained: a folder, a hub id, or testbed:NAME.
        device: None is a GPU if there is one.
        dtype: of the weights.
        batch_size: answers per forward pass.
        max_length: tokens; longer texts are truncated at their end.

    Returns:
        `ches` and `ln_ches`; the module `ches` has their formulas.
    """
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
    scores = score_rows(network, tokenizer, rows, batch_size=batch_size, max_length=max_length)
    return {"ches": scores.ches.tolist(), "ln_ches": scores.ln_ches.tolist()}


def reward(rows: PairRows, *, scorer: Any) -> Columns:
    """Score both answers with a function or a reward model.

    A band on the margin is a common filter: AIR (arXiv 2504.03612) finds moderate margins better than maximal ones.

    Args:
        rows: the pairs.
        scorer: `module:function`, called as `score(row, answers)`, which returns a list with one number per answer;
            or `{reward_model: NAME}`.

    Returns:
        `chosen_score`, `rejected_score`, and their difference `reward_margin`.
    """
    if not isinstance(scorer, Mapping):  # a reward model is loaded when the first row is scored
        resolve_scorer(scorer)
    both = [
        score_answers(scorer, row, [answer_text(row, "chosen"), answer_text(row, "rejected")])
        for row in tqdm(rows, desc="reward", unit="row", disable=not rows)
    ]
    return {
        "chosen_score": [chosen for chosen, _ in both],
        "rejected_score": [rejected for _, rejected in both],
        "reward_margin": [chosen - rejected for chosen, rejected in both],
    }


def image_similarity(
    rows: PairRows, *, model: str, column: str = "image_similarity", batch_size: int = 16
) -> dict[str, list[float | None]]:
    """Compute the cosine between the embeddings of a pair's two images.

    MVC keeps counterfactual pairs that mean nearly the same and look different: CLIP similarity above 0.7 and DINOv2 similarity
    below 0.5. So name this check twice, with a model and a column each, and filter by both columns.

    Args:
        rows: with `images` and `rejected_images`; the value of pairs that lack either is None.
        model: a folder or hub id of CLIP, SigLIP, DINOv2 or another image encoder with pooling.
        column: the name of the column.
        batch_size: pairs of images per forward pass.

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
    from transformers import AutoImageProcessor, AutoModel

    from contralto.decoding.pictures import open_image

    encoder, processor = from_pretrained(AutoModel, model).eval(), from_pretrained(AutoImageProcessor, model)
    embed = getattr(encoder, "get_image_features", encoder)
    for start in tqdm(range(0, len(paired), batch_size), desc=column, unit="batch"):
        batch = paired[start : start + batch_size]
        pictures = [open_image(rows[i][name][0]) for name in ("images", "rejected_images") for i in batch]
        with torch.inference_mode():
            output = embed(**processor(images=pictures, return_tensors="pt"))
        first, second = getattr(output, "pooler_output", output).float().chunk(2)  # each (B, H)
        for i, similarity in zip(batch, cosine_similarity(first, second).tolist(), strict=True):
            values[i] = similarity
    return {column: values}
