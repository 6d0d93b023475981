"""The table of methods in the documentation, derived from their declarations.

python -m contralto.decoding.methods.table > docs/methods.md
"""

import re
from pathlib import Path

from contralto.decoding.methods.base import Method, Support
from contralto.decoding.methods.reference import signature_of
from contralto.decoding.methods.registry import METHODS

__all__ = ["document", "row"]

HEAD = """# Decoding methods

Written by `python -m contralto.decoding.methods.table` from the declarations in `decoding/methods/`. Parameters are those of the
rule, with the defaults of its signature; *mask* is the parameter that is the plausibility threshold. The column *sampling* says whether
every text has a random stream of its own, so that it does not depend on its batch.
"""
COLUMNS = ("method", "what it does", "papers (arXiv)", "branches", "parameters", "mask", "options")
CALLS = ("method", "`logits_processor=[...]`", "`custom_generate=...`", "scripts")
IN_PYTHON = """The classes are in `contralto.decoding`. The table shows the arguments that are models or prompts; the parameters of the first table are
keywords. `model` is the model that generates. `contrast_inputs`, `negative_inputs` and the like are what the tokenizer or processor
returns for the other prompts or images, `input_ids` and `attention_mask` among it: one row per prompt, or one for all, padded on the left.
For an encoder-decoder they are other source texts.

```python title="cfg.py"
from contralto import testbed
from contralto.decoding import ClassifierFreeGuidanceLogitsProcessor

model, tokenizer = testbed.load("expert"), testbed.tokenizer()
how = {"return_tensors": "pt", "padding": True, "padding_side": "left"}
inputs = tokenizer(["Mia went to the barn. She", "Tom sat by the river. He"], **how)
negative_inputs = tokenizer(["Ben went to the river. She", "Ben ran home. He"], **how)
contrast = ClassifierFreeGuidanceLogitsProcessor(model, negative_inputs, guidance_scale=1.5)
output = model.generate(**inputs, custom_generate=contrast.loop(), max_new_tokens=20)
print(*tokenizer.batch_decode(output, skip_special_tokens=True), sep="\\n")
```

```sh
python cfg.py
```
"""
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CAPABILITIES = ("method", "executors", "beams", "sampling", "likelihoods", "encoder-decoders", "vLLM")


def document() -> str:
    """Return the page with the tables of all methods."""
    methods = [method for method in METHODS.values() if method.contrasts]
    return "\n".join(
        [
            HEAD,
            *_table(COLUMNS, [row(method) for method in methods]),
            "",
            "## In Python",
            "",
            IN_PYTHON,
            *_table(CALLS, [_calls(method) for method in methods]),
            "",
            "## Capabilities",
            "",
            *_table(CAPABILITIES, [_capabilities(method) for method in methods]),
            "",
        ]
    )


def row(method: Method) -> list[str]:
    """Return the cells of a method in the first table.

    Args:
        method: its declaration.

    Returns:
        A cell for each of `COLUMNS`.
    """
    forms = [(f"{name}: " if name else "") + _parameters(method, name) for name in method.forms]
    masks = dict.fromkeys(f"`{form.mask}`" if form.mask else "none" for form in method.forms.values())
    return [
        method.name,
        method.description,
        ", ".join(method.papers) or "-",
        ", ".join(method.branches) or "-",
        "; ".join(forms),
        ", ".join(masks),
        ", ".join(f"`{source}`" for source in method.sources) or "-",
    ]


def _parameters(method: Method, form: str) -> str:
    return ", ".join(f"`{each.name}={each.default}`" for each in method.parameters(form).values())


def _calls(method: Method) -> list[str]:
    """Return how the processor and the loop of a method are made."""
    processor = _call(method.processor)
    return [
        method.name,
        f"`{processor}`" if processor else "-",
        f"`{loop}`" if (loop := _call(method.loop)) else f"`{processor}.loop()`",
        _scripts(method),
    ]


def _scripts(method: Method) -> str:
    """Return links to the examples that make the processor or the loop of a method."""
    names = [target.split(":")[1] for target in (method.processor, method.loop) if isinstance(target, str)]
    call = re.compile(rf"\b({'|'.join(names)})\(")
    texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(EXAMPLES.glob("*.py"))}
    named = [name for name, text in texts.items() if names and call.search(text)]
    return ", ".join(f"[{name}](../examples/{name})" for name in named) or "-"


def _call(target: object) -> str | None:
    """Return the call of a class with its positional arguments, which are models and prompts."""
    if not isinstance(target, str):
        return None
    parameters = signature_of(target).parameters.values()
    shown = [each for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    named = [each.name if each.default is each.empty else f"{each.name}={each.default}" for each in shown]
    return f"{target.split(':')[1]}({', '.join(named)})"


def _capabilities(method: Method) -> list[str]:
    return [
        method.name,
        ", ".join(method.executors),
        _support(method.beams),
        _support(method.row_seeds),
        _support(True if method.likelihoods else method.likelihoods),  # type: ignore[arg-type]
        _support(method.encoder_decoder),
        "yes, with images in Python" if method.vllm and method.reads_images else _support(method.vllm),
    ]


def _support(support: Support) -> str:
    return "yes" if support is True else f"no, it {support.reason}"


def _table(head: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    print(document(), end="")
