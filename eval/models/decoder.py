"""The decoder of an evaluated model: a method, its sampling, and the kind of likelihood."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from contralto.common.hashing import seed_from
from contralto.decoding.methods import GATE, DecodingConfig, check_sampling, likelihood_processor
from contralto.decoding.methods.controls import control_processor

if TYPE_CHECKING:
    from contralto.decoding.inputs import DecodingBatch

__all__ = ["SAMPLING", "Decoder", "seed_of"]

SCORES = ("renormalised", "raw")
SAMPLING = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""The options of sampling, with the values that stand for none."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The settings that determine an answer besides the models and the request. Made by `Decoder.of`.

    Examples:
        >>> decoder = Decoder.of(method="cd", amateur="testbed:amateur", beta=1, temperature=0.7)
        >>> decoder.describe()
        {'method': 'cd', 'amateur': 'testbed:amateur', 'form': 'obrien', 'beta': 1.0, 'alpha': 0.1, 'temperature': 0.7, 'seed': 0}
    """

    config: DecodingConfig
    """The method with its parameters and other models."""
    temperature: float
    """Above 0: every answer is sampled; 0: as the task says."""
    top_k: int
    top_p: float
    min_p: float
    seed: int
    """The seed of sampling, noise and transformations."""
    score: str
    """The kind of likelihood: `renormalised` or `raw`, see `contralto.decoding.executors.score`."""
    masked: bool
    """True if likelihoods count implausible tokens as ruled out."""
    control: str | None
    """`mask` or `uniform`: likelihoods are those of a control of the method, without its other models; None for the method itself."""

    @classmethod
    def of(
        cls,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        score: str = "renormalised",
        masked: bool = False,
        control: str | None = None,
        **options: Any,
    ) -> "Decoder":
        """Check options and return their decoder.

        Args:
            temperature: Above 0, every answer is sampled.
            top_k: See `contralto.decoding.methods.SamplingConfig`.
            top_p: See `contralto.decoding.methods.SamplingConfig`.
            min_p: See `contralto.decoding.methods.SamplingConfig`.
            seed: A whole number, the seed of sampling, noise and transformations.
            score: `renormalised` or `raw`.
            masked: Count implausible tokens of likelihoods as ruled out.
            control: `mask` or `uniform`, see `contralto.decoding.methods.controls`: the likelihoods of a control of the method.
            options: Any of `contralto.decoding.methods.option_names()`.

        Raises:
            TypeError: A value has another type.
            ValueError: A value is out of range, or options exclude each other.
        """
        sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        _check_types({**sampling, "seed": seed})
        check_sampling(**sampling, greedy="the decoding of the task")
        if score not in SCORES:
            raise ValueError(f"score must be {' or '.join(SCORES)}, not {score!r}")
        if not isinstance(masked, bool):
            raise TypeError(f"masked must be true or false, not {masked!r}")
        config = DecodingConfig.from_options(**options)
        if control is not None:
            control_processor(config, control)
        row_seeds = config.declaration.row_seeds
        if temperature and not row_seeds:
            raise ValueError(f"method={config.method!r} does not sample here: it {row_seeds.reason}")
        return cls(
            config=config,
            temperature=float(temperature),
            top_k=top_k,
            top_p=float(top_p),
            min_p=float(min_p),
            seed=seed,
            score=score,
            masked=masked,
            control=control,
        )

    @property
    def is_plain(self) -> bool:
        """Return True if the decoder has no contrast."""
        return not self.config.contrasts

    @property
    def models(self) -> dict[str, Any]:
        """Return the other models that the method reads, by the options that name them; a control reads none."""
        names = () if self.control else self.config.declaration.models
        return {name: self.config.models[name] for name in names if name in self.config.models}

    @property
    def views(self) -> tuple[str, ...]:
        """Return the views of the branches; a control has none."""
        return () if self.control else self.config.active_views

    def likelihood_processor(self, batch: "DecodingBatch") -> Any:
        """Return the logits processor whose scores are the log-probabilities of the method, or of its control.

        Args:
            batch: The inputs of the branches.

        Raises:
            ValueError: The method has no likelihoods, or does not support the model.
        """
        return (
            control_processor(self.config, self.control) if self.control else likelihood_processor(self.config, batch)
        )

    def describe(self) -> dict[str, Any]:
        """Return all options that have an effect, models by name; caches and run folders are keyed by them."""
        options = {name: _model_name(value) for name, value in self.config.describe().items()}
        if self.control:
            own = ("method", "form", GATE, *self.config.rule_parameters)
            options = {name: value for name, value in options.items() if name in own} | {"control": self.control}
        if self.temperature:
            options |= {name: getattr(self, name) for name, off in SAMPLING.items() if getattr(self, name) != off}
        if self.temperature or (self.config.declaration.is_seeded and not self.control):
            options["seed"] = self.seed
        if not self.is_plain:
            options |= {"score": self.score} if self.score != SCORES[0] else {}
            options |= {"masked": True} if self.masked else {}
        return {name: value for name, value in options.items() if value is not None}


def _check_types(values: dict[str, Any]) -> None:
    for name, value in values.items():
        is_whole = name in ("top_k", "seed")
        if isinstance(value, bool) or not isinstance(value, int if is_whole else (int, float)):
            raise TypeError(f"{name} must be {'a whole number' if is_whole else 'a number'}, not {value!r}")


def _model_name(value: Any) -> Any:
    """Return the name of a model that is given as an object; other values as they are."""
    if value is None or isinstance(value, str | bool | int | float | list):
        return value
    return getattr(value, "name_or_path", "") or type(value).__name__


def seed_of(*parts: Any) -> int:
    """Return a seed of 63 bits from the hash of a request's content.

    Args:
        parts: JSON values; others count by their string.
    """
    return seed_from(json.dumps(parts, ensure_ascii=False, default=str))
