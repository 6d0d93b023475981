"""How requests say that they are branches of one text: a few `contrast_...` values beside the prompt. No vLLM here.

In this process they are `SamplingParams(extra_args=...)`, over HTTP the field `vllm_xargs`. All requests of a text have the same
values, but for `contrast_branch`:

    contrast_id         ties them: any text or number that no other text in flight has
    contrast_branch     0 for the main branch, then 1 (and 2), in the order of the method's branches
    contrast_marker     a token that no text holds; a request that lost its partners ends with it
    contrast_method     one of `supported()`: a method whose declaration says that it runs in vLLM
    contrast_form       and contrast_alpha, contrast_beta, ...: its form and parameters (default: the papers')
    contrast_temperature, contrast_top_k, contrast_top_p, contrast_min_p, contrast_seed: sampling (default: greedy)
    contrast_start      how many tokens of the text are part of the prompts already (default 0)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from contralto.decoding.methods import METHODS, Form
from contralto.decoding.sampling import _wrapped, gumbel_noise

__all__ = [
    "PREFIX",
    "Row",
    "Rule",
    "Sampling",
    "Warp",
    "check_group",
    "check_penalties",
    "check_request",
    "draw",
    "end_broken",
    "forms_of",
    "parameters_of",
    "seeds_of",
    "supported",
]

PREFIX = "contrast_"
LONGEST_ID = 256
"""Characters of the id of a text."""
IMAGES = "prompts with images are not decoded by contrast in vLLM, where it is not tested: use contralto.decoding with transformers"
TYPES = {float: "a number", int: "a whole number", bool: "true or false"}


@dataclass(frozen=True)
class Rule:
    """A formula with its parameters."""

    method: str
    form: str
    parameters: tuple[tuple[str, Any], ...]

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the branches, the main branch first."""
        return forms_of(self.method)[self.form].branch_names

    def __call__(self, logits: Sequence[Tensor], steps: Tensor) -> Tensor:
        """Return the scores `(P, V)` of logits `(P, V)` per branch, for texts of `steps` `(P,)` tokens."""
        scores: Tensor = forms_of(self.method)[self.form].scores(logits, step=steps[:, None], **dict(self.parameters))
        return scores


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
        raise ValueError(f"{PREFIX}method must be one of {', '.join(supported())}, not {method!r}")
    return METHODS[method].forms


def parameters_of(method: str, form: str) -> Mapping[str, Any]:
    """Return the parameters of a formula with their defaults.

    Args:
        method: the name of a method.
        form: the name of a form.
    """
    return {name: parameter.default for name, parameter in forms_of(method)[form].parameters.items()}


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the scores. Temperature 0 takes the best."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass(frozen=True)
class Row:
    """What a request says of the text that it is a branch of.

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
    """The id of the text. 1 and "1" are two ids."""
    branch: int
    marker: int
    rule: Rule
    sampling: Sampling
    seed: int
    start: int

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> "Row | None":
        """Read the `contrast_...` values among others; None if there are none.

        Raises:
            ValueError: a value that is missing, unknown, of another type, or outside its range.
        """
        values = {n.removeprefix(PREFIX): v for n, v in (given or {}).items() if n.startswith(PREFIX)}
        if not values:
            return None
        for name in ("id", "branch", "marker", "method"):
            if values.get(name) is None:
                raise ValueError(f"a branch of a text needs {PREFIX}{name}; it has {_names(values)}")
        rule = _rule(values)
        own = {name for name, _ in rule.parameters}
        known = {"id", "branch", "marker", "method", "form", "seed", "start", *Sampling.__annotations__, *own}
        if foreign := sorted(set(values) - known):
            raise ValueError(
                f"{PREFIX}method {rule.method} has no {PREFIX}{foreign[0]}; its parameters are {_names(own)}, "
                f"and besides there are {_names(known - own)}"
            )
        branch, names = _typed("branch", values["branch"], int), rule.branches
        if not 0 <= branch < len(names):
            allowed = " or ".join([", ".join(map(str, range(len(names) - 1))), str(len(names) - 1)])
            raise ValueError(f"{PREFIX}branch must be {allowed} ({', '.join(names)}), not {branch}")
        if not isinstance(values["id"], str | int) or isinstance(values["id"], bool):
            raise ValueError(  # noqa: TRY004  all of a request is a ValueError, over HTTP status 400
                f"{PREFIX}id must be a text or a whole number, not {values['id']!r}"
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
    """A value in its type. JSON's true and false arrive as 1 and 0."""
    if kind is bool and value in (0, 1):
        return bool(value)
    allowed = (int, float) if kind is float else kind
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise ValueError(f"{PREFIX}{name} must be {TYPES[kind]}, not {value!r}")  # noqa: TRY004  as above
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise ValueError(f"{PREFIX}{name} must be a number of 64 bits, not {value}")
    return kind(value)


def _rule(values: Mapping[str, Any]) -> Rule:
    """The rule that is asked for; its own checks see to the ranges."""
    method = values["method"]
    forms = forms_of(method)
    form = values.get("form") or next(iter(forms))
    if not isinstance(form, str) or form not in forms:
        raise ValueError(
            f"{PREFIX}form of {method} must be {' or '.join(filter(None, forms)) or 'left out'}, not {form!r}"
        )
    defaults = parameters_of(method, form)
    chosen = {n: _typed(n, values.get(n, default), type(default)) for n, default in defaults.items()}
    return _checked(Rule(method, form, tuple(chosen.items())))


@lru_cache(maxsize=1024)
def _checked(rule: Rule) -> Rule:
    try:
        rule([torch.zeros(1, 1)] * len(rule.branches), torch.zeros(1))
    except ValueError as error:
        raise ValueError(f"{PREFIX}method {rule.method}: {error}") from None
    return rule


def _sampling(values: Mapping[str, Any]) -> Sampling:
    found = Sampling(
        temperature=_typed("temperature", values.get("temperature", 0.0), float),
        top_k=_typed("top_k", values.get("top_k", 0), int),
        top_p=_typed("top_p", values.get("top_p", 1.0), float),
        min_p=_typed("min_p", values.get("min_p", 0.0), float),
    )
    if not 0 <= found.temperature < float("inf"):
        raise ValueError(f"{PREFIX}temperature must be at least 0 (0: the best token), not {found.temperature}")
    if found.top_k < 0:
        raise ValueError(f"{PREFIX}top_k must be at least 0 (0: all tokens), not {found.top_k}")
    if not 0 < found.top_p <= 1:
        raise ValueError(f"{PREFIX}top_p must lie in (0, 1], not {found.top_p}")
    if not 0 <= found.min_p <= 1:
        raise ValueError(f"{PREFIX}min_p must lie in [0, 1], not {found.min_p}")
    if not found.temperature and found != Sampling():
        raise ValueError(f"{PREFIX}top_k, top_p and min_p are of sampling: give a {PREFIX}temperature above 0 too")
    return found


# ----------------------------------------------------------------------------------------------- what cannot work together


def check_request(row: Row, how: Any) -> None:
    """Refuse sampling options of a request that would part its branches.

    Args:
        row: what the request says.
        how: `vllm.SamplingParams`, or what has its attributes.

    Raises:
        ValueError: several texts of one request, sampling or penalties by vLLM, a marker that does not end the request.
    """
    if (how.n or 1) != 1:
        raise ValueError(f"n must be 1 in a branch of a text, not {how.n}: give each text a {PREFIX}id of its own")
    if how.temperature:
        raise ValueError(
            f"temperature must be 0 in a branch of a text, not {how.temperature}: both branches would draw tokens of their "
            f"own; give {PREFIX}temperature"
        )
    check_penalties(
        how, "in a branch of a text", "counts the tokens of each branch's own prompt, and the branches would part"
    )
    if row.marker not in (how.stop_token_ids or ()):
        raise ValueError(
            f"stop_token_ids must hold {PREFIX}marker {row.marker}, or a branch that lost its partner would run on"
        )


def check_penalties(how: Any, where: str, why: str) -> None:
    """Reject vLLM's penalties, which act on the contrasted scores, unlike those of `generate()`, see `decoding.order`.

    Args:
        how: `vllm.SamplingParams`, or what has its attributes.
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
        if (getattr(how, name, None) or off) != off:
            raise ValueError(
                f"{name} must be {off} {where}, not {getattr(how, name)}: vLLM applies it after the contrast and {why}"
            )


def check_group(requests: Sequence[tuple[Row, Mapping[str, Any]]]) -> None:
    """Refuse requests that cannot be the branches of one text.

    Args:
        requests: of each request what it says, and its options that must be equal (`max_tokens`, stop tokens, ...).

    Raises:
        ValueError: the same branch twice, or options that differ.
    """
    (first, options), *others = requests
    seen = {first.branch}
    for row, own in others:
        if row.branch in seen:
            raise ValueError(
                f"{PREFIX}id {row.group!r}: two requests are branch {row.branch}; they need different ones"
            )
        seen.add(row.branch)
        for name in ("rule", "sampling", "seed", "start", "marker"):
            if getattr(row, name) != getattr(first, name):
                raise ValueError(
                    f"{PREFIX}id {row.group!r}: the branches differ in {_spoken(name, first, row)}; they must be equal"
                )
        for name, value in options.items():
            if own.get(name) != value:
                raise ValueError(
                    f"{PREFIX}id {row.group!r}: the branches differ in {name} ({value!r} and {own.get(name)!r}); they must be "
                    "equal"
                )


def _spoken(name: str, one: Row, two: Row) -> str:
    """What differs, as the user wrote it."""
    if name in ("seed", "start", "marker"):
        return f"{PREFIX}{name} ({getattr(one, name)} and {getattr(two, name)})"
    values = [_flat(row) for row in (one, two)]
    key = next(k for k in {**values[0], **values[1]} if values[0].get(k) != values[1].get(k))
    return f"{PREFIX}{key} ({values[0].get(key)!r} and {values[1].get(key)!r})"


def _flat(row: Row) -> dict[str, Any]:
    return {"method": row.rule.method, "form": row.rule.form, **dict(row.rule.parameters), **vars(row.sampling)}


# ------------------------------------------------------------------------------------------------------------- drawing


@dataclass(frozen=True)
class Warp:
    """The samplings of several texts as columns `(P, 1)`, made once for many steps."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    cuts: bool
    """Whether any of them has top-k or top-p."""
    floors: bool
    """Whether any of them has min-p."""

    @classmethod
    def of(cls, how: Sequence[Sampling], device: Any) -> "Warp":
        """The columns, on a device."""

        def column(name: str, dtype: torch.dtype) -> Tensor:
            values = torch.tensor([getattr(sampling, name) for sampling in how], dtype=dtype)
            return values.to(device, non_blocking=True)[:, None]

        return cls(
            column("temperature", torch.float32),
            column("top_k", torch.int64),
            column("top_p", torch.float32),
            column("min_p", torch.float32),
            cuts=any(sampling.top_k or sampling.top_p < 1 for sampling in how),
            floors=any(sampling.min_p for sampling in how),
        )


def draw(scores: Tensor, warp: Warp, seeds: Tensor, steps: Tensor) -> Tensor:
    """Scores whose argmax is a draw, for every text by its own sampling, seed and step.

    Temperature, top-k, top-p, min-p, then Gumbel noise, as `contralto.decoding.SeededSampling`, with the same noise: so a
    text does not depend on the batch it is written in, nor on where it was resumed.

    Args:
        scores: `(P, V)`.
        warp: of `P` texts; rows of temperature 0 stay as they are.
        seeds: `(P,)` int64.
        steps: `(P,)` int64, how many tokens each text has.

    Returns:
        `(P, V)` float32.

    Examples:
        >>> from contralto.decoding import SeededSampling
        >>> scores, ids = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.zeros(1, 4, dtype=torch.long)
        >>> warp = Warp.of([Sampling(temperature=0.7, top_k=2)], "cpu")
        >>> mine = draw(scores, warp, torch.tensor([9]), torch.tensor([0]))
        >>> torch.equal(mine, SeededSampling([9], temperature=0.7, top_k=2)(ids, scores))
        True
    """
    size, samples = scores.shape[-1], warp.temperature > 0
    warm = scores / torch.where(samples, warp.temperature, 1.0)
    if warp.cuts:
        ordered, order = warm.sort(dim=-1)
        rank = torch.where(warp.top_k > 0, warp.top_k.clamp(max=size), size)
        warm = warm.masked_fill(warm < ordered.gather(-1, size - rank), -torch.inf)
        removed = warm.gather(-1, order).softmax(-1).cumsum(-1) <= 1 - warp.top_p
        removed[..., -1] = False
        removed &= warp.top_p < 1  # the sum may miss 1 by a rounding
        warm = warm.masked_fill(torch.zeros_like(removed).scatter(-1, order, removed), -torch.inf)
    if warp.floors:
        p = warm.softmax(-1)
        warm = warm.masked_fill(p < warp.min_p * p.amax(-1, keepdim=True), -torch.inf)
    drawn = (warm.double().log_softmax(-1) + gumbel_noise(seeds, steps, size)).float()
    return torch.where(samples, drawn, scores.float())


def end_broken(scores: Tensor, branches: Tensor, markers: Tensor) -> Tensor:
    """Make texts end with their marker whose logits cannot be contrasted: NaN, `+inf`, or no possible token in a branch.

    Such a text is reported as one that does not get on. The device is not waited for, and other texts go on.

    Args:
        scores: `(P, V)` of the rule.
        branches: `(K, P, V)` logits.
        markers: `(P, 1)` tokens.

    Returns:
        `(P, V)`.

    Examples:
        >>> branches = torch.tensor([[[0.0, 1.0, 2.0], [0.0, 1.0, torch.nan]]])
        >>> end_broken(branches[0], branches, torch.tensor([[0], [1]]))
        tensor([[0., 1., 2.],
                [-inf, 0., -inf]])
    """
    fine = branches.amax(-1).isfinite().all(0)[:, None]
    ends = torch.full_like(scores, -torch.inf).scatter_(1, markers, 0.0)
    return torch.where(fine, scores, ends)


def seeds_of(seeds: Sequence[int]) -> Tensor:
    """Seeds of any size as int64."""
    return torch.tensor([_wrapped(seed) for seed in seeds])
