"""`DistillationPairTrainer`: a student learns from a teacher on pairs of texts, one of the teacher's and one of its own.

A row is that of a preference trainer: `chosen` is the teacher's text y_t, `rejected` the student's y_s, as the strategy
`teacher_student` of contralto.data_gen makes them. With p the teacher, q the student and D a divergence at a token:

    D(y) = 1/|y| sum_i D(p(. | x, y_<i), q(. | x, y_<i))        loss = w_t D_t(y_t) + w_s D_s(y_s)

`loss_type` says which divergences and weights, see `contralto.align.trainers.distillation_config`.

A text that has no weight is not run through any model; with a curriculum, in the steps in which it has none.
"""

# ruff: noqa: TRY004 (a wrong type in somebody's recipe is a ValueError like any other mistake in it)

import copy
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from datasets import IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from contralto.align.caches.blocks import TokenRows, default_folder
from contralto.align.caches.teacher import TeacherStates, load_head, save_head
from contralto.align.losses.chunked import Head, chunked_divergence, chunked_logps, first_tokens, vocabulary_size
from contralto.align.trainers.base import StagedTrainer
from contralto.align.trainers.batches import IGNORED, PairBatch
from contralto.align.trainers.collators import TeacherStatesCollator
from contralto.align.trainers.distillation_config import TEACHER, DistillationConfig
from contralto.align.trainers.scoring import Scoring, TokenScores, install_head
from contralto.align.trl_compat import NoReference, create_model_from_path, gathered
from contralto.common.hashing import content_digest, model_digest, weights_digest
from contralto.common.head import head_of
from contralto.common.hub import from_pretrained, locate
from contralto.decoding.vocabulary import differing_tokens, find_tokenizer

__all__ = ["DistillationPairTrainer", "Found", "Teacher"]

logger = logging.getLogger(__name__)

STATES_OF = "output layer"
"""Where precomputed states are taken, for the key of their cache."""


class Teacher(NamedTuple):
    """What the teacher says of the tokens that count."""

    states: Tensor
    """`(N, H)`, or logits `(N, V)` where there is no head."""
    head: Head | None


class Found(NamedTuple):
    """What the student's forward finds, of R texts of N tokens."""

    total: Tensor
    """The loss."""
    values: Tensor
    """`(R,)` the mean divergence of each text, without gradient."""
    alpha: Tensor | None
    """`(R,)` how much it is skewed; None for other divergences."""
    logps: Tensor | None
    """`(R,)` the student's mean log-probability per token; None where nobody wants it."""
    teacher_logps: Tensor | None


class Texts(NamedTuple):
    """The texts of a batch that have a weight."""

    batch: PairBatch
    rows: dict[str, slice]
    """TokenRows of `chosen`, and of `rejected`."""
    pairs: int
    states: Tensor | None = None
    """Their precomputed states of the teacher, `(N, H)`."""


class DistillationPairTrainer(StagedTrainer):
    """Trains a student on a teacher's texts and its own by divergences between the two models at every token.

    Everything that TRL's `DPOTrainer` takes, it takes: data, collators, callbacks, PEFT, saving, accelerate. Only the tokens of the texts
    go through the heads, a few at a time, and no logits are kept. Where the two vocabularies differ in size, as they do where models of
    one family pad theirs, both softmaxes are over the tokens that both have.

    The curriculum's mean gap m is over the batch of all processes. An evaluation takes alpha_0 and beta_0, so that its losses
    compare over time.

    Args:
        model: the student: a name or folder, a model of transformers, or one with an adapter of peft.
        teacher: a loaded model, quantised or not; None takes `args.teacher_model_name_or_path`.
        args: a `DistillationConfig`.
        how: the other arguments of `DPOTrainer`: `train_dataset`, `eval_dataset`, `processing_class`, `peft_config`, `callbacks`,
            `data_collator`, `optimizers`, `quantization_config`.

    Raises:
        ValueError: whatever is wrong, in one sentence; before a model is loaded where that can be.

    Examples:
        >>> DistillationPairTrainer("any", args=DistillationConfig("out", report_to="none", num_train_epochs=2))
        Traceback (most recent call last):
            ...
        ValueError: distillm2 needs a teacher: pass a loaded model, or set teacher_model_name_or_path
    """

    _tag_names = ["trl", "contralto", "distillation"]  # noqa: RUF012
    _name = "DistillationPairTrainer"
    _paper: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, model: Any, teacher: Any = None, args: DistillationConfig | None = None, **how: Any) -> None:
        if not isinstance(args, DistillationConfig):
            raise ValueError(f"args must be a DistillationConfig, not {type(args).__name__}")
        _check(model, teacher, args, how)
        self.uses_teacher = args.loss_type != ["sft"]
        self.sides = {
            side: name
            for side, name, weight in zip(("chosen", "rejected"), args.kind[:2], args.weights, strict=True)
            if weight or args.loss_type == ["distillm2"]
        }
        self._teacher: Any = _without_adapter(teacher)
        self._head: Head | None = None
        if isinstance(model, str) and how.get("peft_config") is not None and torch.accelerator.is_available():
            args = copy.copy(args)  # the caller's stays as it was
            args.model_init_kwargs = {"dtype": "bfloat16"} | dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
        super().__init__(model, self._reference_at_start(args), args=args, **how)
        if not self.uses_teacher or args.precompute_teacher:
            self.ref_model = None
        else:
            _check_vocabulary(self.processing_class, self.unwrap(self.ref_model).config.get_text_config().vocab_size)
        self._teacher = None
        self.data_collator = TeacherStatesCollator(self.data_collator)
        self._idle_is_told = args.loss_type != ["distillm2"]

    def _reference_at_start(self, args: DistillationConfig) -> Any:
        """What `DPOTrainer.__init__` takes for the reference."""
        if not self.uses_teacher or args.precompute_teacher:
            return NoReference() if args.deepspeed_plugin is None else None
        return self._loaded(args)

    # ------------------------------------------------------------------------------------------------------ the stages

    def reference(self, batch: PairBatch) -> Teacher | None:
        """The teacher's hidden states at the tokens that count, from disk or by a forward."""
        self._tell_idle()
        if not self.uses_teacher:
            return None
        if self.args.precompute_teacher:
            states = self.texts(batch).states
            assert states is not None
            assert self._head is not None
            return Teacher(states.to(self._head.weight.dtype), self._head)
        with self.reference_model() as (model, bare):
            states = self.score_tokens(model, self.texts(batch).batch, Scoring(hidden=True)).hidden
            head = head_of(bare, gather=gathered)
        assert states is not None
        return Teacher(states if head is None else states.to(head.weight.dtype), head)

    def score(self, model: Any, batch: PairBatch, reference: Teacher | None) -> TokenScores:
        """The student's forward, and the divergences."""
        texts = self.texts(batch)
        batch = texts.batch
        if self.aux_loss_enabled:
            batch = batch._replace(inputs=batch.inputs | {"output_router_logits": True})
        return self.score_tokens(model, batch, Scoring(function=partial(self.compare, texts, reference)))

    def loss(self, batch: PairBatch, policy: TokenScores, reference: Teacher | None) -> Found:
        """What the forward found."""
        found: Found = policy.result
        return found

    def report(self, batch: PairBatch, policy: TokenScores, reference: Teacher | None, loss: Found) -> None:
        """The mean of each side's divergence, alpha, beta, and the models' log-probabilities per token."""
        texts = self.texts(batch)
        sums = {"pairs": torch.tensor(texts.pairs), "tokens": texts.batch.inputs["attention_mask"].sum()}
        per_text = {"loss": loss.values, "alpha": loss.alpha, "logps": loss.logps, "teacher_logps": loss.teacher_logps}
        for side, rows in texts.rows.items():
            sums |= {f"{name}/{side}": each[rows].sum() for name, each in per_text.items() if each is not None}
        if policy.aux_loss is not None:
            sums["aux_loss"] = policy.aux_loss * texts.pairs
        totals = self.sum_over_processes(sums)
        self.count_tokens(round(totals["tokens"]))
        self.record_metrics(
            **{name: value / totals["pairs"] for name, value in totals.items() if name not in ("pairs", "tokens")}
        )
        if self.args.loss_type == ["distillm2"]:
            weights = self.weights()
            self.record_metrics(**{"weight/chosen": weights[0], "weight/rejected": weights[1]})
            if self.mode == "train":
                self.record_metrics(beta=self.args.schedule.beta(**self.moment()))

    # -------------------------------------------------------------------------------------------------- the comparison

    def weights(self) -> tuple[float, float]:
        """Return the weights of the teacher's and of the student's text in this step."""
        weights: tuple[float, float] = self.args.weights
        if self.args.loss_type == ["distillm2"] and self.mode == "train":
            weights = self.args.schedule.weights(**self.moment())
        return weights

    def texts(self, batch: PairBatch) -> Texts:
        """Return the batch without the texts that have no weight in this step."""
        weights = dict(zip(("chosen", "rejected"), self.weights(), strict=True))
        return self.texts_of(batch, [side for side in self.sides if weights[side]])

    def texts_of(self, batch: PairBatch, sides: Sequence[str]) -> Texts:
        """Return the batch with the texts of some sides alone.

        Args:
            batch: all rows.
            sides: `chosen`, `rejected` or both.
        """
        pairs = len(batch.labels) // 2
        halves = {"chosen": slice(0, pairs), "rejected": slice(pairs, 2 * pairs)}
        if len(sides) == 2:
            return Texts(batch, halves, pairs, batch.teacher_states)
        (side,) = sides
        rows, states = halves[side], self._states_of_side(batch, side)
        if batch.inputs.keys() <= {"input_ids", "attention_mask"}:
            inputs = {name: value[rows] for name, value in batch.inputs.items()}
            kept = batch._replace(
                inputs=inputs, labels=batch.labels[rows], mask=batch.mask[rows], lengths=batch.lengths[rows]
            )
            return Texts(kept, {side: slice(0, pairs)}, pairs, states)
        own = torch.zeros_like(batch.lengths, dtype=torch.bool)  # images do not lie row by row: all rows stay
        own[rows] = True
        labels, mask = batch.labels.masked_fill(~own[:, None], IGNORED), batch.mask & own[:, None]
        return Texts(batch._replace(labels=labels, mask=mask), {side: rows}, pairs, states)

    def _tell_idle(self) -> None:
        """Warn, once, where the texts of one side have no weight in a part of the steps."""
        if self._idle_is_told or self.mode == "eval":
            return
        self._idle_is_told = True
        for side, share in zip(("teacher", "student"), self.args.schedule.idle(self.moment()["epochs"]), strict=True):
            if share > 0 and self.accelerator.is_main_process:
                logger.warning(
                    "the %s's texts have no weight in %.0f%% of the steps, and are skipped there: set beta_max below 1, or "
                    "curriculum to released_gradual, to keep them in the loss",
                    *(side, 100 * share),
                )

    def _states_of_side(self, batch: PairBatch, side: str) -> Tensor | None:
        """Return the precomputed states of one side: those of chosen texts come first."""
        states = batch.teacher_states
        if states is None or len(self.sides) == 1:  # only one side was computed
            return states
        first = int(batch.mask[: len(batch.mask) // 2].sum())
        return states[:first] if side == "chosen" else states[first:]

    def compare(
        self, texts: Texts, teacher: Teacher | None, hidden: Tensor, head: Head | None, targets: Tensor
    ) -> Found:
        """The loss of the batch, from what goes into the student's head; runs within its forward."""
        mask = texts.batch.mask
        text, lengths = mask.nonzero()[:, 0], mask.sum(-1).clamp(min=1)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        weights = self._weights(texts, lengths.to(exact))[text]
        if teacher is None:
            of_targets = chunked_logps(hidden, head, targets).logps
            return Found(-(weights * of_targets).sum(), -_means(of_targets, text, lengths), None, None, None)
        size = min(vocabulary_size(hidden, head), vocabulary_size(*teacher))
        teacher = Teacher(*first_tokens(*teacher, size))
        hidden, head = first_tokens(hidden, head, size)
        logps = self._logps(hidden, head, teacher, targets, text, lengths)
        alpha = self._alpha(texts, *logps, like=weights.new_empty(len(lengths)))
        counts = {side: int(count) for side, count in zip(texts.rows, _counts(texts), strict=True)}
        names = {name: sum(n for side, n in counts.items() if self.sides[side] == name) for name in self.sides.values()}
        total, values = self._divergence(names, hidden, head, teacher, weights, None if alpha is None else alpha[text])
        return Found(total, _means(values, text, lengths), alpha, *logps)

    def _divergence(
        self,
        names: dict[str, int],
        hidden: Tensor,
        head: Head | None,
        teacher: Teacher,
        weights: Tensor,
        alpha: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        args, learning = self.args, torch.is_grad_enabled()
        found = chunked_divergence(
            names,
            hidden,
            head,
            teacher.states,
            teacher.head,
            weights=weights if learning else None,
            alpha=args.alpha if alpha is None else alpha,
            beta=args.beta,
            srkl=args.srkl_gradient,
            temperature=args.temperature,
        )
        total = (weights * found.divergence).sum() if found.total is None else found.total
        return total, found.divergence.detach()

    def _weights(self, texts: Texts, lengths: Tensor) -> Tensor:
        """`(R,)` what a token of each text counts."""
        weights, found = self.weights(), torch.zeros_like(lengths)
        for side, rows in texts.rows.items():
            found[rows] = weights[side == "rejected"] / texts.pairs
        return found / lengths

    @torch.no_grad()
    def _logps(
        self, hidden: Tensor, head: Head | None, teacher: Teacher, targets: Tensor, text: Tensor, lengths: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """`(R,)` mean log-probabilities per token of student and teacher, where alpha or the log needs them."""
        if not (self._adapts() or self.is_logging_step()):
            return None, None
        own = head
        if head is not None:
            own = head._replace(weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach())
        both = ((hidden.detach(), own), (teacher.states, teacher.head))
        student, teachers = (_means(chunked_logps(*model, targets).logps, text, lengths) for model in both)
        return student, teachers

    def _adapts(self) -> bool:
        moves = self.args.loss_type == ["distillm2"] and self.args.schedule.adaptive_alpha
        return moves and self.mode == "train" and self.moment()["epoch"] > 1

    def _alpha(
        self, texts: Texts, logps: Tensor | None, teacher_logps: Tensor | None, *, like: Tensor
    ) -> Tensor | None:
        """`(R,)`."""
        if not any(name.startswith("skew") for name in self.sides.values()):
            return None
        found = torch.full_like(like, self.args.alpha)
        if not self._adapts() or logps is None or teacher_logps is None:
            return found
        for side, rows in texts.rows.items():
            own, other = (teacher_logps[rows], logps[rows]) if side == "chosen" else (logps[rows], teacher_logps[rows])
            mean = self._mean(own.exp() - other.exp())
            found[rows] = self.args.schedule.alpha(own, other, epoch=self.moment()["epoch"], mean_gap=mean).to(found)
        return found

    def _mean(self, values: Tensor) -> Tensor:
        """Over all processes."""
        if self.accelerator.num_processes == 1:
            return values.mean()
        total = self.accelerator.reduce(torch.stack([values.sum(), values.new_tensor(len(values))]), "sum")
        mean: Tensor = total[0] / total[1]
        return mean

    def moment(self) -> dict[str, int]:
        """Where the curriculum stands: the arguments of `Curriculum.weights`."""
        args, state = self.args, self.state
        epochs = args.all_epochs or state.num_train_epochs
        per_epoch = state.max_steps / state.num_train_epochs
        done = args.first_epoch - 1
        return {
            "epoch": min(done + int(state.epoch or 0) + 1, epochs),
            "epochs": epochs,
            "step": min(round(done * per_epoch) + state.global_step, round(epochs * per_epoch)),
            "steps": round(epochs * per_epoch),
        }

    # --------------------------------------------------------------------------------------- the teacher, and its states

    def _loaded(self, args: DistillationConfig) -> Any:
        if self._teacher is None:
            self._teacher = _load(args)
        if not self._teacher.get_output_embeddings().weight.is_floating_point():
            raise ValueError(
                "the teacher's head is quantised, and it is read row by row: leave it out of the quantisation"
            )
        return self._teacher

    def precompute(self, dataset: Any, name: str, batch_size: int) -> Any:
        """The data set with the places of the teacher's states, from disk or computed now."""
        if self._teacher is None and self.args.teacher_model_name_or_path is None:
            raise ValueError("the teacher was a loaded model, which is gone: pass this data set as eval_dataset")
        key = _key(self._teacher, self.args, self.accelerator.mixed_precision, list(self.sides))
        states = TeacherStates(
            self.args.teacher_cache or default_folder("teacher"),
            key,
            lambda rows: self._states_of(rows, batch_size),
            lambda: _bytes_per_token(self._loaded(self.args)),
            self.processes(),
        )
        dataset, path = states.add(dataset, name), states.folder / "head.safetensors"
        if self.accelerator.is_main_process and not path.is_file():
            save_head(_cacheable(self._loaded(self.args)), path)
        self.accelerator.wait_for_everyone()
        self._head = load_head(path, self.accelerator.device)
        return dataset

    @torch.no_grad()
    def _states_of(self, rows: TokenRows, batch_size: int) -> list[tuple[Tensor, list[int]]]:
        """The states of rows, in batches of similar length."""
        teacher = self._loaded(self.args)
        _check_vocabulary(self.processing_class, teacher.config.get_text_config().vocab_size)
        if not getattr(teacher, "is_quantized", False):
            teacher.to(self.accelerator.device)
        _cacheable(teacher.eval())
        install_head(teacher)
        found: dict[int, tuple[Tensor, list[int]]] = {}
        order = sorted(range(len(rows)), key=lambda i: -sum(map(len, rows[i].values())))
        for start in range(0, len(order), batch_size):
            own = order[start : start + batch_size]
            batch = PairBatch.of(self.to_device(self.data_collator([dict(rows[i]) for i in own])))
            texts = self.texts_of(batch, list(self.sides))
            with self.accelerator.autocast():
                states = self.score_tokens(teacher, texts.batch, Scoring(hidden=True)).hidden
            assert states is not None
            lengths = texts.batch.mask.sum(-1).tolist()
            split = dict(enumerate(torch.split(states.cpu(), lengths)))
            for at, i in enumerate(own):
                places = [part.start + at for part in texts.rows.values()]
                found[i] = torch.cat([split[place] for place in places]), [lengths[place] for place in places]
        return [found[i] for i in range(len(rows))]


def _cacheable(teacher: Any) -> Head:
    """Return the teacher's head; raise an error where hidden states do not make its logits."""
    head = head_of(teacher, gather=gathered)
    if head is None:
        raise ValueError(
            f"precompute_teacher keeps hidden states, and the logits of {type(teacher).__name__} are more than those times its output "
            "layer: set precompute_teacher to False"
        )
    return head


def _means(values: Tensor, text: Tensor, lengths: Tensor) -> Tensor:
    """`(R,)` the mean of each text's tokens, without gradient."""
    values = values.detach()
    return values.new_zeros(len(lengths)).index_add_(0, text, values) / lengths


def _counts(texts: Texts) -> list[int]:
    """Tokens per side, with one wait for the device."""
    counts: list[int] = torch.stack([texts.batch.mask[rows].sum() for rows in texts.rows.values()]).tolist()
    return counts


# ------------------------------------------------------------------------------------------------------------ the teacher


def _load(args: DistillationConfig) -> Any:
    """The teacher that the options name."""
    name = cast(str, args.teacher_model_name_or_path)
    cpu = args.device.type == "cpu"
    options: dict[str, Any] = {"dtype": "float32" if cpu else "auto", "trust_remote_code": args.trust_remote_code}
    if args.teacher_model_revision is not None:
        options["revision"] = args.teacher_model_revision
    if args.teacher_load_in_4bit or args.teacher_load_in_8bit:
        kind: dict[str, Any] = {"load_in_8bit": True}
        if args.teacher_load_in_4bit:
            kind = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        options["quantization_config"] = BitsAndBytesConfig(**kind)  # type: ignore[no-untyped-call]
        options["device_map"] = {"": str(args.device)}
    more = cast(dict[str, Any], args.teacher_model_init_kwargs or {})
    return create_model_from_path(locate(name), **{"device_map": None} | options | more)


def _without_adapter(teacher: Any) -> Any:
    """A model of peft as the model that its adapter was put into, where the adapter stays in force."""
    return teacher.get_base_model() if isinstance(teacher, PeftModel) else teacher


def _key(teacher: Any, args: DistillationConfig, precision: str, sides: list[str]) -> str:
    """A hash of all that a teacher's states depend on but the rows."""
    how = (precision, args.max_length, args.truncation_mode, sides, STATES_OF)
    if teacher is not None:
        return model_digest(teacher, frozen_only=False, extra=how)
    name = cast(str, args.teacher_model_name_or_path)
    options = [getattr(args, each) for each in TEACHER[1:5]]
    return content_digest(repr((weights_digest(name), options, args.device.type, how)))


def _bytes_per_token(teacher: Any) -> int:
    size: int = teacher.config.get_text_config().hidden_size
    return int(size * teacher.dtype.itemsize)


# --------------------------------------------------------------------------------------- what can be seen before loading


def _check(model: Any, teacher: Any, args: DistillationConfig, how: Mapping[str, Any]) -> None:
    if not isinstance(model, str | PreTrainedModel | PeftModel):
        raise ValueError(f"model must be a name, a folder or a loaded model, not a {type(model).__name__}")
    _check_teacher(model, teacher, args)
    config = how.get("peft_config")
    if config is not None and not isinstance(config, PeftConfig):
        raise ValueError(f"peft_config must be a configuration of peft, not a {type(config).__name__}")
    if config is not None and isinstance(model, PeftModel):
        raise ValueError("the model has an adapter already, and peft_config asks for another: leave peft_config out")
    if config is not None and config.is_prompt_learning:
        raise ValueError("learned prompts change which tokens stand where, and a divergence compares them: use LoRA")
    if args.head_in_shards and args.loss_type != ["sft"] and not args.precompute_teacher:
        raise ValueError(
            "the teacher's whole head is read, which ZeRO 3 and FSDP 1 keep in shards: set precompute_teacher, or use FSDP 2 or ZeRO 2"
        )
    for name, dataset, first in args.checked_pairs(how.get("train_dataset"), how.get("eval_dataset")):
        _check_dataset(name, dataset, first, args)
    if teacher is not None or args.teacher_model_name_or_path is not None:
        _check_tokenizers(model, teacher, args, how.get("processing_class"))


def _check_teacher(model: Any, teacher: Any, args: DistillationConfig) -> None:
    (name,) = args.loss_type
    if name == "sft":
        if teacher is not None:
            raise ValueError("sft learns from the teacher's texts alone: leave the teacher out")
        return
    if teacher is None and args.teacher_model_name_or_path is None:
        raise ValueError(f"{name} needs a teacher: pass a loaded model, or set teacher_model_name_or_path")
    if teacher is not None and args.teacher_model_name_or_path is not None:
        raise ValueError("there are two teachers, the model and teacher_model_name_or_path: give one")
    if teacher is not None and not isinstance(teacher, nn.Module):
        raise ValueError(f"teacher must be a loaded model, not a {type(teacher).__name__}; a name goes into the config")
    if teacher is not None and teacher is model:
        raise ValueError("the teacher is the student itself, and would be trained with it: pass another model")


def _check_dataset(name: str, dataset: Any, first: Mapping[str, Any], args: DistillationConfig) -> None:
    if args.precompute_teacher and isinstance(dataset, IterableDataset):
        raise ValueError(
            f"{name} is streamed, and precompute_teacher goes through all rows beforehand: set it to False"
        )
    if args.precompute_teacher and {"image", "images"} & set(first):
        raise ValueError(
            f"{name} has images, which are read as they come: precompute_teacher is for text, set it to False"
        )


def _check_tokenizers(model: Any, teacher: Any, args: DistillationConfig, processing_class: Any) -> None:
    """Reject a teacher that has another id, or none, for a token of the student's. It may have more tokens.

    The tokenizer of a loaded teacher is looked for on this machine. Where there is none, sizes must tell: `_check_vocabulary`.
    """
    student = model if isinstance(model, str) else str(model.config.name_or_path)
    code = args.trust_remote_code
    if teacher is None:
        name = cast(str, args.teacher_model_name_or_path)
        revision = args.teacher_model_revision or "main"
        other = from_pretrained(AutoTokenizer, name, revision=revision, trust_remote_code=code)
    else:
        name = str(getattr(teacher, "name_or_path", "") or "")
        other = find_tokenizer(name)
    if other is None:
        return
    own = getattr(processing_class, "tokenizer", processing_class) or from_pretrained(
        AutoTokenizer, student, trust_remote_code=code
    )
    if differing := differing_tokens(own, other):
        raise ValueError(
            f"{student} and {name} have different tokenizers ({len(differing)} tokens of the student's differ, such as "
            f"{differing[0]!r}), and distillation compares probabilities token by token"
        )


def _check_vocabulary(processing_class: Any, size: int) -> None:
    tokens = len(getattr(processing_class, "tokenizer", processing_class))
    if tokens > size:
        raise ValueError(
            f"the student's tokenizer has {tokens} tokens, and the teacher's head only {size}: distillation compares "
            "probabilities token by token, so both need the same tokenizer"
        )
