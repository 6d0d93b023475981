"""Convert a GGUF file to a folder that transformers, peft, TRL and vLLM read.

Read from transformers 5.23: `from_pretrained(gguf_file=...)` restores the weights, but `save_pretrained` refuses a model that was loaded
so. A model of the same configuration is therefore made, and takes the weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from warnings import catch_warnings, filterwarnings

from contralto.common.errors import during, require
from contralto.common.files import new_folder
from contralto.common.hashing import file_digest
from contralto.common.suggestions import did_you_mean

__all__ = ["Converted", "convert", "find_gguf"]

MAGIC = b"GGUF"
DTYPES = ("float32", "bfloat16", "float16")
CARD = """---
library_name: transformers
{license}---

# {name}

Converted from the GGUF file `{file}` (architecture {architecture}, weights {kinds}; SHA-256 of the file begins with {digest}) by
`contralto convert`. The weights are those that the file stands for, in {dtype}: what its quantisation lost is not restored.
"""


class Converted(NamedTuple):
    """A model that was converted."""

    file: Path
    """The GGUF file."""
    architecture: str
    """Its architecture, such as llama."""
    kinds: tuple[str, ...]
    """The types of its tensors, such as Q4_1, the most frequent first."""
    parameters: int
    """The number of parameters."""
    size: int
    """Bytes of the folder."""
    has_chat_template: bool
    """Whether prompts can be conversations."""


def find_gguf(source: str | Path) -> Path:
    """Return the GGUF file that a path names, or the only one in the folder that it names.

    Args:
        source: a file or a folder.

    Raises:
        ValueError: there is none, there are several, it is a part of a model in several files, or no GGUF file at all.
    """
    path = Path(source)
    if not path.exists():
        raise ValueError(f"there is no file or folder {source}: give a GGUF file, or a folder that holds one")
    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{source} holds no GGUF file")
    if len(files) > 1:
        raise ValueError(
            f"{source} holds {len(files)} GGUF files: name one of {', '.join(file.name for file in files)}"
        )
    (file,) = files
    with file.open("rb") as opened:
        if opened.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{file} is no GGUF file: it may be a broken download, or a pointer of Git LFS")
    return file


def convert(source: str | Path, output: str | Path, *, dtype: str = "float32") -> Converted:
    """Convert a GGUF file to a folder with model, tokenizer, chat template, generation configuration and a card.

    The folder appears when it is complete: an interrupted conversion leaves none.

    Args:
        source: a GGUF file, or a folder that holds one.
        output: the folder to make; it may exist if it is empty.
        dtype: float32 holds the weights exactly as the file defines them; bfloat16 and float16 round them, in half the space.

    Raises:
        ModuleNotFoundError: the package gguf is not installed.
        ValueError: the source is no single GGUF file, transformers does not read its architecture, or the output is not empty.
    """
    file, output = find_gguf(source), Path(output)
    if dtype not in DTYPES:
        raise ValueError(
            f"dtype must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, not {dtype!r}{did_you_mean(dtype, DTYPES)}"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder: name another one")
    require("gguf")
    with during(f"cannot convert {file}"), _quiet():
        about = _metadata(file)
        with new_folder(output) as folder:
            parameters, has_template = _save(file, folder, about, dtype)
            (folder / "README.md").write_text(_card(file, output.name, about, dtype), encoding="utf-8")
            size = sum(each.stat().st_size for each in folder.iterdir())
    return Converted(file, about["architecture"], about["kinds"], parameters, size, has_template)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings of loading a GGUF file: it is expected that it is slow, and that the result is not saved as GGUF."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        with catch_warnings():
            filterwarnings("ignore", "The given NumPy array is not writable")
            yield
    finally:
        logging.set_verbosity(before)


def _metadata(file: Path) -> dict[str, Any]:
    """Return the architecture, the types of the tensors, the end-of-turn token and the license.

    Raises:
        ValueError: a damaged file, a part of a model in several files, or an architecture that transformers does not read.
    """
    from collections import Counter

    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    try:
        reader = GGUFReader(file)
    except (IndexError, KeyError, OverflowError, ValueError) as error:  # whatever the sizes in the file lead it to
        raise ValueError(
            f"it is damaged or cut short ({type(error).__name__} of the reader): fetch it again"
        ) from error

    def value(name: str) -> Any:
        field = reader.get_field(name)
        return None if field is None else field.contents()

    if (value("split.count") or 1) > 1:
        raise ValueError("it is one of several parts: join them by llama-gguf-split --merge")
    architecture = str(value("general.architecture"))
    known = {name.replace("_", "").replace("-", "") for name in GGUF_SUPPORTED_ARCHITECTURES}
    if architecture.replace("_", "").replace("-", "") not in known:
        raise ValueError(
            f"transformers does not read GGUF files of the architecture {architecture}; it reads "
            f"{', '.join(sorted(GGUF_SUPPORTED_ARCHITECTURES))}"
        )
    kinds = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    return {
        "architecture": architecture,
        "kinds": tuple(kind for kind, _ in kinds.most_common()),
        "end_of_turn": value("tokenizer.ggml.eot_token_id"),
        "license": value("general.license"),
    }


def _save(file: Path, folder: Path, about: dict[str, Any], dtype: str) -> tuple[int, bool]:
    """Write model and tokenizer; return the number of parameters, and whether there is a chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    loaded = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
    )
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):  # only the weights of the file are saved
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)  # type: ignore[no-untyped-call]
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    _set_ends(model.generation_config, about["end_of_turn"])
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters(), tokenizer.chat_template is not None


def _set_ends(generation: Any, end_of_turn: int | None) -> None:
    """Let completions end at the token that ends a turn as well, which transformers does not read from the file."""
    ends = generation.eos_token_id
    ends = list(ends) if isinstance(ends, list) else [] if ends is None else [ends]
    if end_of_turn is not None and end_of_turn not in ends:
        generation.eos_token_id = [*ends, int(end_of_turn)]


def _card(file: Path, name: str, about: dict[str, Any], dtype: str) -> str:
    license_line = f"license: {about['license']}\n" if about["license"] else ""
    return CARD.format(
        license=license_line,
        name=name,
        file=file.name,
        architecture=about["architecture"],
        kinds=", ".join(about["kinds"]),
        digest=file_digest(str(file)),
        dtype=dtype,
    )
