"""The controls of a comparison: simpler decoders that could explain the gains of a method (Yin et al. 2025, arXiv 2504.10020).

- *mask*: sampling from the plausible tokens alone, that is `min_p` with the method's threshold. It never changes a greedy
  choice, so that greedy decoding under the mask is greedy decoding.
- *scale*: a method whose weights on what the model believes add up to w sharpens by itself, as the temperature 1 / w does.
  The control samples at that temperature, under the same mask: `p >= m max p` before it is `p >= m^w max p` after it. The controls of
  sampling act at every token, also where a gate skips the contrast.
- *alone*: the other model by itself.
- *uniform*: the likelihoods of the method's formula with equal probabilities in place of its other distributions, that is sharpening by
  itself. Its raw scores add a constant for each token, so that long options score higher, as do those of the method.
- *bias*: for questions of yes and no, greedy decoding with its threshold moved until it says yes as often.
- *OLM* and *PBA*: the spurious baselines of Yin et al. (The Mirage of Performance Gains) for questions of yes and no.
  Output layer modification answers yes where p(yes) and p(no) are close; prompt-based adjustment asks for yes in the prompt. Their third
  one, the plausibility constraint without a contrast, is the mask under sampling.

The threshold, the sum of the weights and the parameters that turn a contrast off are fields of the method's declaration, see
`contralto.decoding.methods.Form`. They are required: no method is compared without its controls.
"""

from collections.abc import Sequence

from contralto.decoding.methods.controls import has_effect
from contralto.eval.comparison.decoders import DecoderChoice
from contralto.eval.comparison.rows import ComparisonRow

__all__ = ["OLM_DISTANCE", "OLM_MASS", "generation_rows", "ranking_rows"]

GREEDY, SAMPLING, PLAIN = "greedy", "sampling", "plain"
OLM_MASS, OLM_DISTANCE = 0.2, 0.5
"""Output layer modification answers yes where p(yes) + p(no) is above the first and their distance below the second."""


def _alone(choices: Sequence[DecoderChoice]) -> dict[str, ComparisonRow]:
    """Return a row for the other model of each method that has one."""
    rows = {}
    for choice in choices:
        models = list(choice.config.declaration.models)
        if choice.config.declaration.branches and len(models) == 1 and models[0] in choice.config.models:
            name = f"{models[0]} alone"
            rows[name] = ComparisonRow(name=name, role="control", alone=models[0], note="what is subtracted, by itself")
    return rows


def generation_rows(
    choices: Sequence[DecoderChoice], *, sampled: bool, yes_no: bool = False, hint: str | None = None
) -> list[ComparisonRow]:
    """Return the rows of a task whose answers are generated: greedy ones first, then sampled ones.

    Args:
        choices: The methods.
        sampled: Add sampled rows.
        yes_no: The answers are yes or no, so that a threshold can be moved.
        hint: The sentence after a question that asks for yes, for prompt-based adjustment; None if the task has none.

    Examples:
        >>> from contralto.eval.comparison.decoders import parse_decoder
        >>> vcd = parse_decoder("vcd")
        >>> for row in generation_rows([vcd], sampled=True, yes_no=True, hint=" Answer yes whenever possible."):
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
    rows = {GREEDY: ComparisonRow(name=GREEDY, role="baseline"), **_alone(choices), **spurious}
    for name, options, config in choices:
        against = [GREEDY, *spurious]
        if config.mask is not None:
            control = f"{GREEDY}, mask {config.mask:g}"
            note = "the same as greedy, by definition"
            rows[control] = ComparisonRow(name=control, role="control", same_as=GREEDY, note=note)
        if yes_no:
            against.append(f"{GREEDY}, yes as {name}")
            rows[against[-1]] = ComparisonRow(
                name=against[-1],
                role="control",
                against=(GREEDY,),
                matched_to=name,
                note=f"greedy with its threshold moved until it says yes as often as {name}",
            )
        rows[name] = ComparisonRow(name=name, role="method", options=options, against=tuple(against))
    if sampled:
        rows |= _sampled_rows(choices)
    return list(rows.values())


def _spurious(hint: str | None) -> dict[str, ComparisonRow]:
    """Return the baselines of Yin et al. (arXiv 2504.10020), which only answer yes more often."""
    olm = ComparisonRow(
        name=f"{GREEDY}, OLM",
        role="control",
        against=(GREEDY,),
        modified=True,
        note=f"yes where p(yes) + p(no) > {OLM_MASS:g} and they differ by less than {OLM_DISTANCE:g} (arXiv 2504.10020)",
    )
    if hint is None:
        return {olm.name: olm}
    note = f"the prompt asks for yes: {hint.strip()!r} (arXiv 2504.10020)"
    pba = ComparisonRow(name=f"{GREEDY}, PBA", role="control", against=(GREEDY,), hint=hint, note=note)
    return {olm.name: olm, pba.name: pba}


def _sampled_rows(choices: Sequence[DecoderChoice]) -> dict[str, ComparisonRow]:
    rows = {SAMPLING: ComparisonRow(name=SAMPLING, role="baseline", options={"temperature": 1.0})}
    for choice in choices:
        if choice.config.declaration.row_seeds:
            controls = _sampled_controls(choice)
            name = f"{choice.name}, {SAMPLING}"
            rows |= {row.name: row for row in controls}
            rows[name] = ComparisonRow(
                name=name,
                role="method",
                options={**choice.options, "temperature": 1.0},
                against=(SAMPLING, *(row.name for row in controls)),
            )
    return rows


def _sampled_controls(choice: DecoderChoice) -> list[ComparisonRow]:
    """Return the controls of sampling: the mask alone, and the mask with the equivalent temperature."""
    mask, weight, rows = choice.config.mask, choice.config.weight, []
    if mask is not None:
        rows.append(
            ComparisonRow(
                name=f"{SAMPLING}, mask {mask:g}",
                role="control",
                options={"temperature": 1.0, "min_p": mask},
                against=(SAMPLING,),
                note="mask only",
            )
        )
    if weight != 1:
        masked = "" if mask is None else ", mask" if mask == 0.1 else f", mask {mask:g}"
        rows.append(
            ComparisonRow(
                name=f"{SAMPLING}{masked}, T {1 / weight:.3g}",
                role="control",
                options={"temperature": 1 / weight} | ({} if mask is None else {"min_p": mask**weight}),
                against=(SAMPLING,),
                note=f"the temperature that the weights of {choice.name} amount to, 1 / {weight:g}",
            )
        )
    return rows


def ranking_rows(choices: Sequence[DecoderChoice]) -> list[ComparisonRow]:
    """Return the rows of a task whose options are ranked by likelihood: the method renormalised, raw and under its mask, and their controls.

    A method without likelihoods has no row.

    Args:
        choices: The methods.

    Examples:
        >>> from contralto.eval.comparison.decoders import parse_decoder
        >>> [row.name for row in ranking_rows([parse_decoder("cd", {"amateur": "testbed:amateur"})])]
        ['plain', 'amateur alone', 'cd, uniform', 'cd', 'cd, uniform, raw', 'cd, raw', 'plain, mask 0.1', 'cd, mask']
    """
    rows = {PLAIN: ComparisonRow(name=PLAIN, role="baseline"), **_alone(choices)}
    for choice in choices:
        if choice.config.declaration.likelihoods:
            rows |= {row.name: row for row in _ranking_rows_of(choice)}
    return list(rows.values())


def _ranking_rows_of(choice: DecoderChoice) -> list[ComparisonRow]:
    name, options, config = choice
    rows = [
        *_scored_rows(choice, renormalized=True, note="renormalised, no mask"),
        *_scored_rows(choice, renormalized=False, note="the weighted sum itself, no mask"),
    ]
    if config.mask is None:
        return rows
    against, masked = [PLAIN], {**options, "masked": True}
    if config.declaration.forms[config.form or ""].off is not None:
        against.append(f"{PLAIN}, mask {config.mask:g}")
        rows.append(_control_row(against[-1], {**masked, "control": "mask"}, "mask only"))
    note = "an implausible token counts for -1000"
    return [*rows, _method_row(f"{name}, mask", masked, tuple(against), note)]


def _scored_rows(choice: DecoderChoice, *, renormalized: bool, note: str) -> list[ComparisonRow]:
    """Return the row of a method without its mask, after its control: the same score with uniform distributions, if that changes any."""
    name, options, config = choice
    kind, scored = ("", dict(options)) if renormalized else (", raw", {**options, "score": "raw"})
    if not has_effect(config, renormalized=renormalized):
        return [_method_row(f"{name}{kind}", scored, (PLAIN,), note)]
    control, others = f"{name}, uniform{kind}", ", ".join(config.declaration.branches[1:])
    what = f"the formula of {name} with equal probabilities for {others}: sharpening alone"
    what += "" if renormalized else ", and a constant for each token, which prefers options of many tokens"
    return [
        _control_row(control, {**scored, "control": "uniform"}, what),
        _method_row(f"{name}{kind}", scored, (PLAIN, control), note),
    ]


def _control_row(name: str, options: dict[str, object], note: str) -> ComparisonRow:
    return ComparisonRow(name=name, role="control", options=options, against=(PLAIN,), note=note)


def _method_row(name: str, options: dict[str, object], against: tuple[str, ...], note: str) -> ComparisonRow:
    return ComparisonRow(name=name, role="method", options=options, against=against, note=note)
