"""Candidates that a model writes itself by diverse beams, and their quality."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from contralto.align.trainers.sequence_rows import pad_sequences, scored_row, texts_of
from contralto.common.files import read_text, replace_text
from contralto.common.hashing import content_digest
from contralto.data_gen.functions import search_folder
from contralto.data_gen.scorers import resolve_scorer, score_answers
from contralto.decoding.executors.diverse import ENDED, diverse_beams

__all__ = ["CandidateWriter", "ngram_overlap", "write_beams"]


def ngram_overlap(reference: Sequence[int], candidate: Sequence[int], *, n: int = 2) -> float:
    """Return the share of a candidate's n-grams that a reference has, times BLEU's brevity penalty: the quality in CoNT's released code.

        q = |{t: g_t in reference}| / (|y| - n + 1) * exp(min(0, 1 - |y*| / |y|))

    Unlike in BLEU an n-gram that occurs several times counts as often, and orders below n do not count. The released code counts padding
    as tokens in the first sample, and leaves the first and the last n-gram of the others out; here every sequence counts as it is.

    Args:
        reference: tokens of y*.
        candidate: tokens of y, at least one.
        n: the order; a shorter sequence lowers it.

    Examples:
        >>> ngram_overlap([1, 2, 3, 4], [1, 2, 3, 9])
        0.6666666666666666
        >>> round(ngram_overlap([1, 2, 3, 4], [1, 2]), 4)
        0.3679
    """
    n = min(n, len(reference), len(candidate))
    own = {tuple(reference[at : at + n]) for at in range(len(reference) - n + 1)}
    grams = [tuple(candidate[at : at + n]) for at in range(len(candidate) - n + 1)]
    return sum(gram in own for gram in grams) / len(grams) * math.exp(min(0.0, 1 - len(reference) / len(candidate)))


def write_beams(trainer: Any, rows: Sequence[Mapping[str, Any]], count: int, penalty: float, **options: Any) -> Any:
    """Return candidates `(B, count, T)` of the model as it is now, in evaluation mode, padded with `ENDED`.

    Args:
        trainer: a `SequenceTrainer`.
        rows: with tokens.
        count: candidates per row.
        penalty: of diverse beams.
        options: further options of `generate()`.
    """
    policy, training = trainer.policy, trainer.model.training
    pad = trainer.tokenise.tokenizer.pad_token_id
    options = {"pad_token_id": policy.generation_config.eos_token_id if pad is None else pad} | options
    trainer.model.eval()
    with trainer.accelerator.autocast():
        beams = diverse_beams(
            policy,
            trainer.sources(rows),
            num_candidates=count,
            diversity_penalty=penalty,
            max_new_tokens=trainer.args.max_completion_length,
            **options,
        )
    trainer.model.train(training)
    return beams


class CandidateWriter:
    """Writes candidates of a whole data set once, each process its share, and goes on where an earlier run was stopped.

    A process appends each row to a file of JSON lines before it goes on; the lines are rows that `contralto align brio` reads as well.

    Args:
        trainer: a `SequenceTrainer` whose model has not been trained yet.
        scorer: as for `contralto.data_gen.scorers.resolve_scorer`.
        folder: for the files.
        count: candidates per prompt.
        penalty: of diverse beams.

    Raises:
        ValueError: there is no such scorer.
    """

    def __init__(self, trainer: Any, scorer: Any, folder: Path, count: int, penalty: float) -> None:
        search_folder(Path())
        self.trainer, self.count, self.penalty = trainer, count, penalty
        self.scorer, self.folder = resolve_scorer(scorer), folder
        settings = [trainer.origin, repr(scorer), count, penalty, trainer.args.max_completion_length]
        self.settings = json.dumps(settings)

    def with_candidates(self, dataset: Any) -> Any:
        """Return the rows with the columns `candidates` and `scores`.

        Args:
            dataset: rows with tokens.
        """
        accelerator = self.trainer.accelerator
        rank, world_size = accelerator.process_index, accelerator.num_processes
        self.folder.mkdir(parents=True, exist_ok=True)
        known = self._recorded()
        keys = [content_digest(f"{self.settings}{row['prompt_ids']}", 32) for row in dataset]
        own = [at for at in range(rank, len(dataset), world_size) if keys[at] not in known]
        size = self.trainer.args.per_device_eval_batch_size
        path = self.folder / f"{rank}.jsonl"
        replace_text(path, "".join(_whole_lines(path)))  # without one that a killed run has begun
        with path.open("a", encoding="utf-8") as file:
            for start in tqdm(range(0, len(own), size), desc="candidates", disable=rank > 0 or not own):
                numbers = own[start : start + size]
                rows = [dataset[at] for at in numbers]
                for at, row, line in zip(numbers, rows, self._written(rows), strict=True):
                    kept = {"key": keys[at], "prompt": row["prompt"], "reference": row["reference"], **line}
                    file.write(json.dumps(kept, ensure_ascii=False) + "\n")
                    file.flush()
        accelerator.wait_for_everyone()
        known = self._recorded()
        others = dataset.remove_columns([name for name in ("candidates", "scores") if name in dataset.column_names])
        for name in ("candidates", "scores"):
            others = others.add_column(name, [known[key][name] for key in keys])
        return others

    def _recorded(self) -> dict[str, dict[str, Any]]:
        """Return the rows of all processes by their keys."""
        lines = [json.loads(text) for path in sorted(self.folder.glob("*.jsonl")) for text in _whole_lines(path)]
        return {line["key"]: line for line in lines}

    def _written(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return candidates and scores of rows."""
        texts = texts_of(self.trainer.tokenise.tokenizer, write_beams(self.trainer, rows, self.count, self.penalty))
        return [
            {"candidates": own, "scores": score_answers(self.scorer, scored_row(row), own)}
            for row, own in zip(rows, texts, strict=True)
        ]


def _whole_lines(path: Path) -> list[str]:
    """Return the lines of a file that were written to their end."""
    text = read_text(path) if path.exists() else ""
    return [f"{line}\n" for line in text.split("\n")[:-1]]


def quality_of(rows: Sequence[Mapping[str, Any]], samples: torch.Tensor, tokenizer: Any, scorer: Any) -> torch.Tensor:
    """Return the quality of samples `(B, n)`: by a scorer, or by `ngram_overlap` with the references if that is None.

    Args:
        rows: with tokens.
        samples: `(B, n, T)`, padded with `ENDED`.
        tokenizer: of the model.
        scorer: a scorer, or None.
    """
    if scorer is None:
        return torch.tensor(
            [
                [ngram_overlap(row["reference_ids"], [token for token in ids if token != ENDED]) for ids in own]
                for row, own in zip(rows, samples.tolist(), strict=True)
            ]
        )
    texts = texts_of(tokenizer, samples)
    return torch.tensor([score_answers(scorer, scored_row(row), own) for row, own in zip(rows, texts, strict=True)])


def reference_tokens(rows: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """Return the references of other rows of a batch, `(B, B - 1, T)`.

    Args:
        rows: with tokens.
    """
    references = [row["reference_ids"] for row in rows]
    return pad_sequences([[*references[:at], *references[at + 1 :]] for at in range(len(references))])
