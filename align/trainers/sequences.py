"""The base of trainers that rank whole candidates, BRIO and CoNT, for decoders and encoder-decoders."""

# ruff: noqa: TRY004 (a wrong type in somebody's data is a ValueError like any other mistake in it)

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor
from transformers import AutoTokenizer, TrainingArguments, set_seed

from contralto.align.cards.mixin import CardMixin
from contralto.align.trainers.base import LastLog
from contralto.align.trainers.checks import check_adapter, check_model, located
from contralto.align.trainers.config import apply_machine_defaults, option, with_adapter_dtype, with_own_peft_config
from contralto.align.trainers.sequence_rows import Tokenise, pad_sequences, pad_sources, tokenised_rows
from contralto.align.trainers.sequence_scores import SequenceScores, SequenceTask, install_sequences
from contralto.align.trainers.settings import RecipeOptions, records_settings
from contralto.align.trainers.sharding import fsdp_version, uses_deepspeed
from contralto.align.trl_compat import PlainTrainer, create_model_from_path
from contralto.common.hashing import fingerprint, weights_digest
from contralto.common.hub import from_pretrained

__all__ = ["RankedBatch", "RankedLoss", "SequenceConfig", "SequenceTrainer"]

logger = logging.getLogger(__name__)

AT_LEAST_1 = ("max_completion_length", "chunk_size")


@dataclass
class SequenceConfig(RecipeOptions, TrainingArguments):
    """The options of `transformers.TrainingArguments`, and those that trainers on candidates have in common.

    Args:
        model_init_kwargs: keyword arguments of `from_pretrained`.
        trust_remote_code: run the code of a model's repository.
        max_prompt_length: tokens of a prompt; a source of an encoder-decoder is cut there, a row of a decoder is dropped.
        max_completion_length: tokens of references and candidates.
        chunk_size: candidates per forward pass, whose activations alone are in memory.

    Raises:
        ValueError: an option is out of range, or training is sharded.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012
    reads_references: ClassVar[bool] = True
    """Rows are prompts with references and candidates, not pairs."""
    needs_candidates: ClassVar[bool] = True
    unit: ClassVar[str] = "prompt"
    """What a batch counts."""

    logging_steps: float = option(10, "Log every X steps; a number in [0, 1) is a share of all steps.")
    model_init_kwargs: dict[str, Any] | str | None = option(  # noqa: RUF009 (a field, as in the others)
        None, "Keyword arguments of from_pretrained, as JSON."
    )
    trust_remote_code: bool = option(False, "Run the code of a model's repository.")
    max_prompt_length: int | None = option(
        512, "Tokens of a prompt: a source of an encoder-decoder is cut there, a row of a decoder is dropped."
    )
    max_completion_length: int = option(128, "Tokens of references and candidates.")
    chunk_size: int = option(8, "Candidates per forward pass; the activations of one pass are in memory at a time.")

    @records_settings
    def __post_init__(self) -> None:
        for name in AT_LEAST_1:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_prompt_length is not None and self.max_prompt_length < 2:
            raise ValueError(f"max_prompt_length must be at least 2, not {self.max_prompt_length}")
        if fsdp_version(self) or uses_deepspeed(self):
            raise ValueError(
                "candidates are read outside of the wrapped model, which fsdp and deepspeed shard: leave them out, processes of "
                "--num_processes are supported"
            )
        self.remove_unused_columns = False
        apply_machine_defaults(self)
        super().__post_init__()


class RankedBatch(NamedTuple):
    """A batch of prompts whose candidates are to be ranked."""

    task: SequenceTask
    quality: Tensor
    """`(B, n)`, or `(B, 1 + n)` with the reference first; higher is better."""
    mask: Tensor
    """In the shape of `quality`, false for absent candidates."""


class RankedLoss(NamedTuple):
    """The loss of a batch, and figures to log."""

    total: Tensor
    figures: dict[str, Tensor]
    """Scalars of this process."""


class SequenceTrainer(CardMixin, PlainTrainer):  # type: ignore[misc]  # `create_model_card` has another signature
    """Train a decoder or an encoder-decoder to rank candidates. A subclass provides `make_batch` and `loss`.

    Args:
        model: a folder, a hub id or `testbed:NAME`, a model of transformers, or one with an adapter of peft.
        args: a `SequenceConfig`.
        train_dataset: rows as `contralto.data_gen.load_candidates` returns them.
        eval_dataset: the same, to evaluate on.
        processing_class: the tokenizer; None loads that of the model.
        peft_config: an adapter to train.
        quantization_config: see `transformers.PreTrainedModel.from_pretrained`.
        kwargs: the other arguments of `transformers.Trainer`.

    Attributes:
        origin: a digest of the weights before training.
        reads_encoder: whether the model is an encoder-decoder.
        tokenise: makes the tokens of prompts and answers.

    Raises:
        ValueError: an argument is wrong; before a model is loaded where that can be.
    """

    args: Any

    def __init__(
        self,
        model: Any,
        args: Any,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        quantization_config: Any = None,
        **kwargs: Any,
    ) -> None:
        model = located(model)
        check_model(model)
        check_adapter(model, peft_config, compares_tokens=True)
        self.args = args
        data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        for name, dataset in data.items():
            self._check_data(name, dataset)
        tokenizer = processing_class or from_pretrained(AutoTokenizer, _name_of(model))
        self.origin = weights_digest(model) if isinstance(model, str) else fingerprint(model)
        set_seed(args.seed)  # of a new adapter and of a projection; the Trainer sets it again
        loaded = _loaded(model, with_adapter_dtype(args, model, peft_config), peft_config, quantization_config)
        self.reads_encoder = bool(loaded.config.is_encoder_decoder)
        self.tokenise = Tokenise(
            tokenizer,
            is_encoder_decoder=self.reads_encoder,
            max_prompt_length=args.max_prompt_length,
            max_completion_length=args.max_completion_length,
        )
        self.prepare_policy(loaded.get_base_model() if is_peft_model(loaded) else loaded)
        rows = {name: self._tokenised(name, dataset) for name, dataset in data.items()}
        callbacks = [*(kwargs.pop("callbacks", None) or ()), LastLog()]
        self._figures: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        super().__init__(
            model=loaded,
            args=args,
            data_collator=list,
            processing_class=tokenizer,
            callbacks=callbacks,
            **rows,
            **kwargs,
        )
        install_sequences(self.policy)

    def _check_data(self, name: str, dataset: Any) -> None:
        """Reject data without rows or without the columns that the loss reads."""
        if dataset is None:
            if name == "train_dataset":
                raise ValueError(
                    "train_dataset is missing: give rows as contralto.data_gen.load_candidates returns them"
                )
            return
        if not isinstance(dataset, Dataset):
            raise ValueError(f"{name} must be a datasets.Dataset, not a {type(dataset).__name__}")
        if not len(dataset):
            raise ValueError(f"{name} has no rows")
        for column in self.columns():
            values = dataset[column] if column in dataset.column_names else [None]
            at = next((at for at, value in enumerate(values, 1) if value is None), None)
            if at is not None:
                where = f"{name}, row {at}" if column in dataset.column_names else name
                raise ValueError(f"{where} has no {column}: a row needs {', '.join(self.columns())}")

    def _tokenised(self, name: str, dataset: Any) -> Any:
        if dataset is None:
            return None
        rows, said = tokenised_rows(dataset, self.tokenise, name)
        if said:
            logger.warning("%s", said)
        return rows

    @property
    def policy(self) -> Any:
        """Return the model as transformers loaded it, without adapter and wrappers."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if is_peft_model(model) else model

    # ------------------------------------------------------------------------------ what subclasses provide

    def prepare_policy(self, policy: Any) -> None:
        """Change the model before it is trained.

        Args:
            policy: the model as transformers loaded it.
        """

    def columns(self) -> Sequence[str]:
        """Return the columns that every row must have."""
        raise NotImplementedError

    def make_batch(self, rows: Sequence[Mapping[str, Any]]) -> RankedBatch:
        """Make a batch of rows, on the device of training.

        Args:
            rows: with tokens.
        """
        raise NotImplementedError

    def loss(self, batch: RankedBatch, scores: SequenceScores) -> RankedLoss:
        """Compute the loss of a batch.

        Args:
            batch: the candidates and their quality.
            scores: the result of the model.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------ steps

    def sources(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the prompts of rows, padded as the model generates from them, on the device of training.

        Args:
            rows: with tokens.
        """
        tokenizer = self.tokenise.tokenizer
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        padded = pad_sources([row["prompt_ids"] for row in rows], pad=pad, left=not self.reads_encoder)
        return {name: value.to(self.accelerator.device) for name, value in padded.items()}

    def references(self, rows: Sequence[Mapping[str, Any]]) -> Tensor | None:
        """Return the references of rows `(B, T)` on the device of training; None if a row has none.

        Args:
            rows: with tokens.
        """
        if any(row["reference_ids"] is None for row in rows):
            return None
        return pad_sequences([[row["reference_ids"]] for row in rows])[:, 0].to(self.accelerator.device)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch, and record its figures.

        Args:
            model: the model, with wrappers.
            inputs: the rows of the batch.
            return_outputs: not supported: there are no logits to return.
            num_items_in_batch: not read: the loss of a batch is a mean.

        Raises:
            ValueError: outputs are asked for.
        """
        if return_outputs:
            raise ValueError("compute_metrics reads logits, which are not kept here: leave compute_metrics out")
        batch = self.make_batch(inputs)
        loss = self.loss(batch, model(task=batch.task))
        for name, value in loss.figures.items():
            mean = float(self.accelerator.gather(value.detach().float()).nanmean())
            if not math.isnan(mean):  # of batches without a pair of different quality
                self._figures[self.mode][name].append(mean)
        return loss.total

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """Return the loss of a batch of the evaluation.

        Args:
            model: the model, with wrappers.
            inputs: the rows of the batch.
            prediction_loss_only: not read.
            ignore_keys: not read.
        """
        with torch.no_grad(), self.compute_loss_context_manager():
            loss: Tensor = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log values with the means of the figures since the last log.

        Args:
            logs: the values.
            args: see `transformers.Trainer.log`.
            kwargs: see `transformers.Trainer.log`.
        """
        mode = "eval" if any(name.startswith("eval_") for name in logs) else "train"
        prefix = "eval_" * (mode == "eval")
        means = {f"{prefix}{name}": sum(values) / len(values) for name, values in self._figures[mode].items()}
        self._figures[mode].clear()
        super().log(logs | means, *args, **kwargs)


def _name_of(model: Any) -> str:
    """Return the name of a model, to load its tokenizer."""
    return model if isinstance(model, str) else str(model.config.name_or_path)


def _loaded(model: Any, args: Any, adapter: Any, quantization: Any) -> Any:
    """Return the model, loaded if it is a name, with a new adapter if there is one."""
    if isinstance(model, str):
        options = {"device_map": None, "trust_remote_code": args.trust_remote_code} | dict(args.model_init_kwargs or {})
        if quantization is not None:
            options |= {"quantization_config": quantization, "device_map": {"": str(args.device)}}
        model = create_model_from_path(model, **options)
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} does not generate text: give a language model or an encoder-decoder")
    if adapter is None:
        return model
    adapter = with_own_peft_config({"peft_config": adapter})["peft_config"]
    if model.config.is_encoder_decoder:
        adapter.task_type = "SEQ_2_SEQ_LM"
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    return get_peft_model(model, adapter)
