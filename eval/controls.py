"""The decoders of a comparison: the methods that were asked for, and the controls that could explain their gains away.

- *mask*: sampling from the plausible tokens alone. It is `min_p` with the method's threshold. It never changes a greedy
  choice, so that greedy search under the mask is greedy search.
- *scale*: a method whose weights on what the model believes add up to w sharpens by itself, as the temperature 1 / w does.
  The control samples at that temperature, under the same mask: `p >= m max p` before it is `p >= m^w max p` after it.
- *amateur*: what is subtracted, by itself.
- *bias*: for questions of yes and no, greedy decoding with its threshold moved until it says yes as often.
"""

import shlex
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from contralto.decoding import methods

__all__ = ["Choice", "Row", "generation_rows", "mask_of", "parse", "ranking_rows", "weight_of"]

GREEDY, SAMPLING, PLAIN, AMATEUR = "greedy", "sampling", "plain", "amateur alone"
UNSAMPLED = ("search", "scd")
"""Methods that do not sample in lm-eval."""


class Choice(NamedTuple):
    """A method that was asked for."""

    name: str
    options: dict[str, Any]
    method: Namespace
    """The checked options, of `methods.choice`."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the comparison."""

    name: str
    role: str
    """baseline, control or method."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """How it decodes, for `ContraltoLM.decoding_by`; a seed comes besides if it samples."""
    against: tuple[str, ...] = ()
    """The rows that it is tested against."""
    same_as: str | None = None
    """The row that it equals by definition; then it is not run."""
    as_often_as: str | None = None
    """For the bias-matched threshold: the row whose yes it matches."""
    alone: str | None = None
    """The other model that answers by itself, by its branch."""
    note: str = ""

    @property
    def is_sampled(self) -> bool:
        """Whether its answers differ from seed to seed."""
        return bool(self.options.get("temperature"))


def parse(text: str, sources: Mapping[str, Any] | None = None) -> Choice:
    """A method as users write it: its name, then its options.

    Args:
        text: such as "cd beta=0.5 alpha=0.1"; quotes as in a shell.
        sources: where the other branches come from, such as `{"amateur": "testbed:amateur"}`; a method takes what it
            reads, unless the text says otherwise.

    Raises:
        ValueError: no method, no such method or option, a value outside its range, or a model or contrast prompt missing.
        TypeError: a value of another type.

    Example:
        >>> parse("vcd alpha=2").options
        {'method': 'vcd', 'alpha': 2}
        >>> parse("cd", {"amateur": "testbed:amateur"}).name
        'cd'
    """
    name, *pairs = shlex.split(text) or [""]
    if not name or "=" in name:
        raise ValueError(f"a decoder begins with its method, such as 'cd beta=0.5', not {text!r}")
    if name == "none":
        raise ValueError("greedy decoding and sampling are compared anyway: leave 'none' out")
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise ValueError(f"the options of a decoder are of the form name=value, not {wrong[0]!r} in {text!r}")
    given = {key: _value(value) for key, value in (pair.split("=", 1) for pair in pairs)}
    read = methods.METHODS[name].sources if name in methods.METHODS else ()
    taken = {key: value for key, value in (sources or {}).items() if key in read and value}
    if "adapters_off" in taken and "amateur" in given:
        del taken["adapters_off"]
    options = {"method": name, **taken, **given}
    try:
        method = methods.choice(**options)
    except (ValueError, TypeError) as error:
        raise type(error)(f"decoder {text!r}: {error}") from None
    if "prompt" in methods.METHODS[name].views and name != "cfg" and not method.contrast_prompt:
        raise ValueError(
            f"decoder {text!r}: {name} contrasts prompts: give contrast_prompt, a template with {{prompt}} or fields of the "
            "document"
        )
    return Choice(
        " ".join([name, *(pair for pair in pairs if pair.split("=")[0] not in methods.SOURCES)]), options, method
    )


def _value(text: str) -> Any:
    """A number or a truth value where the text is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def mask_of(method: Namespace) -> float | None:
    """The method's plausibility threshold; None if its formula has none.

    Example:
        >>> mask_of(parse("vcd").method), mask_of(parse("cad contrast_prompt=x").method)
        (0.1, None)
    """
    given = methods.parameters(method)
    if method.method in ("cd", "scd") or method.form == "log_ratio":
        return float(given["alpha"])
    if method.method in ("vcd", "ritual", "ritual-vcd", "m3id", "icd"):
        return float(given["beta"])
    return float(given["relative_top"]) if method.method == "dola" else None


def weight_of(method: Namespace) -> float:
    """The sum of the weights with which the formula adds log-probabilities: how much it sharpens where branches agree.

    What is subtracted does not count: an uninformative branch changes nothing, and the others are then raised to this power.

        cd, scd (O'Brien & Lewis)   1 + beta          vcd, icd, cad       1 + alpha       cfg       guidance_scale
        ritual                      1 + kappa         ritual-vcd          1 + alpha + kappa
        proxy                       1 + alpha         cid (log_ratio)     1 + lam         others    1

    M3ID's weight grows with the text, from 1; the control leaves it at 1.

    Example:
        >>> weight_of(parse("ritual").method), weight_of(parse("vcd alpha=0.5").method)
        (4.0, 1.5)
    """
    given, name = methods.parameters(method), method.method
    if name in ("cd", "scd") and method.form == "obrien":
        return 1 + float(given["beta"])
    if name in ("vcd", "icd", "cad", "proxy"):
        return 1 + float(given["alpha"])
    if name == "ritual":
        return 1.0 if given["normalize"] else 1 + float(given["kappa"])
    if name == "ritual-vcd":
        return 1 + float(given["alpha"]) + float(given["kappa"])
    if name == "cid" and method.form == "log_ratio":
        return 1 + float(given["lam"])
    return max(1.0, float(given["guidance_scale"])) if name == "cfg" else 1.0


def _alone(choices: Sequence[Choice]) -> dict[str, Row]:
    """The amateurs by themselves."""
    if not any(choice.method.method in ("cd", "scd") and choice.method.amateur for choice in choices):
        return {}
    return {AMATEUR: Row(name=AMATEUR, role="control", alone="amateur", note="what is subtracted, by itself")}


def generation_rows(choices: Sequence[Choice], *, sampled: bool, yes_no: bool = False) -> list[Row]:
    """The rows of a task whose answers are written: greedy ones first, then sampled ones.

    Args:
        choices: the methods.
        sampled: whether there are sampled rows.
        yes_no: whether answers are yes or no, so that a threshold can be moved.

    Example:
        >>> for row in generation_rows([parse("vcd")], sampled=True, yes_no=True):
        ...     print(" < ".join([row.name, *row.against]))
        greedy
        greedy, mask 0.1
        greedy, yes as vcd < greedy
        vcd < greedy < greedy, yes as vcd
        sampling
        sampling, mask 0.1 < sampling
        sampling, mask, T 0.5 < sampling
        vcd, sampling < sampling < sampling, mask 0.1 < sampling, mask, T 0.5
    """
    rows = {GREEDY: Row(name=GREEDY, role="baseline"), **_alone(choices)}
    for name, options, method in choices:
        mask, against = mask_of(method), [GREEDY]
        if mask is not None:
            control = f"{GREEDY}, mask {mask:g}"
            rows[control] = Row(name=control, role="control", same_as=GREEDY, note="the same as greedy, by definition")
        if yes_no:
            against.append(f"{GREEDY}, yes as {name}")
            rows[against[-1]] = Row(
                name=against[-1],
                role="control",
                against=(GREEDY,),
                as_often_as=name,
                note=f"greedy with its threshold moved until it says yes as often as {name}",
            )
        rows[name] = Row(name=name, role="method", options=options, against=tuple(against))
    if sampled:
        rows |= _sampled_rows(choices)
    return list(rows.values())


def _sampled_rows(choices: Sequence[Choice]) -> dict[str, Row]:
    rows = {SAMPLING: Row(name=SAMPLING, role="baseline", options={"temperature": 1.0})}
    for name, options, method in choices:
        if method.method in UNSAMPLED:
            continue
        mask, weight, against = mask_of(method), weight_of(method), [SAMPLING]
        if mask is not None:
            against.append(f"{SAMPLING}, mask {mask:g}")
            how = {"temperature": 1.0, "min_p": mask}
            rows[against[-1]] = Row(
                name=against[-1], role="control", options=how, against=(SAMPLING,), note="mask only"
            )
        if weight != 1:
            masked = "" if mask is None else ", mask" if mask == 0.1 else f", mask {mask:g}"
            against.append(f"{SAMPLING}{masked}, T {1 / weight:.3g}")
            how = {"temperature": 1 / weight} | ({} if mask is None else {"min_p": mask**weight})
            note = f"the temperature that the weights of {name} amount to, 1 / {weight:g}"
            rows[against[-1]] = Row(name=against[-1], role="control", options=how, against=(SAMPLING,), note=note)
        own = f"{name}, {SAMPLING}"
        rows[own] = Row(name=own, role="method", options={**options, "temperature": 1.0}, against=tuple(against))
    return rows


STRENGTHS = {
    "cd": {"beta": 0},
    "scd": {"beta": 0},
    "vcd": {"alpha": 0},
    "icd": {"alpha": 0},
    "ritual": {"kappa": 0},
    "ritual-vcd": {"kappa": 0, "alpha": 0},
    "m3id": {"lam": 0},
    "cid": {"lam": 0},
}
"""What turns a method with a mask into its mask alone."""


def ranking_rows(choices: Sequence[Choice]) -> list[Row]:
    """The rows of a task whose options are ranked by likelihood: both scores, and what the mask does to them.

    A method without likelihoods (search) has no row.

    Example:
        >>> [row.name for row in ranking_rows([parse("cd", {"amateur": "testbed:amateur"})])]
        ['plain', 'amateur alone', 'cd', 'cd, raw', 'plain, mask 0.1', 'cd, mask']
    """
    rows = {PLAIN: Row(name=PLAIN, role="baseline"), **_alone(choices)}
    for name, options, method in choices:
        if method.method == "search":
            continue
        rows[name] = Row(name=name, role="method", options=options, against=(PLAIN,), note="renormalised, no mask")
        raw = f"{name}, raw"
        note = "the weighted sum itself, no mask"
        rows[raw] = Row(name=raw, role="method", options={**options, "score": "raw"}, against=(PLAIN,), note=note)
        mask = mask_of(method)
        if mask is None:
            continue
        against = [PLAIN]
        if method.method in STRENGTHS and method.form != "li":
            against.append(f"{PLAIN}, mask {mask:g}")
            how = {**options, **STRENGTHS[method.method], "masked": True}
            rows[against[-1]] = Row(name=against[-1], role="control", options=how, against=(PLAIN,), note="mask only")
        masked = f"{name}, mask"
        note = "an implausible token counts for -1000"
        rows[masked] = Row(
            name=masked, role="method", options={**options, "masked": True}, against=tuple(against), note=note
        )
    return list(rows.values())
