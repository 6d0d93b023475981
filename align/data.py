"""The datasets of `contralto align`, from a file, a folder, the hub, or a mixture of TRL."""

from pathlib import Path
from typing import Any

from contralto.align.prompt_data import load_prompts
from contralto.align.text_data import TEXT_COLUMNS, load_texts
from contralto.common.column_names import column_names
from contralto.common.suggestions import did_you_mean

__all__ = ["training_data"]

WHOLE = {
    "reads_prompts": "rewards are computed on prompts of known number",
    "reads_texts": "texts are read whole",
    "reads_references": "candidates are tokenised before training",
}
"""Why rows are no streams, by the attribute of the trainer's configuration."""


def training_data(data: Any, args: Any, mixture: Any) -> tuple[Any, Any]:
    """Return the datasets to train and to evaluate on.

    Args:
        data: a `DataArguments`.
        args: the configuration of the trainer: `eval_strategy` says whether there is an evaluation, `reads_rejected`, if
            there is one, whether rows need `rejected`, `reads_labels` whether they are single completions with labels,
            `reads_prompts` whether they are prompts alone, `reads_texts` whether they are texts, and `reads_references` whether they
            are prompts with references and candidates.
        mixture: a `trl.DatasetMixtureConfig`.

    Returns:
        Rows with prompt, chosen and rejected, with prompt, completion and label, with prompts for rewards, with texts, or with
        references and candidates; the second dataset is None without an evaluation.

    Raises:
        ValueError: no dataset is named, or there is none to evaluate on.
    """
    if mixture.datasets:
        train, test = _mixture(data, mixture, args)
    elif data.dataset_name is None:
        raise ValueError("no dataset: set --dataset_name to a JSONL, JSON or parquet file, a folder, or a hub id")
    else:
        train, test = _rows(data, data.dataset_name, data.dataset_train_split, args), None
    if args.eval_strategy == "no":
        return train, None
    if data.eval_dataset_name is not None:
        return train, _rows(data, data.eval_dataset_name, data.dataset_test_split, args)
    if test is None and mixture.datasets:
        raise ValueError("datasets has no split to evaluate on: set --test_split_size or --eval_dataset_name")
    if test is None and Path(data.dataset_name).is_file():
        raise ValueError(f"{data.dataset_name} is one file, without a split to evaluate on: set --eval_dataset_name")
    if test is None:
        test = _rows(data, data.dataset_name, data.dataset_test_split, args)
    return train, test


def _mixture(data: Any, mixture: Any, args: Any) -> tuple[Any, Any]:
    """Return the training and test splits of a mixture of datasets; None for a missing test split."""
    from trl import get_dataset  # type: ignore[attr-defined]

    if data.dataset_name is not None:
        raise ValueError(
            "datasets and dataset_name are both given, and only one of them can be trained on: leave one out"
        )
    splits = get_dataset(mixture)
    if data.dataset_train_split not in splits:
        raise ValueError(
            f"datasets has no split {data.dataset_train_split!r}{did_you_mean(data.dataset_train_split, splits)}; it has {', '.join(splits)}"
        )
    test = data.dataset_test_split if data.dataset_test_split in splits else None
    data.dataset_config, data.dataset_streaming = None, mixture.streaming
    names = (data.dataset_train_split, test)
    train, evaluation = (None if name is None else _rows(data, splits[name], name, args) for name in names)
    return train, evaluation


def _rows(data: Any, source: Any, split: str, args: Any) -> Any:
    """Return the rows of one split, pairs or completions with labels as the trainer reads them."""
    from contralto.data_gen import load_candidates, load_pairs, load_unpaired, stream_pairs, stream_unpaired
    from contralto.data_gen.published_forms import COLUMN_NAMES

    options = {"config": data.dataset_config, "conversations": data.conversations}
    known = (*COLUMN_NAMES, *TEXT_COLUMNS) if getattr(args, "reads_texts", False) else COLUMN_NAMES
    options |= {"columns": column_names(data.columns or [], known)}
    for flag, reason in WHOLE.items():
        if getattr(args, flag, False) and data.dataset_streaming:
            raise ValueError(f"{reason}: leave dataset_streaming out")
    if getattr(args, "reads_prompts", False):
        return load_prompts(source, split=split, **options)
    if getattr(args, "reads_texts", False):
        return load_texts(source, split=split, **options)
    if getattr(args, "reads_references", False):
        return load_candidates(source, split=split, needs_candidates=args.needs_candidates, **options)
    if getattr(args, "reads_labels", False):
        return (stream_unpaired if data.dataset_streaming else load_unpaired)(source, split=split, **options)
    options["needs_rejected"] = getattr(args, "reads_rejected", True)
    return (stream_pairs if data.dataset_streaming else load_pairs)(source, split=split, **options)
