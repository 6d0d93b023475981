"""Texts by contrast from vLLM in this process; and what every client does with the answers: check, resume, give up."""

import itertools
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from contralto.decoding.vllm.engine import marker_of
from contralto.decoding.vllm.settings import IMAGES, PREFIX, Row

__all__ = ["Branch", "PairOutput", "Progress", "RefusedError", "generate_pairs"]

PATIENCE = 5
REFUSED = "contralto: "
"""How the scheduler's sentences begin."""


class PairOutput(NamedTuple):
    """A text that was decoded by contrast."""

    tokens: list[int]
    """With the end token, if it ended by one."""
    text: str
    logprobs: tuple[list[float], ...]
    """Of every token, by branch: `log p(token)` of that branch's own distribution, before the contrast."""
    finish_reason: str
    """`stop` or `length`."""
    stop_reason: int | str | None
    prompt_tokens: tuple[int, ...]
    """How long the branches' prompts were."""
    rounds: int
    """How often it was asked for; 1 where branches stayed together."""
    desyncs: int
    """How often branches parted; each time the text went on from what they had in common."""


class RefusedError(ValueError):
    """The engine refused a text; the message is its sentence.

    Attributes:
        outputs: those of all texts, None for each that was refused.
    """

    outputs: Sequence[PairOutput | None] = ()


@dataclass(frozen=True)
class Branch:
    """What one request of a round gave."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    finish_reason: str | None
    stop_reason: int | str | None
    text: str = ""


@dataclass
class Progress:
    """A text on its way: what is certain of it, after any number of rounds.

    A token is certain when all branches have it, at the same place, and none of them is a marker: then their logits were
    weighed together. Whatever else a round gave is dropped, and the text goes on from what is certain.

    Args:
        marker: the token that ends a branch without partners.
        max_tokens: how long it may become.
        whole: whether it must be written in one piece, because a grammar or a stop text looks at all of it; then a desync
            starts it afresh.
        patience: rounds without a new token after which it is given up.
    """

    marker: int
    max_tokens: int
    whole: bool = False
    patience: int = PATIENCE
    tokens: list[int] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    rounds: int = 0
    desyncs: int = 0
    stuck: int = 0
    ended: Branch | None = None
    """The main branch of the last round."""

    @property
    def left(self) -> int:
        """How many tokens it may still have."""
        return self.max_tokens - len(self.tokens)

    def take(self, branches: Sequence[Branch]) -> bool:
        """Add what a round gave, and say whether the text has ended.

        Raises:
            RefusedError: the engine refused it.
            RuntimeError: it was aborted, or the branches do not stay together.
        """
        self.rounds += 1
        for branch in branches:
            if isinstance(branch.stop_reason, str) and branch.stop_reason.startswith(REFUSED):
                raise RefusedError(branch.stop_reason.removeprefix(REFUSED))
        if any(branch.finish_reason == "abort" for branch in branches):
            raise RuntimeError("the engine aborted a text: it was stopped, or put to sleep")
        certain = common([unmarked(branch.tokens, self.marker) for branch in branches])
        main, before = branches[0], self.tokens
        ended = main.finish_reason in ("stop", "length") and len(certain) == len(main.tokens)
        self.tokens = [*before, *certain]
        kept = self.logprobs or [[] for _ in branches]
        self.logprobs = [[*old, *b.logprobs[: len(certain)]] for old, b in zip(kept, branches, strict=True)]
        if ended or not self.left:
            self.ended = main
            return True
        self.desyncs += 1
        self.stuck = 0 if certain and not self.whole else self.stuck + 1
        if self.stuck >= self.patience:
            raise RuntimeError(
                f"the branches of a text parted {self.desyncs} times and did not get on: start vLLM with make_llm or contralto "
                "serve, whose scheduler keeps them together; if it does, the logits of a branch hold NaN or +inf (an overflow of "
                "half precision, broken weights), or the request excludes every token"
            )
        if self.whole:
            self.tokens, self.logprobs = [], []
        return False

    @property
    def is_one(self) -> bool:
        """Whether the last round has all of it, and so its text."""
        return self.rounds == 1 or self.whole

    def output(self, text: str, prompt_tokens: Sequence[int]) -> PairOutput:
        """The text, which has ended.

        Args:
            text: what it says.
            prompt_tokens: how long the branches' prompts are.
        """
        assert self.ended is not None
        reason = self.ended.finish_reason
        return PairOutput(
            tokens=self.tokens,
            text=text,
            logprobs=tuple(self.logprobs),
            finish_reason="stop" if reason == "stop" and self.ended.stop_reason != self.marker else "length",
            stop_reason=self.ended.stop_reason if self.ended.stop_reason != self.marker else None,
            prompt_tokens=tuple(prompt_tokens),
            rounds=self.rounds,
            desyncs=self.desyncs,
        )


def unmarked(tokens: Sequence[int], marker: int) -> list[int]:
    """Tokens up to the marker.

    Examples:
        >>> unmarked([5, 6, 0], 0), unmarked([5, 6], 0)
        ([5, 6], [5, 6])
    """
    return list(itertools.takewhile(lambda token: token != marker, tokens))


def common(branches: Sequence[Sequence[int]]) -> list[int]:
    """What all of them begin with.

    Examples:
        >>> common([[1, 2, 3], [1, 2], [1, 4]])
        [1]
    """
    return [some[0] for some in itertools.takewhile(lambda some: len(set(some)) == 1, zip(*branches, strict=False))]


def contrast_values(
    *, method: str, form: str | None = None, marker: int, seed: int = 0, **values: Any
) -> dict[str, Any]:
    """The `contrast_...` values of a text, checked; its id, branch and start are for each request.

    Raises:
        ValueError: see `settings.Row`.
    """
    given = {"method": method, "form": form, "marker": marker, "seed": seed, **values}
    found = {f"{PREFIX}{name}": value for name, value in given.items() if value is not None}
    Row.of({**found, f"{PREFIX}id": "", f"{PREFIX}branch": 0})
    return found


def check_prompts(prompts: Sequence[Sequence[Any]], values: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the branches, if every text has a prompt for each.

    Raises:
        ValueError: more or fewer prompts.
    """
    row = Row.of({**values, f"{PREFIX}id": "", f"{PREFIX}branch": 0})
    assert row is not None
    for i, each in enumerate(prompts):
        if isinstance(each, str | Mapping) or len(each) != len(row.rule.branches):
            count = "one" if isinstance(each, str | Mapping) else len(each)
            raise ValueError(
                f"text {i} has {count} prompts, and {row.rule.method} needs {len(row.rule.branches)}: "
                + ", ".join(row.rule.branches)
            )
    return row.rule.branches


# --------------------------------------------------------------------------------------------------- in this process


def generate_pairs(
    llm: Any,
    prompts: Sequence[Sequence[Any]],
    *,
    method: str,
    form: str | None = None,
    max_tokens: int = 16,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Sequence[int] = 0,
    adapters: Sequence[Any] | None = None,
    marker: int | None = None,
    logprobs: bool = True,
    use_tqdm: bool = True,
    sampling: Mapping[str, Any] | None = None,
    main_sampling: Mapping[str, Any] | None = None,
    **parameters: Any,
) -> list[PairOutput]:
    """Texts by contrast from vLLM in this process, each with a request per branch.

    Branches that part (which they do not under `make_llm`'s scheduler) are noticed, and the text goes on from what they have in
    common: the result is always the method's.

    Args:
        llm: of `make_llm`.
        prompts: for every text its branches' prompts, in the method's order, the main one first: texts, lists of token ids,
            conversations (lists of messages), or vLLM's own dictionaries; without images.
        method, form, parameters: one of `cad`, `cd`, `cfg`, `cid`, `icd`, `m3id`, `proxy`, `ritual`, `ritual-vcd`, `vcd`; its
            form and the parameters of its paper, such as `alpha=0.5`.
        max_tokens: at most so many tokens per text.
        temperature, top_k, top_p, min_p: of sampling; temperature 0 takes the best token.
        seed: of sampling: one for each text, or a number to which the text's place is added. A text depends on nothing else.
        adapters: a `LoRARequest` or None for every branch: `[tuned, None]` contrasts an adapter with the model without it.
        marker: a token that no text holds; found by itself where there is one.
        logprobs: whether outputs tell the log-probabilities of both branches.
        use_tqdm: show vLLM's progress bar.
        sampling: further arguments of `SamplingParams` for all branches: `stop`, `ignore_eos`, `min_tokens`, ...
        main_sampling: those of the main branch alone: `structured_outputs`, `bad_words`, `logit_bias`, ...

    Returns:
        An output per text.

    Raises:
        ValueError: options that do not go together, or prompts of another number than the method has branches.
        RefusedError: the engine refused texts, which can never start; its `outputs` has the others.
        RuntimeError: branches do not stay together.
    """
    tokenizer = llm.get_tokenizer()
    if marker is None:
        marker = marker_of(tokenizer, vocabulary=llm.model_config.get_vocab_size(), ends=_ends(llm))
    drawn: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    values = contrast_values(method=method, form=form, marker=marker, **drawn, **parameters)
    branches = check_prompts(prompts, values)
    seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
    if len(seeds) != len(prompts):
        raise ValueError(f"seed must be a number or one for each of the {len(prompts)} texts, not {len(seeds)}")
    adapters = list(adapters) if adapters is not None else [None] * len(branches)
    if len(adapters) != len(branches):
        raise ValueError(
            f"adapters must be one for each branch ({', '.join(branches)}), None for none, not {len(adapters)}"
        )
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
    shared, own = dict(sampling or {}), dict(main_sampling or {})
    whole = bool(shared.get("stop") or {**shared, **own}.get("structured_outputs"))
    patience = PATIENCE + len(prompts)  # under vLLM's own scheduler one text may have to wait for all others
    texts = [_Text(each, tokenizer, Progress(marker, max_tokens, whole, patience)) for each in prompts]
    asked = _Asked(llm, values, shared, own, adapters, 0 if logprobs else None, use_tqdm)
    left, refused = list(range(len(texts))), None
    while left:
        results = asked.round([(texts[i], seeds[i]) for i in left])
        unfinished = []
        for i, result in zip(left, results, strict=True):
            try:
                if not texts[i].progress.take(result):
                    unfinished.append(i)
            except RefusedError as error:
                refused = refused or error
        left = unfinished
    found = [text.output(tokenizer) for text in texts]
    if refused is not None:
        refused.outputs = found
        raise refused
    return [output for output in found if output is not None]


def _ends(llm: Any) -> list[int]:
    """Tokens that end a text, by the model's generation configuration."""
    ends = llm.model_config.try_get_generation_config().get("eos_token_id")
    return list(ends) if isinstance(ends, list) else [] if ends is None else [ends]


class _Text:
    """A text with its prompts as tokens."""

    def __init__(self, prompts: Sequence[Any], tokenizer: Any, progress: Progress) -> None:
        self.prompts = [_tokens(prompt, tokenizer) for prompt in prompts]
        self.progress = progress
        self.read: list[int] = []

    def output(self, tokenizer: Any) -> PairOutput | None:
        progress = self.progress
        if progress.ended is None:
            return None
        said = progress.ended.text
        if not progress.is_one:
            before = self.prompts[0]["prompt_token_ids"]
            read = tokenizer.decode(before, skip_special_tokens=True)
            said = tokenizer.decode([*before, *progress.tokens], skip_special_tokens=True)[len(read) :]
        return progress.output(said, self.read)


def _tokens(prompt: Any, tokenizer: Any) -> dict[str, Any]:
    """A prompt as vLLM takes it, with its tokens."""
    if isinstance(prompt, Mapping):
        if prompt.get("multi_modal_data") or prompt.get("multi_modal_uuids"):
            raise ValueError(IMAGES)
        text, rest = prompt.get("prompt"), {name: value for name, value in prompt.items() if name != "prompt"}
        return dict(prompt) if text is None else {**rest, "prompt_token_ids": tokenizer.encode(text)}
    if isinstance(prompt, str):
        return {"prompt_token_ids": tokenizer.encode(prompt)}
    if prompt and isinstance(prompt[0], Mapping):
        how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        return {"prompt_token_ids": list(tokenizer.apply_chat_template(prompt, **how)["input_ids"])}
    return {"prompt_token_ids": list(prompt)}


class _Asked(NamedTuple):
    """How texts are asked for."""

    llm: Any
    values: Mapping[str, Any]
    shared: Mapping[str, Any]
    main: Mapping[str, Any]
    adapters: Sequence[Any]
    logprobs: int | None
    use_tqdm: bool

    def round(self, texts: Sequence[tuple[_Text, int]]) -> list[list[Branch]]:
        """Ask for the rest of texts; the branches of each."""
        count = len(self.adapters)
        prompts = [
            {**prompt, "prompt_token_ids": [*prompt["prompt_token_ids"], *text.progress.tokens]}
            for text, _ in texts
            for prompt in text.prompts
        ]
        params = [params for text, seed in texts for params in self._params(text, seed)]
        outputs = self.llm.generate(
            prompts, params, lora_request=list(self.adapters) * len(texts), use_tqdm=self.use_tqdm
        )
        found = [outputs[i : i + count] for i in range(0, len(outputs), count)]
        for (text, _), some in zip(texts, found, strict=True):
            text.read = text.read or [len(output.prompt_token_ids or ()) for output in some]
        return [[_branch(output.outputs[0]) for output in some] for some in found]

    def _params(self, text: _Text, seed: int) -> list[Any]:
        from vllm import SamplingParams

        progress = text.progress
        name = uuid.uuid4().hex
        stops = [*self.shared.get("stop_token_ids", ()), progress.marker]
        how = {**self.shared, "stop_token_ids": stops, "max_tokens": progress.left, "logprobs": self.logprobs}
        if "min_tokens" in how:
            how["min_tokens"] = max(0, how["min_tokens"] - len(progress.tokens))
        own = {f"{PREFIX}id": name, f"{PREFIX}seed": seed, f"{PREFIX}start": len(progress.tokens)}
        return [
            SamplingParams(
                temperature=0,
                extra_args={**self.values, **own, f"{PREFIX}branch": branch},
                **(how if branch else {**how, **self.main}),
            )
            for branch in range(len(self.adapters))
        ]


def _branch(output: Any) -> Branch:
    steps = output.logprobs or ()
    return Branch(
        tokens=list(output.token_ids),
        logprobs=[step[token].logprob for step, token in zip(steps, output.token_ids, strict=False)],
        finish_reason=output.finish_reason,
        stop_reason=output.stop_reason,
        text=output.text,
    )
