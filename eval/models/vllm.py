"""`contralto-vllm`, a model of lm-eval for contrastive decoding in vLLM.

    contralto eval --backend vllm --model_args pretrained=MODEL,method=cad,contrast_prompt='{question}' --tasks gsm8k_cot

Answers, seeds and contrast prompts are those of the model `contralto`, for the methods whose branches are prompts or adapters. It has no
likelihoods: use `contralto` for them.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from contralto import __version__
from contralto.common.adapters import split_adapter
from contralto.common.bars import SteadyBar
from contralto.decoding.vllm.adapters import adapters_of, lora_options, loras
from contralto.eval.models.arguments import check_arguments
from contralto.eval.models.base import ContrastiveEvalModel, decoder_options, describe_arguments, take_options
from contralto.eval.models.decoder import Decoder
from contralto.eval.models.generation_options import GenerationOptions, read_options
from contralto.eval.models.requests import EvalRequest
from contralto.eval.models.thinking import answer_text, end_of_thought

__all__ = ["ContraltoVLLM"]

LENGTH = 256
"""New tokens per answer where the task does not set them."""
IGNORED = {
    "add_bos_token": "a prompt gets BOS unless it begins with it",
    "prefix_token_id": "it is for likelihoods, and this model answers only",
    "swap_space": "vLLM has no such option any more",
    "truncation_side": "prompts are never truncated: lower max_gen_toks, or raise max_length",
}
"""Arguments of lm-eval's own vLLM model that would have no effect, each with the reason."""
KEPT_TOGETHER = 256
"""The number of answers that are generated before they are written to the cache."""
NO_LIKELIHOODS = "the vllm backend answers only, and this task asks for likelihoods: leave --backend vllm out"


@register_model("contralto-vllm")
class ContraltoVLLM(ContrastiveEvalModel, TemplateLM):  # type: ignore[misc]
    """Models in vLLM, answering by a contrastive method.

    Answers do not depend on the batch: vLLM forms it, and sampling has a seed per request. They are kept (`use_cache`) after
    every 256.

    Args:
        pretrained: A folder, a hub id, or `testbed:NAME`; also a LoRA adapter, which is put onto its base.
        adapter: The folder of a LoRA adapter on it; with `adapters_off=True` the other branch is the model without it.
        lora_local_path: lm-eval's name for `adapter`.
        max_gen_toks: New tokens per answer where the task does not set them.
        max_length: lm-eval's name for `max_model_len`, the tokens of a prompt and its answer.
        think_end_token: The end of a thought, a string or the id of a token: the answer is the text after it. Stop strings then
            cut the finished answer, and do not end it earlier.
        enable_thinking: Passed on to the chat template.
        chat_template_args: Further variables of the chat template.
        batch_size: Has no effect; vLLM forms batches.
        max_batch_size: Has no effect.
        device: Has no effect.
        kwargs: Options of `Decoder.of`, see `ContraltoLM`, for methods that vLLM runs; their other models are LoRA adapters of
            the same model. Further arguments of `vllm.LLM`, such as `tensor_parallel_size=2`.

    Raises:
        ValueError: An option is out of range or belongs to another method, vLLM cannot run the method, an argument of lm-eval's
            own vLLM model would have no effect, a likelihood is requested, or a cache belongs to another configuration.
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
        self.decoder = Decoder.of(**take_options(kwargs))
        check_arguments(pretrained, kwargs, known=set(kwargs), options=decoder_options(), ignored=IGNORED)
        if max_length is not None and kwargs.setdefault("max_model_len", max_length) != max_length:
            raise ValueError("max_length and max_model_len are two names of one argument: give one")
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self.chat_template_args = {**(chat_template_args or {}), **thinking}
        if self.chat_template_args.get("enable_thinking") and think_end_token is None:
            raise ValueError("enable_thinking=True needs think_end_token, the end of a thought, such as '</think>'")
        self._engine_kwargs, self._name, self._length = kwargs, pretrained, max_gen_toks
        pretrained, adapter = split_adapter(pretrained, adapter or lora_local_path)
        self._adapters = adapters_of(self.decoder.config, adapter)
        from contralto.decoding.vllm.engine import make_llm

        self._llm = make_llm(pretrained, **{**lora_options(self._adapters), **kwargs})
        self.tokenizer = self._llm.get_tokenizer()
        self.think_end_token = end_of_thought(think_end_token, self.tokenizer)
        self.generated, self.seconds = 0, 0.0

    @property
    def eot_token_id(self) -> int:
        """Return the token that ends a completion."""
        return int(self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        """Return the name of the tokenizer for lm-eval's cache of requests."""
        return self._name.replace("/", "__")

    @property
    def configuration(self) -> dict[str, Any]:
        """Return the settings that determine an answer, besides the request."""
        return {
            "contralto": __version__,
            "backend": "vllm",
            "pretrained": self._name,
            "adapters": self._adapters,
            "max_gen_toks": self._length,
            **({} if self.think_end_token is None else {"think_end_token": self.think_end_token}),
            **({"chat_template_args": self.chat_template_args} if self.chat_template_args else {}),
            **describe_arguments(self._engine_kwargs, self.tokenizer),
            **self.decoder.describe(),
        }

    def get_model_info(self) -> dict[str, Any]:
        """Return the description of the model for lm-eval's results."""
        return self.decoder_info()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenize a string, without a second BOS.

        Args:
            string: The string.
            add_special_tokens: Add BOS; None to add it unless the string begins with it.
            kwargs: Ignored.
        """
        begins = bool(self.tokenizer.bos_token) and string.startswith(self.tokenizer.bos_token)
        special = not begins if add_special_tokens is None else add_special_tokens
        tokens: list[int] = self.tokenizer.encode(string, add_special_tokens=special)
        return tokens

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation in the model's chat template, and remember it for contrast prompts.

        Args:
            chat_history: The messages.
            add_generation_prompt: Begin the turn of the model.
        """
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self.chat_template_args,
        )
        self.remember(chat_history, text)
        return text

    # -------------------------------------------------------------------------------------------------------- generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate the completion of each prompt, up to a stop string.

        Args:
            requests: lm-eval's instances.
            disable_tqdm: Show no progress bar.
        """
        prepared = list(self.eval_requests(requests))
        self.check_options(prepared)
        groups: dict[str, list[int]] = {}  # vLLM takes one set of options at a time
        for i, request in enumerate(prepared):
            groups.setdefault(repr(request.gen_kwargs), []).append(i)
        answers = [""] * len(prepared)
        with SteadyBar(total=len(prepared), desc="Running generate_until requests", disable=disable_tqdm) as bar:
            for places in groups.values():
                for start in range(0, len(places), KEPT_TOGETHER):
                    batch = places[start : start + KEPT_TOGETHER]
                    for i, answer in zip(batch, self._generate_batch([prepared[i] for i in batch]), strict=True):
                        answers[i] = answer
                        self.keep_answer(prepared[i], answer)
                    bar.update(len(batch))
        return answers

    def _generate_batch(self, requests: Sequence[EvalRequest]) -> list[str]:
        """Generate the completions of requests that have the same options."""
        options = self.options_of(requests[0])
        kwargs = {"max_tokens": options.length, **self.sampling_of(options)}
        eos = self.tokenizer.decode([self.eot_token_id])
        strings = [text for text in options.stop if text and text != eos]
        stop = strings if self.think_end_token is None else []  # vLLM would look for them in the thought too
        generate = self._generate_plain if self.decoder.is_plain else self._generate_contrastive
        start = time.perf_counter()
        completions = generate(requests, kwargs, stop)
        self.seconds += time.perf_counter() - start
        return [answer_text(tokens, self._decode, options.stop, self.think_end_token) for tokens in completions]

    def options_of(self, request: EvalRequest) -> GenerationOptions:
        """Return the generation options of a request.

        Args:
            request: The request.

        Raises:
            ValueError: The backend does not support an option.
        """
        eos = self.tokenizer.decode([self.eot_token_id])
        options = read_options(request.gen_kwargs, default=self._length, eos=eos)
        if options.other:
            raise ValueError(
                f"the task asks for {', '.join(options.other)}, which the vllm backend does not know: use model contralto"
            )
        return options

    def _generate_contrastive(
        self, requests: Sequence[EvalRequest], kwargs: Mapping[str, Any], stop: list[str]
    ) -> list[Sequence[int]]:
        from contralto.decoding.vllm.offline import generate_pairs

        config = self.decoder.config
        outputs = generate_pairs(
            self._llm,
            [self._branch_prompts(request) for request in requests],
            method=config.method,
            form=config.form,
            seed=[request.seed for request in requests],
            adapters=loras(self._adapters),
            logprobs=False,
            use_tqdm=False,
            sampling={"stop": stop},
            **kwargs,
            **{name: value for name, value in config.parameters.items() if value is not None},
        )
        self.generated += sum(len(output.tokens) for output in outputs)
        return [output.tokens for output in outputs]

    def _decode(self, tokens: Sequence[int]) -> str:
        """Decode a completion as transformers does; the caller truncates it at stop strings."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _branch_prompts(self, request: EvalRequest) -> list[list[int]]:
        """Return the prompt of every branch."""
        prompt, config = self.tok_encode(request.context), self.decoder.config
        if "prompt" not in config.declaration.views:
            return [prompt] * len(self._adapters)
        if config.contrast_prompt is None:
            return [prompt, prompt[-1:]]  # as transformers' classifier-free guidance without a negative prompt
        return [prompt, self.tok_encode(self.contrasted(request).context)]

    def _generate_plain(
        self, requests: Sequence[EvalRequest], kwargs: Mapping[str, Any], stop: list[str]
    ) -> list[Sequence[int]]:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": self.tok_encode(request.context)} for request in requests]
        params = [
            SamplingParams(stop=stop, seed=request.seed if kwargs["temperature"] else None, **kwargs)
            for request in requests
        ]
        outputs = self._llm.generate(prompts, params, lora_request=loras(self._adapters)[0], use_tqdm=False)
        self.generated += sum(len(output.outputs[0].token_ids) for output in outputs)
        return [output.outputs[0].token_ids for output in outputs]

    # -------------------------------------------------------------------------------------------------------- likelihoods

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        raise ValueError(NO_LIKELIHOODS)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Raise an error: vLLM has no likelihoods of contrastive distributions.

        Args:
            requests: lm-eval's instances.
            disable_tqdm: Ignored.

        Raises:
            ValueError: Always.
        """
        raise ValueError(NO_LIKELIHOODS)
