"""The declaration of a decoding method: every fact about it, written once.

Command-line flags and help, errors, the vLLM table, the controls of a comparison, cost lines, tables of the documentation and the test
matrix are derived from the declaration. Every field of `Method` is required: a declaration that leaves one out does not import.
"""

import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from inspect import Parameter as SignatureParameter
from typing import Any, Literal, NamedTuple

from contralto.decoding.methods.reference import Reference, argument_docs, load, signature_of
from contralto.decoding.methods.views import VIEWS, Extra

__all__ = ["GATE", "Critic", "Form", "Method", "MethodParameter", "Support", "Unsupported"]

KINDS: Mapping[str, type] = {"float": float, "int": int, "bool": bool, "int | None": int, "float | None": float}
"""Types of parameters by their annotation."""
COST_FIELDS = ("branches", "rows", "models")
"""Names in the cost lines, besides those of the parameters."""
GATE = "gate"
"""The parameter of every method whose branches can be skipped, see `Method.has_gate`."""
GATED = "contralto.decoding.processors.gated:GatedLogitsProcessor"


class Unsupported(NamedTuple):
    """A capability that a method does not have, with the reason; its truth value is False."""

    reason: str
    """Why, as the end of a sentence whose subject is the method."""

    def __bool__(self) -> bool:
        return False


Support = Literal[True] | Unsupported
"""A capability: True, or the reason why the method does not have it."""


class Critic(str):
    """The description of another model that is a token classifier with one label, the value of a text so far.

    It stands among the `models` of a method in place of a plain text, which describes a language model.

    Examples:
        >>> f"the critic: {Critic('a token classifier')}"
        'the critic: a token classifier'
    """

    __slots__ = ()


class MethodParameter(NamedTuple):
    """A parameter of a method, as its declaration and the signature of its rule define it."""

    name: str
    default: Any
    kind: type | None
    """float, int or bool; None if `convert` makes the value."""
    description: str
    convert: Callable[[Any], Any] | None = None
    least: int | None = None
    is_new: bool = False


@dataclass(frozen=True, kw_only=True)
class Form:
    """A formula of a method.

    Args:
        rule: a pure function of the logits of the branches. Its keyword parameters are parameters of the method, with their defaults,
            types and descriptions.
        internal: keyword parameters that executors set, such as `step`, the number of generated tokens.
        stacked: whether its last branch is `(..., L, V)`: several candidate distributions.
        mask: the parameter that is the plausibility threshold; None if the formula has none.
        weight: makes of the parameters the sum of the weights with which the formula adds log-probabilities: where the branches agree,
            it sharpens by this power.
        off: values of parameters with which the formula is its mask alone; None if there are none.
    """

    rule: Reference
    internal: tuple[str, ...]
    stacked: bool
    mask: str | None
    weight: Callable[..., float]
    off: Mapping[str, float] | None

    @cached_property
    def branch_names(self) -> tuple[str, ...]:
        """Return the leading tensor parameters of the rule, as words."""
        named = signature_of(self.rule).parameters.values()
        return tuple(p.name.replace("_", " ") for p in named if p.kind is SignatureParameter.POSITIONAL_OR_KEYWORD)

    @cached_property
    def parameters(self) -> Mapping[str, MethodParameter]:
        """Return the parameters of the rule by name, without internal ones."""
        named = signature_of(self.rule).parameters.values()
        own = [p for p in named if p.kind is SignatureParameter.KEYWORD_ONLY and p.name not in self.internal]
        return {p.name: _from_signature(p.name, self.rule, p) for p in own}

    def scores(self, branches: Sequence[Any], *, step: Any = 0, **parameters: Any) -> Any:
        """Apply the rule.

        Args:
            branches: logits `(..., V)` of each branch, the main branch first.
            step: number of tokens generated before, for rules that depend on it.
            parameters: parameters of the rule.

        Returns:
            Scores `(..., V)`.
        """
        branches = [*branches[:-1], branches[-1].unsqueeze(-2)] if self.stacked else branches
        timed = {"step": step} if "step" in self.internal else {}
        return load(self.rule)(*branches, **timed, **parameters)

    def check(self, count: int) -> None:
        """Raise ValueError unless the form fits its rule and the number of branches of the method."""
        if len(self.branch_names) != count:
            raise ValueError(f"the rule has the branches {self.branch_names}, and the method has {count}")
        keywords = signature_of(self.rule).parameters
        if missing := [name for name in self.internal if name not in keywords]:
            raise ValueError(f"internal names {missing[0]!r}, which is not a parameter of the rule")
        if self.mask is not None and self.mask not in self.parameters:
            raise ValueError(f"mask names {self.mask!r}, which is not a parameter of the rule")
        if unknown := [name for name in self.off or {} if name not in self.parameters]:
            raise ValueError(f"off names {unknown[0]!r}, which is not a parameter of the rule")
        try:
            float(self.weight(**{name: parameter.default for name, parameter in self.parameters.items()}))
        except TypeError as error:
            raise ValueError(f"weight cannot be computed from the parameters of the rule: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Method:
    """A decoding method.

    Args:
        name: what users call it.
        description: one line for help texts and tables.
        papers: arXiv identifiers of its papers; empty if there are none.
        processor: its logits processor, `processor(*models_or_(model, *views), **parameters)`, or why it has none.
        loop: a decoding loop of its own; None if the loop is that of the processor.
        likelihoods: the logits processor whose scores are its log-probabilities, or why it has none.
        forms: its formulas by name, the default first; the name of a single formula is empty.
        branches: names of the distributions that it combines, the main branch first; empty if it combines none.
        models: descriptions of the other models, by name, if the other branches are other models, or, of a method without branches, if it
            scores its candidates by other models; a `Critic` is a token classifier, the others are language models.
        views: names in `VIEWS`, if the other branches are the same model with other inputs.
        contrast_prompt_optional: whether it works without a contrast prompt, if it has the view `prompt`.
        extra: parameters that are not of the rule.
        beams: beam search.
        sampling: sampling.
        row_seeds: sampling in which every row has a random stream of its own, so that texts do not depend on the batch.
        streaming: streaming of tokens as they are chosen.
        encoder_decoder: encoder-decoder models.
        vllm: decoding in vLLM.
        cost: sentence about the cost for each executor, `loop` and `processor`, with `{parameter}`, `{rows}`, `{models}`
            ("2 models") and `{branches}`.

    Raises:
        TypeError: a field is left out.
        ValueError: the fields do not fit each other, or the signatures of rule and processor.
    """

    name: str
    description: str
    papers: tuple[str, ...]
    processor: Reference | Unsupported
    loop: Reference | None
    likelihoods: Reference | Unsupported
    forms: Mapping[str, Form]
    branches: tuple[str, ...]
    models: Mapping[str, str]
    views: tuple[str, ...]
    contrast_prompt_optional: bool
    extra: Mapping[str, Extra]
    beams: Support
    sampling: Support
    row_seeds: Support
    streaming: Support
    encoder_decoder: Support
    vllm: Support
    cost: Mapping[str, str]
    _parameters: dict[str, Mapping[str, MethodParameter]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise ValueError(f"method {self.name!r}: {problem}")

    @property
    def contrasts(self) -> bool:
        """Return True if the method changes the generated tokens."""
        return bool(self.forms)

    @property
    def other_names(self) -> tuple[str, ...]:
        """Return the names of the other branches, or of the models that score its candidates."""
        return self.branches[1:] or tuple(self.models)

    @property
    def default_form(self) -> str:
        """Return the name of the first form."""
        return next(iter(self.forms), "")

    @property
    def executors(self) -> tuple[str, ...]:
        """Return the executors that run it, the default first."""
        if not self.contrasts:
            return ()
        return ("loop", "processor") if self.processor else ("loop",)

    @property
    def sources(self) -> tuple[str, ...]:
        """Return the options that provide the inputs or models of the other branches."""
        adapters_off = ("adapters_off",) if self.models and self.branches else ()
        return (*self.models, *adapters_off, *(("contrast_prompt",) if "prompt" in self.views else ()))

    @property
    def reads_images(self) -> bool:
        """Return True if a branch is made of the images of the prompt."""
        return any(VIEWS[view].reads_image for view in self.views)

    @property
    def has_gate(self) -> bool:
        """Return True if its other branches can be skipped where the main one is sure: by its processor, or by a loop that has a gate."""
        return len(self.branches) > 1 and (self.loop is None or GATE in signature_of(self.loop).parameters)

    @property
    def is_seeded(self) -> bool:
        """Return True if a branch depends on a seed."""
        return any(VIEWS[view].is_seeded for view in self.views)

    def parameters(self, form: str | None = None) -> Mapping[str, MethodParameter]:
        """Return the parameters by name: of the formula, of the method, of its views, and the gate.

        Args:
            form: the name of a form; None is the default form.
        """
        form = form or self.default_form
        if form not in self._parameters:
            rule = self.forms[form].parameters if form in self.forms else {}
            extras = {**self.extra, **self.view_parameters}
            own = {**rule, **{name: _from_extra(name, each) for name, each in extras.items()}}
            self._parameters[form] = own | ({GATE: _gate()} if self.has_gate else {})
        return self._parameters[form]

    @property
    def view_parameters(self) -> Mapping[str, Extra]:
        """Return the parameters of its views, which its processor does not take."""
        return {name: extra for view in self.views for name, extra in VIEWS[view].parameters.items()}


def _from_signature(
    name: str, of: Reference, parameter: SignatureParameter, extra: Extra | None = None
) -> MethodParameter:
    kind, convert = KINDS.get(parameter.annotation), extra.convert if extra else None
    if kind is None and convert is None:
        raise ValueError(f"the parameter {name!r} must be annotated as one of {', '.join(KINDS)}")
    if parameter.default is SignatureParameter.empty:
        raise ValueError(f"the parameter {name!r} needs a default")
    text = argument_docs(of).get(parameter.name, "")
    least, is_new = (extra.least, extra.is_new) if extra else (None, False)
    return MethodParameter(name, parameter.default, kind, text, convert, least, is_new)


def _gate() -> MethodParameter:
    """Return the parameter that `GatedLogitsProcessor` takes, which is None without a gate."""
    return MethodParameter(GATE, None, float, argument_docs(GATED)[GATE], is_new=True)


def _from_extra(name: str, extra: Extra) -> MethodParameter:
    signature, own = signature_of(extra.of).parameters, extra.name or name
    if own not in signature:
        raise ValueError(f"extra {name!r} is not a parameter of {extra.of!r}")
    return _from_signature(name, extra.of, signature[own], extra)


def _problems(method: Method) -> Iterator[str]:
    """Yield the problems of a declaration."""
    if unknown := [view for view in method.views if view not in VIEWS]:
        yield f"there is no view {unknown[0]!r}; there are {', '.join(VIEWS)}"
    if method.models and method.views:
        yield "a method may have models or views, not both"
    others = len(method.models) + len(method.views)
    scores_candidates = bool(method.models) and not method.branches
    if others and not scores_candidates and len(method.branches) != others + 1:
        yield f"it has {len(method.branches)} branches, but {others} models or views in addition to the main branch"
    if len(method.forms) > 1 and "" in method.forms:
        yield "each form of a method with several forms needs a name"
    if bool(method.forms) != bool(method.processor or method.loop):
        yield "a method with a form needs a processor or a loop, and only such a method"
    if "prompt" not in method.views and method.contrast_prompt_optional:
        yield "contrast_prompt_optional is only for methods with the view 'prompt'"
    for name, form in method.forms.items():
        try:
            form.check(len(method.branches))
            parameters = method.parameters(name)
        except ValueError as error:
            yield f"form {name!r}: {error}"
            return
        if method.has_gate and GATE in (*form.parameters, *method.extra, *method.view_parameters):
            yield f"{GATE!r} names the gate of every method with branches: name the parameter otherwise"
        yield from _constructor_problems(method, parameters)
        yield from _cost_problems(method, parameters)


def _constructor_problems(method: Method, parameters: Mapping[str, MethodParameter]) -> Iterator[str]:
    """Yield parameters that the processor or loop of a method does not take."""
    for target in (method.processor or None, method.loop):
        if target is None:
            continue
        accepted = signature_of(target).parameters
        if any(p.kind is SignatureParameter.VAR_KEYWORD for p in accepted.values()):
            continue
        for name in parameters:
            if name not in accepted and name not in (GATE, *method.view_parameters):
                yield f"{target!r} has no parameter {name!r}"


def _cost_problems(method: Method, parameters: Mapping[str, MethodParameter]) -> Iterator[str]:
    if set(method.cost) != set(method.executors):
        yield f"cost must have a line for each of {', '.join(method.executors)}, not for {', '.join(method.cost)}"
    for line in method.cost.values():
        for _, name, _, _ in string.Formatter().parse(line):
            if name is not None and name not in (*COST_FIELDS, *parameters):
                yield f"cost names {name!r}, which is not a parameter"
