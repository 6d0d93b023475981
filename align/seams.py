"""Where contralto touches what TRL and transformers keep to themselves. No other module of contralto.align does.

Read from TRL 1.16.0, transformers 5.23.0, peft 0.21.2 and accelerate 1.15.0. TRL's `DPOTrainer` has no hook between the forward and
the loss: one method does everything. `StagedTrainer` replaces that method once, by four stages with public names, and gives public
names to the other private methods that have to be overridden. Of TRL's trainer it reads `_metrics`, `_total_train_tokens`, `_tp_size`,
`_is_vision_dataset`, `aux_loss_enabled`, `router_aux_loss_coef`, and it relies on these steps of `DPOTrainer.__init__`: a reference is
loaded unless there is one, or an adapter, or `precompute_ref_log_probs`; `_precompute_ref_logps` is called last.
"""

import functools
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig
from trl import DPOTrainer  # type: ignore[attr-defined]
from trl.trainer.utils import maybe_gather_lm_head_ctx, use_adapter

from contralto.align.divergences import Head, chunked_divergence, chunked_logps

__all__ = ["IGNORED", "Batch", "NoReference", "Request", "Scored", "StagedTrainer", "head_of", "install_head"]

IGNORED = -100
"""The label of tokens that are not scored."""
COLUMNS = ("margin", "chosen_advantage")
"""Columns of numbers, one per pair, that reach the loss."""
CACHED = ("ref_chosen_token_logps", "ref_rejected_token_logps")
"""Columns of a precomputed reference: a number per token that is scored."""
NOT_FOR_THE_MODEL = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps", "ref_token_logps", *COLUMNS}


class Request(NamedTuple):
    """What a forward through the completion head is asked for, beside log-probabilities."""

    also: tuple[str, ...] = ()
    """Statistics of `chunked_logps`."""
    teacher: tuple[Tensor, Head] | None = None
    """The reference's hidden states `(N, H)` and its head: then the forward KL and the reference's log-probabilities come too."""
    hidden: bool = False
    """Hidden states `(N, H)` in place of log-probabilities: the head does not run."""
    states: bool = False
    """The hidden states of all layers."""


class Scored(NamedTuple):
    """What it gives; what was not asked for is None. `(B, T - 1)` tensors are 0 at tokens that are not scored."""

    logps: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    kl: Tensor | None = None
    teacher_logps: Tensor | None = None
    hidden: Tensor | None = None
    states: list[Tensor] | None = None
    """Of every layer `(B, T - 1, H)`, without the embeddings."""
    aux_loss: Tensor | None = None
    """The load-balancing loss of a mixture of experts."""


_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
"""What configurations call the factor of the logits: Cohere; Muse; Falcon-H1."""


def head_of(model: Any) -> Head:
    """The language-model head of a transformers model, with what its configuration does to the logits.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 5}
        >>> head_of(LlamaForCausalLM(LlamaConfig(**shape))).weight.shape
        torch.Size([5, 8])
    """
    config, layer = model.config.get_text_config(), model.get_output_embeddings()
    bias = getattr(layer, "bias", None)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(_whole(layer.weight), None if bias is None else _whole(bias), _scale(config), softcap)


def _whole(weight: Tensor) -> Tensor:
    """FSDP2 keeps a shard per process."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _scale(config: Any) -> float:
    for name in _MULTIPLIERS:
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    divisor = getattr(config, "logits_scaling", None)  # Granite and MiniCPM3 divide, HyperCLOVA X multiplies by it
    if divisor is None:
        return 1.0
    return float(divisor if config.model_type == "hyperclovax" else 1 / divisor)


def install_head(model: Any) -> None:
    """Give `model.forward` an argument `completion_request`: with it, only tokens with a label go through the head.

    TRL installs a head of its own in the same way, which on a CPU projects every position. Without the argument nothing changes.
    Everything that needs the head's weight happens within the forward, where FSDP and DeepSpeed have gathered it.

    Args:
        model: a causal language model of transformers, not wrapped. A second call does nothing.
    """
    if getattr(model, "scores_completions", False):
        return
    stock = model.forward

    @functools.wraps(type(model).forward)  # generate() reads the signature
    def forward(
        self: Any, *args: Any, completion_request: Request | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if completion_request is None:
            return stock(*args, **kwargs, **({} if labels is None else {"labels": labels}))
        assert labels is not None
        return _score(self, completion_request, labels, *args, **kwargs)

    model.forward, model.scores_completions = MethodType(forward, model), True


def _score(model: Any, request: Request, labels: Tensor, *args: Any, **kwargs: Any) -> Scored:
    """The backbone on everything, the head on the tokens that have a label."""
    kwargs |= {"use_cache": False} | ({"output_hidden_states": True} if request.states else {})
    out = model.base_model(*args, **kwargs)
    layer: Any = model.get_output_embeddings()
    labels = labels[:, 1:].to(layer.weight.device)
    valid = labels != IGNORED
    rows = out.last_hidden_state[:, :-1].to(labels.device)[valid]
    states = [each[:, :-1] for each in out.hidden_states[1:]] if request.states else None
    if request.hidden:
        return Scored(hidden=rows, states=states)
    bias: Any = getattr(layer, "bias", None)
    with maybe_gather_lm_head_ctx(layer.weight, bias):
        found = _through_head(rows, head_of(model), labels[valid], request)
    placed = {name: value.new_zeros(valid.shape).masked_scatter(valid, value) for name, value in found.items()}
    return Scored(**placed, states=states, aux_loss=_aux_loss(model, out, kwargs))


def _through_head(rows: Tensor, head: Head, targets: Tensor, request: Request) -> dict[str, Tensor]:
    if request.teacher is None:
        given = chunked_logps(rows, head, targets, also=request.also)._asdict()
    else:
        compared = chunked_divergence("forward_kl", rows, head, *request.teacher, targets=targets)
        given = {"logps": compared.logps, "kl": compared.divergence, "teacher_logps": compared.teacher_logps}
        if request.also:
            with torch.no_grad():
                given = chunked_logps(rows, head, targets, also=request.also)._asdict() | given
    return {name: value for name, value in given.items() if value is not None}


def _aux_loss(model: Any, out: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    if not kwargs.get("output_router_logits"):
        return None
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # every family's is this one

    config = model.config.get_text_config()
    experts, chosen = config.num_experts, config.num_experts_per_tok
    return load_balancing_loss_func(out.router_logits, experts, chosen, kwargs.get("attention_mask"))  # type: ignore[return-value]


class NoReference(nn.Module):
    """Stands where `DPOTrainer.__init__` would load a reference, for losses that have none."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PretrainedConfig()

    def forward(self) -> None:
        """Never called."""


class Batch(NamedTuple):
    """A batch of B pairs as the stages take it: 2B rows, the chosen texts first, padded."""

    inputs: dict[str, Any]
    """What the model reads."""
    labels: Tensor
    """`(2B, T)`, `IGNORED` outside the completions."""
    mask: Tensor
    """`(2B, T - 1)`, true where the next token is one of the completion."""
    lengths: Tensor
    """`(2B,)` tokens of the completions."""
    columns: dict[str, Tensor]
    """`(B,)` by name, of `COLUMNS`."""
    ref_token_logps: Tensor | None
    """`(2B, T - 1)` if the reference was precomputed."""

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> "Batch":
        """Of what the collator gives."""
        scored = inputs["completion_mask"].bool()
        mask = scored[:, 1:]
        cached = inputs.get("ref_token_logps")
        return cls(
            inputs={name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL},
            labels=inputs["input_ids"].masked_fill(~scored, IGNORED),
            mask=mask,
            lengths=scored.sum(-1),
            columns={name: inputs[name] for name in COLUMNS if name in inputs},
            ref_token_logps=None if cached is None else _unpacked(cached, mask),
        )


def _unpacked(packed: Tensor, mask: Tensor) -> Tensor:
    """Numbers that stand one after another in each row, at the places of the mask."""
    filled = torch.arange(packed.shape[1], device=packed.device) < mask.sum(-1, keepdim=True)
    return packed.new_zeros(mask.shape).masked_scatter(mask, packed[filled])


class WithColumns:
    """A collator that also passes on `COLUMNS` and `CACHED`.

    Args:
        collator: what makes the rest of the batch.
    """

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        found = {name: [example.pop(name) for example in examples] for name in COLUMNS if name in examples[0]}
        cached = [example.pop(name) for name in CACHED if name in examples[0] for example in examples]
        batch: dict[str, Any] = self.collator(examples)
        batch |= {name: torch.tensor(values, dtype=torch.float32) for name, values in found.items()}
        if cached:
            rows = [torch.as_tensor(row, dtype=torch.float32) for row in cached]
            batch["ref_token_logps"] = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return batch


class StagedTrainer(DPOTrainer):
    """TRL's `DPOTrainer` with its loss in four stages: `reference`, `score`, `loss`, `report`.

    A subclass provides them, and `precompute`, which gives a data set the columns `CACHED`. `side_modules` are trained
    and saved beside the model, each as a safetensors file of its name.
    """

    args: Any
    model: Any
    _signature_columns: Any

    def __init__(self, model: Any, ref_model: Any = None, **how: Any) -> None:
        self.side_modules: dict[str, nn.Module] = {}
        super().__init__(model, ref_model, **how)
        if isinstance(self.unwrapped(self.ref_model), NoReference):
            self.ref_model = None
        self.install_heads()
        self.data_collator = WithColumns(self.data_collator)

    def install_heads(self) -> None:
        """The completion head on policy and reference."""
        install_head(self.policy)
        if self.ref_model is not None:
            install_head(self.unwrapped(self.ref_model))

    def unwrapped(self, model: Any) -> Any:
        """A model without what accelerate put around it."""
        return None if model is None else self.accelerator.unwrap_model(model)

    @property
    def policy(self) -> Any:
        """The policy as transformers loaded it, without adapter and wrappers."""
        model = self.unwrapped(self.model)
        return model.get_base_model() if is_peft_model(model) else model

    @property
    def mode(self) -> str:
        """`train` or `eval`."""
        return "train" if self.model.training else "eval"

    def note(self, **values: float) -> None:
        """Take down metrics by name; what is logged is their mean since the last log."""
        for name, value in values.items():
            self._metrics[self.mode][name].append(value)

    def count_tokens(self, tokens: int) -> None:
        """Count the tokens seen in training, which are logged as a total."""
        if self.mode == "train":
            self._total_train_tokens += tokens // self._tp_size
        self._metrics[self.mode]["num_tokens"] = [self._total_train_tokens]

    @contextmanager
    def as_reference(self) -> Iterator[tuple[Any, Any]]:
        """The reference to call, and the same without wrappers; the policy with its adapter off, if there is no other."""
        own = self.ref_model is None
        unwrapped = self.unwrapped(self.model if own else self.ref_model)
        with torch.no_grad(), self.accelerator.autocast(), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="None of the inputs have requires_grad"
            )  # of reentrant checkpoints
            if not (own and is_peft_model(unwrapped)):
                yield (self.model if own else self.ref_model), unwrapped
                return
            with use_adapter(unwrapped, "ref" if "ref" in unwrapped.peft_config else None):
                yield self.model, unwrapped.get_base_model()

    def ask(self, model: Any, batch: Batch, request: Request) -> Scored:
        """A forward of the batch."""
        scored: Scored = model(**batch.inputs, labels=batch.labels, completion_request=request)
        width = batch.mask.shape[1]  # prompt tuning puts virtual tokens before the text
        return scored._replace(**{name: value[:, -width:] for name, value in _per_token(scored).items()})

    def _compute_loss(self, model: Any, inputs: Mapping[str, Any], return_outputs: bool) -> Any:
        batch = Batch.of(inputs)
        reference = self.reference(batch)
        policy = self.score(model, batch, reference)
        loss = self.loss(batch, policy, reference)
        total = loss.total
        if self.aux_loss_enabled:
            total = total + self.router_aux_loss_coef * policy.aux_loss
        with torch.no_grad():
            self.report(batch, policy, reference, loss)
        if not return_outputs:
            return total
        with torch.no_grad():
            return total, model(**batch.inputs)  # logits, for a compute_metrics that wants them

    def reference(self, batch: Batch) -> Any:
        """The first stage."""
        raise NotImplementedError

    def score(self, model: Any, batch: Batch, reference: Any) -> Any:
        """The second stage: the policy's forward."""
        raise NotImplementedError

    def loss(self, batch: Batch, policy: Any, reference: Any) -> Any:
        """The third stage: something with a `total`."""
        raise NotImplementedError

    def report(self, batch: Batch, policy: Any, reference: Any, loss: Any) -> None:
        """The fourth stage: metrics."""
        raise NotImplementedError

    def precompute(self, dataset: Any, name: str, batch_size: int) -> Any:
        """The data set with the columns `CACHED`."""
        raise NotImplementedError

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        self.install_heads()  # this runs within DPOTrainer.__init__
        return self.precompute(dataset, name, batch_size)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()  # type: ignore[no-untyped-call]
            self._signature_columns = [*(self._signature_columns or ()), *COLUMNS, *CACHED]

    def end(self) -> None:
        """Finish the trackers and the process group; the last call of a script.

        The wrapped model goes first: where it goes last its reducer takes the process group with it, and torch 2.13 then waits for gloo's
        threads with the interpreter's lock in its hand, which these threads may be waiting for.
        """
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        super().end()  # type: ignore[no-untyped-call]

    def create_optimizer(self, model: Any = None) -> Any:
        """The optimizer, with the parameters of `side_modules` in groups of their own."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if made and self.side_modules:
            for group in self.side_groups():
                optimizer.add_param_group(group)
            # the Trainer clips and clears the gradients of the model alone
            optimizer.register_step_pre_hook(lambda *_: self._clip_side_modules())
            optimizer.register_step_post_hook(lambda *_: self._clear_side_modules())
        return optimizer

    def _clear_side_modules(self) -> None:
        for module in self.side_modules.values():
            module.zero_grad()

    def _clip_side_modules(self) -> None:
        if self.args.max_grad_norm:
            for module in self.side_modules.values():
                nn.utils.clip_grad_norm_(module.parameters(), self.args.max_grad_norm)

    def side_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the side modules."""
        return []

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        from safetensors.torch import save_file

        if self.args.should_save:
            for name, module in self.side_modules.items():
                save_file(_bare(module).state_dict(), Path(output_dir or self.args.output_dir) / f"{name}.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        from safetensors.torch import load_file

        for name, module in self.side_modules.items():
            path = Path(resume_from_checkpoint) / f"{name}.safetensors"
            if not path.is_file():
                raise ValueError(f"{resume_from_checkpoint} holds no {path.name}: it was trained with other settings")
            _bare(module).load_state_dict(load_file(path))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        from safetensors.torch import load_file

        for name, module in self.side_modules.items():
            _bare(module).load_state_dict(
                load_file(Path(str(self.state.best_model_checkpoint)) / f"{name}.safetensors")
            )


def _bare(module: nn.Module) -> nn.Module:
    """Without `DistributedDataParallel`."""
    inner = getattr(module, "module", module)
    assert isinstance(inner, nn.Module)
    return inner


def _per_token(scored: Scored) -> dict[str, Any]:
    """The `(2B, T - 1)` fields that are there."""
    others = ("hidden", "states", "aux_loss")
    return {name: value for name, value in scored._asdict().items() if value is not None and name not in others}


def last_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint of a run that was written to its end, or None.

    `trainer_state.json` is what the Trainer writes last; a run that is killed while it saves leaves a checkpoint without it, which
    `get_last_checkpoint` of transformers would choose.

    Args:
        folder: the run's `output_dir`.

    Example:
        >>> last_checkpoint("no/such/folder")
    """
    whole = [path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json")]
    steps = {int(path.name.removeprefix("checkpoint-")): path for path in whole}
    return str(steps[max(steps)]) if steps else None
