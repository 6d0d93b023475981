"""`contralto`, a model of lm-eval that decodes and scores by contrast.

    lm_eval.simple_evaluate(model="contralto", model_args={"pretrained": ..., "method": "cd", "amateur": ...}, tasks=[...])

Importing this module registers the name in lm-eval; the command `contralto eval` does that, and then runs lm-eval's own
command line. Every argument of lm-eval's `hf` model works here too.

Read from lm_eval 0.4.13: `HFLM`'s encoding of texts and pairs, its distributed setup.
"""

import copy
import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
from contralto.common.bars import SteadyBar
from contralto.common.errors import during
from contralto.common.hashing import fingerprint
from contralto.common.hub import from_pretrained, trusts_remote_code
from contralto.common.placement import input_device
from contralto.decoding import AdaptersOff, SeededSampling
from contralto.decoding.aligned import aligned_tokenizers
from contralto.decoding.branches import ModelVariant
from contralto.decoding.executors.score import Likelihood, score
from contralto.decoding.inputs import DecodingBatch
from contralto.decoding.loading import check_device
from contralto.decoding.methods import generate_kwargs
from contralto.decoding.methods.variants import is_variant, make_variant
from contralto.decoding.quantization import check_bits, take_bits
from contralto.decoding.stopping import StopStrings, StopStringsAfterThought
from contralto.decoding.vocabulary import check_same_tokenizer
from contralto.eval.metrics import register_in_lm_eval
from contralto.eval.models.arguments import check_arguments, check_ranking, parameters_of
from contralto.eval.models.base import ContrastiveEvalModel, decoder_options, describe_arguments, take_options
from contralto.eval.models.decoder import Decoder
from contralto.eval.models.generation_options import GenerationOptions, read_options
from contralto.eval.models.loading import ModelLoading
from contralto.eval.models.prefixes import check_prefix_cache, read_prompts, shared_prefixes
from contralto.eval.models.requests import EvalRequest, images_of
from contralto.eval.models.thinking import answer_text, end_of_thought, ends_thought

__all__ = ["ContraltoLM"]

logger = logging.getLogger(__name__)
register_in_lm_eval()


@register_model("contralto")
class ContraltoLM(ContrastiveEvalModel, ModelLoading, HFLM):  # type: ignore[misc]
    """Language models in lm-eval, decoding and scoring by a contrastive method.

    Answers (`generate_until`) come from the fastest executor of the method, likelihoods from
    `contralto.decoding.executors.score`, by default renormalised and without plausibility constraint. Answers do not depend on
    the batch: noise, transformations and sampling have a seed per request, made of `seed` and of the request itself.

    A cache of answers (`use_cache`) belongs to one configuration, and any other is rejected. Answers are on disk as soon as
    their batch is done.

    Args:
        pretrained: A folder, a hub id, `testbed:NAME`, or a model; also an adapter, which is put onto its base as by `peft`.
        device: Such as cuda:1; None is a GPU if there is one.
        batch_size: Rows per batch; "auto" starts with `max_batch_size` and halves it when memory runs out.
        max_batch_size: The first batch size of "auto".
        prefix_cache: Read a beginning that the prompts of a run share, such as few-shot examples, once for each branch, see
            `contralto.decoding.branches.reused_prefixes`. Likelihoods without a method are lm-eval's own, and read whole prompts.
        kwargs: Options of `Decoder.of`, that is `method`, its other models and parameters, `contrast_prompt`, `temperature`,
            `top_k`, `top_p`, `min_p`, `seed`, `score`, `masked`, `control`; and all arguments of lm-eval's `hf` model. `contrast_prompt` is
            a template in which `{name}` is a field of the document and `{prompt}` the whole prompt, or under a chat template the
            text of its last turn; there the contrast prompt takes that text's place, and examples, system message and the
            beginning of an answer stay. `load_in_4bit`, `amateur_load_in_8bit`, ... quantise by bitsandbytes.

    Raises:
        ValueError: An argument is unknown, an option is out of range or belongs to another method, another model has a different
            tokenizer, a likelihood is requested of a method that has none, or a cache belongs to another configuration.
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
        prefix_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.prefix_cache = check_prefix_cache(prefix_cache)
        self.decoder = Decoder.of(**take_options(kwargs))
        self.bits = take_bits(kwargs)
        check_bits(self.bits, self.decoder.config.models)
        if trusts_remote_code():
            kwargs.setdefault("trust_remote_code", True)
        check_arguments(
            pretrained,
            {"device": device, **kwargs},
            known=parameters_of(kind for kind in type(self).__mro__ if issubclass(kind, HFLM)),
            options=decoder_options(),
            ignored=self.ignored,
        )
        self.adaptive = str(batch_size).startswith("auto")
        """True if the batch size is halved when memory runs out."""
        if not self.adaptive and not (str(batch_size).isdigit() and int(batch_size or 0)):
            raise ValueError(f"batch_size must be a whole number of at least 1, or auto, not {batch_size!r}")
        check_device(device)
        self._init_hf(pretrained, device, batch_size, max_batch_size or 64, kwargs)
        self.think_end_token: str | int | None = end_of_thought(self.think_end_token, self.tokenizer)
        # lm-eval takes the device of the weights, which is `meta` if they are offloaded
        self._device = input_device(self.model)
        self._name = pretrained if isinstance(pretrained, str) else self.model.name_or_path or type(self.model).__name__
        if hasattr(self, "accelerator") and self.world_size == 1:  # lm-eval sets both on several GPUs only
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self._loaded: dict[str, Any] = {}
        self._tokenizers: dict[str, Any] = {}
        self._model_kwargs = kwargs
        self.load_others()

    def _init_hf(
        self,
        pretrained: Any,
        device: str | None,
        batch_size: int | str | None,
        max_batch_size: int,
        kwargs: Mapping[str, Any],
    ) -> None:
        """Initialize lm-eval's model, and shorten its errors to one line."""
        name = pretrained if isinstance(pretrained, str) else ""
        source, kwargs = self._resolved(name, kwargs) if name else (pretrained, kwargs)
        try:
            with during(f"cannot load {name or type(pretrained).__name__}"):
                super().__init__(
                    source,
                    device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
                    batch_size=max_batch_size if self.adaptive else int(batch_size or 1),
                    max_batch_size=max_batch_size,
                    **kwargs,
                )
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            raise ValueError(f"neither contralto nor the model knows an argument: {error}") from error

    # ------------------------------------------------------------------------------------------------------- the decoder

    def decoding_by(self, **options: Any) -> "ContraltoLM":
        """Return the same model with another decoder; weights are shared, and other models are loaded once.

        Args:
            options: See `Decoder.of`; options that are left out have their defaults.
        """
        other = copy.copy(self)
        other.decoder = Decoder.of(**options)
        other.load_others()
        other.set_cache_hook(type(self.cache_hook)(None))
        return other

    def load_others(self) -> None:
        """Load the other models of the decoder, once each, and reset the token counts."""
        self._others = self._load_others()
        self._reset_counts()

    def _reset_counts(self) -> None:
        self.generated = 0
        """Tokens generated so far."""
        self.seconds = 0.0
        """Time spent on them and on likelihoods."""
        self._endless = 0
        """Answers in which no thought ends, of models that think."""
        self.ruled_out = Counter({"tokens": 0, "ruled_out": 0})
        """Tokens whose likelihood was requested, and those of them that the method rules out."""

    def _load_others(self) -> tuple[Any, ...]:
        """Return the models of the other branches, loaded once."""
        models = self.decoder.models
        others = [self._load(name, each) if isinstance(each, str) else each for name, each in models.items()]
        if self.decoder.config.adapters_off and not self.decoder.control:
            others.append(AdaptersOff(others[-1] if others else self.model))
        return tuple(others)

    def _load(self, option: str, name: str) -> Any:
        key = f"{name} {self.bits.get(option)}"
        if key not in self._loaded and is_variant(name):
            self._loaded[key] = make_variant(name, self.model)
        if key not in self._loaded:
            code = bool(self._model_kwargs.get("trust_remote_code"))
            tokenizer = from_pretrained(AutoTokenizer, name, trust_remote_code=code)
            if not self.decoder.config.parameters.get("vocabulary"):
                check_same_tokenizer(self._name, self.tokenizer, name, tokenizer)
            self._loaded[key] = self._load_other(
                option, name, auto=self.AUTO_MODEL_CLASS, dtype=self.model.dtype, device=self.device, trusted=code
            )
        return self._loaded[key]

    @property
    def models(self) -> dict[str, torch.nn.Module]:
        """Return the models that run, by the names of their branches; `main` generates."""
        others = zip(self.decoder.config.declaration.other_names, self._others, strict=False)
        return {"main": self.model} | {name: model for name, model in others if not isinstance(model, ModelVariant)}

    @property
    def other_models(self) -> dict[str, Any]:
        """Return the other models of the method, by the option that names each."""
        return dict(zip(self.decoder.config.declaration.models, self._others, strict=False))

    @property
    def configuration(self) -> dict[str, Any]:
        """Return the settings that determine an answer, besides the request."""
        return {
            "contralto": __version__,
            "pretrained": self._name,
            "weights": {name: fingerprint(model) for name, model in self.models.items()},
            "dtype": str(self.model.dtype),
            "max_length": self.max_length,
            **({"bits": self.bits} if self.bits else {}),
            **describe_arguments(self._model_kwargs, self.tokenizer),
            **self.decoder.describe(),
        }

    def get_model_info(self) -> dict[str, Any]:
        """Return the description of the model for lm-eval's results."""
        info: dict[str, Any] = super().get_model_info()
        return info | self.decoder_info()

    # ----------------------------------------------------------------------------------------------------------- batches

    def _run_batches(
        self,
        requests: list[EvalRequest],
        work: Callable[[list[EvalRequest]], list[Any]],
        title: str,
        disable_tqdm: bool,
    ) -> list[Any]:
        """Answer requests in batches of equal options, the longest first, and store every answer at once."""
        tokens = [self._length(request) + 1 for request in requests]
        order = sorted(
            range(len(requests)), key=lambda i: (repr(requests[i].gen_kwargs), -tokens[i], requests[i].context)
        )
        answers: list[Any] = [None] * len(requests)
        hidden = disable_tqdm or self.rank != 0
        bar = SteadyBar(total=len(requests), work=sum(tokens), desc=title, disable=hidden)
        with shared_prefixes(self.prefix_cache), bar:
            for _, group in groupby(order, key=lambda i: repr(requests[i].gen_kwargs)):
                left = list(group)
                while left:
                    batch = left[: self.batch_size]
                    try:
                        results = work([requests[i] for i in batch])
                    except RuntimeError as error:
                        if not (self.adaptive and len(batch) > 1 and should_reduce_batch_size(error)):
                            raise
                        self.batch_size_per_gpu = len(batch) // 2
                        clear_torch_cache()
                        continue
                    for i, answer in zip(batch, results, strict=True):
                        answers[i] = answer
                    self.keep_answers([requests[i] for i in batch], results)
                    left = left[len(batch) :]
                    bar.update(len(batch), work=sum(tokens[i] for i in batch))
        return answers

    def _length(self, request: EvalRequest) -> int:
        return sum(map(len, request.tokens)) if request.tokens else len(self.tok_encode(request.context))

    def _batch(self, requests: Sequence[EvalRequest], room: int) -> DecodingBatch:
        """Return a batch with the inputs of the method's branches."""
        config = self.decoder.config
        config.check_contrast_prompt()
        views = tuple(self._view(view, requests, room) for view in self.decoder.views)
        code = bool(self._model_kwargs.get("trust_remote_code"))
        tokenizers = (self.tokenizer, self._tokenizers)
        aligned = {} if self.decoder.control else aligned_tokenizers(config, *tokenizers, trust_remote_code=code)
        return DecodingBatch(self.model, self._others, self._encode(requests, room), views, aligned)

    def _view(self, view: str, requests: Sequence[EvalRequest], room: int) -> Mapping[str, Any]:
        """Return the inputs of another branch."""
        if view != "prompt":
            raise ValueError(
                f"method={self.decoder.config.method!r} contrasts images: use model contralto-vlm and a task with images"
            )
        return self._encode([self.contrasted(request) for request in requests], room)

    def _encode(self, requests: Sequence[EvalRequest], room: int) -> Mapping[str, Any]:
        """Return the inputs of the model for a batch, prompts of at most `room` tokens."""
        if requests[0].tokens:
            return self._pad([request.tokens[0] for request in requests if request.tokens])
        side = "left" if self.backend == "causal" else "right"
        texts = [request.context or self.tok_decode([self.prefix_token_id], False) for request in requests]
        ids, mask = self.tok_batch_encode(texts, side, left_truncate_len=room, truncation=self.truncation)
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}

    def _pad(self, rows: Sequence[Sequence[int]], side: str | None = None) -> dict[str, Tensor]:
        """Return rows of tokens as one batch `(rows, length)` with its mask."""
        side = side or ("left" if self.backend == "causal" else "right")
        padded = self.tokenizer.pad({"input_ids": [list(row) for row in rows]}, padding_side=side, return_tensors="pt")
        return {name: padded[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def _autocast(self) -> torch.autocast:
        """Return the context of all forward passes, also of other branches: `mixed_precision_dtype`."""
        precision = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=precision, enabled=precision is not None)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation as lm-eval does, and remember it for contrast prompts.

        Args:
            chat_history: The messages.
            add_generation_prompt: Begin the turn of the model.
        """
        # lm-eval's image-text models change it:
        # https://github.com/EleutherAI/lm-evaluation-harness/blob/v0.4.13/lm_eval/models/hf_vlms.py
        conversation = copy.deepcopy(chat_history)
        text: str = super().apply_chat_template(chat_history, add_generation_prompt)
        self.remember(conversation, text)
        return text

    # -------------------------------------------------------------------------------------------------------- generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate the completion of each prompt, up to a stop string.

        Args:
            requests: lm-eval's instances.
            disable_tqdm: Show no progress bar.
        """
        prepared, before = list(self.eval_requests(requests)), self._endless
        self.check_options(prepared)
        answers: list[str] = self._run_batches(
            prepared, self._generate_batch, "Running generate_until requests", disable_tqdm
        )
        if endless := self._endless - before:
            logger.warning(
                "%d of %d answers hold no think_end_token and count as answers from their beginning, as in lm-eval: raise "
                "max_gen_toks if the model was still thinking",
                endless,
                len(prepared),
            )
        return answers

    def _generate_batch(self, requests: list[EvalRequest]) -> list[str]:
        """Generate the completions of one batch of equal options."""
        options = self.options_of(requests[0])
        room = self.max_length - (options.length if self.backend == "causal" else 0)
        if room < 1:
            raise ValueError(
                f"the task asks for {options.length} tokens, and the model reads {self.max_length}: lower max_gen_toks"
            )
        batch = self._batch(requests, room)
        prompt = batch.inputs["input_ids"].shape[1] if self.backend == "causal" else 1
        kwargs = self._generate_kwargs(options, batch, [request.seed for request in requests])
        kwargs |= {"max_length": options.other.get("max_length", prompt + options.length), "use_cache": True}
        start = time.perf_counter()
        with self._autocast():
            output = self.model.generate(
                **batch.inputs,
                **read_prompts(self.model, batch.inputs, kwargs),
                pad_token_id=self.tokenizer.pad_token_id,
                stopping_criteria=self._stopping_criteria(options.stop, prompt),
                eos_token_id=self._end_tokens(),
                **kwargs,
            )
        self.seconds += time.perf_counter() - start
        tokens = output[:, prompt:] if self.backend == "causal" else output
        self.generated += int((tokens != self.tokenizer.pad_token_id).sum())
        return [self._text(row, options.stop) for row in tokens.tolist()]

    def options_of(self, request: EvalRequest) -> GenerationOptions:
        """Return the generation options of a request.

        Args:
            request: The request.
        """
        return read_options(
            request.gen_kwargs, default=self.max_gen_toks, eos=self.tok_decode(self.eot_token_id, False)
        )

    def _generate_kwargs(self, options: GenerationOptions, batch: DecodingBatch, seeds: list[int]) -> dict[str, Any]:
        """Return the keyword arguments of `generate()`: the method, sampling, and the task's other options."""
        sampling, beams = self.sampling_of(options), options.other.get("num_beams", 1)
        config = dataclasses.replace(self.decoder.config, beams=beams, executor=None)
        kwargs = generate_kwargs(config, batch)
        if sampling["temperature"]:
            if not (row_seeds := config.declaration.row_seeds):
                raise ValueError(
                    f"the task samples, and method={config.method!r} does not sample here: it {row_seeds.reason}"
                )
            kwargs["logits_processor"] = [*kwargs.get("logits_processor", []), SeededSampling(seeds, **sampling)]
        other = {name: value for name, value in options.other.items() if name != "max_length"}
        return {**other, **kwargs, "do_sample": False}  # SeededSampling draws by itself

    def _stopping_criteria(self, stop: list[str], prompt: int) -> list[StoppingCriteria]:
        """Return the stopping criteria of a row besides its end token, which `generate()` handles."""
        strings = [text for text in stop if text and text != self.tok_decode(self.eot_token_id, False)]
        if not strings:
            return []
        if self.think_end_token is None:
            return [StopStrings(self.tokenizer, strings, prompt)]
        return [StopStringsAfterThought(self.tokenizer, strings, prompt, end=self.think_end_token)]

    def _end_tokens(self) -> list[int]:
        """Return the end tokens of the model and of the tokenizer."""
        known = self.model.generation_config.eos_token_id
        tokens = known if isinstance(known, list) else [] if known is None else [known]
        return list(dict.fromkeys([*tokens, self.eot_token_id]))

    def _text(self, tokens: list[int], stop: list[str]) -> str:
        """Return an answer without its thought, up to the first stop string."""
        self._endless += not ends_thought(tokens, self.tok_decode, self.think_end_token)
        return answer_text(tokens, self.tok_decode, stop, self.think_end_token)

    # -------------------------------------------------------------------------------------------------------- likelihoods

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether greedy decoding would generate it.

        Args:
            requests: lm-eval's instances.
            disable_tqdm: Show no progress bar.
        """
        if self.decoder.is_plain and not any(len(request.args) > 2 for request in requests):
            result: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
            return result
        check_ranking(self.enable_thinking)
        prepared = [
            self._scoring_request(request) for request in tqdm(requests, desc="Tokenizing inputs", disable=disable_tqdm)
        ]
        return self._run_batches(prepared, self._score_batch, "Running loglikelihood requests", disable_tqdm)

    def _scoring_request(self, request: Any) -> EvalRequest:
        context, continuation, *media = request.args
        images = images_of(media)
        tokens = self._pair(context, continuation, images)
        seed = self.seed_of(context, images, 0)
        return EvalRequest(context, request.args, request.doc, seed, images, continuation=continuation, tokens=tokens)

    def _pair(self, context: str, continuation: str, images: Sequence[Any]) -> tuple[Sequence[int], Sequence[int]]:
        """Return the tokens of a context and of its continuation, as lm-eval splits them."""
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
        """Return likelihoods of tokens, for `loglikelihood_rolling`."""
        if self.decoder.is_plain:
            result: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            return result
        config = self.decoder.config
        if "prompt" in config.declaration.views:
            raise ValueError(f"method={config.method!r} contrasts prompts, and the likelihood of a whole text has none")
        prepared = [EvalRequest("", (), {}, 0, tokens=(first, second)) for _, first, second in requests]
        return self._run_batches(prepared, self._score_batch, "Running loglikelihood requests", True)

    def _score_batch(self, requests: list[EvalRequest]) -> list[tuple[float, bool]]:
        """Return the likelihoods of one batch."""
        batch = self._batch(requests, self.max_length)
        continuations = self._pad([request.tokens[1] for request in requests if request.tokens], "right")
        start = time.perf_counter()
        with self._autocast():
            likelihood = score(
                self.decoder.likelihood_processor(batch),
                self.model,
                batch.inputs,
                continuations["input_ids"],
                continuation_mask=continuations["attention_mask"],
                renormalized=self.decoder.score == "renormalised",
                masked=self.decoder.masked,
                dtype=self.softmax_dtype,
            )
        self.seconds += time.perf_counter() - start
        self._count(likelihood)
        return list(zip(likelihood.total.tolist(), likelihood.is_greedy.tolist(), strict=True))

    def _count(self, likelihood: Likelihood) -> None:
        self.ruled_out.update(tokens=int(likelihood.length.sum()), ruled_out=int(likelihood.ruled_out.sum()))
