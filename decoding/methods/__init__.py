"""The decoding methods by name: which options each reads, what its branches are, how it is made.

Commands offer the options of all methods as flags (`add_arguments`); programs name them (`choice`). `check` refuses those
that the chosen method does not read, and values outside their range, before anything is loaded.
"""

import argparse
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contralto import decoding
from contralto.decoding import rules
from contralto.decoding.branches import AdaptersOff
from contralto.decoding.executors.search import ContrastiveSearch
from contralto.decoding.executors.search_processor import ContrastiveSearchLogitsProcessor
from contralto.decoding.executors.speculative import SpeculativeContrastiveDecoding
from contralto.decoding.images import diffusion_noise

SOURCES = ("amateur", "adapters_off", "expert", "antiexpert", "contrast_prompt")
"""Flags that say where the other branches come from."""


class Form(NamedTuple):
    """A formula with its parameters."""

    rule: Callable[..., Any]
    parameters: Mapping[str, Any]
    """Names and defaults; a flag each."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A decoding method."""

    does: str
    make: Callable[..., Any]
    """Its logits processor, or what stands for `generate()`'s own loop."""
    forms: Mapping[str, Form]
    """By --form, the default first; a single formula has no name."""
    branches: tuple[str, ...]
    """What the rule's distributions are called, the main one first."""
    models: tuple[str, ...] = ()
    """Flags of the other models, if the other branches are other models."""
    views: tuple[str, ...] = ()
    """What the model reads in the other branches, if it is the same: the image `noised` or `transformed`, the prompt
    `blind`, that is without image, or another `prompt`."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Parameters that are not of the formula."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Its flags of `SOURCES`."""
        adapters_off = ("adapters_off",) if self.models else ()
        return (*self.models, *adapters_off, *(("contrast_prompt",) if "prompt" in self.views else ()))


def _dola(rule: Callable[..., Tensor], final: Tensor, layer: Tensor, *, relative_top: float) -> Tensor:
    """A form of DoLa's rule for one candidate layer."""
    return rule(final, layer[None], relative_top=relative_top)


_OBRIEN = Form(rules.contrastive_decoding, {"beta": 0.5, "alpha": 0.1})
_LI = Form(rules.contrastive_decoding_li, {"alpha": 0.1, "amateur_temperature": 1.0})
_NOISE = {"noise_step": 500}

METHODS = {
    "none": Method(
        does="no contrast",
        make=dict,
        forms={"": Form(lambda: None, {})},
        branches=(),
    ),
    "cd": Method(
        does="contrastive decoding: a weaker model subtracted",
        make=decoding.ContrastiveDecodingLogitsProcessor,
        forms={"obrien": _OBRIEN, "li": _LI},
        branches=("expert", "amateur"),
        models=("amateur",),
        more={"amateur_window": None},
    ),
    "scd": Method(
        does="the same, faster: the amateur drafts, the expert reads the drafts (speculative)",
        make=SpeculativeContrastiveDecoding,
        forms={"obrien": _OBRIEN, "li": _LI},
        branches=("expert", "amateur"),
        models=("amateur",),
        more={"amateur_window": None, "draft_length": None},
    ),
    "search": Method(
        does="contrastive search: of the k likeliest tokens one unlike the text so far",
        make=ContrastiveSearchLogitsProcessor,
        forms={"": Form(ContrastiveSearch, {"alpha": 0.6, "k": 4})},
        branches=(),
    ),
    "vcd": Method(
        does="visual contrastive decoding: a noised image subtracted",
        make=decoding.VisualContrastiveDecodingLogitsProcessor,
        forms={"": Form(rules.visual_contrastive_decoding, {"alpha": 1.0, "beta": 0.1})},
        branches=("image", "noised image"),
        views=("noised",),
        more=_NOISE,
    ),
    "ritual": Method(
        does="a randomly transformed image added",
        make=decoding.RitualLogitsProcessor,
        forms={"": Form(rules.ritual, {"kappa": 3.0, "beta": 0.1, "normalize": False})},
        branches=("image", "transformed image"),
        views=("transformed",),
    ),
    "ritual-vcd": Method(
        does="both: a transformed image added, a noised one subtracted",
        make=decoding.RitualVCDLogitsProcessor,
        forms={"": Form(rules.ritual_vcd, {"kappa": 3.0, "alpha": 1.0, "beta": 0.1})},
        branches=("image", "transformed image", "noised image"),
        views=("transformed", "noised"),
        more=_NOISE,
    ),
    "m3id": Method(
        does="the prompt without its image subtracted, more and more",
        make=decoding.M3IDLogitsProcessor,
        forms={"": Form(partial(rules.m3id, step=0), {"lam": 0.02, "beta": 0.1})},
        branches=("image", "no image"),
        views=("blind",),
    ),
    "icd": Method(
        does="instruction contrastive decoding: a disturbed instruction subtracted",
        make=decoding.InstructionContrastiveDecodingLogitsProcessor,
        forms={"": Form(rules.instruction_contrastive_decoding, {"alpha": 1.0, "beta": 0.1})},
        branches=("instruction", "disturbed instruction"),
        views=("prompt",),
    ),
    "cid": Method(
        does="contrastive input decoding: what the prompt makes likely and another does not",
        make=decoding.ContrastiveInputDecodingLogitsProcessor,
        forms={
            "probability": Form(rules.contrastive_input_decoding, {"lam": 10.0}),
            "log_ratio": Form(rules.contrastive_input_decoding_log_ratio, {"lam": 1.0, "alpha": 0.1}),
        },
        branches=("prompt", "contrast prompt"),
        views=("prompt",),
    ),
    "cad": Method(
        does="context-aware decoding: the prompt without its context subtracted",
        make=decoding.ContextAwareDecodingLogitsProcessor,
        forms={"": Form(rules.context_aware_decoding, {"alpha": 0.5})},
        branches=("with context", "without context"),
        views=("prompt",),
    ),
    "cfg": Method(
        does="classifier-free guidance: away from a negative prompt, or from the prompt's last token alone",
        make=decoding.ClassifierFreeGuidanceLogitsProcessor,
        forms={"": Form(rules.classifier_free_guidance, {"guidance_scale": 1.5})},
        branches=("prompt", "negative prompt"),
        views=("prompt",),
    ),
    "dola": Method(
        does="an earlier layer of the same model subtracted",
        make=decoding.DoLaLogitsProcessor,
        forms={
            "kl": Form(partial(_dola, rules.dola), {"relative_top": 0.1}),
            "jsd": Form(partial(_dola, rules.dola_jsd), {"relative_top": 0.1}),
        },
        branches=("last layer", "earlier layer"),
        more={"layers": "high", "final_norm": True},
    ),
    "proxy": Method(
        does="proxy tuning: a small tuned model added, the same untuned subtracted",
        make=decoding.ProxyTuningLogitsProcessor,
        forms={"": Form(rules.proxy_tuning, {"alpha": 1.0})},
        branches=("base", "expert", "anti-expert"),
        models=("expert", "antiexpert"),
    ),
}


# -------------------------------------------------------------------------------------------------------------- options


def layers(given: Any) -> str | list[int]:
    """The value of layers: low, high, or numbers."""
    text = str(given)
    return text if text in ("low", "high") else [int(number) for number in text.strip("[]").split(",")]


PARAMETERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "alpha": (float, "plausibility threshold, contrast strength, or penalty (search)"),
    "beta": (float, "contrast strength (cd, scd), or plausibility threshold"),
    "kappa": (float, "weight of the transformed image"),
    "lam": (float, "contrast strength (cid; the default is ours), or how fast it grows (m3id)"),
    "guidance_scale": (float, "of cfg; 1 is no guidance"),
    "relative_top": (float, "plausibility threshold of dola"),
    "layers": (layers, "of dola: low, high, or numbers such as 2,4,6; 1 is the first"),
    "final_norm": (bool, "whether dola's earlier layers pass the final norm (the official code: no)"),
    "k": (int, "candidates of search"),
    "normalize": (bool, "divide ritual's scores by 1 + kappa"),
    "noise_step": (int, "how far the image diffuses, 0 to 999"),
    "amateur_temperature": (float, "of --form li"),
    "amateur_window": (int, "prompt tokens the amateur sees (default all; Li et al.: 1)"),
    "draft_length": (int, "tokens the amateur drafts at a time (default: it adapts)"),
}
"""Every parameter of some method: its type, and what it is."""
OPTIONS = ("method", "form", *SOURCES, *PARAMETERS)
"""All that says how to decode."""
TYPES = {float: "a number", int: "a whole number", bool: "true or false"}


def choice(**given: Any) -> argparse.Namespace:
    """A method with its options, checked, as programs name them.

    Args:
        given: any of `OPTIONS`; None is the default.

    Raises:
        TypeError: a value of another type.
        ValueError: an unknown option, and all that `check` refuses.

    Examples:
        >>> choice(method="cd", amateur="testbed:amateur", beta=1).beta
        1.0
        >>> choice(method="vcd", kappa=1)
        Traceback (most recent call last):
            ...
        ValueError: method='vcd' has no kappa; its own are alpha, beta, noise_step
    """
    if unknown := [name for name in given if name not in OPTIONS]:
        raise ValueError(f"there is no option {unknown[0]!r}; a method's options are {', '.join(OPTIONS)}")
    args = argparse.Namespace(**dict.fromkeys(OPTIONS))
    for name, value in given.items():
        setattr(args, name, value if value is None else _typed(name, value))
    if args.method not in (None, *METHODS):
        raise ValueError(f"there is no method {args.method!r}; there are {', '.join(METHODS)}")
    try:
        check(args)
    except ValueError as error:
        raise ValueError(_as_options(str(error))) from None
    return args


def _typed(name: str, value: Any) -> Any:
    """A value in its option's type; numbers may be whole where others are allowed, and texts are not numbers."""
    kind: Any = PARAMETERS.get(name, (bool if name == "adapters_off" else str,))[0]
    if kind is str:
        return value
    if kind is layers:
        try:
            return layers(
                ",".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value
            )
        except ValueError:
            raise ValueError(f"layers must be low, high or numbers such as 2,4,6, not {value!r}") from None
    fits = isinstance(value, bool) == (kind is bool) and isinstance(value, (int, float) if kind is float else kind)
    if not fits:
        raise TypeError(f"{name} must be {TYPES[kind]}, not {value!r}")
    return kind(value)


def _as_options(message: str) -> str:
    """A message about flags, for those who name options."""
    named = re.sub(r"--(method|form) (\w[\w-]*)", r"\1='\2'", message)
    return re.sub(r"--([a-z][a-z-]*)", lambda found: found[1].replace("-", "_"), named)


def add_arguments(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """The flags of the methods `names`; they are listed at the end of the help."""
    group = parser.add_argument_group("method (its parameters bear the letters of its paper)")
    group.add_argument("--method", choices=names, help="see below; default: cd with an amateur, else none")
    group.add_argument("--contrast-prompt", metavar="TEXT", help="what the other branch reads; {prompt} is the prompt")
    forms = (f"{name}: {' or '.join(m.forms)}" for name, m in METHODS.items() if name in names and len(m.forms) > 1)
    group.add_argument("--form", help=f"which formula, the first by default; {'; '.join(forms)}")
    for name, (kind, purpose) in PARAMETERS.items():
        how: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        group.add_argument(flag(name), help=purpose, **how)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "methods, with their flags and defaults:\n" + "\n".join(map(_describe, names))


def _describe(name: str) -> str:
    """A method in the help: what it does, and the flags of each of its forms."""
    method = METHODS[name]
    lines = [f"  {name:<12}{method.does}"]
    for form, (_, parameters) in method.forms.items():
        flags = [flag(source) for source in method.sources]
        flags += [_default(p, d) for p, d in {**parameters, **method.more}.items()]
        lines += [f"  {'':<12}" + " ".join([f"--form {form}"] * bool(form) + flags)] if form or flags else []
    return "\n".join(lines)


def _default(name: str, value: Any) -> str:
    """A parameter's flag in the help, with its default if it has one."""
    if isinstance(value, bool):
        return flag(f"no_{name}" if value else name)
    return flag(name) if value is None else f"{flag(name)} {value}"


def flag(name: str) -> str:
    """A parameter as a flag."""
    return f"--{name.replace('_', '-')}"


def check(args: argparse.Namespace) -> None:
    """Settle the method and its form, and refuse what it does not read, does without, or cannot take.

    Raises:
        ValueError: a flag of another method or form, a model missing, a parameter outside its range.
    """
    args.method = args.method or ("cd" if args.amateur or args.adapters_off else "none")
    method = METHODS[args.method]
    _check_flags(args, method)
    _check_models(args, method)
    for name in ("k", "amateur_window", "draft_length"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"{flag(name)} must be at least 1, not {getattr(args, name)}")
    given, rule = parameters(args), method.forms[args.form or ""].rule
    known = inspect.signature(rule).parameters
    rule(*[torch.zeros(1)] * len(method.branches), **{name: given[name] for name in given if name in known})
    if "noise_step" in given:
        diffusion_noise(torch.zeros(1, 1), step=given["noise_step"])


def _check_flags(args: argparse.Namespace, method: Method) -> None:
    """Every flag of some method that is given must be one of this method in this form."""
    forms = [form for form in method.forms if form]
    if args.form and args.form not in forms:
        known = f"it has {' and '.join(forms)}" if forms else "leave --form out"
        raise ValueError(f"--method {args.method} has no --form {args.form}: {known}")
    args.form = args.form or next(iter(forms), None)
    own = [*method.sources, *_defaults(args)]
    every = {name for m in METHODS.values() for f in m.forms.values() for name in (*f.parameters, *m.more)}
    given = [name for name in SOURCES if getattr(args, name)] + [
        n for n in sorted(every) if getattr(args, n) is not None
    ]
    foreign = [name for name in given if name not in own]
    if foreign:
        chosen = f"--method {args.method}" + (f" --form {args.form}" if args.form else "")
        has = f"its own are {', '.join(map(flag, own))}" if own else "it decodes without contrast"
        raise ValueError(f"{chosen} has no {flag(foreign[0])}; {has}")


def _check_models(args: argparse.Namespace, method: Method) -> None:
    """The models of the other branches must be given, the last one by name or as another without its adapters."""
    if not method.models:
        return
    last, whose = method.models[-1], method.models[-2] if len(method.models) > 1 else "model"
    if args.adapters_off and getattr(args, last):
        raise ValueError(f"give either {flag(last)} or --adapters-off, not both")
    missing = [name for name in method.models if not getattr(args, name) and not (name == last and args.adapters_off)]
    if missing:
        other = f", or --adapters-off for {flag(whose)} without its adapters" if missing[0] == last else ""
        raise ValueError(
            f"--method {args.method} weighs the model against others: give {flag(missing[0])} MODEL{other}"
        )


def _defaults(args: argparse.Namespace) -> dict[str, Any]:
    """The parameters of the chosen method in its form."""
    method = METHODS[args.method]
    return {**method.forms[args.form or ""].parameters, **method.more}


def parameters(args: argparse.Namespace) -> dict[str, Any]:
    """The parameters of the chosen method: as given, or its defaults."""
    found = {name: getattr(args, name) for name in _defaults(args)}
    return {name: found[name] if found[name] is not None else value for name, value in _defaults(args).items()}


# --------------------------------------------------------------------------------------------------------- how it is made


class Setting(NamedTuple):
    """What a method is made for."""

    model: Any
    others: tuple[Any, ...]
    """The models of the other branches: models, or `AdaptersOff`."""
    inputs: Mapping[str, Any]
    """A batch of prompts."""
    views: tuple[Mapping[str, Any], ...]
    """The same batch as the other branches see it."""


def processor(args: argparse.Namespace, setting: Setting, **more: Any) -> Any:
    """The chosen method as a logits processor (for `scd`, as a loop), made for a batch."""
    method = METHODS[args.method]
    own = {name: value for name, value in parameters(args).items() if name != "noise_step"}
    own |= {"form": args.form} if args.form else {}
    first = setting.others if method.models else (setting.model, *setting.views)
    if not setting.views:  # else they hold masks of their own
        accepted = inspect.signature(method.make).parameters
        own |= {name: value for name, value in _sources(setting).items() if name in accepted}
    made = method.make(*first, **own, **more)
    if isinstance(made, decoding.ContrastiveLogitsProcessor):
        made.check_model(setting.model)
    return made


def _sources(setting: Setting) -> dict[str, Any]:
    """What other models read besides the tokens."""
    if setting.model.config.is_encoder_decoder:
        return {"encoder_inputs": setting.inputs}
    vision = {n: value for n, value in setting.inputs.items() if n not in ("input_ids", "attention_mask")}
    return {"attention_mask": setting.inputs["attention_mask"], "vision_inputs": vision or None}


def arguments(
    args: argparse.Namespace, setting: Setting, *, executor: str, beams: int = 1, streamer: Any = None
) -> dict[str, Any]:
    """What `generate()` is told so that it decodes by the chosen method."""
    if args.method == "none":
        return {"streamer": streamer}
    if args.method == "scd":
        return {"custom_generate": processor(args, setting, streamer=streamer)}
    if args.method == "search" and executor == "loop":
        return {"custom_generate": ContrastiveSearch(**parameters(args), streamer=streamer)}
    # with one plausible token, beams that are sure of it would have nothing to branch into
    keep = {"min_tokens_to_keep": 2} if args.method == "cd" and beams > 1 else {}
    made = processor(args, setting, **keep)
    if executor == "loop":
        return {"custom_generate": made.loop(streamer=streamer)}
    return {"logits_processor": [made], "streamer": streamer}


def cost(args: argparse.Namespace, model: Any, others: Sequence[Any], *, executor: str) -> str:
    """Which branches run, and what they cost beside plain decoding: one line."""
    method = METHODS[args.method]
    if args.method == "none":
        said = "1 forward per token"
    elif args.method == "search":
        candidates = f"for all {parameters(args)['k']} candidates"
        said = f"1 forward per token {candidates}" if executor == "loop" else f"2 forwards per token, one {candidates}"
    elif args.method == "dola":
        said = "1 forward per token" if executor == "loop" else "2 forwards per token"
        said += ", and its head once more for every earlier layer"
    elif method.models:
        named = zip(method.branches[1:], others, strict=True)
        sizes = [_size(name, other, method.branches[0], model) for name, other in named]
        how = ", drafts read several at a time" if args.method == "scd" else " per token"
        said = "; ".join([f"{1 + len(others)} models{how}", *sizes])
    else:
        count = len(method.branches)
        said = f"{count} rows per prompt in one forward" if executor == "loop" else f"{count} forwards per token"
        said += f" ({', '.join(method.branches)})"
    return f"{args.method}: {said}"


def _size(name: str, model: Any, main_name: str, main: Any) -> str:
    """How large another model is."""
    if isinstance(model, AdaptersOff):
        return f"{name} is the same model without its adapters"
    count = model.num_parameters()
    return f"{name} {count / 1e6:,.2f}M parameters, {count / main.num_parameters():.0%} of the {main_name}'s"
