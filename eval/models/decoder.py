"""How an evaluated model decodes and scores: a method with its options, sampling, and what a likelihood is."""

import json
import math
from dataclasses import dataclass
from typing import Any

from contralto.common.hashing import seed_from
from contralto.decoding.methods import DecodingConfig

__all__ = ["Decoder", "seed_of"]

SCORES = ("renormalised", "raw")
SAMPLING = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """What decides an answer, besides the models and the request. Made by `Decoder.of`.

    Examples:
        >>> decoder = Decoder.of(method="cd", amateur="testbed:amateur", beta=1, temperature=0.7)
        >>> decoder.describe()
        {'method': 'cd', 'amateur': 'testbed:amateur', 'form': 'obrien', 'beta': 1.0, 'alpha': 0.1, 'temperature': 0.7, 'seed': 0}
    """

    method: DecodingConfig
    temperature: float
    """Above 0: every answer is sampled; 0: as the task says."""
    top_k: int
    top_p: float
    min_p: float
    seed: int
    """Of sampling, of noise and of transformations."""
    score: str
    """What a likelihood is: `renormalised` or `raw`, see `contralto.decoding.executors.score`."""
    masked: bool
    """Whether likelihoods count implausible tokens as ruled out."""

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
        **options: Any,
    ) -> "Decoder":
        """Check the options, and keep them.

        Args:
            temperature, top_k, top_p, min_p: of sampling, see `contralto.decoding.SeededSampling`.
            seed: a whole number.
            score, masked: of likelihoods.
            options: any of `contralto.decoding.methods.option_names()`.

        Raises:
            TypeError: a value of another type.
            ValueError: a value outside its range, or options that do not go together.
        """
        for name, value, kind in (
            ("temperature", temperature, "a number"),
            ("top_p", top_p, "a number"),
            ("min_p", min_p, "a number"),
            ("top_k", top_k, "a whole number"),
            ("seed", seed, "a whole number"),
        ):
            allowed = int if kind == "a whole number" else (int, float)
            if isinstance(value, bool) or not isinstance(value, allowed):
                raise TypeError(f"{name} must be {kind}, not {value!r}")
        if not 0 <= temperature < math.inf:
            raise ValueError(
                f"temperature must be a finite number of at least 0 (0: decode as the task says), not {temperature}"
            )
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {top_p}")
        if not 0 <= min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1], not {min_p}")
        if top_k < 0:
            raise ValueError(f"top_k must be at least 0 (0: all tokens), not {top_k}")
        if not temperature and (top_k, top_p, min_p) != (0, 1.0, 0.0):
            raise ValueError("top_k, top_p and min_p are of sampling: give a temperature above 0 too")
        if score not in SCORES:
            raise ValueError(f"score must be {' or '.join(SCORES)}, not {score!r}")
        if not isinstance(masked, bool):
            raise TypeError(f"masked must be true or false, not {masked!r}")
        config = DecodingConfig.from_options(**options)
        row_seeds = config.declaration.row_seeds
        if temperature and not row_seeds:
            raise ValueError(f"method={config.method!r} does not sample here: it {row_seeds.reason}")
        return cls(
            method=config,
            temperature=float(temperature),
            top_k=top_k,
            top_p=float(top_p),
            min_p=float(min_p),
            seed=seed,
            score=score,
            masked=masked,
        )

    @property
    def is_plain(self) -> bool:
        """Whether nothing is contrasted."""
        return not self.method.contrasts

    def describe(self) -> dict[str, Any]:
        """All options that have an effect, models by name."""
        shown = {name: _name(value) for name, value in self.method.describe().items()}
        if self.temperature:
            shown |= {name: getattr(self, name) for name, off in SAMPLING.items() if getattr(self, name) != off}
        if self.temperature or self.method.declaration.is_seeded:
            shown["seed"] = self.seed
        if not self.is_plain:
            shown |= {"score": self.score} if self.score != SCORES[0] else {}
            shown |= {"masked": True} if self.masked else {}
        return {name: value for name, value in shown.items() if value is not None}


def _name(value: Any) -> Any:
    """A model that is given as an object, by its name."""
    return (
        value
        if value is None or isinstance(value, str | bool | int | float | list)
        else getattr(value, "name_or_path", "") or type(value).__name__
    )


def seed_of(*parts: Any) -> int:
    """A seed for everything that makes a request: 63 bits of a hash."""
    said = json.dumps(parts, ensure_ascii=False, default=str)
    return seed_from(said)
