"""Write the files of the repositories for `custom_generate` from the declarations of the methods.

python -m contralto.decoding.hub.contents hub      writes those of this project
"""

import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

from contralto.common.files import replace_text
from contralto.decoding.hub.repositories import REPOSITORIES, Argument, HubRepository, check_name
from contralto.decoding.methods.base import Support
from contralto.decoding.methods.reference import description_of

__all__ = ["files", "write"]

WIDTH = 119
NEEDS = ("contralto>=0.2", "transformers>=5.19")
"""Lines of requirements.txt; transformers compares the first condition of each."""


def files(name: str, repo_id: str | None = None) -> dict[str, str]:
    """Return the files of a repository.

    Args:
        name: a name in `REPOSITORIES`.
        repo_id: the value of `custom_generate` in the example; None for the folder `./hub/NAME`.

    Returns:
        Their content, by path.

    Raises:
        ValueError: there is no such repository.

    Examples:
        >>> list(files("dola"))
        ['README.md', 'custom_generate/generate.py', 'custom_generate/requirements.txt']
    """
    repository = check_name(name)
    return {
        "README.md": _readme(repository, repo_id or f"./hub/{name}"),
        "custom_generate/generate.py": _code(repository),
        "custom_generate/requirements.txt": "".join(f"{line}\n" for line in NEEDS),
    }


def write(folder: Path, contents: Mapping[str, str]) -> None:
    """Write files below a folder, each as a whole or not at all.

    Args:
        folder: is made if there is none.
        contents: their content, by path.
    """
    for path, text in contents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        replace_text(folder / path, text)


# ----------------------------------------------------------------------------------------------------------- generate.py


def _code(repository: HubRepository) -> str:
    arguments = repository.arguments
    lines = [
        f'"""{repository.title} as `custom_generate`, by contralto, which holds the method: `contralto.decoding`."""',
        "",
        "from contralto.decoding.hub import decode",
        "",
        "",
        "def generate(",
        "    model,",
        "    *,",
        *(f"    {each.name}={_literal(each.default)}," for each in arguments),
        "    **kwargs,",
        "):",
        f'    """Generate by {repository.declaration.description.split(":")[0]}.',
        "",
        "    Args:",
        *_entry("model", "the model that generates."),
        *(line for each in arguments for line in _entry(each.name, each.description)),
        *_entry("kwargs", "the other arguments of `generate()`."),
        "",
        "    Returns:",
        "        What `generate()` returns.",
        '    """',
        "    return decode(",
        f'        "{repository.name}",',
        "        model,",
        "        kwargs,",
        *(f"        {each.name}={each.name}," for each in arguments),
        "    )",
    ]
    return "\n".join(lines) + "\n"


def _literal(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _entry(name: str, text: str) -> Iterator[str]:
    yield from textwrap.wrap(f"{name}: {text}", WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 12)


# ------------------------------------------------------------------------------------------------------------- README.md


def _readme(repository: HubRepository, repo_id: str) -> str:
    papers = [f"[arXiv {paper}](https://arxiv.org/abs/{paper})" for paper in repository.declaration.papers]
    sections = {
        "Description": f"{repository.purpose}\n\nPapers: {', '.join(papers)}.",
        "Base model": "None. The repository holds no weights: pass its name, or the path of its folder, as `custom_generate`.",
        "Model compatibility": _compatibility(repository),
        "Installation": "```sh\npip install contralto\n```\n\nThe method is in the Python package contralto; `custom_generate/generate.py` "
        "calls it, and nothing else is run from this repository.",
        "Additional arguments": "\n".join(_item(each) for each in repository.arguments),
        "Output type changes": "None: the output is that of `generate()`. Scores and logits are returned if they are asked for, "
        "attentions and hidden states are not.",
        "Formula": "\n\n".join(_formulas(repository)),
        "Example usage": f"```py\n{repository.example.replace('{repo_id}', repo_id)}```",
    }
    body = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in sections.items())
    head = "---\nlibrary_name: transformers\nlicense: apache-2.0\ntags:\n- custom_generate\n---\n\n"
    return (
        f"{head}# {repository.title}\n\n{body}\n\nThis page and the code are written by `contralto hub write` from the declaration of the "
        f"method `{repository.method}`. Names such as `plausible` are of `contralto.decoding.rules`.\n"
    )


def _item(argument: Argument) -> str:
    default = "" if argument.default is None else f", defaults to {_literal(argument.default)}"
    optional = "" if argument.description.endswith("Required.") else ", *optional*"
    return f"- `{argument.name}` (`{argument.kind}`{optional}{default}): {argument.description}"


def _compatibility(repository: HubRepository) -> str:
    method = repository.declaration
    kinds = "Decoder-only and encoder-decoder models" if method.encoder_decoder else "Decoder-only models"
    images = "with images in the prompt" if method.reads_images else "also those that read images"
    supported = [_supported("Beam search", method.beams), _supported("Sampling", method.sampling)]
    return f"{kinds}, {images}, with batches padded on the left. {' '.join(supported)}"


def _supported(feature: str, support: Support) -> str:
    return f"{feature} is supported." if support else f"{feature} is not: the method {support.reason}."


def _formulas(repository: HubRepository) -> Iterator[str]:
    """Yield the explanation of each formula, from its docstring, with the indented formulas as blocks of code."""
    forms = repository.declaration.forms
    for name, rule in zip(forms, repository.formulas or [form.rule for form in forms.values()], strict=True):
        paragraphs = description_of(rule).split("\n\n")
        heading = f'`form="{name}"`: ' if name else ""
        blocks = [f"```text\n{textwrap.dedent(p)}\n```" if p.startswith("    ") else p for p in paragraphs]
        yield heading + "\n\n".join(blocks)


if __name__ == "__main__":
    for each in REPOSITORIES:
        write(Path(sys.argv[1]) / each, files(each))
