"""Images in the rows of a data set: image files below allowed folders, and images stored in the rows.

Rows come from other people. The image that a row names is read, sent to an endpoint and copied into the data set, so a row must not
be able to name any other file of the machine, and nothing is downloaded.
"""

import base64
import binascii
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

__all__ = ["check_image", "images_of", "placed", "with_located"]

ADDRESS = re.compile(r"\w[\w+.-]*://")
SOURCES = ("image", "path", "url", "base64", "image_url")
"""Keys of an image part that name or hold its image."""


def images_of(value: Any, *, folders: Sequence[Path], where: str) -> tuple[Any, ...]:
    """Return the images of a column: checked paths, and Pillow images.

    Args:
        value: an image or a list of images: a path relative to the first folder, a `data:` URL, a mapping with `bytes` or `path`, or
            a Pillow image. None is no images.
        folders: the folders below which files may lie. Links are resolved before this is checked.
        where: the place of the images, for errors.

    Raises:
        ValueError: a URL; a file that is missing, lies elsewhere or is not an image; another kind of value.

    Examples:
        >>> images_of(["../secret.txt"], folders=[Path("/recipes")], where="row 1, column 'images'")
        Traceback (most recent call last):
            ...
        ValueError: row 1, column 'images': ../secret.txt is outside of /recipes: move it there, or set the folder of the images in the recipe with rows: {image_folder: FOLDER}
    """
    images = value if isinstance(value, list | tuple) else [] if value is None else [value]
    return tuple(_image(image, folders, where) for image in images)


def _image(value: Any, folders: Sequence[Path], where: str) -> Any:
    if isinstance(value, Mapping):
        if value.get("bytes"):
            return _opened(value["bytes"], where)
        value = value.get("path")
    if isinstance(value, str) and value.startswith("data:"):
        return _opened(_decoded(value.partition(",")[2], where), where)
    if isinstance(value, str | PathLike):
        return str(_file(str(value), folders, where))
    if not hasattr(value, "tobytes"):
        raise ValueError(f"{where} must be a path or an image, not {type(value).__name__}: {str(value)[:80]!r}")
    return value


def _file(name: str, folders: Sequence[Path], where: str) -> Path:
    if ADDRESS.match(name):
        raise ValueError(
            f"{where}: {name[:200]} is a URL, but images are not downloaded: download it, and use the path of the file"
        )
    try:
        path = (folders[0] / name).resolve()
    except (ValueError, OSError, RuntimeError) as error:  # a null byte; links in a circle
        raise ValueError(f"{where}: {name[:200]!r} is not a path: {error}") from error
    if not any(path.is_relative_to(folder.resolve()) for folder in folders):
        raise ValueError(
            f"{where}: {name[:200]} is outside of {folders[0]}: move it there, or set the folder of the images in the recipe with "
            "rows: {image_folder: FOLDER}"
        )
    check_image(path, where)
    return path


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{where}: the image is not valid base64: {error}") from error


def _opened(content: bytes, where: str) -> Any:
    with _pillow(where) as read:
        image = read(io.BytesIO(content))
        image.load()
        return image


def check_image(image: Any, where: str = "") -> str:
    """Return the media type of an image, such as `image/png`, from its header.

    Args:
        image: a path, or the bytes of a file.
        where: the place that names the image, for errors.

    Raises:
        ValueError: there is no such file, or it is not an image.
    """
    file = image
    if isinstance(image, bytes):
        file = io.BytesIO(image)
    else:
        where = f"{where}: {str(image)[:200]}" if where else str(image)
        _check_is_file(image, where)
    with _pillow(where) as read, read(file) as opened:
        from PIL import Image

        kind = "JPEG" if opened.format == "MPO" else opened.format  # a JPEG that ends with previews
        return str(Image.MIME[kind])


def _check_is_file(path: Any, where: str) -> None:
    try:
        is_file = Path(path).is_file()  # a pipe would block the reader
    except (ValueError, OSError) as error:  # such as a name that is too long
        raise ValueError(f"{where}: not a path: {error}") from error
    if not is_file:
        raise ValueError(f"{where}: there is no such file")


@contextmanager
def _pillow(where: str) -> Iterator[Callable[[Any], Any]]:
    """Yield a function that opens images with Pillow; each of its errors becomes a ValueError."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("images are read with Pillow: pip install 'contralto[vision]'") from error

    def read(file: Any) -> Any:
        image = Image.open(file)
        if not Image.MIME.get(image.format or "", "").startswith("image/"):  # PostScript is a document
            image.close()
            raise OSError(f"{image.format} is not an image format")
        return image

    try:
        yield read
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
        raise ValueError(f"{where} is not an image that Pillow can read{reason}") from error


# --------------------------------------------------------------------------------------------------------------- messages


def placed(
    messages: Sequence[Mapping[str, Any]], *, folders: Sequence[Path], where: str
) -> tuple[list[dict[str, Any]], tuple[Any, ...]]:
    """Move the images out of the parts of messages.

    Args:
        messages: with a text or a list of parts as `content`.
        folders: see `images_of`.
        where: the place of the messages, for errors.

    Returns:
        The messages with `{"type": "image"}` in the place of each image, and the images in their order.

    Raises:
        ValueError: a part is neither text nor image, `images_of` rejects an image, or only some parts have an image.

    Examples:
        >>> parts = [{"type": "text", "text": "What is it?"}, {"type": "image"}]
        >>> placed([{"role": "user", "content": parts}], folders=[Path(".")], where="the row")[0][0]["content"] == parts
        True
    """
    images: list[Any] = []
    without, kept = 0, []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            content = [_part(part, where) for part in content]
            named = [part.pop("named", None) for part in content if part["type"] == "image"]
            without += named.count(None)
            images += [images_of(each, folders=folders, where=where)[0] for each in named if each is not None]
        kept.append({**message, "content": content})
    if images and without:
        raise ValueError(
            f"{where}: {len(images)} image parts contain an image and {without} do not: use one form for all of them"
        )
    return kept, tuple(images)


def _part(part: Any, where: str) -> dict[str, Any]:
    """Return a text part unchanged, an image part with its image under `named`."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return dict(part)
    if kind not in ("image", "image_url"):
        raise ValueError(
            f"{where}: a part of a message must be an object of type text or image, not {str(part)[:80]!r}"
        )
    named = [part[key] for key in SOURCES if part.get(key) is not None]
    if len(named) > 1:
        raise ValueError(
            f"{where}: an image part must have one image, but this one has {', '.join(k for k in SOURCES if part.get(k))}"
        )
    if not named:
        return {"type": "image"}
    [image] = named
    image = image.get("url", image) if isinstance(image, Mapping) else image
    return {"type": "image", "named": f"data:,{image}" if part.get("base64") else image}


# ---------------------------------------------------------------------------------------------------- stored data sets


def with_located(dataset: Any, *, folders: Sequence[Path], where: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a `datasets.Dataset` with its images decoded, without downloads and without files elsewhere.

    `datasets` itself opens whatever file or address a stored image names.

    Args:
        dataset: the data set.
        folders: see `images_of`.
        where: the name of the data set, for errors.

    Raises:
        ValueError: `images_of` rejects an image.
    """
    kept = dataset.features
    for name, feature in kept.items():
        if (bare := _undecoded(feature)) is not feature:
            dataset = dataset.cast_column(name, bare)
    for number, row in enumerate(dataset, 1):
        yield {
            name: _read(value, kept[name], folders, f"{where}, row {number}, column {name!r}")
            for name, value in row.items()
        }


def _undecoded(feature: Any) -> Any:
    """Return a feature in which images stay bytes and paths; the same object if it holds none."""
    from datasets import Image, LargeList, List

    if isinstance(feature, Image):
        return Image(mode=feature.mode, decode=False)
    if isinstance(feature, dict):
        bare = {name: _undecoded(each) for name, each in feature.items()}
        return bare if any(bare[name] is not feature[name] for name in bare) else feature
    if isinstance(feature, List | LargeList) and (inner := _undecoded(feature.feature)) is not feature.feature:
        return type(feature)(inner)
    return feature


def _read(value: Any, feature: Any, folders: Sequence[Path], where: str) -> Any:
    """Decode the images of a value as `datasets` does, after checking their sources."""
    from datasets import Image, LargeList, List

    if value is None:
        return None
    if isinstance(feature, Image):
        checked = {"bytes": value["bytes"], "path": None}
        if not value["bytes"]:
            checked = {"bytes": None, "path": _image(value, folders, where)}
        return Image(mode=feature.mode).decode_example(checked)
    if isinstance(feature, dict):
        return {name: _read(each, feature[name], folders, where) for name, each in value.items()}
    if isinstance(feature, List | LargeList):
        return [_read(each, feature.feature, folders, where) for each in value]
    return value
