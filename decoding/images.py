"""Make contrast images: VCD's diffusion noise and RITUAL's random transformations.

Noise is added to the pixel tensors that a processor returns, transformations are applied to the image before the processor.
Both are drawn from one seed per image, so that the result for an image does not depend on its batch or its place in it.
"""

import copy
import math
import random
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Generator, Tensor

from contralto.decoding.pictures import to_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["RITUAL_TRANSFORMS", "RitualView", "diffusion_noise", "noised", "ritual_transform"]

STEPS = 1000
Inputs = TypeVar("Inputs", bound=MutableMapping[str, Any])

# ---------------------------------------------------------------------------------------------------- diffusion noise


def diffusion_noise(
    pixel_values: Tensor,
    *,
    step: int = 500,
    seed: int | Sequence[int] | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Add the noise of visual contrastive decoding to images (VCD, Leng et al. 2023, arXiv 2311.16922).

        x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,    eps ~ N(0, 1),    abar_t = prod_{i <= t} (1 - beta_i)
        beta_i = sigmoid(u_i) (0.005 - 0.00001) + 0.00001,    u = linspace(-6, 6, 1000)

    This is the forward diffusion process, with the schedule of the official code (`vcd_utils/vcd_add_noise.py`), which also
    adds the noise to the preprocessed pixels, shifted and scaled to about unit variance.

    Args:
        pixel_values: `(N, ...)` preprocessed pixels, floating point; the rows of the first dimension are images.
        step: t in 0..999; the paper's 500 leaves 86% of the amplitude, 999 leaves 29%.
        seed: one seed per row, so that a row's noise depends on its seed alone; or one seed from which the noise of all rows
            is drawn in turn; or None for `generator`, else torch's global state.
        generator: the source of the noise if there is no seed.

    Returns:
        A new tensor like `pixel_values`. The noise is drawn in single precision, by default on the CPU, so that it does
        not depend on dtype or device.

    Raises:
        TypeError: `pixel_values` is not a floating-point tensor.
        ValueError: `step` outside 0..999, another number of seeds than rows, or both a seed and a generator.

    Examples:
        >>> image = torch.ones(1, 3, 32, 32)
        >>> [round(float(diffusion_noise(image, step=step, seed=7).mean()), 1) for step in (0, 500, 999)]
        [1.0, 0.9, 0.3]
        >>> two = diffusion_noise(image.expand(2, 3, 32, 32), seed=[8, 7])
        >>> torch.equal(two[1:], diffusion_noise(image, seed=[7]))
        True
    """
    _check_pixels("pixel_values", pixel_values)
    sizes = [1] * len(pixel_values)
    return _add_noise(pixel_values, None, sizes, step, _generators(seed, generator, len(sizes)))


def noised(
    inputs: Inputs, *, step: int = 500, seed: int | Sequence[int] | None = None, generator: Generator | None = None
) -> Inputs:
    """Return the contrast inputs of VCD: the outputs of a processor with diffusion noise on their pixels.

    `pixel_values`, `pixel_values_videos` and `pixel_values_images` are changed, whichever there are; all else is shared with
    `inputs`. Padding according to `pixel_attention_mask` is not changed: Idefics and SmolVLM recognise a padding image by its
    zeros.

    Args:
        inputs: the processor's output (a dict or `BatchFeature`) with tensors.
        step: see `diffusion_noise`.
        seed: see `diffusion_noise`. One seed per image: per row of `pixel_values`, or where the patches of all images are
            concatenated (Qwen2-VL and its successors), per row of `image_grid_thw`; then those of the videos.
        generator: see `diffusion_noise`.

    Returns:
        A mapping of the same type.

    Raises:
        ValueError: no pixels among the inputs; and as in `diffusion_noise`.
        TypeError: pixels that are not floating-point tensors.

    Examples:
        >>> inputs = {"input_ids": torch.tensor([[1, 2]]), "pixel_values": torch.zeros(1, 3, 4, 4)}
        >>> contrast = noised(inputs, step=999, seed=[0])
        >>> contrast["input_ids"] is inputs["input_ids"], float(contrast["pixel_values"].std()) > 0.5
        (True, True)
    """
    pixels = {name: inputs[name] for name in inputs if name.startswith("pixel_values") and inputs[name] is not None}
    if not pixels:
        raise ValueError(
            f"the inputs contain no pixel_values, only {', '.join(inputs)}: pass what the processor returns for a "
            "prompt with an image"
        )
    for name, value in pixels.items():
        _check_pixels(name, value)
    sizes = {name: _rows_per_image(inputs, name) for name in pixels}
    generators = _generators(seed, generator, sum(map(len, sizes.values())))
    contrast = copy.copy(inputs)
    for name, value in pixels.items():
        contrast[name] = _add_noise(value, _real_pixels(inputs, value), sizes[name], step, generators)
    return contrast


def _check_pixels(name: str, value: Any) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.ndim:
        given = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise TypeError(
            f"{name} must be preprocessed pixels in a floating-point tensor, one row per image, not {given}: "
            "call the processor with return_tensors='pt'"
        )


def _generators(
    seed: int | Sequence[int] | None, generator: Generator | None, images: int
) -> Iterator[Generator | None]:
    """Return one generator per image if there is one seed per image, else the same one repeatedly."""
    if seed is not None and generator is not None:
        raise ValueError("seed and generator are mutually exclusive: pass one of them")
    if isinstance(seed, Sequence):
        if len(seed) != images:
            raise ValueError(
                f"there are {len(seed)} seeds for {images} images: pass one seed per image, or a single number"
            )
        return iter([Generator().manual_seed(each) for each in seed])
    return repeat(generator if seed is None else Generator().manual_seed(seed))


def _add_noise(
    pixels: Tensor, real: Tensor | None, sizes: list[int], step: int, generators: Iterator[Generator | None]
) -> Tensor:
    """Add noise image by image, where `real` only; the draws do not depend on the size of the padding."""
    if not 0 <= step < STEPS:
        raise ValueError(f"step must lie in 0..{STEPS - 1} (the number of diffusion steps), not {step}")
    noise = torch.zeros(pixels.shape, device=pixels.device)
    masks: Sequence[Tensor | None] = [None] * len(sizes) if real is None else torch.split(real, sizes)
    for rows, mask, generator in zip(torch.split(noise, sizes), masks, generators, strict=False):
        count = rows.numel() if mask is None else int(mask.sum())
        drawn = torch.randn(count, generator=generator, device=generator.device if generator else "cpu")
        drawn = drawn.to(noise.device)
        rows.copy_(drawn.view_as(rows) if mask is None else rows.masked_scatter(mask, drawn))
    kept, exact = _signal(step), pixels if pixels.dtype == torch.float64 else pixels.float()
    noisy = math.sqrt(kept) * exact + math.sqrt(1 - kept) * noise
    return (noisy if real is None else torch.where(real, noisy, exact)).to(pixels.dtype)


def _signal(step: int) -> float:
    """Return abar_t, the share of the image's variance that remains at a step."""
    betas = torch.linspace(-6, 6, STEPS, dtype=torch.float64).sigmoid() * (0.5e-2 - 1e-5) + 1e-5
    return float((1 - betas[: step + 1]).prod())


def _rows_per_image(inputs: MutableMapping[str, Any], name: str) -> list[int]:
    """Return for each image the number of its rows in the pixels of that name."""
    grid = inputs.get("video_grid_thw" if name.endswith("videos") else "image_grid_thw")
    if grid is not None and inputs[name].ndim == 2:
        counts: list[int] = grid.prod(-1).tolist()
        return counts
    return [1] * len(inputs[name])


def _real_pixels(inputs: MutableMapping[str, Any], pixels: Tensor) -> Tensor | None:
    """Return a mask of the pixels that are not padding, in their shape; None without a mask.

    The mask of the processor has no dimension for channels: (N, H, W) for pixels (N, C, H, W), or (N, patches) for
    (N, patches, C).
    """
    mask: Tensor | None = inputs.get("pixel_attention_mask")
    if mask is None:
        return None
    channels = -1 if mask.shape == pixels.shape[:-1] else -3
    return mask.bool().unsqueeze(channels).expand(pixels.shape)  # pixels (..., H, W, C) or (..., C, H, W)


# -------------------------------------------------------------------------------------------- RITUAL's transformations


class RitualView(NamedTuple):
    """A transformed image."""

    image: "Image"
    transform: str
    """The name of the transformation, one of `RITUAL_TRANSFORMS`."""


def ritual_transform(image: "Image", *, seed: int, transforms: Sequence[str] | None = None) -> RitualView:
    """Apply one random transformation to an image, as RITUAL does for each query (Woo et al. 2024, arXiv 2405.17821).

    The six transformations of the official code (`eval_bench/pope_eval_llava.py`) are equally likely:

    - `hflip`, `vflip`: mirrored;
    - `rotation`: by an angle from -180..180 degrees, with black corners (`RandomRotation(degrees=180)`);
    - `color_jitter`: brightness, contrast and saturation times 0..2, hue turned by -0.5..0.5, in random order;
    - `gaussian_blur`: 13 pixels wide, sigma 1.5..2.0, mirrored at the edges;
    - `crop`: 8 to 100% of the area, sides 3:4 to 4:3, scaled to 336 x 336 bilinearly (`RandomResizedCrop(336)`).

    The official code calls torchvision, which is not required here. Given the same random numbers the results are those of
    torchvision: its PIL functions call the same Pillow operations, and the blur is computed as in torchvision, since
    Pillow's own approximates a Gaussian by three boxes. The random numbers come from `random.Random(seed)`, not from torch.

    Args:
        image: a PIL image of any mode and size, as for the processor; `pictures.to_rgb` converts it.
        seed: determines the transformation and its parameters.
        transforms: the transformations to draw from; None for all of `RITUAL_TRANSFORMS`.

    Raises:
        TypeError: not a PIL image.
        ValueError: an unknown transformation, or none at all; a blur of an image smaller than 7 x 7.

    Examples:
        >>> from PIL import Image
        >>> view = ritual_transform(Image.new("RGB", (64, 48)), seed=1)
        >>> view.transform, view.image.size
        ('vflip', (64, 48))
    """
    from PIL.Image import Image

    names = RITUAL_TRANSFORMS if transforms is None else transforms
    if not names or set(names) - set(RITUAL_TRANSFORMS):
        raise ValueError(f"transforms must be some of {', '.join(RITUAL_TRANSFORMS)}, not {', '.join(names) or 'none'}")
    if not isinstance(image, Image):
        raise TypeError(
            f"a transformation needs a PIL image, not a {type(image).__name__}: apply it before the processor"
        )
    rng = random.Random(seed)
    name = rng.choice(names)
    return RitualView(_RITUAL[name](to_rgb(image), rng), name)


def _hflip(image: "Image", rng: random.Random) -> "Image":
    from PIL import ImageOps

    return ImageOps.mirror(image)


def _vflip(image: "Image", rng: random.Random) -> "Image":
    from PIL import ImageOps

    return ImageOps.flip(image)


def _rotation(image: "Image", rng: random.Random) -> "Image":
    return image.rotate(rng.uniform(-180, 180))


def _color_jitter(image: "Image", rng: random.Random) -> "Image":
    from PIL import ImageEnhance

    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for kind in rng.sample(range(4), 4):
        if kind == 3:
            image = _turn_hue(image, rng.uniform(-0.5, 0.5))
        else:
            image = enhancers[kind](image).enhance(rng.uniform(0, 2))
    return image


def _turn_hue(image: "Image", turn: float) -> "Image":
    """Rotate the hue by a share of the whole circle."""
    from PIL import Image

    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(each + int(turn * 255)) % 256 for each in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _gaussian_blur(image: "Image", rng: random.Random) -> "Image":
    import numpy as np
    from PIL import Image

    reach, sigma = 6, rng.uniform(1.5, 2.0)
    if min(image.size) <= reach:
        raise ValueError(
            f"a blur with a kernel of 13 pixels needs an image of at least 7 x 7, not {image.width} x {image.height}"
        )
    kernel = (-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2)).softmax(0)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(1).float()  # (H, W, 3) -> (3, 1, H, W)
    pixels = torch.nn.functional.pad(pixels, (reach,) * 4, mode="reflect")
    pixels = torch.conv2d(torch.conv2d(pixels, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
    return Image.fromarray(pixels.round().clamp(0, 255).byte().squeeze(1).permute(1, 2, 0).contiguous().numpy())


def _crop(image: "Image", rng: random.Random) -> "Image":
    from PIL.Image import Resampling

    left, top, width, height = _crop_box(image.width, image.height, rng)
    return image.crop((left, top, left + width, top + height)).resize((336, 336), Resampling.BILINEAR)


def _crop_box(width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
    """Return left, top, width and height of a random box, or after ten tries the largest central box of an allowed shape."""
    for _ in range(10):
        area, ratio = width * height * rng.uniform(0.08, 1), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, width - w), rng.randint(0, height - h), w, h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width / (3 / 4)))
    return (width - w) // 2, (height - h) // 2, w, h


_RITUAL: dict[str, Callable[["Image", random.Random], "Image"]] = {
    "hflip": _hflip,
    "vflip": _vflip,
    "rotation": _rotation,
    "color_jitter": _color_jitter,
    "gaussian_blur": _gaussian_blur,
    "crop": _crop,
}
RITUAL_TRANSFORMS = tuple(_RITUAL)
"""The names of RITUAL's transformations."""
