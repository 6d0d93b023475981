"""`contralto`, a model of lm-eval that decodes and scores by contrast.

    lm_eval.simple_evaluate(model="contralto", model_args={"pretrained": ..., "method": "cd", "amateur": ...}, tasks=[...])

Importing this module makes the name known to lm-eval; the command `contralto eval` does that, and then runs lm-eval's own
command line. Everything that its `hf` model takes works here too.

Read from lm_eval 0.4.13: `HFLM`'s encoding of texts and pairs, its distributed setup, `CacheHook.dbdict`.
"""

import copy
import dataclasses
import inspect
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import clear_torch_cache
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, StoppingCriteria

from contralto import __version__
from contralto.common.errors import during
from contralto.common.hashing import fingerprint, json_digest
from contralto.common.hub import check_weights, from_pretrained, locate, trusts_remote_code
from contralto.common.placement import input_device
from contralto.decoding import AdaptersOff, ContrastiveLogitsProcessor, SeededSampling
from contralto.decoding.executors.score import Likelihood, score
from contralto.decoding.inputs import DecodingBatch
from contralto.decoding.loading import check_device
from contralto.decoding.methods import generate_kwargs, likelihood_processor, option_names
from contralto.decoding.stopping import StopStrings, StopStringsAfterThought
from contralto.decoding.vocabulary import check_same_tokenizer
from contralto.eval.models.arguments import check_arguments, check_ranking, parameters_of
from contralto.eval.models.asked import Asked, read_options
from contralto.eval.models.conversations import Conversations
from contralto.eval.models.decoder import SAMPLING, Decoder, seed_of
from contralto.eval.models.thinking import answer_text, end_of_thought, ends_thought

__all__ = ["ContraltoLM", "Job"]

logger = logging.getLogger(__name__)

IDENTITY = "contralto"
"""The key under which a cache of answers says whose they are."""
OPTIONS = (*option_names(), *inspect.signature(Decoder.of).parameters)[:-1]
"""Model arguments that say how to decode; the last parameter of `Decoder.of` stands for the first ones."""


@dataclass(frozen=True)
class Job:
    """One request."""

    context: str
    arguments: tuple[Any, ...]
    """As lm-eval made it, for the cache."""
    doc: Mapping[str, Any]
    seed: int
    images: tuple[Any, ...] = ()
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)
    continuation: str = ""
    tokens: tuple[Sequence[int], Sequence[int]] | None = None
    """Context and continuation, where likelihoods of tokens are asked for."""


@register_model("contralto")
class ContraltoLM(Conversations, HFLM):  # type: ignore[misc]
    """Language models in lm-eval, decoding and scoring by a contrastive method.

    Answers (`generate_until`) come from the fast path of the method, likelihoods from `contralto.decoding.executors.score`, by default
    renormalised and without plausibility constraint. Answers do not depend on the batch: noise, transformations and
    sampling have a seed per request, made of `seed` and of the request itself.

    A cache of answers (`use_cache`) holds those of one configuration, and is refused to any other. Answers are on disk as
    soon as their batch is done.

    Args:
        pretrained: a folder, a hub id, `testbed:NAME`, or a model.
        device: default: a GPU if there is one.
        batch_size: rows at a time; "auto" begins with `max_batch_size` and halves when memory runs out.
        method, amateur, expert, antiexpert, adapters_off, form, alpha, beta, ...: see `contralto.decoding.methods`.
        contrast_prompt: of methods that contrast prompts: a template in which `{name}` is a field of the document and `{prompt}`
            the whole prompt, or under a chat template the text of its last turn; there the contrast prompt takes that text's
            place, and examples, system message and an answer that has been begun stay.
        temperature, top_k, top_p, min_p: above 0, every answer is sampled, whatever the task says.
        seed: of sampling, noise and transformations.
        score: "renormalised" log-probabilities, or "raw" scores.
        masked: whether likelihoods have the plausibility constraint; a token that it rules out counts for -1000.
        kwargs: all that lm-eval's `hf` model takes.

    Raises:
        ValueError: an unknown argument, an option outside its range or of another method, another tokenizer, a likelihood of
            a method that has none, a cache of another configuration.
    """

    ignored: Mapping[str, str] = {}
    """Arguments of lm-eval's model that would have no effect here, each with the reason."""

    def __init__(
        self,
        pretrained: Any,
        *,
        device: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = 64,
        **kwargs: Any,
    ) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        self._decoder = Decoder.of(**options)
        if trusts_remote_code():
            kwargs.setdefault("trust_remote_code", True)
        check_arguments(
            pretrained,
            {"device": device, **kwargs},
            known=parameters_of(kind for kind in type(self).__mro__ if issubclass(kind, HFLM)),
            options=OPTIONS,
            ignored=self.ignored,
        )
        self.adaptive = str(batch_size).startswith("auto")
        if not self.adaptive and not str(batch_size).isdigit():
            raise ValueError(f"batch_size must be a whole number or auto, not {batch_size!r}")
        check_device(device)
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        size = (max_batch_size or 64) if self.adaptive else int(batch_size or 1)
        shown = pretrained if isinstance(pretrained, str) else ""
        if shown:
            check_weights(shown)
        try:
            with during(f"cannot load {shown or type(pretrained).__name__}"):
                super().__init__(
                    locate(pretrained) if shown else pretrained,
                    device=where,
                    batch_size=size,
                    max_batch_size=max_batch_size or 64,
                    **kwargs,
                )
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            raise ValueError(f"neither contralto nor the model knows an argument: {error}") from error
        self.think_end_token: str | int | None = end_of_thought(self.think_end_token, self.tokenizer)
        self._device = input_device(self.model)  # lm-eval takes the weights' own, which is `meta` if they are offloaded
        self._shown = shown or self.model.name_or_path or type(self.model).__name__
        self._join_processes()
        self._loaded: dict[str, Any] = {}
        self._started_with = kwargs
        self._others = self._load_others()
        self._reset_counts()

    def _join_processes(self) -> None:
        """Rank and number of the processes of `accelerate launch`; lm-eval sets them on several GPUs only."""
        if hasattr(self, "accelerator") and self.world_size == 1:
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

    # ------------------------------------------------------------------------------------------------------- the decoder

    @property
    def _method(self) -> str:
        return self._decoder.method.method

    def decoding_by(self, **options: Any) -> "ContraltoLM":
        """The same model decoding otherwise; weights are shared, and other models loaded once.

        Args:
            options: how to decode, all anew.
        """
        other = copy.copy(self)
        other._decoder = Decoder.of(**options)
        other._others = other._load_others()
        other._reset_counts()
        other.set_cache_hook(type(self.cache_hook)(None))
        return other

    def _reset_counts(self) -> None:
        self.generated = 0
        """Tokens written so far."""
        self.seconds = 0.0
        """Time spent on them."""
        self._endless = 0
        """Answers in which no thought ends, of models that think."""
        self.ruled_out = Counter({"tokens": 0, "ruled_out": 0})
        """Tokens whose likelihood was asked for, and how many of them the method rules out."""

    def _load_others(self) -> tuple[Any, ...]:
        """The models of the other branches."""
        chosen = self._decoder.method
        others = [self._load(name) if isinstance(name, str) else name for name in chosen.models.values()]
        return (*others, AdaptersOff(others[-1] if others else self.model)) if chosen.adapters_off else tuple(others)

    def _load(self, name: str) -> Any:
        if name not in self._loaded:
            code = bool(self._started_with.get("trust_remote_code"))
            tokenizer = from_pretrained(AutoTokenizer, name, trust_remote_code=code)
            check_same_tokenizer(self._shown, self.tokenizer, name, tokenizer)
            dtype = self.model.dtype
            model = from_pretrained(self.AUTO_MODEL_CLASS, name, dtype=dtype, trust_remote_code=code)
            self._loaded[name] = model.to(self.device).eval()
        return self._loaded[name]

    @property
    def models(self) -> dict[str, torch.nn.Module]:
        """The models that run, by what they are called in the method."""
        named = {"main": self.model}
        others = zip(self._decoder.method.declaration.branches[1:], self._others, strict=False)
        return named | {name: model for name, model in others if not isinstance(model, AdaptersOff)}

    @property
    def other_models(self) -> dict[str, Any]:
        """Return the other models of the method, by the option that names each."""
        return dict(zip(self._decoder.method.models, self._others, strict=False))

    @property
    def configuration(self) -> dict[str, Any]:
        """All that determines an answer, besides the request."""
        return {
            "contralto": __version__,
            "pretrained": self._shown,
            "weights": {name: fingerprint(model) for name, model in self.models.items()},
            "dtype": str(self.model.dtype),
            "max_length": self.max_length,
            **{name: repr(value) for name, value in sorted(self._started_with.items())},
            **self._decoder.describe(),
        }

    @property
    def key(self) -> str:
        """A short hash of the configuration."""
        return short_hash(self.configuration)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results."""
        info: dict[str, Any] = super().get_model_info()
        own = self.configuration
        return info | {"decoder": self._decoder.describe(), "configuration": own, "key": short_hash(own)}

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take a cache of answers, if they are this configuration's."""
        if cache_hook.dbdict is not None:
            owner, own = cache_hook.dbdict.get(IDENTITY), self.configuration
            if owner is None and len(cache_hook.dbdict):
                raise ValueError("use_cache names a cache of another model's answers: name another file")
            if owner is not None and owner != own:
                changed = sorted(k for k in {*owner, *own} if owner.get(k) != own.get(k))
                raise ValueError(f"use_cache names a cache made with another {', '.join(changed)}: name another file")
            cache_hook.dbdict[IDENTITY] = own
        super().set_cache_hook(cache_hook)

    # ----------------------------------------------------------------------------------------------------------- answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """lm-eval's `generate_until`: the text that follows each prompt, up to a stop string."""
        jobs, before = list(self._jobs(requests)), self._endless
        for job in {repr(job.gen_kwargs): job for job in jobs}.values():
            self._asked(job)  # a mistake ends the run before anything is answered
        answers: list[str] = self._answer(jobs, self._write, "Running generate_until requests", disable_tqdm)
        if endless := self._endless - before:
            logger.warning(
                "%d of %d answers hold no think_end_token and count as answers from their beginning, as in lm-eval: raise "
                "max_gen_toks if the model was still thinking",
                endless,
                len(jobs),
            )
        return answers

    def _jobs(self, requests: Sequence[Any]) -> Iterator[Job]:
        """Requests with their seeds; one that its task repeats has another seed each time, one that fills up a rank has not."""
        seen: Counter[int] = Counter()
        for request in requests:
            context, gen_kwargs, *more = request.args
            times = request.repeats or 1
            if times > 1 and self._decoder.temperature and self.cache_hook.dbdict is not None:
                raise ValueError(
                    "a task that repeats its requests cannot be sampled through a cache, which would repeat the answer: "
                    "leave use_cache out, or sample by gen_kwargs do_sample=True"
                )
            images = _images(more)
            seed = self._seed(context, images, seen[id(request)] % times)
            seen[id(request)] += 1
            yield Job(context, request.args, request.doc, seed, images, gen_kwargs)

    def _seed(self, *parts: Any) -> int:
        return seed_of(self._decoder.seed, *parts)

    def _answer(
        self, jobs: list[Job], work: Callable[[list[Job]], list[Any]], title: str, disable_tqdm: bool
    ) -> list[Any]:
        """Work through jobs in batches, the longest first, and keep every answer at once."""
        order = sorted(
            range(len(jobs)), key=lambda i: (repr(jobs[i].gen_kwargs), -self._length(jobs[i]), jobs[i].context)
        )
        answers: list[Any] = [None] * len(jobs)
        with tqdm(total=len(jobs), desc=title, disable=disable_tqdm or self.rank != 0) as bar:
            for _, group in groupby(order, key=lambda i: repr(jobs[i].gen_kwargs)):
                left = list(group)
                while left:
                    batch = left[: self.batch_size]
                    try:
                        found = work([jobs[i] for i in batch])
                    except RuntimeError as error:
                        if not (self.adaptive and len(batch) > 1 and should_reduce_batch_size(error)):
                            raise
                        self.batch_size_per_gpu = len(batch) // 2
                        clear_torch_cache()
                        continue
                    for i, answer in zip(batch, found, strict=True):
                        answers[i] = answer
                    self._keep([jobs[i] for i in batch], found)
                    left = left[len(batch) :]
                    bar.update(len(batch))
        return answers

    def _length(self, job: Job) -> int:
        return sum(map(len, job.tokens)) if job.tokens else len(self.tok_encode(job.context))

    def _keep(self, jobs: Sequence[Job], answers: Sequence[Any]) -> None:
        """Answers on disk before anything else happens, in one transaction."""
        answered = self.cache_hook.dbdict
        if answered is not None:
            answered.autocommit = False
        for job, answer in zip(jobs, answers, strict=True):
            if job.arguments and not job.gen_kwargs.get("do_sample"):  # lm-eval keeps no sampled answers
                self.cache_hook.add_partial("loglikelihood" if job.tokens else "generate_until", job.arguments, answer)
        if answered is not None:
            answered.commit(blocking=True)
            answered.autocommit = True

    def _write(self, jobs: list[Job]) -> list[str]:
        """The answers of one batch."""
        asked = self._asked(jobs[0])
        room = self.max_length - (asked.length if self.backend == "causal" else 0)
        if room < 1:
            raise ValueError(
                f"the task asks for {asked.length} tokens, and the model reads {self.max_length}: lower max_gen_toks"
            )
        setting = self._setting(jobs, room)
        prompt = setting.inputs["input_ids"].shape[1] if self.backend == "causal" else 1
        how = self._how(asked, setting, [job.seed for job in jobs])
        how |= {"max_length": asked.more.get("max_length", prompt + asked.length), "use_cache": True}
        start = time.perf_counter()
        with self._autocast():
            output = self.model.generate(
                **setting.inputs,
                pad_token_id=self.tokenizer.pad_token_id,
                stopping_criteria=self._ends(asked.stop, prompt),
                eos_token_id=self._end_tokens(),
                **how,
            )
        self.seconds += time.perf_counter() - start
        tokens = output[:, prompt:] if self.backend == "causal" else output
        self.generated += int((tokens != self.tokenizer.pad_token_id).sum())
        return [self._text(row, asked.stop) for row in tokens.tolist()]

    def _asked(self, job: Job) -> Asked:
        """Return the generation options of a request."""
        return read_options(job.gen_kwargs, default=self.max_gen_toks, eos=self.tok_decode(self.eot_token_id, False))

    def _autocast(self) -> torch.autocast:
        """Return the context of all forward passes, those of other branches too: `mixed_precision_dtype`."""
        precision = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=precision, enabled=precision is not None)

    def _ends(self, stop: list[str], prompt: int) -> list[StoppingCriteria]:
        """What ends a row besides its end token, which `generate()` sees to."""
        strings = [text for text in stop if text and text != self.tok_decode(self.eot_token_id, False)]
        if not strings:
            return []
        if self.think_end_token is None:
            return [StopStrings(self.tokenizer, strings, prompt)]
        return [StopStringsAfterThought(self.tokenizer, strings, prompt, end=self.think_end_token)]

    def _end_tokens(self) -> list[int]:
        """The model's end tokens, and the tokenizer's."""
        known = self.model.generation_config.eos_token_id
        tokens = known if isinstance(known, list) else [] if known is None else [known]
        return list(dict.fromkeys([*tokens, self.eot_token_id]))

    def _text(self, tokens: list[int], stop: list[str]) -> str:
        """Return an answer as lm-eval wants it: without its thought, up to the first stop string."""
        self._endless += not ends_thought(tokens, self.tok_decode, self.think_end_token)
        return answer_text(tokens, self.tok_decode, stop, self.think_end_token)

    def _how(self, asked: Asked, setting: DecodingBatch, seeds: list[int]) -> dict[str, Any]:
        """What `generate()` is told: the method, sampling, and what the task asks for besides."""
        sampling = asked.sampling
        if self._decoder.temperature:
            sampling = {name: getattr(self._decoder, name) for name in SAMPLING}
        beams = asked.more.get("num_beams", 1)
        config = dataclasses.replace(self._decoder.method, beams=beams, executor=None)
        how = generate_kwargs(config, setting)
        if sampling["temperature"]:
            if not (row_seeds := config.declaration.row_seeds):
                raise ValueError(
                    f"the task samples, and method={config.method!r} does not sample here: it {row_seeds.reason}"
                )
            how["logits_processor"] = [*how.get("logits_processor", []), SeededSampling(seeds, **sampling)]
        return {
            **{name: value for name, value in asked.more.items() if name != "max_length"},
            **how,
            "do_sample": False,
        }

    # ------------------------------------------------------------------------------------------------------- the branches

    def _setting(self, jobs: Sequence[Job], room: int) -> DecodingBatch:
        """A batch as the method's branches read it."""
        self._decoder.method.check_contrast_prompt()
        views = self._decoder.method.active_views
        return DecodingBatch(
            self.model, self._others, self._encode(jobs, room), tuple(self._see(view, jobs, room) for view in views)
        )

    def _see(self, view: str, jobs: Sequence[Job], room: int) -> Mapping[str, Any]:
        """The same batch as another branch sees it."""
        if view != "prompt":
            raise ValueError(
                f"method={self._method!r} contrasts images: use model contralto-vlm and a task with images"
            )
        return self._encode([self._contrasted(job) for job in jobs], room)

    def _contrasted(self, job: Job) -> Job:
        """The job with its contrast prompt."""
        found: Job = self.contrast(job, self._decoder.method.contrast_prompt or "")
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """lm-eval's, and remember what was rendered."""
        conversation = copy.deepcopy(chat_history)  # models of images change it
        text: str = super().apply_chat_template(chat_history, add_generation_prompt)
        self.remember(conversation, text)
        return text

    def _encode(self, jobs: Sequence[Job], room: int) -> Mapping[str, Any]:
        """What a model reads of a batch."""
        if jobs[0].tokens:
            return self._pad([job.tokens[0] for job in jobs if job.tokens])
        side = "left" if self.backend == "causal" else "right"
        texts = [job.context or self.tok_decode([self.prefix_token_id], False) for job in jobs]
        ids, mask = self.tok_batch_encode(texts, side, left_truncate_len=room, truncation=self.truncation)
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}

    def _pad(self, rows: Sequence[Sequence[int]], side: str | None = None) -> dict[str, Tensor]:
        """Rows of tokens as one batch."""
        side = side or ("left" if self.backend == "causal" else "right")
        padded = self.tokenizer.pad({"input_ids": [list(row) for row in rows]}, padding_side=side, return_tensors="pt")
        return {name: padded[name].to(self.device) for name in ("input_ids", "attention_mask")}

    # -------------------------------------------------------------------------------------------------------- likelihoods

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """lm-eval's `loglikelihood`: how likely each continuation is, and whether greedy search would write it."""
        if self._decoder.is_plain and not any(len(request.args) > 2 for request in requests):
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
            return found
        check_ranking(self.enable_thinking)
        jobs = [
            self._scoring_job(request) for request in tqdm(requests, desc="Tokenizing inputs", disable=disable_tqdm)
        ]
        return self._answer(jobs, self._rate, "Running loglikelihood requests", disable_tqdm)

    def _scoring_job(self, request: Any) -> Job:
        context, continuation, *more = request.args
        images = _images(more)
        tokens = self._pair(context, continuation, images)
        seed = self._seed(context, images, 0)
        return Job(context, request.args, request.doc, seed, images, continuation=continuation, tokens=tokens)

    def _pair(self, context: str, continuation: str, images: Sequence[Any]) -> tuple[Sequence[int], Sequence[int]]:
        """The tokens of a context and of its continuation, as lm-eval splits them."""
        if not context:
            rest = self.tok_encode(continuation, add_special_tokens=False)
            return (rest[:1], rest[1:]) if rest[0] == self.prefix_token_id else ([self.prefix_token_id], rest)
        first, second = self._encode_pair(context, continuation)
        room = self.max_length + 1 - len(second)
        if room < 1:
            raise ValueError(
                f"a continuation of {len(second)} tokens does not fit a model that reads {self.max_length}"
            )
        return first[-room if self.backend == "causal" else -self.max_length :], second

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Likelihoods of tokens, for `loglikelihood_rolling`."""
        if self._decoder.is_plain:
            found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            return found
        if "prompt" in self._decoder.method.declaration.views:
            raise ValueError(f"method={self._method!r} contrasts prompts, and the likelihood of a whole text has none")
        jobs = [Job("", (), {}, 0, tokens=(first, second)) for _, first, second in requests]
        return self._answer(jobs, self._rate, "Running loglikelihood requests", True)

    def _rate(self, jobs: list[Job]) -> list[tuple[float, bool]]:
        """The likelihoods of one batch."""
        setting = self._setting(jobs, self.max_length)
        rest = self._pad([job.tokens[1] for job in jobs if job.tokens], "right")
        start = time.perf_counter()
        with self._autocast():
            found = score(
                self._scorer(setting),
                self.model,
                setting.inputs,
                rest["input_ids"],
                continuation_mask=rest["attention_mask"],
                renormalized=self._decoder.score == "renormalised",
                masked=self._decoder.masked,
                dtype=self.softmax_dtype,
            )
        self.seconds += time.perf_counter() - start
        self._count(found)
        return list(zip(found.total.tolist(), found.is_greedy.tolist(), strict=True))

    def _scorer(self, setting: DecodingBatch) -> ContrastiveLogitsProcessor:
        """The method whose likelihoods are asked for."""
        made: ContrastiveLogitsProcessor = likelihood_processor(self._decoder.method, setting)
        return made

    def _count(self, found: Likelihood) -> None:
        self.ruled_out.update(tokens=int(found.length.sum()), ruled_out=int(found.ruled_out.sum()))


def _images(more: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
    """The images of a request, from what follows its texts."""
    return tuple(more[0].get("visual", ())) if more else ()


def short_hash(configuration: Mapping[str, Any]) -> str:
    """Twelve digits that say which configuration answered."""
    return json_digest(configuration, 12)
