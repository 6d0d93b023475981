"""Images for prompts of vLLM: the noise of VCD as transformers sees it, and the images of conversations."""

import numpy as np
import pytest
import torch
from PIL import Image

from contralto import testbed
from contralto.decoding.images import noised
from contralto.decoding.vllm.images import images_of, noised_image


@pytest.fixture(scope="module")
def processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(testbed.path("vision-0"))


def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("whole", [True, False])
def test_noise_is_that_of_transformers(processor, whole):
    """The pixels that vLLM is given are those that the image processor would have made, with the noise of `noised`."""
    inputs = processor(text="<image>", images=picture(), return_tensors="pt")
    entries = noised_image(picture(), processor if whole else processor.image_processor, step=600, seed=4)
    (pixels,) = entries["multi_modal_data"]["image"]
    assert torch.equal(pixels, noised(inputs, step=600, seed=[4])["pixel_values"][0])
    again = processor.image_processor(images=pixels, return_tensors="pt", **entries["mm_processor_kwargs"])
    assert torch.equal(again["pixel_values"][0], pixels)


def test_tiles_are_refused():
    def processor(images, return_tensors):
        return {"pixel_values": torch.zeros(1, 5, 3, 32, 32)}

    with pytest.raises(
        ValueError, match=r"function returns pixels of shape \(1, 5, 3, 32, 32\) for an image, and only"
    ):
        noised_image(picture(), processor)


def test_images_of_a_conversation(tmp_path):
    picture().save(tmp_path / "a.png")
    parts = [{"type": "image", "image": picture()}, {"type": "text", "text": "Why?"}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [*parts, {"type": "image", "image": str(tmp_path / "a.png")}]},
    ]
    found = images_of(messages)
    assert [image.size for image in found] == [(40, 48)] * 2
    assert found[0].tobytes() == found[1].tobytes() == picture().tobytes()


@pytest.mark.parametrize(
    "part", [{"type": "image"}, {"type": "image_url", "image_url": {"url": "x"}}, {"type": "video"}]
)
def test_parts_that_cannot_be_read(part):
    with pytest.raises(
        ValueError, match=f"a part of type '{part['type']}' is not read here: write text, or an image as"
    ):
        images_of([{"role": "user", "content": [part]}])
