"""The inputs of branches: optional views, and seeds of noise."""

import torch

from contralto.decoding import inputs
from contralto.decoding.methods import DecodingConfig


def test_an_optional_contrast_prompt_leaves_its_view_out():
    assert DecodingConfig(method="cfg").active_views == ()
    assert DecodingConfig(method="cfg", contrast_prompt="x").active_views == ("prompt",)
    assert DecodingConfig(method="vcd").active_views == ("noised",)


def test_every_image_of_a_prompt_has_noise_of_its_own():
    pixels = {"pixel_values": torch.zeros(4, 3, 2, 2)}
    assert inputs._noise_seeds(pixels, [7, 8]) == [7000, 7001, 8000, 8001]
    assert inputs._noise_seeds(pixels, [7, 8, 9]) == 7  # unequally many images
    grid = {"pixel_values": torch.zeros(64, 8), "image_grid_thw": torch.ones(2, 3)}
    assert inputs._noise_seeds(grid, [7, 8]) == [7000, 8000]
