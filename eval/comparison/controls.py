"""The decoders of a comparison: the methods that were asked for, and the controls that could explain their gains away.

- *mask*: sampling from the plausible tokens alone. It is `min_p` with the method's threshold. It never changes a greedy
  choice, so that greedy search under the mask is greedy search.
- *scale*: a method whose weights on what the model believes add up to w sharpens by itself, as the temperature 1 / w does.
  The control samples at that temperature, under the same mask: `p >= m max p` before it is `p >= m^w max p` after it.
- *amateur*: what is subtracted, by itself.
- *bias*: for questions of yes and no, greedy decoding with its threshold moved until it says yes as often.
- *OLM* and *PBA*: the spurious baselines of Yin et al. 2025 (The Mirage of Performance Gains, arXiv 2504.10020) for questions of yes and
  no. Output layer modification answers yes where p(yes) and p(no) are close; prompt-based adjustment asks for yes in the prompt. Their
  third one, the plausibility constraint without a contrast, is the mask under sampling.

The threshold, the sum of the weights and what turns a contrast off are facts of the method's declaration, see
`contralto.decoding.methods.Form`, which requires them: no method is compared without controls.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from contralto.decoding.methods import METHODS, DecodingConfig

__all__ = [
    "Choice",
    "Row",
    "generation_rows",
    "parse",
    "ranking_rows",
]

GREEDY, SAMPLING, PLAIN, AMATEUR = "greedy", "sampling", "plain", "amateur alone"
FORCED_FROM, FORCED_WITHIN = 0.2, 0.5
"""Of output layer modification: p(yes) + p(no) above the first, and their distance below the second, make a yes."""


class Choice(NamedTuple):
    """A method that was asked for."""

    name: str
    options: dict[str, Any]
    method: DecodingConfig


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
    forced: bool = False
    """Whether it says yes wherever yes and no are close, and else what greedy decoding says; then it is not run."""
    hint: str | None = None
    """What follows every question of the prompt."""
    alone: str | None = None
    """The other model that answers by itself, by its branch."""
    note: str = ""

    @property
    def is_run(self) -> bool:
        """Whether its answers come from a run of its own."""
        return not (self.same_as or self.as_often_as or self.forced)

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

    Examples:
        >>> parse("vcd alpha=2").options
        {'method': 'vcd', 'alpha': 2}
        >>> parse("cd", {"amateur": "testbed:amateur"}).name
        'cd'
    """
    name, *pairs = shlex.split(text) or [""]
    if not name or "=" in name:
        raise ValueError(f"a decoder begins with its method, such as 'cd beta=0.5', not {text!r}")
    if name in METHODS and not METHODS[name].contrasts:
        raise ValueError(f"greedy decoding and sampling are compared anyway: leave {name!r} out")
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise ValueError(f"the options of a decoder are of the form name=value, not {wrong[0]!r} in {text!r}")
    given = {key: _value(value) for key, value in (pair.split("=", 1) for pair in pairs)}
    read = METHODS[name].sources if name in METHODS else ()
    taken = {key: value for key, value in (sources or {}).items() if key in read and value}
    if "adapters_off" in taken and "amateur" in given:
        del taken["adapters_off"]
    options = {"method": name, **taken, **given}
    try:
        method = DecodingConfig.from_options(**options)
        method.check_contrast_prompt()
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"decoder {text!r}: {error}") from None
    shown = [pair for pair in pairs if pair.split("=")[0] not in method.declaration.sources]
    return Choice(" ".join([name, *shown]), options, method)


def _value(text: str) -> Any:
    """A number or a truth value where the text is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def _alone(choices: Sequence[Choice]) -> dict[str, Row]:
    """The amateurs by themselves."""
    if not any(list(c.method.declaration.models) == ["amateur"] and c.method.models for c in choices):
        return {}
    return {AMATEUR: Row(name=AMATEUR, role="control", alone="amateur", note="what is subtracted, by itself")}


def generation_rows(
    choices: Sequence[Choice], *, sampled: bool, yes_no: bool = False, hint: str | None = None
) -> list[Row]:
    """The rows of a task whose answers are written: greedy ones first, then sampled ones.

    Args:
        choices: the methods.
        sampled: whether there are sampled rows.
        yes_no: whether answers are yes or no, so that a threshold can be moved.
        hint: what follows a question to ask for a yes, for prompt-based adjustment; None if the task has no such sentence.

    Examples:
        >>> for row in generation_rows([parse("vcd")], sampled=True, yes_no=True, hint=" Answer yes whenever possible."):
        ...     print(" < ".join([row.name, *row.against]))
        greedy
        greedy, OLM < greedy
        greedy, PBA < greedy
        greedy, mask 0.1
        greedy, yes as vcd < greedy
        vcd < greedy < greedy, OLM < greedy, PBA < greedy, yes as vcd
        sampling
        sampling, mask 0.1 < sampling
        sampling, mask, T 0.5 < sampling
        vcd, sampling < sampling < sampling, mask 0.1 < sampling, mask, T 0.5
    """
    spurious = _spurious(hint) if yes_no else {}
    rows = {GREEDY: Row(name=GREEDY, role="baseline"), **_alone(choices), **spurious}
    for name, options, method in choices:
        mask, against = method.mask, [GREEDY, *spurious]
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


def _spurious(hint: str | None) -> dict[str, Row]:
    """Return the baselines of Yin et al. that only say yes more often."""
    olm = Row(
        name=f"{GREEDY}, OLM",
        role="control",
        against=(GREEDY,),
        forced=True,
        note=f"yes where p(yes) + p(no) > {FORCED_FROM:g} and they differ by less than {FORCED_WITHIN:g} (arXiv 2504.10020)",
    )
    if hint is None:
        return {olm.name: olm}
    note = f"the prompt asks for yes: {hint.strip()!r} (arXiv 2504.10020)"
    pba = Row(name=f"{GREEDY}, PBA", role="control", against=(GREEDY,), hint=hint, note=note)
    return {olm.name: olm, pba.name: pba}


def _sampled_rows(choices: Sequence[Choice]) -> dict[str, Row]:
    rows = {SAMPLING: Row(name=SAMPLING, role="baseline", options={"temperature": 1.0})}
    for name, options, method in choices:
        if not method.declaration.row_seeds:
            continue
        mask, weight, against = method.mask, method.weight, [SAMPLING]
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


def ranking_rows(choices: Sequence[Choice]) -> list[Row]:
    """The rows of a task whose options are ranked by likelihood: both scores, and what the mask does to them.

    A method without likelihoods (search) has no row.

    Examples:
        >>> [row.name for row in ranking_rows([parse("cd", {"amateur": "testbed:amateur"})])]
        ['plain', 'amateur alone', 'cd', 'cd, raw', 'plain, mask 0.1', 'cd, mask']
    """
    rows = {PLAIN: Row(name=PLAIN, role="baseline"), **_alone(choices)}
    for name, options, method in choices:
        if not method.declaration.likelihoods:
            continue
        rows[name] = Row(name=name, role="method", options=options, against=(PLAIN,), note="renormalised, no mask")
        raw = f"{name}, raw"
        note = "the weighted sum itself, no mask"
        rows[raw] = Row(name=raw, role="method", options={**options, "score": "raw"}, against=(PLAIN,), note=note)
        mask = method.mask
        if mask is None:
            continue
        against = [PLAIN]
        if (off := method.declaration.forms[method.form or ""].off) is not None:
            against.append(f"{PLAIN}, mask {mask:g}")
            how = {**options, **off, "masked": True}
            rows[against[-1]] = Row(name=against[-1], role="control", options=how, against=(PLAIN,), note="mask only")
        masked = f"{name}, mask"
        note = "an implausible token counts for -1000"
        rows[masked] = Row(
            name=masked, role="method", options={**options, "masked": True}, against=tuple(against), note=note
        )
    return list(rows.values())
