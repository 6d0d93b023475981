"""Prompts with images for vLLM, as dictionaries of vLLM's own. This module does not import vLLM."""

from collections.abc import Mapping, Sequence
from typing import Any

from contralto.decoding.images import diffusion_noise
from contralto.decoding.pictures import open_image

__all__ = ["images_of", "noised_image"]

READ = {
    "do_resize": False,
    "do_center_crop": False,
    "do_rescale": False,
    "do_normalize": False,
    "do_convert_rgb": False,
}
"""The options of an image processor that leave preprocessed pixels as they are."""


def noised_image(image: Any, processor: Any, *, step: int = 500, seed: int = 0) -> dict[str, Any]:
    """Return an image with the noise of visual contrastive decoding (VCD, Leng et al. 2023, arXiv 2311.16922) for vLLM.

    The noise is added to the preprocessed pixels, as `noised` does in transformers, and vLLM is told to leave them as they are:

        x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps

    Args:
        image: a path, the bytes of an image file, or a Pillow image.
        processor: the model's processor of transformers, or its image processor.
        step: t of the noise, see `diffusion_noise`.
        seed: of the noise.

    Returns:
        The entries `multi_modal_data` and `mm_processor_kwargs` of a prompt of vLLM.

    Raises:
        ValueError: the processor makes tiles or patches of the image (LLaVA-NeXT, Qwen2-VL, ...), which vLLM makes itself.

    Examples:
        >>> from PIL import Image
        >>> from transformers import AutoProcessor
        >>> from contralto import testbed
        >>> processor = AutoProcessor.from_pretrained(testbed.path("vision-0"))
        >>> entries = noised_image(Image.new("RGB", (32, 32)), processor, step=999, seed=1)
        >>> entries["multi_modal_data"]["image"][0].shape, entries["mm_processor_kwargs"]["do_normalize"]
        (torch.Size([3, 32, 32]), False)
    """
    own = getattr(processor, "image_processor", processor)
    pixels = own(images=open_image(image), return_tensors="pt")["pixel_values"]
    if pixels.ndim != 4 or len(pixels) != 1:
        raise ValueError(
            f"{type(own).__name__} returns pixels of shape {tuple(pixels.shape)} for an image, and only (1, C, H, W) can be "
            "passed on to vLLM: use contralto.decoding with transformers"
        )
    noisy = diffusion_noise(pixels, step=step, seed=[seed])[0]
    return {"multi_modal_data": {"image": [noisy]}, "mm_processor_kwargs": dict(READ)}


def images_of(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the images of a conversation: paths, bytes or Pillow images in its parts `{"type": "image", "image": ...}`.

    Args:
        messages: the conversation.

    Raises:
        ValueError: a part of type image without its image, or of another type than text and image.

    Examples:
        >>> images_of([{"role": "user", "content": [{"type": "text", "text": "Why?"}]}])
        []
    """
    contents = [message.get("content") for message in messages]
    images = []
    for part in (part for parts in contents if isinstance(parts, list) for part in parts):
        if part.get("type") == "image" and part.get("image") is not None:
            images.append(open_image(part["image"]))
        elif part.get("type") != "text":
            raise ValueError(
                f"a part of type {part.get('type')!r} is not read here: write text, or an image as "
                "{'type': 'image', 'image': a path, bytes or a Pillow image}"
            )
    return images
