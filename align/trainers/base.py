"""The base of trainers on pairs: TRL's `DPOTrainer` with its loss in four stages."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin, broadcast_object_list, is_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from contralto.align.caches.blocks import Processes
from contralto.align.cards.mixin import CardMixin
from contralto.align.trainers.batches import (
    IMAGE_COLUMNS,
    PAIR_COLUMNS,
    REFERENCE_COLUMNS,
    STATES,
    TEACHER_PROMPTS,
    Arrange,
    PairBatch,
)
from contralto.align.trainers.checks import has_images
from contralto.align.trainers.collators import ColumnCollator, TwoImageCollator
from contralto.align.trainers.compiling import compile_layers, compiles_layers, layers_of
from contralto.align.trainers.config import with_own_peft_config
from contralto.align.trainers.layouts import shared_prefixes
from contralto.align.trainers.scoring import Scoring, TokenScores, install_head
from contralto.align.trl_compat import PairTrainer, use_adapter

__all__ = ["LastLog", "StagedTrainer"]

logger = logging.getLogger(__name__)

ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}
"""Nats per token by which log-probabilities in another layout may differ on average, by the dtype of the model's products."""
NOISE_FACTOR = 3
"""They may also differ by so many times what scoring the two halves of a batch apart changes."""


class LastLog(TrainerCallback):
    """Log the last step of a training in which nothing was logged, since it has fewer steps than `logging_steps`."""

    @staticmethod
    def applies(args: Any, state: Any, step: int) -> bool:
        """Return whether a step is logged for this reason.

        Args:
            args: the configuration of the training.
            state: its state.
            step: the number of the step, from 1.
        """
        is_last = args.logging_strategy == "steps" and step >= state.max_steps
        return is_last and not any("loss" in line for line in state.log_history)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Have the trainer log if this is such a step.

        Args:
            args: see `transformers.TrainerCallback`.
            state: see `transformers.TrainerCallback`.
            control: see `transformers.TrainerCallback`.
            kwargs: see `transformers.TrainerCallback`.
        """
        if self.applies(args, state, state.global_step):
            control.should_log = True


class StagedTrainer(CardMixin, PairTrainer):  # type: ignore[misc]  # `create_model_card` has the signature of TRL's
    """TRL's `DPOTrainer` with its loss in four stages: `reference`, `score`, `loss`, `report`.

    A subclass provides the stages, and `precompute`, which gives a data set the columns `REFERENCE_COLUMNS`.

    Args:
        model: see `trl.DPOTrainer`.
        ref_model: see `trl.DPOTrainer`.
        kwargs: the other arguments of `trl.DPOTrainer`.

    Attributes:
        arrange: the layout of batches for the models; None leaves them padded.
        has_views: whether rows have two images, see `TwoImageCollator`.
        has_images: whether rows have images that are read before training.
        side_modules: modules that are trained and saved beside the model, each as a safetensors file of its name.
    """

    arrange: Arrange | None = None
    has_views = False
    has_images = False

    def __init__(self, model: Any, ref_model: Any = None, **kwargs: Any) -> None:
        if "tokenizer" in kwargs:
            raise ValueError("tokenizer is named processing_class here, as in TRL: give processing_class=tokenizer")
        self.side_modules: dict[str, nn.Module] = {}
        self._layout_is_checked = False
        kwargs = with_own_peft_config(kwargs) | {"callbacks": [*(kwargs.get("callbacks") or ()), LastLog()]}
        if kwargs["args"].precompute_ref_log_probs and has_images(next(iter(kwargs["train_dataset"]))):
            self.has_images, self.hidden_options = True, (*self.hidden_options, "precompute_ref_log_probs")
        super().__init__(model, ref_model, **kwargs)
        collator = TwoImageCollator(self.data_collator) if self.has_views else self.data_collator
        self.data_collator = ColumnCollator(collator)
        if self.has_images:
            self._precompute_images()
        self._uncompiled = self._layers_to_compile()

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, which must not compile the whole model where its layers are compiled."""
        super().create_accelerator_and_postprocess()
        if compiles_layers(self):
            self.accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend=DynamoBackend.NO)

    def _layers_to_compile(self) -> list[nn.Module]:
        """Return the layers that are compiled in the first training step, when nothing is measured with hooks any more."""
        if not compiles_layers(self):
            return []
        if self.aux_loss_enabled:
            raise ValueError(
                "torch_compile is set, and the load-balancing loss is read by hooks that a compiled layer does not call: leave "
                "torch_compile out, or set output_router_logits to False in the model's config"
            )
        return layers_of(self.policy, self.unwrap(self.ref_model))

    def _precompute_images(self) -> None:
        """Give the data sets their columns, for which the collator has to be there, and drop the reference."""
        args, evaluation = self.args, self.eval_dataset
        size = args.precompute_ref_batch_size or args.per_device_eval_batch_size
        if isinstance(evaluation, dict):
            self.eval_dataset = {name: self.precompute(part, name, size) for name, part in evaluation.items()}
        elif evaluation is not None:
            self.eval_dataset = self.precompute(evaluation, "eval", size)
        size = args.precompute_ref_batch_size or args.per_device_train_batch_size
        self.train_dataset = self.precompute(self.train_dataset, "train", size)
        self.ref_model, self.precompute_ref_logps = None, True

    def install_heads(self) -> None:
        """Install the completion head on policy and reference."""
        install_head(self.policy)
        if self.ref_model is not None:
            install_head(self.unwrap(self.ref_model))

    @property
    def policy(self) -> Any:
        """Return the policy as transformers loaded it, without adapter and wrappers."""
        model = self.unwrap(self.model)
        return model.get_base_model() if is_peft_model(model) else model

    def extra_columns(self) -> tuple[str, ...]:
        """Return the names of data set columns that reach the collator beside those of TRL."""
        return (*PAIR_COLUMNS, *REFERENCE_COLUMNS, STATES, TEACHER_PROMPTS, *(IMAGE_COLUMNS if self.has_views else ()))

    # ------------------------------------------------------------------------------------------------------ the stages

    def compute_step(self, model: Any, inputs: Mapping[str, Any], *, return_outputs: bool) -> Any:
        """Run the four stages on a batch.

        Args:
            model: the policy, with wrappers.
            inputs: the batch as the collator returned it, on the device.
            return_outputs: return the model's outputs as well, for a `compute_metrics` that reads logits.
        """
        batch = self.arranged(model, inputs)
        if self.model.training:
            compile_layers(self._uncompiled, self.args)
            self._uncompiled = []
        reference = self.reference(batch)
        policy = self.score(model, batch, reference)
        loss = self.loss(batch, policy, reference)
        total = loss.total
        if self.aux_loss_enabled:
            total = total + self.router_aux_loss_coef * policy.aux_loss
        with torch.no_grad():
            self.report(batch, policy, reference, loss)
            return (total, model(**batch.inputs)) if return_outputs else total

    def reference(self, batch: PairBatch) -> Any:
        """Return the outputs of the reference that the loss needs: the first stage.

        Args:
            batch: the pairs.
        """
        raise NotImplementedError

    def score(self, model: Any, batch: PairBatch, reference: Any) -> Any:
        """Return the result of the policy's forward: the second stage.

        Args:
            model: the policy, with wrappers.
            batch: the pairs.
            reference: the result of the first stage.
        """
        raise NotImplementedError

    def loss(self, batch: PairBatch, policy: Any, reference: Any) -> Any:
        """Compute the loss, the attribute `total` of the result: the third stage.

        Args:
            batch: the pairs.
            policy: the result of the second stage.
            reference: the result of the first stage.
        """
        raise NotImplementedError

    def report(self, batch: PairBatch, policy: Any, reference: Any, loss: Any) -> None:
        """Record metrics: the fourth stage.

        Args:
            batch: the pairs.
            policy: the result of the second stage.
            reference: the result of the first stage.
            loss: the result of the third stage.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------- forward passes

    def score_tokens(self, model: Any, batch: PairBatch, scoring: Scoring | None = None) -> TokenScores:
        """Run a model on a batch, and its language-model head on the completion tokens only.

        Args:
            model: policy or reference, with wrappers.
            batch: the pairs.
            scoring: what to return; None returns log-probabilities.
        """
        scoring = (scoring or Scoring())._replace(layout=batch.layout)
        scores: TokenScores = model(**batch.inputs, labels=batch.labels, scoring=scoring)
        return scores.last(batch.mask.shape[1])

    def arranged(self, model: Any, inputs: Mapping[str, Any]) -> PairBatch:
        """Make a batch in the layout of the trainer, or padded if the model does not compute the same there.

        A model that ignores masks or positions would be silently wrong, so the first batch is scored in both. If they differ, all further
        batches stay padded.

        Args:
            model: policy or reference, with wrappers.
            inputs: the batch as the collator returned it, on the device.
        """
        batch = PairBatch.of(inputs, self.arrange)
        if batch.layout is None or self._layout_is_checked:
            return batch
        probe = batch
        if batch.layout.holds_single_sequences:  # which would show nothing of masks
            probe = PairBatch.of(inputs, shared_prefixes)
        off, noise = self._layout_error(model, probe)
        allowed = max(ROUNDING[self._product_dtype(batch.mask.device.type)], NOISE_FACTOR * noise)
        differs = self.sum_over_processes({"differs": torch.tensor(not off < allowed)})
        self._layout_is_checked = True  # not before: a forward pass that runs out of memory is tried again
        if not differs["differs"]:
            return batch
        logger.warning(
            "%s does not compute the same without padding: its log-probabilities are %.2g nats per token off, of which rounding explains "
            "%.2g; batches stay padded, and prefix_sharing, padding_free and packing have no effect",
            type(self.policy).__name__,
            off,
            allowed,
        )
        self.arrange = None
        return batch._replace(layout=None)

    def _layout_error(self, model: Any, batch: PairBatch) -> tuple[float, float]:
        """Return mean differences of log-probabilities from those of padded rows: in the batch's layout, and in its halves apart."""
        training, plain = model.training, batch._replace(layout=None)
        model.eval()
        with torch.no_grad():
            moved, padded, *halves = (
                torch.as_tensor(self.score_tokens(model, each).logps)
                for each in (batch, plain, plain.side(0), plain.side(1))
            )
        model.train(training)
        off, noise = ((one - padded).abs().sum() / batch.mask.sum() for one in (moved, torch.cat(halves)))
        return float(off), float(noise)

    def _product_dtype(self, device: str) -> torch.dtype:
        """Return the dtype in which the policy multiplies matrices."""
        dtype: torch.dtype = self.policy.dtype
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype

    @contextmanager
    def reference_model(self) -> Iterator[tuple[Any, Any]]:
        """Yield the reference with and without wrappers, without gradients; the policy with its adapter off if there is no other."""
        own = self.ref_model is None
        unwrapped = self.unwrap(self.model if own else self.ref_model)
        with torch.no_grad(), self.accelerator.autocast(), warnings.catch_warnings():
            # reentrant checkpoints warn of inputs without gradients
            warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
            if not (own and is_peft_model(unwrapped)):
                yield (self.callable_policy if own else self.ref_model), unwrapped
                return
            with use_adapter(unwrapped, "ref" if "ref" in unwrapped.peft_config else None):
                yield self.callable_policy, unwrapped.get_base_model()

    # ------------------------------------------------------------------------------------------------------ processes

    def broadcast(self, value: Any) -> Any:
        """Return the value of the main process on all processes.

        Args:
            value: any object that can be pickled.
        """
        box = [value]
        broadcast_object_list(box, from_process=0)
        return box[0]

    def processes(self) -> Processes:
        """Return the processes of this training in the form that a cache on disk expects."""
        accelerator = self.accelerator
        return Processes(
            accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone, self.broadcast
        )

    # -------------------------------------------------------------------------------------------------------- metrics

    def is_logging_step(self) -> bool:
        """Return whether this step will be logged, as far as that is known in advance."""
        step, args = self.state.global_step + 1, self.args
        if self.mode == "eval" or args.logging_strategy == "epoch":
            return True
        logged = args.logging_strategy == "steps" and step % max(1, round(self.state.logging_steps)) == 0
        return logged or (step == 1 and bool(args.logging_first_step)) or LastLog.applies(args, self.state, step)

    def sum_over_processes(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return sums over all processes, with one all-reduce and one device synchronisation.

        Args:
            sums: scalars of this process by name.
        """
        values = torch.stack([value.to(self.accelerator.device, torch.float64) for value in sums.values()])
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values, "sum")
        return dict(zip(sums, values.tolist(), strict=True))

    # --------------------------------------------------------------------------------------------------- side modules

    def create_optimizer(self, model: Any = None) -> Any:
        """Return the optimizer, with the parameters of `side_modules` in groups of their own.

        Args:
            model: see `transformers.Trainer.create_optimizer`.
        """
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.side_modules:
            for group in self.side_groups():
                optimizer.add_param_group(group)
            # the Trainer clips and clears the gradients of the model alone
            optimizer.register_step_pre_hook(lambda *_: self._clip_side_modules())
            optimizer.register_step_post_hook(lambda *_: self._clear_side_modules())
        return optimizer

    def side_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups of the side modules."""
        return []

    def _clear_side_modules(self) -> None:
        for module in self.side_modules.values():
            module.zero_grad()

    def _clip_side_modules(self) -> None:
        if self.args.max_grad_norm:
            for module in self.side_modules.values():
                nn.utils.clip_grad_norm_(module.parameters(), self.args.max_grad_norm)

    def save_extra(self, folder: Path) -> None:
        """Save the side modules.

        Args:
            folder: where the model has been saved.
        """
        for name, module in self.side_modules.items():
            save_file(_without_ddp(module).state_dict(), folder / f"{name}.safetensors")

    def load_extra(self, folder: Path) -> None:
        """Load the side modules.

        Args:
            folder: a checkpoint.

        Raises:
            ValueError: the checkpoint has no file of a module.
        """
        for name, module in self.side_modules.items():
            path = folder / f"{name}.safetensors"
            if not path.is_file():
                raise ValueError(f"{folder} holds no {path.name}: it was trained with other settings")
            _without_ddp(module).load_state_dict(load_file(path))


def _without_ddp(module: nn.Module) -> nn.Module:
    """Return a module without `DistributedDataParallel`."""
    inner = getattr(module, "module", module)
    assert isinstance(inner, nn.Module)
    return inner
