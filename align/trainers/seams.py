"""Where contralto touches what TRL and transformers keep to themselves. No other module of contralto.align does.

Read from TRL 1.16.0, transformers 5.23.0, peft 0.21.2 and accelerate 1.15.0. TRL's `DPOTrainer` has no hook between the forward and
the loss: one method does everything. `StagedTrainer` replaces that method once, by four stages with public names, and gives public
names to the other private methods that have to be overridden. Of TRL's trainer it reads `_metrics`, `_total_train_tokens`, `_tp_size`,
`_is_vision_dataset`, `aux_loss_enabled`, `router_aux_loss_coef`, and it relies on these steps of `DPOTrainer.__init__`: a reference is
loaded unless there is one, or an adapter, or `precompute_ref_log_probs`; `padding_free` is warned of; `_precompute_ref_logps` is called
last. Of transformers it relies on this: a mask of four dimensions is taken as it is, and where there is no mask and positions start again,
a text does.
"""

import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import PretrainedConfig
from trl import DPOTrainer  # type: ignore[attr-defined]
from trl.trainer.utils import create_model_from_path, use_adapter

from contralto.align.losses.divergences import Head, chunked_divergence, chunked_logps
from contralto.align.trainers.config import unshared
from contralto.align.trainers.heads import gathered, take
from contralto.align.trainers.layouts import Layout

__all__ = [
    "IGNORED",
    "Batch",
    "NoReference",
    "Request",
    "Scored",
    "StagedTrainer",
    "create_model_from_path",
    "install_head",
]

_HALVES = (torch.float16, torch.bfloat16)
IGNORED = -100
"""The label of tokens that are not scored."""
COLUMNS = ("margin", "chosen_advantage")
"""Columns of numbers, one per pair, that reach the loss."""
CACHED = ("ref_chosen_token_logps", "ref_rejected_token_logps")
"""Columns of a precomputed reference: a number per token that is scored."""
STATES = "teacher_states"
"""Where a data set says which hidden states of a teacher are a row's, and where a batch has them."""
BLIND = "blind"
"""Where a batch has its texts without an image."""
VIEWS = ("rejected_images",)
"""Columns of images beside those that TRL reads."""
Arrange = Callable[[Tensor, Tensor], Layout]
"""Of `input_ids` and `attention_mask`: see `contralto.align.trainers.layouts`."""
NOT_FOR_THE_MODEL = {
    "completion_mask",
    "ref_chosen_logps",
    "ref_rejected_logps",
    "ref_token_logps",
    STATES,
    BLIND,
    *COLUMNS,
}


class Request(NamedTuple):
    """What a forward through the completion head is asked for, beside log-probabilities."""

    also: tuple[str, ...] = ()
    """Statistics of `chunked_logps`."""
    teacher: tuple[Tensor, Head | None] | None = None
    """The reference's hidden states `(N, H)` and its head: then the forward KL and the reference's log-probabilities come too."""
    hidden: bool = False
    """Hidden states `(N, H)` in place of log-probabilities, for the head of `head_of`; logits `(N, V)` if that is None."""
    states: bool = False
    """The hidden states of all layers."""
    layout: Layout | None = None
    """What the backbone is given in place of the padded batch."""
    function: Callable[[Tensor, Head | None, Tensor], Any] | None = None
    """Called with hidden states `(N, H)`, head and targets `(N,)` in place of all that; what it returns is `Scored.found`."""


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
    blind: Tensor | None = None
    """`logps` of `Batch.blind`."""
    found: Any = None
    """What `Request.function` returned."""


def install_head(model: Any) -> None:
    """Give `model.forward` an argument `completion_request`: with it, only tokens with a label go through the head.

    TRL installs a head of its own in the same way, which on a CPU projects every position. Without the argument nothing changes.
    Everything that needs the head's weight happens within the forward, where FSDP and DeepSpeed have gathered it. What the head is, is
    measured in the first forward, see `contralto.align.trainers.heads`.

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
        return _score(self, stock, completion_request, labels, *args, **kwargs)

    model.forward, model.scores_completions = MethodType(forward, model), True


def _score(
    model: Any, stock: Callable[..., Any], request: Request, labels: Tensor, *args: Any, **kwargs: Any
) -> Scored:
    """Run the model on everything, and its head on the tokens that have a label."""
    layout = request.layout
    kwargs |= {} if layout is None else layout.read_by(model)
    kwargs |= {"use_cache": False} | ({"output_hidden_states": True} if request.states else {})
    valid = labels[:, 1:] != IGNORED
    scored = valid if layout is None else layout.once(valid)
    rows, head, out, aux_loss = take(model, stock, lambda states: _rows_of(states, scored, layout), *args, **kwargs)
    if kwargs.get("output_router_logits") and aux_loss is None:
        raise ValueError(
            f"{type(model).__name__} gives no load-balancing loss: set output_router_logits to False in its config"
        )
    states = [_predicting(each, layout) for each in out.hidden_states[1:]] if request.states else None
    device = rows.device if head is None else head.weight.device
    rows, labels, valid, scored = (each.to(device) for each in (rows, labels[:, 1:], valid, scored))
    if request.hidden:
        return Scored(hidden=rows, states=states)
    with gathered(model):
        if request.function is not None:
            own = request.function(rows, head, labels[scored])
            return Scored(found=own, aux_loss=aux_loss)
        found = _through_head(rows, head, labels[scored], request)
    placed = {name: value.new_zeros(valid.shape).masked_scatter(scored, value) for name, value in found.items()}
    if layout is not None:
        layout = layout.on(device)
        placed = {name: layout.twice(value, valid) for name, value in placed.items()}
    return Scored(**placed, states=states, aux_loss=aux_loss)


def _rows_of(states: Tensor, scored: Tensor, layout: Layout | None) -> Tensor:
    """The hidden states `(N, H)` that predict the tokens to be scored."""
    if layout is None:
        return states[:, :-1][scored.to(states.device)]
    layout, scored = layout.on(states.device), scored.to(states.device)
    return states.flatten(0, 1).index_select(0, layout.source[:, :-1][scored])


def _predicting(states: Tensor, layout: Layout | None) -> Tensor:
    """`(2B, T - 1, H)` in the places of the padded batch."""
    return states[:, :-1] if layout is None else layout.back(states)


def _through_head(rows: Tensor, head: Head | None, targets: Tensor, request: Request) -> dict[str, Tensor]:
    if request.teacher is None:
        given = chunked_logps(rows, head, targets, also=request.also)._asdict()
    else:
        compared = chunked_divergence("forward_kl", rows, head, *request.teacher, targets=targets)
        given = {"logps": compared.logps, "kl": compared.divergence, "teacher_logps": compared.teacher_logps}
        if request.also:
            with torch.no_grad():
                given = chunked_logps(rows, head, targets, also=request.also)._asdict() | given
    return {name: value for name, value in given.items() if value is not None}


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
    teacher_states: Tensor | None = None
    """`(N, H)` of the tokens that count, if a teacher's were precomputed."""
    layout: Layout | None = None
    """What models are given in place of the padded rows."""
    blind: "Batch | None" = None
    """Of `WithViews`: the same texts without an image."""

    @classmethod
    def of(cls, inputs: Mapping[str, Any], arrange: Arrange | None = None) -> "Batch":
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
            teacher_states=inputs.get(STATES),
            layout=None if arrange is None else arrange(inputs["input_ids"], inputs["attention_mask"]),
            blind=cls.of(inputs[BLIND]) if BLIND in inputs else None,
        )


def _unpacked(packed: Tensor, mask: Tensor) -> Tensor:
    """Numbers that stand one after another in each row, at the places of the mask."""
    filled = torch.arange(packed.shape[1], device=packed.device) < mask.sum(-1, keepdim=True)
    return packed.new_zeros(mask.shape).masked_scatter(mask, packed[filled])


def _without(example: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return a row without some columns; the row itself stays as it was."""
    return {name: value for name, value in example.items() if name not in names}


class WithColumns:
    """A collator that also passes on `COLUMNS` and `CACHED`.

    Args:
        collator: what makes the rest of the batch.
    """

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        found = {name: [example[name] for example in examples] for name in COLUMNS if name in examples[0]}
        cached = [example[name] for name in CACHED if name in examples[0] for example in examples]
        batch: dict[str, Any] = self.collator([_without(example, (*COLUMNS, *CACHED)) for example in examples])
        batch |= {name: torch.tensor(values, dtype=torch.float32) for name, values in found.items()}
        if cached:
            rows = [torch.as_tensor(row, dtype=torch.float32) for row in cached]
            batch["ref_token_logps"] = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return batch


class WithViews:
    """A collator for pairs of two images and two texts: each text is seen under its image, under the other one, and under none.

    The batch has 4B rows, the chosen texts under `images`, then under `rejected_images`, then the rejected texts in the same order; and, as
    a batch of its own named `BLIND`, 2B rows whose prompt shows no image.

    Args:
        collator: TRL's, of one image (or one list of images) per pair.
    """

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        others = [example | {"images": example["rejected_images"]} for example in examples]
        blind = [example | {"images": [], "prompt": _without_images(example["prompt"])} for example in examples]
        batch = dict(self.collator([*(dict(example) for example in examples), *others]))
        return batch | {BLIND: dict(self.collator(blind))}


def _without_images(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A prompt that shows nothing."""
    contents = [message["content"] for message in messages]
    shown = [c if isinstance(c, str) else [part for part in c if part["type"] != "image"] for c in contents]
    return [{**message, "content": content} for message, content in zip(messages, shown, strict=True)]


@contextmanager
def _padding_free_is_ours(args: Any) -> Iterator[None]:
    """`DPOTrainer` warns that it cannot do without padding."""
    given, args.padding_free = args.padding_free, False
    try:
        yield
    finally:
        args.padding_free = given


class StagedTrainer(DPOTrainer):
    """TRL's `DPOTrainer` with its loss in four stages: `reference`, `score`, `loss`, `report`.

    A subclass provides them, and `precompute`, which gives a data set the columns `CACHED`. `side_modules` are trained
    and saved beside the model, each as a safetensors file of its name.
    """

    args: Any
    model: Any
    arrange: Arrange | None = None
    """How batches are laid out for the models; None leaves them padded."""
    has_views = False
    """Whether the rows have two images, see `WithViews`."""
    _signature_columns: Any

    def __init__(self, model: Any, ref_model: Any = None, **how: Any) -> None:
        self.side_modules: dict[str, nn.Module] = {}
        self._layout_holds = False
        with _padding_free_is_ours(how["args"]):
            super().__init__(model, ref_model, **unshared(how))
        if isinstance(self.unwrapped(self.ref_model), NoReference):
            self.ref_model = None
        self.install_heads()
        self.data_collator = WithColumns(WithViews(self.data_collator) if self.has_views else self.data_collator)

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

    def reports(self) -> bool:
        """Whether this step is going to be logged, as far as can be known."""
        step, args = self.state.global_step + 1, self.args
        if self.mode == "eval" or args.logging_strategy == "epoch":
            return True
        logged = args.logging_strategy == "steps" and step % max(1, round(self.state.logging_steps)) == 0
        return logged or (step == 1 and bool(args.logging_first_step))

    def gathered(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Sums over all processes, with one exchange and one wait for the device."""
        values = torch.stack([value.to(self.accelerator.device, torch.float64) for value in sums.values()])
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values, "sum")
        return dict(zip(sums, values.tolist(), strict=True))

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
        if batch.layout is not None and not self._layout_holds:
            self._compare_layout(model, batch)
        request = request._replace(layout=batch.layout)
        scored: Scored = model(**batch.inputs, labels=batch.labels, completion_request=request)
        width = batch.mask.shape[1]  # prompt tuning puts virtual tokens before the text
        return scored._replace(**{name: value[:, -width:] for name, value in _per_token(scored).items()})

    def _compare_layout(self, model: Any, batch: Batch) -> None:
        """Once, on the first batch: a model that does not obey masks or positions gives other numbers, and no error."""
        self._layout_holds, training = True, model.training
        model.eval()
        with torch.no_grad():
            moved, padded = (self.ask(model, each, Request()).logps for each in (batch, batch._replace(layout=None)))
        model.train(training)
        assert moved is not None
        assert padded is not None
        off = float((moved - padded).abs().sum() / batch.mask.sum())
        rounds = self.policy.dtype in _HALVES or torch.is_autocast_enabled(batch.mask.device.type)
        if not off < (0.1 if rounds else 1e-3):
            raise ValueError(
                f"{type(self.policy).__name__} does not compute the same in the layout of prefix_sharing or padding_free: its "
                f"log-probabilities are {off:.2g} nats per token off; leave the option out"
            )

    def _compute_loss(self, model: Any, inputs: Mapping[str, Any], return_outputs: bool) -> Any:
        batch = Batch.of(inputs, self.arrange)
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
            more = (*COLUMNS, *CACHED, STATES, *(VIEWS if self.has_views else ()))
            self._signature_columns = [*(self._signature_columns or ()), *more]

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
    others = ("hidden", "states", "aux_loss", "blind", "found")
    return {name: value for name, value in scored._asdict().items() if value is not None and name not in others}


def last_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint of a run that was written to its end, or None.

    `trainer_state.json` is what the Trainer writes last; a run that is killed while it saves leaves a checkpoint without it, which
    `get_last_checkpoint` of transformers would choose.

    Args:
        folder: the run's `output_dir`.

    Examples:
        >>> last_checkpoint("no/such/folder")
    """
    whole = [path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json")]
    steps = {int(path.name.removeprefix("checkpoint-")): path for path in whole}
    return str(steps[max(steps)]) if steps else None
