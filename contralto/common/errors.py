"""Report errors of the user in one line, and bugs with their traceback.

A command that a user used wrongly ends with a sentence and status 2, Ctrl-C with status 130, a bug with its traceback. The origin of an
error decides, not its text: an error that some code raised with `raise` is a rejected input, and one in which an operation of Python
ended (a missing attribute, a wrong number of arguments) is a bug. Errors of files, memory and packages, and those of libraries that check
files and templates, are the user's wherever they are raised.
"""

import dis
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from types import TracebackType

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from contralto.common.options import OptionError
from contralto.common.texts import Secrets, printable

__all__ = ["Mistakes", "MistakesError", "during", "guarded", "is_mistake", "raise_mistakes", "require", "sentence"]

OUTSIDE = (OSError, MemoryError, ImportError, SyntaxError, UnicodeError)
"""Errors of files, memory and packages, which are the user's wherever they are raised."""
REFUSALS = (ValueError, RuntimeError, NotImplementedError)
"""Errors that reject an input where code raised them with `raise`; contralto also raises TypeError for it."""
LIBRARIES = {
    "PIL.DecompressionBombError",
    "PIL.UnidentifiedImageError",
    "_pickle.UnpicklingError",
    "aiohttp.ClientError",
    "datasets.DatasetsError",
    "jinja2.TemplateError",
    "json.JSONDecodeError",
    "pyarrow.ArrowException",
    "safetensors.SafetensorError",
    "sqlite3.DatabaseError",
    "torch.OutOfMemoryError",
    "yaml.YAMLError",
    "zipfile.BadZipFile",
}
"""Errors of libraries about a file, a template, an address or a device, by package and class, so that nothing is imported."""
READERS = {"json.decoder"}
"""Modules whose errors are those of the text that they read, also where C raises them: too deep, too many digits."""
TEMPLATES = ("<template>", "<unknown>")
"""The file names of Jinja's templates in tracebacks."""
_OS_ERROR = re.compile(r"\(os error \d+\)$")
"""The end of Rust's messages about files."""
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "mauve": "mauve-text"}
"""Packages whose module has another name."""


def guarded(
    command: str,
    run: Callable[[], object],
    *,
    extra: str = "",
    resumes: str = "",
    debug: bool = False,
    quiet: bool = False,
) -> int:
    """Run a command and return its exit status.

    Args:
        command: the name of the command, with which the sentence begins.
        run: the function to run.
        extra: the extra of contralto that the command needs, by default the one of its name.
        resumes: what goes on after an interruption, for the sentence about it.
        debug: raise every error.
        quiet: print no sentence, as in all processes but the first.

    Returns:
        0; 2 for an error of the user, 130 for Ctrl-C, 141 for a closed pipe.

    Raises:
        Exception: a bug; with `debug` any error.
    """
    try:
        run()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _interruption(command, resumes, quiet=quiet)
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if _interrupted(error):
            return _interruption(command, resumes, quiet=quiet)
        if debug or not is_mistake(error):
            raise
        if not quiet:
            several = error.sentences if isinstance(error, MistakesError) else [sentence(error, extra or command)]
            secrets = Secrets.of_process()
            for text in several:  # it may quote an endpoint, a file or a template
                print(f"contralto {command}: {printable(secrets.hide(text))}", file=sys.stderr)
        return 2
    return 0


def _interruption(command: str, resumes: str, *, quiet: bool) -> int:
    if not quiet:
        print(f"\ncontralto {command}: interrupted{'; ' if resumes else ''}{resumes}", file=sys.stderr)
    return 130


@contextmanager
def during(prefix: str) -> Iterator[None]:
    """Prefix the messages of errors of the user that are raised within the block.

    Args:
        prefix: the prefix, such as "cannot load MODEL".

    Raises:
        ImportError: raised within the block, with the prefix.
        MemoryError: likewise.
        OSError: likewise.
        OptionError: likewise.
        ValueError: likewise, for all other errors of the user.

    Examples:
        >>> with during("prompts.yaml"):
        ...     raise ValueError("not YAML")
        Traceback (most recent call last):
            ...
        ValueError: prompts.yaml: not YAML
    """
    try:
        yield
    except Exception as error:
        if not is_mistake(error) or _interrupted(error):
            raise
        if isinstance(error, OptionError):
            raise error.within(prefix) from error
        kind = next((kind for kind in (ImportError, MemoryError, OSError) if isinstance(error, kind)), ValueError)
        raise kind(f"{prefix}: {sentence(error)}") from error


class MistakesError(ValueError):
    """Several mistakes of the user in one input.

    Args:
        sentences: a sentence per mistake.
    """

    def __init__(self, sentences: Sequence[str]) -> None:
        super().__init__("\n".join(sentences))
        self.sentences = tuple(sentences)


def raise_mistakes(sentences: Sequence[str]) -> None:
    """Raise an error with all sentences, if there are any.

    Args:
        sentences: a sentence per mistake.

    Raises:
        ValueError: with the sentence, if there is one.
        MistakesError: several sentences.

    Examples:
        >>> raise_mistakes([])
        >>> raise_mistakes(["a must be 1", "b must be 2"])
        Traceback (most recent call last):
            ...
        contralto.common.errors.MistakesError: a must be 1
        b must be 2
    """
    if len(sentences) > 1:
        raise MistakesError(sentences)
    if sentences:
        raise ValueError(sentences[0])


class Mistakes:
    """Collect the mistakes in the parts of an input, to report them together.

    Examples:
        >>> mistakes = Mistakes()
        >>> for part in ("a", "b"):
        ...     with mistakes.collected():
        ...         raise ValueError(f"{part} is wrong")
        >>> try:
        ...     mistakes.report()
        ... except ValueError as error:
        ...     print(error)
        a is wrong
        b is wrong
    """

    def __init__(self) -> None:
        self._errors: list[ValueError] = []

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Keep a ValueError of the user that ends the block; other errors pass."""
        try:
            yield
        except ValueError as error:
            if not is_mistake(error):
                raise
            self._errors.append(error)

    def report(self) -> None:
        """Raise the mistakes, if there are any.

        Raises:
            ValueError: the only one, as it was raised, or a `MistakesError` of all.
        """
        if len(self._errors) == 1:
            raise self._errors[0]
        nested = [error.sentences if isinstance(error, MistakesError) else [sentence(error)] for error in self._errors]
        raise_mistakes([*dict.fromkeys(text for texts in nested for text in texts)])


def require(*modules: str) -> None:
    """Raise an error if packages that are imported later are missing, without importing them.

    Args:
        modules: names of packages.

    Raises:
        ModuleNotFoundError: one is not installed.
    """
    for name in modules:
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _interrupted(error: BaseException) -> bool:
    """Return True if Ctrl-C caused an error, such as the error of an interrupted import."""
    return any(isinstance(each, KeyboardInterrupt) for each in _causes(error))


def is_mistake(error: BaseException) -> bool:
    """Return True if the user caused an error, False for a bug.

    Args:
        error: a caught error, with its traceback.
    """
    names = {f"{kind.__module__.split('.')[0]}.{kind.__qualname__}" for kind in type(error).__mro__}
    if names & LIBRARIES:
        return True
    if any(frame.f_code.co_filename in TEMPLATES for frame, _ in traceback.walk_tb(error.__traceback__)):
        return True
    origin = _origin(error.__traceback__)
    if origin is not None and origin.tb_frame.f_globals.get("__name__") in READERS:
        return True
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == "contralto":
        return False
    if isinstance(error, OUTSIDE) or _is_of_rust(error):
        return True
    if isinstance(error, RuntimeError) and (_is_out_of_memory(error) or _is_unwritten(error, origin)):
        return True
    if origin is None or origin.tb_frame.f_code.co_code[origin.tb_lasti] != dis.opmap["RAISE_VARARGS"]:
        return False
    own = str(origin.tb_frame.f_globals.get("__name__")).split(".")[0] == "contralto"
    return isinstance(error, (*REFUSALS, TypeError) if own else REFUSALS)


def _origin(trace: TracebackType | None) -> TracebackType | None:
    """Return the innermost frame of a traceback."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace


def _is_out_of_memory(error: Exception) -> bool:
    """Return True if torch's allocator raised the error, which has no class of its own on CPUs."""
    memory = sys.modules.get("accelerate.utils.memory")
    return memory is not None and bool(memory.should_reduce_batch_size(error))


def _is_unwritten(error: Exception, origin: TracebackType | None) -> bool:
    """Return True if torch could not write or read a file, which it reports as RuntimeError out of C++."""
    return origin is not None and origin.tb_frame.f_globals.get("__name__") == "torch.serialization"


def _is_of_rust(error: BaseException) -> bool:
    """Return True if tokenizers could not write or read a file, which it reports as a bare Exception out of Rust."""
    return type(error) is Exception and _OS_ERROR.search(str(error)) is not None


def sentence(error: BaseException, extra: str = "") -> str:
    """Return the message of an error as one line.

    Args:
        error: an error of the user.
        extra: the extra that is named for a missing package, if it installs the package.
    """
    if isinstance(error, ModuleNotFoundError) and (error.name or "").replace(".", "").isidentifier():
        assert error.name
        return _missing(error.name.split(".")[0], extra)
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = " ".join(text.split()) or " ".join("".join(traceback.format_exception_only(error)).split())
    if isinstance(error, MemoryError) and text == type(error).__name__:
        return "there is not enough memory: use a smaller model, batch or file"
    is_of_torch = isinstance(error, RuntimeError) and _is_unwritten(error, _origin(error.__traceback__))
    if is_of_torch or _is_of_rust(error):
        library = "torch" if is_of_torch else "the tokenizer"
        return f"{library} could not write or read a file ({text}): make room on the disk, or check it, and run the command again"
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{os.fspath(error.filename)}: {error.strerror}"
    if type(error).__module__.split(".")[0] == "datasets" and error.__cause__ is not None:
        text = f"{text}: {sentence(error.__cause__)}"  # what went wrong is there alone
    return text


def _missing(module: str, extra: str) -> str:
    """Return a sentence that names the package to install for a missing module."""
    package = DISTRIBUTIONS.get(module, module.replace("_", "-"))
    extras = _extras(package)
    what = f"'contralto[{extra if extra in extras else extras[0]}]'" if extras else package
    return f"the package {package} is not installed: pip install {what}"


def _extras(package: str) -> list[str]:
    """Return the extras of contralto that install a package, those that install it by another extra last."""
    try:
        requirements = [Requirement(line) for line in metadata.requires("contralto") or []]
    except metadata.PackageNotFoundError:
        return []
    extras = [each for each in metadata.metadata("contralto").get_all("Provides-Extra") or [] if each != "dev"]

    def bring(name: str) -> list[str]:
        named = [need for need in requirements if canonicalize_name(need.name) == name and need.marker]
        return [e for e in extras for need in named if need.marker and need.marker.evaluate({"extra": e})]

    direct = bring(canonicalize_name(package))
    whole = [
        e
        for e in bring("contralto")
        for need in requirements
        if need.name == "contralto" and set(need.extras) & set(direct)
    ]
    return list(dict.fromkeys([*direct, *whole]))
