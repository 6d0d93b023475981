"""The configuration of decoding: a method with its parameters, its other models, sampling and executor, checked once."""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from contralto.common.options import Option, OptionError
from contralto.common.suggestions import closest, did_you_mean
from contralto.decoding.methods.base import GATE, Critic, Method, MethodParameter, Unsupported
from contralto.decoding.methods.reference import load
from contralto.decoding.methods.registry import METHODS
from contralto.decoding.methods.variants import is_variant, variant_options

__all__ = ["DecodingConfig", "SamplingConfig", "check_sampling", "model_options", "option_names", "parameter_names"]

TYPES = {float: "a number", int: "a whole number", bool: "true or false"}


def model_options(methods: Collection[str] | None = None) -> dict[str, list[Method]]:
    """Return the names of the options for other models, each with the methods that have it.

    Args:
        methods: the names of the methods; None is all.
    """
    found: dict[str, list[Method]] = {}
    for method in _chosen(methods):
        for name in method.models:
            found.setdefault(name, []).append(method)
    return found


def _chosen(methods: Collection[str] | None) -> list[Method]:
    return [method for name, method in METHODS.items() if methods is None or name in methods]


def parameter_names(methods: Collection[str] | None = None) -> tuple[str, ...]:
    """Return the names of the parameters of methods.

    Args:
        methods: the names of the methods; None is all.
    """
    forms = [(method, form) for method in _chosen(methods) for form in method.forms]
    return tuple(dict.fromkeys(name for method, form in forms for name in method.parameters(form)))


def option_names() -> tuple[str, ...]:
    """Return the names of all options of `DecodingConfig.from_options`."""
    return ("method", "form", *model_options(), "adapters_off", "contrast_prompt", *parameter_names())


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Sampling parameters.

    Args:
        temperature: a finite number above 0.
        top_k: number of likeliest tokens that stay; 0 is all.
        top_p: the likeliest tokens that make up this probability stay, in (0, 1].
        min_p: tokens of at least this share of the likeliest one's probability stay, in [0, 1].

    Raises:
        OptionError: a value outside its range.

    Examples:
        >>> SamplingConfig(top_p=0.0)
        Traceback (most recent call last):
            ...
        contralto.common.options.OptionError: top_p must lie in (0, 1], not 0.0
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise OptionError(
                "{name} must be a finite number above 0, not {value}: leave {sampling} out for greedy decoding",
                name=Option("temperature"),
                sampling=Option("sampling"),
                value=self.temperature,
            )
        if not 0 < self.top_p <= 1:
            raise OptionError("{name} must lie in (0, 1], not {value}", name=Option("top_p"), value=self.top_p)
        if not 0 <= self.min_p <= 1:
            raise OptionError("{name} must lie in [0, 1], not {value}", name=Option("min_p"), value=self.min_p)
        if self.top_k < 0:
            raise OptionError("{name} must be at least 0, not {value}", name=Option("top_k"), value=self.top_k)


def check_sampling(
    temperature: float, *, top_k: int, top_p: float, min_p: float, greedy: str, prefix: str = ""
) -> None:
    """Check sampling parameters of which temperature 0 selects greedy decoding.

    Args:
        temperature: 0, or a temperature of `SamplingConfig`.
        top_k: see `SamplingConfig`.
        top_p: see `SamplingConfig`.
        min_p: see `SamplingConfig`.
        greedy: the meaning of temperature 0, for the error.
        prefix: the prefix of the parameters' names, for the errors.

    Raises:
        ValueError: a value is outside its range, or truncation is set without a temperature.

    Examples:
        >>> check_sampling(0.0, top_k=0, top_p=0.9, min_p=0.0, greedy="greedy decoding")
        Traceback (most recent call last):
            ...
        ValueError: top_k, top_p and min_p apply only to sampling: set temperature above 0 too
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(
            f"{prefix}temperature must be a finite number of at least 0 (0 for {greedy}), not {temperature}"
        )
    try:
        sampling = SamplingConfig(top_k=top_k, top_p=top_p, min_p=min_p)
    except OptionError as error:
        if not prefix:
            raise
        raise ValueError(f"{prefix}{error}") from None
    if not temperature and sampling != SamplingConfig():
        raise ValueError(f"{prefix}top_k, top_p and min_p apply only to sampling: set {prefix}temperature above 0 too")


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """A decoding method with all that determines how it runs.

    Args:
        method: a name in `METHODS`; empty is the first method that takes the models, without models no contrast.
        form: the formula; None is the method's first.
        parameters: parameters of the method; those that are left out or None have their defaults.
        models: the other models of the method, by name: a folder, a hub id, `testbed:NAME`, a model, or the model itself, weakened:
            `self:layers=8`, `self:dropout=0.3`, `self:int8`, see `contralto.decoding.methods.variants`.
        adapters_off: use the preceding (or main) model without its adapters as the last other model.
        contrast_prompt: what the view `prompt` reads; `{prompt}` in it is the prompt.
        sampling: sampling parameters; None takes the best token.
        beams: number of beams.
        executor: "loop" or "processor"; None is the faster one that can run the rest.

    Raises:
        OptionError: an option that the method does not have or does not support, a model that is missing, a value of another type or
            outside its range.
        ValueError: the same, where the rule itself checks a value.
        TypeError: a parameter of another type.

    Examples:
        >>> DecodingConfig(method="vcd", parameters={"alpha": 2}).parameters
        {'alpha': 2.0, 'beta': 0.1, 'noise_step': 500, 'gate': None}
        >>> DecodingConfig(models={"amateur": "testbed:amateur"}).method
        'cd'
    """

    method: str = ""
    form: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    models: Mapping[str, Any] = field(default_factory=dict)
    adapters_off: bool = False
    contrast_prompt: str | None = None
    sampling: SamplingConfig | None = None
    beams: int = 1
    executor: str | None = None

    def __post_init__(self) -> None:
        self._set("models", {name: model for name, model in self.models.items() if model})
        self._set("adapters_off", bool(self.adapters_off))
        self._set("method", self.method or _default_method(self.models, adapters_off=self.adapters_off))
        if self.method not in METHODS:
            raise ValueError(
                f"there is no method {self.method!r}{did_you_mean(self.method, METHODS)}; there are {', '.join(METHODS)}"
            )
        _check_form(self)
        self._set("form", self.form or self.declaration.default_form or None)
        _check_names(self)
        _check_models(self)
        self._set("parameters", dict(_typed_parameters(self)))
        _check_ranges(self)
        self._set("executor", _executor_of(self))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen once it is made

    @classmethod
    def from_options(cls, **options: Any) -> "DecodingConfig":
        """Return the configuration of a flat set of options.

        Args:
            options: the fields of `DecodingConfig`; models and parameters of methods by their names. None is the default.

        Raises:
            TypeError: a value of another type.
            ValueError: an unknown option, and all that `DecodingConfig` rejects.

        Examples:
            >>> DecodingConfig.from_options(method="cd", amateur="testbed:amateur", beta=1).parameters["beta"]
            1.0
            >>> DecodingConfig.from_options(method="vcd", kappa=1)
            Traceback (most recent call last):
                ...
            contralto.common.options.OptionError: method='vcd' has no kappa; its own are alpha, beta, noise_step, gate
        """
        if unknown := [name for name in options if name not in (*option_names(), *_OWN)]:
            hint = did_you_mean(unknown[0], (*option_names(), *_OWN))
            raise ValueError(
                f"there is no option {unknown[0]!r}{hint}; a method's options are {', '.join(option_names())}"
            )
        values = {name: value for name, value in options.items() if value is not None}
        if not isinstance(values.get("adapters_off", False), bool):
            raise TypeError(f"adapters_off must be true or false, not {values['adapters_off']!r}")
        models = {name: values.pop(name) for name in model_options() if name in values}
        own = {name: values.pop(name) for name in _OWN if name in values}
        return cls(parameters=values, models=models, **own)

    @property
    def declaration(self) -> Method:
        """Return the declaration of the method."""
        return METHODS[self.method]

    @property
    def contrasts(self) -> bool:
        """Return True if the method changes the generated tokens."""
        return self.declaration.contrasts

    @property
    def rule_parameters(self) -> dict[str, Any]:
        """Return the parameters of the formula."""
        form = self.declaration.forms.get(self.form or "")
        return {name: self.parameters[name] for name in form.parameters} if form else {}

    @property
    def mask(self) -> float | None:
        """Return the plausibility threshold; None if the formula has none."""
        form = self.declaration.forms.get(self.form or "")
        return float(self.parameters[form.mask]) if form and form.mask else None

    @property
    def weight(self) -> float:
        """Return the power by which the formula sharpens where the branches agree."""
        form = self.declaration.forms.get(self.form or "")
        return float(form.weight(**self.rule_parameters)) if form else 1.0

    @property
    def active_views(self) -> tuple[str, ...]:
        """Return the views of the branches; none if the contrast prompt is optional and left out."""
        views = self.declaration.views
        return () if "prompt" in views and self.contrast_prompt is None else views

    def check_contrast_prompt(self, *, always: bool = False) -> None:
        """Raise OptionError if the method needs a contrast prompt and has none.

        Args:
            always: require it of methods that can do without, too.

        Raises:
            OptionError: there is no contrast prompt.
        """
        method = self.declaration
        optional = method.contrast_prompt_optional and not always
        if "prompt" in method.views and not optional and self.contrast_prompt is None:
            raise OptionError(
                "{method} contrasts prompts: set {option}, a template in which {{prompt}} is the prompt",
                method=Option("method", self.method),
                option=Option("contrast_prompt"),
            )

    def describe(self) -> dict[str, Any]:
        """Return the options that determine a completion, besides sampling and executor, as plain values."""
        named = {"method": self.method, **self.models, "adapters_off": self.adapters_off}
        named |= {"contrast_prompt": self.contrast_prompt, "form": self.form}
        new = {each.name for each in self.declaration.parameters(self.form).values() if each.is_new}
        own = {name: value for name, value in self.parameters.items() if value is not None or name not in new}
        return {name: value for name, value in named.items() if value} | own


_OWN = tuple(each.name for each in fields(DecodingConfig) if each.name not in ("parameters", "models"))
"""Fields that are options themselves."""


def _default_method(models: Mapping[str, Any], *, adapters_off: bool) -> str:
    """Return the first method that takes the models that are given; without any, the first one without contrast."""
    given = bool(models) or adapters_off
    if not given:
        return next(name for name, method in METHODS.items() if not method.contrasts)
    fitting = [name for name, method in METHODS.items() if method.models and set(models) <= set(method.models)]
    some = [name for name, method in METHODS.items() if set(models) & set(method.models)]
    return next(iter([*fitting, *some]))


def _check_form(config: DecodingConfig) -> None:
    forms = [form for form in config.declaration.forms if form]
    if config.form and config.form not in forms:
        instead = f"it has {' and '.join(forms)}" if forms else "leave {option} out"
        raise OptionError(
            "{method} has no {form}: " + instead,
            method=Option("method", config.method),
            form=Option("form", config.form),
            option=Option("form"),
        )


def _check_names(config: DecodingConfig) -> None:
    """Raise OptionError for an option that is not one of the method in its form."""
    method = config.declaration
    own = (*method.sources, *method.parameters(config.form))
    given = [*config.models, *(["adapters_off"] if config.adapters_off else [])]
    given += ["contrast_prompt"] if config.contrast_prompt else []
    given += sorted(name for name, value in config.parameters.items() if value is not None)
    if foreign := [name for name in given if name not in own]:
        has = "its own are {own}" if own else "it decodes without contrast"
        meant = closest(foreign[0], own)
        raise OptionError(
            ("{method} {form}" if config.form else "{method}")
            + (" has no {name} (did you mean {meant}?); " if meant else " has no {name}; ")
            + has,
            method=Option("method", config.method),
            form=Option("form", config.form),
            name=Option(foreign[0]),
            meant=Option(meant or ""),
            own=[Option(name) for name in own],
        )


def _check_models(config: DecodingConfig) -> None:
    """Raise OptionError unless the other models are given, the last one by name or as another model without its adapters."""
    names = list(config.declaration.models)
    if not names:
        return
    weakened = [name for name, model in config.models.items() if is_variant(model)]
    for name in weakened:
        _check_variant(name, config)
    last, tuned = names[-1], names[-2] if len(names) > 1 else "model"
    if config.adapters_off and last in config.models:
        raise OptionError("set either {last} or {off}, not both", last=Option(last), off=Option("adapters_off"))
    needed = names[:-1] if config.adapters_off else names
    if missing := [name for name in needed if name not in config.models]:
        can_be_off = missing[0] == last and "adapters_off" in config.declaration.sources
        other = ", or {off} for {tuned} without its adapters" if can_be_off else ""
        raise OptionError(
            "{method} needs other models: set {missing}" + other,
            method=Option("method", config.method),
            missing=Option(missing[0]),
            off=Option("adapters_off"),
            tuned=Option(tuned),
        )


def _check_variant(name: str, config: DecodingConfig) -> None:
    """Raise OptionError for the model itself as an amateur, where it is misspelled or cannot be."""
    if isinstance(config.declaration.models.get(name), Critic):
        raise OptionError(
            "{name} must be the folder or hub id of a token classifier, not the model itself: train one with contralto critic",
            name=Option(name, config.models[name]),
        )
    try:
        variant_options(config.models[name])
    except ValueError as error:
        raise OptionError("{name}: {why}", name=Option(name), why=str(error)) from None
    if config.adapters_off:
        raise OptionError(
            "{name} and {off} are both given, and either makes the other model of the model itself: give one",
            name=Option(name, config.models[name]),
            off=Option("adapters_off"),
        )


def _typed_parameters(config: DecodingConfig) -> Iterator[tuple[str, Any]]:
    """Yield all parameters of the method with their values in the right type."""
    for name, parameter in config.declaration.parameters(config.form).items():
        value = config.parameters.get(name)
        yield name, parameter.default if value is None else _typed(parameter, value)


def _typed(parameter: MethodParameter, value: Any) -> Any:
    """Return a value in the type of its parameter: whole numbers may stand for others, strings may not."""
    if parameter.convert is not None:
        return parameter.convert(value)
    kind: Any = parameter.kind
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise TypeError(f"{parameter.name} must be {TYPES[kind]}, not {value!r}")
    return kind(value)


def _check_ranges(config: DecodingConfig) -> None:
    """Raise an error for a value outside its range, by applying the rule to one token."""
    method = config.declaration
    for name, parameter in method.parameters(config.form).items():
        value = config.parameters[name]
        if parameter.least is not None and value is not None and value < parameter.least:
            raise OptionError(
                "{name} must be at least {least}, not {value}", name=Option(name), least=parameter.least, value=value
            )
    if not method.contrasts:
        return
    import torch

    method.forms[config.form or ""].scores([torch.zeros(1, 1)] * len(method.branches), **config.rule_parameters)
    if config.parameters.get(GATE) is not None:
        load("contralto.decoding.rules.gate:check_gate")(config.parameters[GATE])
    for name, extra in method.view_parameters.items():
        own = extra.name or name
        try:
            load(extra.of)(torch.zeros(1, 1), **{own: config.parameters[name]})
        except ValueError as error:  # the function names its own parameter
            raise OptionError("{name}{why}", name=Option(name), why=str(error).removeprefix(own)) from None


def _executor_of(config: DecodingConfig) -> str:
    """Return the executor, after checks of what the method and the executor support."""
    method, named = config.declaration, Option("method", config.method)
    if config.beams < 1:
        raise OptionError("{name} must be at least 1, not {value}", name=Option("beams"), value=config.beams)
    if config.beams > 1 and not method.beams:
        raise OptionError(
            "{method} {why}: leave {beams} out", method=named, why=method.beams.reason, beams=Option("beams")
        )
    if config.sampling and not method.sampling:
        raise OptionError(
            "{method} {why}: leave {option} out", method=named, why=method.sampling.reason, option=Option("sampling")
        )
    if config.executor == "processor" and method.contrasts and isinstance(method.processor, Unsupported):
        raise OptionError("{method} {why}", method=named, why=method.processor.reason)
    if config.beams > 1 and config.executor == "loop":
        raise OptionError(
            "{loop} does not support beam search: use {processor}",
            loop=Option("executor", "loop"),
            processor=Option("executor", "processor"),
        )
    if config.executor not in (None, "loop", "processor"):
        raise OptionError(
            "{name} must be loop or processor, not {value}", name=Option("executor"), value=config.executor
        )
    return config.executor or ("processor" if config.beams > 1 or not method.contrasts else method.executors[0])
