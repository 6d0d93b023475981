"""Open images of any mode as RGB, in the same way for prompts, tasks, data sets and transformations.

Pillow's own `convert("RGB")` clips 16-bit pixels at 255, shows the colours under transparent pixels, and ignores the orientation in
which the camera was held. Here 16 bits are scaled, transparent pixels are white, and the orientation of EXIF is applied. Images whose
range of pixel values is unknown are rejected.
"""

import io
from collections.abc import Mapping
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["open_image", "to_rgb"]


def open_image(source: Any) -> "Image":
    """Return an image in RGB, upright.

    Args:
        source: a path, the bytes of an image file, a Pillow image, or a mapping with `bytes` or `path` as data sets have it.

    Raises:
        ImportError: Pillow is not installed.
        OSError: the file cannot be read.
        ValueError: it is not an image, is PostScript, is cut short or too large, or `to_rgb` rejects it; the message names the file.
        TypeError: `source` is something else.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("images are read with Pillow: pip install 'contralto[vision]'") from error
    if isinstance(source, Mapping):
        source = source["bytes"] if source.get("bytes") else source.get("path")
    if isinstance(source, Image.Image):
        return to_rgb(source)
    if not isinstance(source, str | PathLike | bytes):
        raise TypeError(f"an image must be a path, bytes or a Pillow image, not a {type(source).__name__}")
    name = "an image" if isinstance(source, bytes) else fspath(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.format == "EPS":
                raise ValueError(
                    "PostScript is a program, which Pillow would run in Ghostscript: save the image as PNG"
                )
            return to_rgb(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has too many pixels: {error}; reduce its size") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{name} cannot be read: {error}") from error


def to_rgb(image: "Image") -> "Image":
    """Return a Pillow image in RGB, upright, with white in place of transparency and 16 bits scaled to 8.

    Args:
        image: in any mode except 32-bit integers and floating point, whose range of values is unknown.

    Raises:
        ValueError: pixels of unknown range, or an animation of several frames.

    Examples:
        >>> from PIL import Image
        >>> to_rgb(Image.new("I;16", (1, 1), 32896)).getpixel((0, 0)), to_rgb(Image.new("RGBA", (1, 1))).getpixel((0, 0))
        ((128, 128, 128), (255, 255, 255))
    """
    from PIL import Image, ImageOps

    if getattr(image, "is_animated", False) and image.format != "MPO":  # whose other frames are previews
        frames = getattr(image, "n_frames", "several")
        raise ValueError(f"it has {frames} frames, but only a single image is supported: save one frame")
    if image.mode in ("I", "F"):
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise ValueError(
            f"its pixels are {kind} numbers, whose range is unknown: save it with 8 or 16 bits per channel"
        )
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        import numpy as np

        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")
