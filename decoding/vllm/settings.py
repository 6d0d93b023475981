"""Parse the `contrast_...` values that mark requests as branches of a completion. This module does not import vLLM.

In this process they are `SamplingParams(extra_args=...)`, over HTTP the field `vllm_xargs`. All requests of a completion have equal
values except `contrast_branch`:

    contrast_id         ties them: any string or number that no other completion in flight has
    contrast_branch     0 for the main branch, then 1 (and 2), in the order of the method's branches
    contrast_marker     a token that no completion contains; a request that lost its partners ends with it
    contrast_method     one of `supported()`: a method whose declaration says that it runs in vLLM
    contrast_form       and contrast_alpha, contrast_beta, ...: its form and parameters (default: the papers')
    contrast_gate       no contrast where the main branch's largest probability is at least this (default: contrast every token)
    contrast_temperature, contrast_top_k, contrast_top_p, contrast_min_p, contrast_seed: sampling (default: greedy)
    contrast_start      number of tokens of the completion that the prompts already contain (default 0)
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from contralto.common.suggestions import did_you_mean
from contralto.decoding.methods import GATE, METHODS, Form, check_sampling
from contralto.decoding.rules import gated
from contralto.decoding.vllm.sampling import RequestSampling

__all__ = [
    "PREFIX",
    "Row",
    "Rule",
    "check_group",
    "check_penalties",
    "check_request",
    "forms_of",
    "parameters_of",
    "supported",
]

PREFIX = "contrast_"
LONGEST_ID = 256
"""Maximum number of characters of an id."""
TYPES = {float: "a number", int: "a whole number", bool: "true or false"}


@dataclass(frozen=True)
class Rule:
    """A formula with its parameters."""

    method: str
    form: str
    parameters: tuple[tuple[str, Any], ...]
    gate: float | None = None
    """See `contralto.decoding.rules.gated`; the requests of all branches run all the same."""

    @property
    def branches(self) -> tuple[str, ...]:
        """Return the names of the branches, the main branch first."""
        return self._declared.branch_names

    @property
    def _declared(self) -> Form:
        return METHODS[self.method].forms[self.form]

    def __call__(self, logits: Sequence[Tensor], steps: Tensor) -> Tensor:
        """Return the scores `(P, V)` of logits `(P, V)` per branch, for completions of `steps` `(P,)` tokens."""
        scores: Tensor = self._declared.scores(logits, step=steps[:, None], **dict(self.parameters))
        return scores if self.gate is None else gated(scores, logits[0], gate=self.gate, step=steps[:, None])


def supported() -> list[str]:
    """Return the methods whose branches can be requests of vLLM, in alphabetical order."""
    return sorted(method.name for method in METHODS.values() if method.contrasts and method.vllm)


def forms_of(method: str) -> Mapping[str, Form]:
    """Return the formulas of a method, the default first.

    Args:
        method: the name of a method.

    Raises:
        ValueError: vLLM does not run the method.
    """
    if not isinstance(method, str) or method not in METHODS or method not in supported():
        raise ValueError(
            f"{PREFIX}method must be one of {', '.join(supported())}, not {method!r}{did_you_mean(method, supported())}"
        )
    return METHODS[method].forms


def parameters_of(method: str, form: str) -> Mapping[str, Any]:
    """Return the parameters of a formula with their defaults.

    Args:
        method: the name of a method.
        form: the name of a form.
    """
    return {name: parameter.default for name, parameter in forms_of(method)[form].parameters.items()}


@dataclass(frozen=True)
class Row:
    """The `contrast_...` values of a request: one branch of one completion.

    Examples:
        >>> row = Row.of({"contrast_id": 7, "contrast_branch": 1, "contrast_marker": 0, "contrast_method": "cad"})
        >>> row.rule.parameters, row.sampling.temperature
        ((('alpha', 0.5),), 0.0)
        >>> Row.of({"contrast_id": 7, "contrast_branch": 2, "contrast_marker": 0, "contrast_method": "cad"})
        Traceback (most recent call last):
            ...
        ValueError: contrast_branch must be 0 or 1 (with context, without context), not 2
    """

    group: str | int
    """The id of the completion. 1 and "1" are two ids."""
    branch: int
    marker: int
    rule: Rule
    sampling: RequestSampling
    seed: int
    start: int

    @classmethod
    def of(cls, arguments: Mapping[str, Any] | None) -> "Row | None":
        """Parse the `contrast_...` values of a request.

        Args:
            arguments: the values of a request, these among others.

        Returns:
            The parsed values; None if there are none.

        Raises:
            ValueError: a value that is missing, unknown, of another type, or outside its range.
        """
        values = {n.removeprefix(PREFIX): v for n, v in (arguments or {}).items() if n.startswith(PREFIX)}
        if not values:
            return None
        for name in ("id", "branch", "marker", "method"):
            if values.get(name) is None:
                raise ValueError(f"a branch of a completion needs {PREFIX}{name}; it has {_names(values)}")
        rule = _rule(values)
        own = {name for name, _ in rule.parameters}
        general = {"id", "branch", "marker", "method", "form", "seed", "start", *RequestSampling.__annotations__}
        known = general | own | ({GATE} if METHODS[rule.method].has_gate else set())
        if foreign := sorted(set(values) - known):
            raise ValueError(
                f"{PREFIX}method {rule.method} has no {PREFIX}{foreign[0]}; its parameters are {_names(own)}; general "
                f"fields are {_names(known - own)}"
            )
        branch, names = _typed("branch", values["branch"], int), rule.branches
        if not 0 <= branch < len(names):
            allowed = " or ".join([", ".join(map(str, range(len(names) - 1))), str(len(names) - 1)])
            raise ValueError(f"{PREFIX}branch must be {allowed} ({', '.join(names)}), not {branch}")
        if not isinstance(values["id"], str | int) or isinstance(values["id"], bool):
            raise ValueError(  # noqa: TRY004  all of a request is a ValueError, over HTTP status 400
                f"{PREFIX}id must be a string or a whole number, not {values['id']!r}"
            )
        if len(str(values["id"])) > LONGEST_ID:
            raise ValueError(f"{PREFIX}id must have at most {LONGEST_ID} characters, not {len(str(values['id']))}")
        for name in ("marker", "start"):
            if _typed(name, values.get(name, 0), int) < 0:
                raise ValueError(f"{PREFIX}{name} must be at least 0, not {values[name]}")
        return cls(
            group=values["id"],
            branch=branch,
            marker=values["marker"],
            rule=rule,
            sampling=_sampling(values),
            seed=_typed("seed", values.get("seed", 0), int),
            start=values.get("start", 0),
        )


def _names(names: Any) -> str:
    return ", ".join(f"{PREFIX}{name}" for name in sorted(names)) or "none"


def _typed(name: str, value: Any, kind: Any) -> Any:
    """Convert a value to its declared type. JSON's true and false arrive as 1 and 0."""
    if kind is bool and value in (0, 1):
        return bool(value)
    allowed = (int, float) if kind is float else kind
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise ValueError(f"{PREFIX}{name} must be {TYPES[kind]}, not {value!r}")  # noqa: TRY004  as above
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise ValueError(f"{PREFIX}{name} must be a number of 64 bits, not {value}")
    return kind(value)


def _rule(values: Mapping[str, Any]) -> Rule:
    """Return the requested rule, after its own checks of the ranges."""
    method = values["method"]
    forms = forms_of(method)
    form = values.get("form") or next(iter(forms))
    if not isinstance(form, str) or form not in forms:
        raise ValueError(
            f"{PREFIX}form of {method} must be {' or '.join(filter(None, forms)) or 'left out'}, not {form!r}"
        )
    defaults = parameters_of(method, form)
    chosen = {n: _typed(n, values.get(n, default), type(default)) for n, default in defaults.items()}
    gate = values.get(GATE) if METHODS[method].has_gate else None
    return _checked(Rule(method, form, tuple(chosen.items()), None if gate is None else _typed(GATE, gate, float)))


@lru_cache(maxsize=1024)
def _checked(rule: Rule) -> Rule:
    try:
        rule([torch.zeros(1, 1)] * len(rule.branches), torch.zeros(1))
    except ValueError as error:
        raise ValueError(f"{PREFIX}method {rule.method}: {error}") from None
    return rule


def _sampling(values: Mapping[str, Any]) -> RequestSampling:
    """Return the sampling parameters of a request, after checks of their ranges."""
    sampling = RequestSampling(
        temperature=_typed("temperature", values.get("temperature", 0.0), float),
        top_k=_typed("top_k", values.get("top_k", 0), int),
        top_p=_typed("top_p", values.get("top_p", 1.0), float),
        min_p=_typed("min_p", values.get("min_p", 0.0), float),
    )
    check_sampling(**asdict(sampling), greedy="greedy decoding", prefix=PREFIX)
    return sampling


# ------------------------------------------------------------------------------------------------------- incompatible options


def check_request(row: Row, params: Any) -> None:
    """Reject sampling options of a request that would schedule its branches apart.

    Args:
        row: the values of the request.
        params: `vllm.SamplingParams`, or what has its attributes.

    Raises:
        ValueError: several texts of one request, sampling or penalties by vLLM, a marker that does not end the request.
    """
    if (params.n or 1) != 1:
        raise ValueError(
            f"n must be 1 in a branch of a completion, not {params.n}: send {params.n} completions, each with its "
            f"own {PREFIX}id"
        )
    if params.temperature:
        raise ValueError(
            f"temperature must be 0 in a branch of a completion, not {params.temperature}: branches would draw "
            f"different tokens; set {PREFIX}temperature"
        )
    check_penalties(
        params, "in a branch of a completion", "counts tokens of each branch's own prompt, and branches would diverge"
    )
    if row.marker not in (params.stop_token_ids or ()):
        raise ValueError(
            f"stop_token_ids must contain {PREFIX}marker {row.marker}, or a branch without its partner would "
            "continue alone"
        )


def check_penalties(params: Any, where: str, why: str) -> None:
    """Reject vLLM's penalties, which act on the contrasted scores, unlike those of `generate()`, see `decoding.order`.

    Args:
        params: `vllm.SamplingParams`, or what has its attributes.
        where: which requests this is about.
        why: what else vLLM does with a penalty.

    Raises:
        ValueError: a penalty.

    Examples:
        >>> from types import SimpleNamespace
        >>> check_penalties(SimpleNamespace(presence_penalty=0.5), "with an amateur", "counts the prompt's tokens too")
        Traceback (most recent call last):
            ...
        ValueError: presence_penalty must be 0.0 with an amateur, not 0.5: vLLM applies it after the contrast and counts the prompt's tokens too
    """
    for name, off in (("repetition_penalty", 1.0), ("presence_penalty", 0.0), ("frequency_penalty", 0.0)):
        if (getattr(params, name, None) or off) != off:
            raise ValueError(
                f"{name} must be {off} {where}, not {getattr(params, name)}: vLLM applies it after the contrast and {why}"
            )


def check_group(requests: Sequence[tuple[Row, Mapping[str, Any]]]) -> None:
    """Reject requests that cannot be the branches of one completion.

    Args:
        requests: the values of each request, and its options that must be equal (`max_tokens`, stop tokens, ...).

    Raises:
        ValueError: the same branch twice, or options that differ.
    """
    (first, options), *others = requests
    seen = {first.branch}
    for row, own in others:
        if row.branch in seen:
            raise ValueError(
                f"{PREFIX}id {row.group!r}: two requests have branch {row.branch}; each needs a different one"
            )
        seen.add(row.branch)
        for name in ("rule", "sampling", "seed", "start", "marker"):
            if getattr(row, name) != getattr(first, name):
                raise ValueError(
                    f"{PREFIX}id {row.group!r}: the branches differ in {_difference(name, first, row)}; they must be equal"
                )
        for name, value in options.items():
            if own.get(name) != value:
                raise ValueError(
                    f"{PREFIX}id {row.group!r}: the branches differ in {name} ({value!r} and {own.get(name)!r}); they must be "
                    "equal"
                )


def _difference(name: str, one: Row, two: Row) -> str:
    """Return the name and the two values of a difference, as users write them."""
    if name in ("seed", "start", "marker"):
        return f"{PREFIX}{name} ({getattr(one, name)} and {getattr(two, name)})"
    values = [_flat(row) for row in (one, two)]
    key = next(k for k in {**values[0], **values[1]} if values[0].get(k) != values[1].get(k))
    return f"{PREFIX}{key} ({values[0].get(key)!r} and {values[1].get(key)!r})"


def _flat(row: Row) -> dict[str, Any]:
    rule = row.rule
    return {"method": rule.method, "form": rule.form, **dict(rule.parameters), GATE: rule.gate, **vars(row.sampling)}
