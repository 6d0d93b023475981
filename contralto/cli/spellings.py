"""The spellings of options that the commands accept, and the page of them in the documentation.

Every option is accepted with dashes and with underscores, and a switch also with the value `true` or `false`, as transformers and TRL
write it. The names that other tools give to an option are its aliases. `--help` shows one spelling of each option.

    python -m contralto.cli.options > docs/options.md
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

__all__ = ["ALIASES", "Alias", "aliases_of", "options_of", "page", "respelled", "spelled"]

FOLDERS = ("amateur", "compare", "convert", "critic", "data", "judge")
"""Commands whose output is a folder."""
TRUTH = {"true": True, "false": False}
"""Values of a switch, in lower case."""


class Alias(NamedTuple):
    """A name that another tool gives to an option."""

    name: str
    """The name, with underscores."""
    option: str
    """The name of contralto's option or positional argument, with underscores."""
    source: str
    """The tools that have the name."""
    commands: tuple[str, ...] = ()
    """The commands that accept it; empty for every command with the option."""
    implies: tuple[str, ...] = ()
    """Arguments that it brings, since it has this meaning in the other tool."""
    beside: str = ""
    """An alias without which it has another meaning."""


SEARCH, DOLA = ("--method", "search"), ("--method", "dola")
ALIASES = (
    Alias("model_name_or_path", "model", "transformers, TRL"),
    Alias("adapter_name_or_path", "adapter", "LLaMA-Factory"),
    Alias("torch_dtype", "dtype", "transformers"),
    Alias("device_map", "device", "transformers", ("generate", "explain")),
    Alias("do_sample", "sample", "transformers"),
    Alias("num_beams", "beams", "transformers"),
    Alias("max_tokens", "max_new_tokens", "vLLM, OpenAI"),
    Alias("max_gen_toks", "max_new_tokens", "lm-eval"),
    Alias("negative_prompt", "contrast_prompt", "transformers"),
    Alias("penalty_alpha", "alpha", "transformers", ("generate",), SEARCH),
    Alias("top_k", "k", "transformers, with penalty_alpha", ("generate",), SEARCH, "penalty_alpha"),
    Alias("dola_layers", "layers", "transformers", ("generate", "explain"), DOLA),
    Alias("output_file", "output", "transformers", ("generate",)),
    Alias("output_dir", "output", "transformers, TRL", FOLDERS),
    Alias("output_path", "output", "lm-eval", ("compare",)),
    Alias("num_train_epochs", "epochs", "transformers, TRL", ("amateur", "critic")),
    Alias("max_steps", "steps", "transformers, TRL", ("amateur",)),
    Alias("per_device_train_batch_size", "batch_size", "transformers, TRL", ("amateur", "critic")),
)


def aliases_of(parser: argparse.ArgumentParser) -> Iterator[Alias]:
    """Yield the aliases that a parser accepts: those of its options, and of a positional argument with one value.

    Args:
        parser: the parser of a command, whose `prog` ends in the command or in the command and its action.
    """
    words, dests = parser.prog.split(), {*_positions(parser), *(name[2:] for name in _by_name(options_of(parser)))}
    for alias in ALIASES:
        if alias.option in dests and (not alias.commands or set(alias.commands) & set(words)):
            yield alias


def options_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Return the options of a parser by their spellings, such as `--beta`.

    Args:
        parser: any parser.
    """
    return {option: action for action in parser._actions for option in action.option_strings}


def respelled(words: Sequence[str], known: Iterable[str]) -> list[str]:
    """Return a command line with the dashes and underscores of options as a parser spells them.

    Args:
        words: the arguments. What follows `--` stays as it is, and so do unknown options and values.
        known: the spellings that the parser has.

    Examples:
        >>> respelled(["--model-args", "a-b=c", "--num_fewshot=2"], ["--model_args", "--num_fewshot"])
        ['--model_args', 'a-b=c', '--num_fewshot=2']
    """
    by_name = _by_name(known)
    end = words.index("--") if "--" in words else len(words)
    made = []
    for word in words[:end]:
        name, equals, value = word.partition("=")
        made.append(by_name.get(_name(name), name) + equals + value if name.startswith("--") else word)
    return [*made, *words[end:]]


def spelled(words: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """Return a command line in the spelling of a parser: its options, aliases and switches.

    Args:
        words: the arguments.
        parser: the parser of a command.

    Raises:
        ValueError: an alias belongs to a method, and another method is given.

    Examples:
        >>> parser = argparse.ArgumentParser("generate")
        >>> _ = parser.add_argument("--max-new-tokens"), parser.add_argument("--sample", action="store_true")
        >>> spelled(["--max_new_tokens", "9", "--do_sample", "True", "--", "--a_b"], parser)
        ['--max-new-tokens', '9', '--sample', '--', '--a_b']
    """
    options, positions = options_of(parser), _positions(parser)
    by_name = _by_name(options)
    given = {_name(word.partition("=")[0]) for word in words if word.startswith("--")}
    aliases = {f"--{a.name}": a for a in aliases_of(parser) if not a.beside or f"--{a.beside}" in given}
    words = respelled(words, options)
    end = words.index("--") if "--" in words else len(words)
    made, first, implied = list[str](), list[str](), list[str]()
    left = list(words[:end])
    while left:
        name, equals, value = (word := left.pop(0)).partition("=")
        option = _option(name, aliases, options, positions)
        if option in positions:  # the value of a positional argument, which stands first
            first += [value] if equals else [left.pop(0)] if left else []
        elif option is None:
            made.append(word)
        else:
            made.append(by_name[f"--{option}"] + equals + value)
            implied += _implied(aliases[_name(name)], words[:end], implied)
    return [*first, *_switched(made, options), *implied, *words[end:]]


def _option(
    name: str, aliases: Mapping[str, Alias], options: Mapping[str, argparse.Action], positions: set[str]
) -> str | None:
    """Return the option or positional argument that a word names in another spelling; None for other words."""
    if not name.startswith("--"):
        return None
    if _name(name) in aliases:
        return aliases[_name(name)].option
    return _name(name)[2:] if name not in options and _name(name)[2:] in positions else None


def _implied(alias: Alias, words: Sequence[str], already: Sequence[str]) -> Sequence[str]:
    """Return the arguments that an alias brings, unless they are there."""
    if not alias.implies or already:
        return ()
    option, value = alias.implies
    given = [after for word, after in zip(words, [*words[1:], ""], strict=True) if word == option]
    given += [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]
    if given and given[-1] != value:
        raise ValueError(f"--{alias.name} is an option of {option} {value}, and {option} is {given[-1]}: leave one out")
    return () if given else alias.implies


def _switched(words: Sequence[str], options: Mapping[str, argparse.Action]) -> Iterator[str]:
    """Yield the words with `true` and `false` after a switch turned into the switch or its absence."""
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        action = options.get(name)
        if action is None or action.nargs != 0 or f"--{name.removeprefix('--no-')}" in options.keys() - {name}:
            yield word  # the negation of a switch has no value
            continue
        if not equals and left and left[0].lower() in TRUTH:
            value = left.pop(0)
        if TRUTH.get(value.lower(), True):
            yield name if value.lower() in ("", "true") else word
        elif f"--no-{name[2:]}" in options:
            yield f"--no-{name[2:]}"


def _positions(parser: argparse.ArgumentParser) -> set[str]:
    """Return the names of positional arguments with one value."""
    return {action.dest for action in parser._actions if not action.option_strings and action.nargs is None}


def _name(option: str) -> str:
    """Return an option with underscores."""
    return "--" + option[2:].replace("-", "_")


def _by_name(options: Iterable[str]) -> dict[str, str]:
    """Return spellings of options by their names with underscores."""
    return {_name(option): option for option in options if option.startswith("--")}


HEAD = """# Names of options

Written by `python -m contralto.cli.options`.

Every option of every command is accepted with dashes and with underscores: `--max-new-tokens` and `--max_new_tokens`, also those of TRL in
`contralto align`, of lm-eval in `contralto eval` and of vLLM in `contralto serve`. A switch may have a value, as in transformers and TRL:
`--sample true`. Options are not abbreviated. An unknown name is an error that suggests the nearest one. `--help` shows one spelling of each
option, and these names of other tools stand for it:

| name | of | option | commands |
|---|---|---|---|
"""
TAIL = """
`--penalty_alpha` brings `--method search`, and `--top_k` beside it is the number of candidates, as in `generate()`; `--dola_layers` brings
`--method dola`. `--guidance_scale` is the parameter of `--method cfg` under its own name. `contralto align` takes every option of
`trl dpo`, and `--model`, `--dataset`, `--teacher` and `--output` as short forms; `contralto eval` takes every flag of lm-eval, where the model is `--model_args pretrained=MODEL`.
"""


def page(commands: Iterable[argparse.ArgumentParser]) -> str:
    """Return the page of the documentation.

    Args:
        commands: the parsers of all commands and actions.
    """
    users: dict[Alias, list[str]] = {}
    for parser in commands:
        for alias in aliases_of(parser):
            command = parser.prog.split()[1]
            if command not in users.setdefault(alias, []):
                users[alias].append(command)
    lines = [
        f"| `--{alias.name}` | {alias.source} | {_shown(alias)} | {', '.join(users[alias])} |"
        for alias in ALIASES
        if alias in users
    ]
    return HEAD + "\n".join(lines) + "\n" + TAIL


def _shown(alias: Alias) -> str:
    return " ".join(f"`{part}`" for part in (f"--{alias.option.replace('_', '-')}", " ".join(alias.implies)) if part)
