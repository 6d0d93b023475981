"""The settings of a critic, checked before anything is loaded."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from contralto.align.amateur.settings import check_making
from contralto.common.options import Option, OptionError

__all__ = ["CriticConfig"]

LEAST = {"samples": 1, "max_new_tokens": 1, "batch_size": 1, "lora_r": 0}


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """A critic to be trained.

    Args:
        model: the language model that the critic is to guide: a folder, a hub id, or `testbed:NAME`.
        output: the folder of the critic.
        scorer: the reward of a finished text, `module:function` of a row and its completions, see `contralto.data_gen.scorers`; None with a
            reward model, or for `texts` that have rewards.
        reward_model: a reward model in place of a function: a sequence classifier with one output.
        prompts: a file, folder, hub id or `module:function` with prompts that the model answers; None with `texts`.
        prompt_column: the column of the prompts.
        texts: a JSONL file with columns `prompt`, `completion` and, without a scorer, `reward`, in place of texts that the model writes;
            `finished: false` marks a completion that does not end.
        samples: number of completions per prompt.
        max_new_tokens: largest number of tokens of a completion.
        temperature: of the completions.
        raw: feed prompts as they are, even if there is a chat template; so must decoding.
        threshold: makes the reward 1 from this score on, and 0 below; None takes the score.
        sigmoid: makes the reward of a score `s` `sigmoid(s)`, for reward models.
        lam: 1 trains on Monte-Carlo returns, 0 on the next value (TD), between them on their mixture, see `lambda_returns`.
        gamma: discount per token.
        lora_r: rank of the adapters of the critic's layers, merged when it is saved; 0 trains the head alone.
        epochs: number of times that training goes through the texts.
        batch_size: number of texts per training step.
        learning_rate: the highest rate.
        held_out: share of the prompts on which the critic is measured, and not trained.
        bf16: train in bfloat16; None where the machine is fast at it.
        seed: of texts and training.

    Raises:
        OptionError: a value out of range, options that exclude each other, or one that is missing.

    Examples:
        >>> CriticConfig(model="testbed:expert", output="out", scorer="mine:is_polite")
        Traceback (most recent call last):
            ...
        contralto.common.options.OptionError: prompts is missing: give prompts that the model answers, or texts that have been written
    """

    model: str
    output: str
    scorer: Any = None
    reward_model: str | None = None
    prompts: str | None = None
    prompt_column: str = "prompt"
    texts: str | None = None
    samples: int = 8
    max_new_tokens: int = 64
    temperature: float = 1.0
    raw: bool = False
    threshold: float | None = None
    sigmoid: bool = False
    lam: float = 1.0
    gamma: float = 1.0
    lora_r: int = 16
    epochs: float = 3.0
    batch_size: int = 32
    learning_rate: float = 5e-4
    held_out: float = 0.1
    bf16: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_sources()
        check_making(self, LEAST)
        if not 0 <= self.lam <= 1:
            raise OptionError("{name} must lie in [0, 1], not {value}", name=Option("lam"), value=self.lam)
        if not 0 < self.gamma <= 1:
            raise OptionError("{name} must lie in (0, 1], not {value}", name=Option("gamma"), value=self.gamma)

    def _check_sources(self) -> None:
        """Raise OptionError unless there is one source of texts and at most one of rewards."""
        if self.prompts is None and self.texts is None:
            raise OptionError(
                "{prompts} is missing: give prompts that the model answers, or {texts} that have been written",
                prompts=Option("prompts"),
                texts=Option("texts"),
            )
        pairs = (("prompts", "texts"), ("scorer", "reward_model"), ("threshold", "sigmoid"))
        for first, second in pairs:
            if getattr(self, first) is not None and getattr(self, second):
                raise OptionError(
                    "{first} and {second} are both given: give one", first=Option(first), second=Option(second)
                )
        if self.prompts is not None and self.score_source is None:
            raise OptionError(
                "{scorer} is missing: give a function as module:function, or a reward model in {reward_model}",
                scorer=Option("scorer"),
                reward_model=Option("reward_model"),
            )

    @property
    def score_source(self) -> Any:
        """Return the scorer as `resolve_scorer` takes it; None if the texts have rewards."""
        return self.scorer if self.reward_model is None else {"reward_model": self.reward_model}

    @property
    def work(self) -> Path:
        """Return the folder of everything that an interrupted run resumes from."""
        return Path(self.output) / "work"

    def describe(self) -> dict[str, Any]:
        """Return everything that determines the critic, as JSON values."""
        own = {name: value for name, value in asdict(self).items() if name != "output"}
        scorer = self.scorer
        if callable(scorer):
            own["scorer"] = f"{scorer.__module__}:{getattr(scorer, '__qualname__', type(scorer).__name__)}"
        return own
