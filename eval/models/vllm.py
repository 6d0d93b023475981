"""`contralto-vllm`, a model of lm-eval that answers by contrast through vLLM.

    contralto eval --backend vllm --model_args pretrained=MODEL,method=cad,contrast_prompt='{question}' --tasks gsm8k_cot

Every answer is that of the model `contralto`, for the methods whose branches are prompts or adapters; seeds and contrast prompts are
the same. It answers only: likelihoods are the business of `contralto`.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from contralto import __version__
from contralto.decoding.vllm.adapters import adapters_of, lora_options, loras
from contralto.eval.models.arguments import check_arguments
from contralto.eval.models.asked import Asked, read_options
from contralto.eval.models.conversations import Conversations
from contralto.eval.models.decoder import SAMPLING, Decoder
from contralto.eval.models.lm import IDENTITY, OPTIONS, ContraltoLM, Job, short_hash
from contralto.eval.models.thinking import answer_text, end_of_thought

__all__ = ["ContraltoVLLM"]

LENGTH = 256
"""New tokens of an answer where the task does not say how many."""
IGNORED = {
    "add_bos_token": "a prompt gets the beginning's token unless it begins with it",
    "prefix_token_id": "it is for likelihoods, and this model answers only",
    "swap_space": "vLLM has no such option any more",
    "truncation_side": "prompts are never truncated: lower max_gen_toks, or raise max_length",
}
"""Arguments of lm-eval's own vLLM model that would have no effect, each with the reason."""
AT_ONCE = 256
"""Answers after which those that are done are kept."""


@register_model("contralto-vllm")
class ContraltoVLLM(Conversations, TemplateLM):  # type: ignore[misc]
    """Models in vLLM, answering by a contrastive method.

    Answers do not depend on the batch: vLLM forms it, and sampling has a seed per request. They are kept (`use_cache`) after
    every 256.

    Args:
        pretrained: a folder, a hub id, or `testbed:NAME`.
        adapter: a LoRA adapter on it, a folder; with `adapters_off=True` the other branch is the model without it. lm-eval's
            name for it, `lora_local_path`, works too.
        method, form, alpha, beta, ...: one of `none`, `cad`, `cfg`, `cid`, `icd`, `cd`, `proxy`. The other models of `cd`
            (`amateur`) and `proxy` (`expert`, `antiexpert`) are LoRA adapters of the same model.
        contrast_prompt, temperature, top_k, top_p, min_p, seed: as for the model `contralto`.
        max_gen_toks: new tokens per answer where the task does not say.
        max_length: lm-eval's name for `max_model_len`, the tokens of a prompt and its answer.
        think_end_token: the end of a thought, a string or the id of a token: the answer is the text after it. Stop strings then cut
            the finished answer, and do not end it earlier.
        enable_thinking: passed on to the chat template.
        chat_template_args: further variables of the chat template.
        batch_size, max_batch_size, device: of no effect; vLLM sees to it.
        kwargs: further arguments of `vllm.LLM`, such as `tensor_parallel_size=2`.

    Raises:
        ValueError: an option outside its range or of another method, a method that vLLM cannot run here, an argument of lm-eval's
            own vLLM model that would have no effect, a likelihood, a cache of another configuration.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        adapter: str | None = None,
        lora_local_path: str | None = None,
        max_gen_toks: int = LENGTH,
        max_length: int | None = None,
        think_end_token: str | int | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self._decoder = Decoder.of(**{name: kwargs.pop(name) for name in OPTIONS if name in kwargs})
        check_arguments(pretrained, kwargs, known=set(kwargs), options=OPTIONS, ignored=IGNORED)
        if max_length is not None and kwargs.setdefault("max_model_len", max_length) != max_length:
            raise ValueError("max_length and max_model_len are two names of one argument: give one")
        thinks = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self.chat_template_args = {**(chat_template_args or {}), **thinks}
        if self.chat_template_args.get("enable_thinking") and think_end_token is None:
            raise ValueError("enable_thinking=True needs think_end_token, the end of a thought, such as '</think>'")
        self._adapters = adapters_of(self._decoder.method, adapter or lora_local_path)
        self._started_with, self._shown, self._length = kwargs, pretrained, max_gen_toks
        from contralto.decoding.vllm.engine import make_llm

        self._llm = make_llm(pretrained, **{**lora_options(self._adapters), **kwargs})
        self.tokenizer = self._llm.get_tokenizer()
        self.think_end_token = end_of_thought(think_end_token, self.tokenizer)
        self.generated, self.seconds = 0, 0.0

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return self._shown.replace("/", "__")

    @property
    def configuration(self) -> dict[str, Any]:
        """All that determines an answer, besides the request."""
        return {
            "contralto": __version__,
            "backend": "vllm",
            "pretrained": self._shown,
            "adapters": self._adapters,
            "max_gen_toks": self._length,
            **({} if self.think_end_token is None else {"think_end_token": self.think_end_token}),
            **({"chat_template_args": self.chat_template_args} if self.chat_template_args else {}),
            **{name: repr(value) for name, value in sorted(self._started_with.items())},
            **self._decoder.describe(),
        }

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results."""
        key = short_hash(self.configuration)
        return {"decoder": self._decoder.describe(), "configuration": self.configuration, "key": key}

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take a cache of answers, if they are this configuration's."""
        if cache_hook.dbdict is not None:
            owner = cache_hook.dbdict.get(IDENTITY)
            if owner != self.configuration and (owner is not None or len(cache_hook.dbdict)):
                raise ValueError("use_cache names a cache of another configuration's answers: name another file")
            cache_hook.dbdict[IDENTITY] = self.configuration
        super().set_cache_hook(cache_hook)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """A text's tokens; one that begins with the beginning's token is not given another."""
        begun = bool(self.tokenizer.bos_token) and string.startswith(self.tokenizer.bos_token)
        special = not begun if add_special_tokens is None else add_special_tokens
        found: list[int] = self.tokenizer.encode(string, add_special_tokens=special)
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation in the model's own form."""
        how = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        text: str = self.tokenizer.apply_chat_template(
            chat_history, continue_final_message=not add_generation_prompt, **how, **self.chat_template_args
        )
        self.remember(chat_history, text)
        return text

    _contrasted: Any = ContraltoLM._contrasted
    _jobs: Any = ContraltoLM._jobs
    _seed: Any = ContraltoLM._seed

    # ----------------------------------------------------------------------------------------------------------- answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """lm-eval's `generate_until`: the text that follows each prompt, up to a stop string."""
        jobs: list[Job] = list(self._jobs(requests))
        for job in {repr(job.gen_kwargs): job for job in jobs}.values():
            self._asked(job)  # a mistake ends the run before anything is answered
        alike: dict[str, list[int]] = {}
        for i, job in enumerate(jobs):
            alike.setdefault(repr(job.gen_kwargs), []).append(i)
        answers = [""] * len(jobs)
        with tqdm(total=len(jobs), desc="Running generate_until requests", disable=disable_tqdm) as bar:
            for places in alike.values():
                for start in range(0, len(places), AT_ONCE):
                    some = places[start : start + AT_ONCE]
                    for i, answer in zip(some, self._write([jobs[i] for i in some]), strict=True):
                        answers[i] = answer
                        if not jobs[i].gen_kwargs.get("do_sample"):  # lm-eval keeps no sampled answers
                            self.cache_hook.add_partial("generate_until", jobs[i].arguments, answer)
                    bar.update(len(some))
        return answers

    def _write(self, jobs: Sequence[Job]) -> list[str]:
        """The answers of requests of the same options."""
        asked = self._asked(jobs[0])
        how = {"max_tokens": asked.length, **(self._sampling or asked.sampling)}
        eos = self.tokenizer.decode([self.eot_token_id])
        strings = [text for text in asked.stop if text and text != eos]
        early = strings if self.think_end_token is None else []  # vLLM looks for them in the thought too
        start = time.perf_counter()
        found = self._plain(jobs, how, early) if self._decoder.is_plain else self._by_contrast(jobs, how, early)
        self.seconds += time.perf_counter() - start
        return [answer_text(tokens, self._text, asked.stop, self.think_end_token) for tokens in found]

    def _asked(self, job: Job) -> Asked:
        """Return the generation options of a request."""
        eos = self.tokenizer.decode([self.eot_token_id])
        asked = read_options(job.gen_kwargs, default=self._length, eos=eos)
        if asked.more:
            raise ValueError(
                f"the task asks for {', '.join(asked.more)}, which the vllm backend does not know: use model contralto"
            )
        return asked

    @property
    def _sampling(self) -> dict[str, Any]:
        """The sampling of the decoder; empty if each task decides."""
        return {name: getattr(self._decoder, name) for name in SAMPLING} if self._decoder.temperature else {}

    def _by_contrast(self, jobs: Sequence[Job], how: Mapping[str, Any], stop: list[str]) -> list[Sequence[int]]:
        from contralto.decoding.vllm.offline import generate_pairs

        chosen = self._decoder.method
        found = generate_pairs(
            self._llm,
            [self._prompts(job) for job in jobs],
            method=chosen.method,
            form=chosen.form,
            seed=[job.seed for job in jobs],
            adapters=loras(self._adapters),
            logprobs=False,
            use_tqdm=False,
            sampling={"stop": stop},
            **how,
            **{name: value for name, value in chosen.parameters.items() if value is not None},
        )
        self.generated += sum(len(output.tokens) for output in found)
        return [output.tokens for output in found]

    def _text(self, tokens: Sequence[int]) -> str:
        """As transformers spells it, without what stood before; the caller cuts it at its stop strings."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _prompts(self, job: Job) -> list[list[int]]:
        """What every branch reads."""
        first, count = self.tok_encode(job.context), len(self._adapters)
        if "prompt" not in self._decoder.method.declaration.views:
            return [first] * count
        if self._decoder.method.contrast_prompt is None:
            return [first, first[-1:]]  # of cfg, as transformers has it
        return [first, self.tok_encode(self._contrasted(job).context)]

    def _plain(self, jobs: Sequence[Job], how: Mapping[str, Any], stop: list[str]) -> list[Sequence[int]]:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": self.tok_encode(job.context)} for job in jobs]
        params = [SamplingParams(stop=stop, seed=job.seed if how["temperature"] else None, **how) for job in jobs]
        outputs = self._llm.generate(prompts, params, lora_request=loras(self._adapters)[0], use_tqdm=False)
        self.generated += sum(len(output.outputs[0].token_ids) for output in outputs)
        return [output.outputs[0].token_ids for output in outputs]

    # -------------------------------------------------------------------------------------------------------- likelihoods

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        raise ValueError("the vllm backend answers only, and this task asks for likelihoods: leave --backend vllm out")

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Not here."""
        raise ValueError("the vllm backend answers only, and this task asks for likelihoods: leave --backend vllm out")
