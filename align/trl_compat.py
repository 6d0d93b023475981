"""Every contact of contralto.align with private parts of TRL and transformers. No other module of contralto.align has one.

Read from TRL 1.16.0, transformers 5.23.0, peft 0.21.2 and accelerate 1.15.0. Each contact says what it needs the private part for, so
that a new version of a library has one file to be compared with.

TRL's `DPOTrainer` has no hook between the forward pass and the loss: `_compute_loss` does everything, in 300 lines. `PairTrainer`
replaces it once, as TRL advises for other objectives (https://github.com/huggingface/trl/pull/6918). It relies on these steps of `DPOTrainer.__init__`: a reference is loaded unless one is given, or an adapter is, or
`precompute_ref_log_probs` is set; `padding_free` is warned of; `_precompute_ref_logps` is called last, for each data set.

Two things that are no private parts are relied on as well. transformers uses an attention mask of four dimensions as it is, and without
a mask it takes position ids that start again for the beginning of another sequence.
"""

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, Trainer
from trl import DPOTrainer, KTOTrainer  # type: ignore[attr-defined]
from trl.models import prepare_deepspeed  # type: ignore[attr-defined]
from trl.trainer.utils import (
    create_model_from_path,
    get_comet_experiment_url,
    get_trackio_space_url,
    maybe_gather_lm_head_ctx,
    use_adapter,
)

__all__ = [
    "NoReference",
    "PairTrainer",
    "PlainTrainer",
    "RowTrainer",
    "attention_of",
    "create_model_from_path",
    "default_attention",
    "gathered",
    "is_stateful",
    "record_metrics",
    "tracking_links",
    "use_adapter",
]


class NoReference(nn.Module):
    """A module without weights, to be given as `ref_model` where `DPOTrainer.__init__` would load a reference.

    TRL 1.16 loads the policy once more when `ref_model` is None, unless `precompute_ref_log_probs` is set
    (https://github.com/huggingface/trl/pull/5542), and has no option for losses that use no reference.
    """

    def __init__(self) -> None:
        super().__init__()
        self.config = PretrainedConfig()

    def forward(self) -> None:
        """Do nothing: the module is never called."""


@contextmanager
def _hidden(args: Any, *options: str) -> Iterator[None]:
    """Let `DPOTrainer.__init__` see options as False (TRL 1.16).

    It warns that it ignores `padding_free` (https://github.com/huggingface/trl/pull/7014), and rejects `precompute_ref_log_probs` for
    images (https://github.com/huggingface/trl/issues/5867).
    """
    values = {option: getattr(args, option) for option in options}
    vars(args).update(dict.fromkeys(options, False))
    try:
        yield
    finally:
        vars(args).update(values)


class PairTrainer(DPOTrainer):
    """Give public names to the private methods and attributes of `DPOTrainer` that contralto overrides or reads.

    Args:
        model: see `trl.DPOTrainer`.
        ref_model: see `trl.DPOTrainer`; a `NoReference` keeps it from loading one.
        kwargs: the other arguments of `trl.DPOTrainer`.

    Attributes:
        hidden_options: options that are False to `DPOTrainer` while it is made.
    """

    args: Any
    model: Any
    hidden_options: tuple[str, ...] = ("padding_free",)
    _signature_columns: Any
    _precompute_engine: Any

    def __init__(self, model: Any, ref_model: Any = None, **kwargs: Any) -> None:
        with _hidden(kwargs["args"], *self.hidden_options):
            super().__init__(model, ref_model, **kwargs)
        if isinstance(self.unwrap(self.ref_model), NoReference):
            self.ref_model = None
        self.install_heads()

    def unwrap(self, model: Any) -> Any:
        """Return a model without the wrappers of accelerate, None for None.

        Args:
            model: a model, perhaps wrapped for distributed training.
        """
        return None if model is None else self.accelerator.unwrap_model(model)

    @property
    def mode(self) -> str:
        """Return `train` or `eval`, the name of the metrics that are being collected."""
        return "train" if self.model.training else "eval"

    @property
    def callable_policy(self) -> Any:
        """Return the policy, before training in the inference engine without which DeepSpeed leaves its weights in shards."""
        if not self.is_deepspeed_enabled or self.model_wrapped is not self.model:
            return self.model
        if self._precompute_engine is None:
            self._precompute_engine = prepare_deepspeed(self.model, self.accelerator)
        return self._precompute_engine

    # ------------------------------------------------------------------------------ what subclasses provide

    def install_heads(self) -> None:
        """Prepare the policy and the reference for scoring. `__init__` calls this before anything is precomputed."""
        raise NotImplementedError

    def compute_step(self, model: Any, inputs: Mapping[str, Any], *, return_outputs: bool) -> Any:
        """Return the loss of a batch, or the loss and the model's outputs, and record metrics.

        Args:
            model: the policy, with wrappers.
            inputs: the batch as the collator returned it, on the device.
            return_outputs: return the outputs as well.
        """
        raise NotImplementedError

    def precompute(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Return the data set with columns that were computed before training.

        Args:
            dataset: a tokenised data set.
            name: its name, for progress bars.
            batch_size: rows per forward pass.
        """
        raise NotImplementedError

    def extra_columns(self) -> tuple[str, ...]:
        """Return the names of data set columns that reach the collator beside those of TRL."""
        return ()

    def save_extra(self, folder: Path) -> None:
        """Save the modules that are trained beside the model.

        Args:
            folder: where the model has been saved.
        """

    def load_extra(self, folder: Path) -> None:
        """Load the modules that `save_extra` saved.

        Args:
            folder: a checkpoint.
        """

    # ------------------------------------------------------------------------------ the private parts of TRL 1.16

    def _compute_loss(self, model: Any, inputs: Mapping[str, Any], return_outputs: bool) -> Any:
        return self.compute_step(model, inputs, return_outputs=return_outputs)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        self.install_heads()  # TRL calls this within `__init__`
        return self.precompute(dataset, name, batch_size)

    def record_metrics(self, **values: float) -> None:
        """Record metrics by name; their mean since the last log is logged.

        Args:
            values: the metrics of one batch.
        """
        record_metrics(self, self.mode, **values)

    def record_latest(self, **values: float) -> None:
        """Record values by name, of which the last one before a log is logged, not the mean.

        Args:
            values: measurements that do not belong to a batch.
        """
        self._metrics[self.mode] |= {name: [value] for name, value in values.items()}

    def count_tokens(self, tokens: int) -> None:
        """Add to the number of tokens that were trained on, which is logged as a total.

        Args:
            tokens: tokens of a batch, summed over processes; tensor-parallel ranks have read the same ones.
        """
        if self.mode == "train":
            self._total_train_tokens += tokens // self._tp_size
        self._metrics[self.mode]["num_tokens"] = [self._total_train_tokens]

    # ------------------------------------------------------------------------------ the private parts of transformers 5.23

    def to_device(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch on the device of training.

        Args:
            inputs: the batch as the collator returned it.
        """
        return dict(self._prepare_inputs(inputs))  # type: ignore[arg-type]

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()  # type: ignore[no-untyped-call]
            self._signature_columns = [*(self._signature_columns or ()), *self.extra_columns()]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.save_extra(Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.load_extra(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.load_extra(Path(str(self.state.best_model_checkpoint)))

    def end(self) -> None:
        """Finish the trackers and the process group. Call it last in a script.

        The wrapped model is released first. Released last, its reducer destroys the process group, and torch 2.13 then waits for gloo's
        threads while it holds the interpreter's lock, for which these threads may be waiting: see
        https://github.com/pytorch/pytorch/pull/154976.
        """
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        super().end()  # type: ignore[no-untyped-call]


class NumberCollator:
    """A collator that also passes on columns with a number per row, which TRL's drops.

    Args:
        collator: the collator that makes the rest of the batch.
        columns: the names of the columns.
    """

    def __init__(self, collator: Any, columns: Sequence[str]) -> None:
        self.collator, self.columns = collator, tuple(columns)

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.collator(examples)
        return batch | {name: torch.tensor([float(each[name]) for each in examples]) for name in self.columns}


class RowTrainer(KTOTrainer):
    """Give public names to the private methods and attributes of `KTOTrainer` that contralto overrides or reads.

    `KTOTrainer` has two losses, and decides by their names whether it makes completions of other prompts for a KL term. Here `reads_kl`
    decides. Its advice about the weights of KTO is left to `contralto.align.trainers.unpaired`.

    Args:
        model: see `trl.KTOTrainer`.
        ref_model: see `trl.KTOTrainer`; a `NoReference` keeps it from loading one.
        reads_kl: the losses need log-probabilities of completions of other prompts.
        numbers: columns with a number per row that reach the batch.
        kwargs: the other arguments of `trl.KTOTrainer`.
    """

    args: Any
    model: Any

    def __init__(
        self, model: Any, ref_model: Any = None, *, reads_kl: bool, numbers: Sequence[str] = (), **kwargs: Any
    ) -> None:
        args = kwargs["args"]
        own, args.loss_type = args.loss_type, "kto" if reads_kl else "apo_zero_unpaired"
        try:
            super().__init__(model, ref_model, **kwargs)
        finally:
            args.loss_type = own
        if isinstance(self.ref_model, NoReference):
            self.ref_model = None
        self._numbers = tuple(numbers)
        if numbers:
            self.data_collator = NumberCollator(self.data_collator, numbers)

    def _set_signature_columns_if_needed(self) -> None:
        is_first = self._signature_columns is None
        super()._set_signature_columns_if_needed()  # type: ignore[no-untyped-call]
        if is_first:
            self._signature_columns = [*self._signature_columns, *self._numbers]  # type: ignore[assignment, misc]

    @property
    def mode(self) -> str:
        """Return `train` or `eval`, the name of the metrics that are being collected."""
        return "train" if self.model.training else "eval"

    def compute_step(self, model: Any, batch: dict[str, Any]) -> Any:
        """Return the loss of a batch, and record metrics.

        Args:
            model: the policy, with wrappers.
            batch: the batch as the collator returned it, on the device.
        """
        raise NotImplementedError

    def train_sampler(self) -> Any:
        """Return the sampler of the training data; None leaves it to `train_sampling_strategy`."""
        return None

    def kl_logps(self, model: Any, batch: Mapping[str, Any]) -> Any:
        """Return `(n,)` log-probabilities of the completions of other prompts, without gradients; None if no loss reads them.

        Args:
            model: the policy, with wrappers.
            batch: the batch.
        """
        return self._compute_kl_logps(model, batch)  # type: ignore[no-untyped-call]

    def reference_logps(self, batch: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return log-probabilities `(n,)` under the reference: of the completions, and of those of other prompts (or None).

        Args:
            batch: the batch.
        """
        if self.precompute_ref_logps:
            return batch["ref_logps"], batch.get("ref_KL_logps")
        return self.compute_ref_log_probs(self.model if self.ref_model is None else self.ref_model, batch)

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> tuple[Any, Any]:
        """Return log-probabilities under the reference, as TRL computes them, without its warning of a method of transformers 5.

        Args:
            model: the reference, or the policy whose adapter is switched off.
            inputs: the batch.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`gradient_checkpointing_(dis|en)able` is deprecated")
            found: tuple[Any, Any] = super().compute_ref_log_probs(model, inputs)  # type: ignore[no-untyped-call]
        return found

    def count_tokens(self, tokens: int) -> None:
        """Add to the number of tokens that were trained on, which is logged as a total.

        Args:
            tokens: tokens of a batch, summed over processes.
        """
        if self.mode == "train":
            self._total_train_tokens += tokens // self._tp_size
        self._metrics[self.mode]["num_tokens"] = [self._total_train_tokens]

    def _compute_loss(self, model: Any, inputs: Mapping[str, Any], return_outputs: bool) -> Any:
        if return_outputs:
            raise ValueError("compute_metrics reads logits, which are not made here: leave compute_metrics out")
        return self.compute_step(model, dict(self._prepare_inputs(inputs)))  # type: ignore[arg-type]

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        # TRL advises on the weights of KTO for the data set named train, whatever the loss
        return super()._prepare_dataset(dataset, processing_class, args, f"{dataset_name} rows")

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = self.train_sampler()
        return super()._get_train_sampler(train_dataset) if sampler is None else sampler


class PlainTrainer(Trainer):
    """Give public names to the private methods of `transformers.Trainer` 5.23 that trainers without one of TRL override.

    The loss of a batch is a mean, which the Trainer divides by the number of accumulated batches.
    """

    loss_is_scaled_for_ga = False
    _tag_names: Sequence[str] = ("contralto",)
    args: Any
    model: Any
    model_wrapped: Any

    @property
    def mode(self) -> str:
        """Return `train` or `eval`, the name of the metrics that are being collected."""
        return "train" if self.model.training else "eval"

    def without_extra(self) -> AbstractContextManager[Any]:
        """Return a context in which the model has no modules but its own, for loading and saving."""
        return nullcontext()

    def load_extra(self, folder: Path) -> None:
        """Load the modules that are trained beside the model.

        Args:
            folder: a checkpoint.
        """

    def end(self) -> None:
        """Finish the trackers and the process group, as `PairTrainer.end` does and for its reason. Call it last in a script."""
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        super().end()  # type: ignore[no-untyped-call]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with self.without_extra():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.load_extra(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        with self.without_extra():
            super()._load_best_model()
        self.load_extra(Path(str(self.state.best_model_checkpoint)))


def record_metrics(trainer: Any, mode: str, **values: float) -> None:
    """Record metrics in a trainer of TRL 1.16, which logs their mean.

    Args:
        trainer: any trainer of TRL; all keep lists by mode and name in `_metrics`.
        mode: `train` or `eval`.
        values: the metrics of one batch.
    """
    for name, value in values.items():
        trainer._metrics[mode][name].append(value)


def tracking_links() -> list[str]:
    """Return the addresses of the runs that wandb, trackio and comet track, for a model card.

    TRL 1.16 puts them into its own card, and finds them by functions that it does not export.
    """
    wandb: Any = sys.modules.get("wandb")  # imported if it tracks
    run = getattr(wandb, "run", None)
    links = [getattr(run, "url", None), get_trackio_space_url(), get_comet_experiment_url()]
    return [str(link) for link in links if link]


def attention_of(config: Any) -> str:
    """Return the attention implementation of a loaded model.

    Args:
        config: its configuration; transformers 5.23 keeps the resolved implementation in a private attribute alone.
    """
    return str(config.get_text_config()._attn_implementation)


def default_attention(model_class: Any) -> str:
    """Return the attention implementation that transformers 5.23 chooses when none is named.

    Args:
        model_class: a model class of transformers, or None.
    """
    return "sdpa" if model_class is not None and model_class._supports_sdpa else "eager"


def is_stateful(model_class: Any) -> bool:
    """Return whether models of a class carry a state from token to token, as Mamba does.

    Args:
        model_class: a model class of transformers 5.23.
    """
    return bool(model_class._is_stateful)


def gathered(model: Any) -> AbstractContextManager[Any]:
    """Return a context in which the output layer is gathered from ZeRO 3's shards.

    TRL's `maybe_gather_lm_head_ctx` leaves out weights that are whole already, such as tied embeddings in a forward pass.

    Args:
        model: a causal language model, not wrapped.
    """
    layer = model.get_output_embeddings()
    if layer is None or not hasattr(layer.weight, "ds_id"):  # a model beside the one that ZeRO 3 trains may be whole
        return nullcontext()
    bias: Any = getattr(layer, "bias", None)
    context: AbstractContextManager[Any] = maybe_gather_lm_head_ctx(layer.weight, bias)
    return context
