"""Flags and help of the decoding methods, derived from their declarations."""

import argparse
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from contralto.cli.flags import flag
from contralto.decoding.methods import METHODS, DecodingConfig, Method, MethodParameter, model_options, parameter_names
from contralto.decoding.quantization import MAIN, check_bits, quantization_options, take_bits

if TYPE_CHECKING:
    from contralto.decoding.loading import Models

__all__ = [
    "add_method_arguments",
    "add_model_arguments",
    "add_quantization_arguments",
    "bits_from",
    "config_from",
    "models_from",
    "parameter_help",
]


def add_model_arguments(parser: argparse._ArgumentGroup, names: Collection[str] | None = None) -> None:
    """Add the flags of other models.

    Args:
        parser: a group of a command's parser.
        names: the methods that the command offers; None is all.
    """
    for name, methods in model_options(names).items():
        users = " and ".join(method.name for method in methods)
        parser.add_argument(flag(name), help=f"of {users}: {methods[0].models[name]}")
    parser.add_argument(
        "--adapters-off",
        action="store_true",
        help="use the preceding (or main) model without its PEFT adapters as the last other model",
    )
    add_quantization_arguments(parser, names)


def add_quantization_arguments(parser: argparse._ArgumentGroup, names: Collection[str] | None = None) -> None:
    """Add the flags that load models in 4 or 8 bits.

    Args:
        parser: a group of a command's parser.
        names: the methods that the command offers; None is all.
    """
    offered = (MAIN, *model_options(names))
    for name, (model, bits) in quantization_options().items():
        if model not in offered:
            continue
        whose = "the model" if model == MAIN else f"the {model}"
        parser.add_argument(
            flag(name),
            action="store_true",
            default=None,
            help=f"load {whose} in {bits} bits ({'NF4' if bits == 4 else 'LLM.int8'}, by bitsandbytes)",
        )


def bits_from(args: argparse.Namespace, models: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of bits of each quantised model.

    Args:
        args: of a parser with the flags of `add_quantization_arguments`.
        models: the other models of the method, by name.

    Raises:
        OptionError: a model that is not given, or 4 and 8 bits at once.
        ModuleNotFoundError: bitsandbytes is not installed.
    """
    bits = take_bits({name: getattr(args, name, None) for name in quantization_options()})
    check_bits(bits, models)
    return bits


def models_from(args: argparse.Namespace, config: DecodingConfig, *, with_images: bool) -> "Models":
    """Load the models of a command that decodes.

    Args:
        args: its flags.
        config: the method with the names of its other models.
        with_images: whether the prompts have images.

    Raises:
        ValueError: see `contralto.decoding.loading.load_models`.
    """
    from contralto.decoding.loading import load_models  # imports torch

    return load_models(
        args.model,
        config,
        with_images=with_images,
        dtype=args.dtype,
        device=args.device,
        adapter=args.adapter,
        bits=bits_from(args, config.models),
    )


def add_method_arguments(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Add the flags of methods; the methods are listed at the end of the help.

    Args:
        parser: the parser of a command.
        names: the methods that the command offers.
    """
    group = parser.add_argument_group("method (parameters are named as in the paper)")
    group.add_argument("--method", choices=names, help="see below; default: cd with an amateur, else none")
    group.add_argument("--contrast-prompt", metavar="TEXT", help="prompt of the other branch; {prompt} is the prompt")
    forms = (f"{name}: {' or '.join(METHODS[name].forms)}" for name in names if len(METHODS[name].forms) > 1)
    group.add_argument("--form", help=f"which formula, the first by default; {'; '.join(forms)}")
    for name in parameter_names(names):
        options: dict[str, Any] = {"help": parameter_help(name, names).replace("%", "%%")}
        group.add_argument(flag(name), **options, **_action(name, [parameter for _, parameter in _uses(name)]))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "methods, with their flags and defaults:\n" + "\n".join(_describe(METHODS[name]) for name in names)


def _uses(name: str) -> Iterable[tuple[Method, MethodParameter]]:
    """Yield the methods that have a parameter, each with its own description of it."""
    for method in METHODS.values():
        for form in method.forms:
            if name in method.parameters(form):
                yield method, method.parameters(form)[name]


def parameter_help(name: str, names: Collection[str] | None = None) -> str:
    """Return the descriptions of a parameter, each with the methods that share it.

    Args:
        name: the name of a parameter of some method.
        names: the methods that the command offers; None is all.
    """
    meanings: dict[str, list[str]] = {}
    for method, parameter in (use for use in _uses(name) if names is None or use[0].name in names):
        text = re.split(r"[;.:] |[;.]$|, see ", parameter.description.replace("`", ""))[0]
        meanings.setdefault(text, []).append(method.name)
    return "; ".join(f"{text} ({', '.join(dict.fromkeys(names))})" for text, names in meanings.items())


def _action(name: str, parameters: Sequence[MethodParameter]) -> dict[str, Any]:
    """Return the arguments of `add_argument` for a parameter's type."""
    kinds = {parameter.convert or parameter.kind for parameter in parameters}
    if len(kinds) > 1:
        raise ValueError(f"the methods disagree about the type of {name!r}: rename it in one of them")
    (kind,) = kinds
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": _type(parameters[0].convert) if parameters[0].convert else kind}


def _type(convert: Callable[[Any], Any]) -> Callable[[str], Any]:
    """Return a type for argparse, which would replace the message of a ValueError by the name of the function."""

    def read(text: str) -> Any:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _describe(method: Method) -> str:
    """Return the lines of a method in the help: its description, and the flags of each of its forms."""
    lines = [f"  {method.name:<12}{method.description}"]
    for form in method.forms:
        flags = [flag(source) for source in method.sources]
        flags += [_default(parameter) for parameter in method.parameters(form).values()]
        lines += [f"  {'':<12}" + " ".join([f"--form {form}"] * bool(form) + flags)] if form or flags else []
    return "\n".join(lines)


def _default(parameter: MethodParameter) -> str:
    """Return a parameter's flag with its default, if it has one."""
    name, value = parameter.name, parameter.default
    if isinstance(value, bool):
        return flag(name if value else f"no_{name}")
    return flag(name) if value is None else f"{flag(name)} {value}"


def config_from(args: argparse.Namespace, **options: Any) -> DecodingConfig:
    """Return the checked configuration of parsed flags.

    Args:
        args: of a parser with the flags of this module; those of methods that the command does not offer may be missing.
        options: further options of `DecodingConfig`, such as `sampling`.

    Raises:
        OptionError: an invalid option.
        ValueError: the same, where the rule of the method checks a value.
    """
    return DecodingConfig(
        method=args.method or "",
        form=args.form,
        parameters={name: getattr(args, name, None) for name in parameter_names()},
        models={name: getattr(args, name, None) for name in model_options()},
        adapters_off=args.adapters_off,
        contrast_prompt=args.contrast_prompt,
        **options,
    )
