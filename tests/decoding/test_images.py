"""Views of images: VCD's noise against a float64 reference, RITUAL's transformations against what torchvision computes."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch.testing import assert_close
from transformers import BatchFeature, Idefics3ImageProcessorPil

from contralto.decoding import images
from contralto.decoding.images import RITUAL_TRANSFORMS, diffusion_noise, noised, ritual_transform

# ---------------------------------------------------------------------------------------------------- diffusion noise


def _signal(step):
    """abar_t as VCD's formula reads, in plain Python."""
    product = 1.0
    for i in range(step + 1):
        u = -6 + 12 * i / 999
        product *= 1 - ((0.5e-2 - 1e-5) / (1 + math.exp(-u)) + 1e-5)
    return product


def _reference(pixels, step, seeds):
    rows = []
    for row, seed in zip(pixels.double(), seeds, strict=True):
        eps = torch.randn(row.numel(), generator=torch.Generator().manual_seed(seed)).double().view(row.shape)
        rows.append(math.sqrt(_signal(step)) * row + math.sqrt(1 - _signal(step)) * eps)
    return torch.stack(rows)


def _pixels(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("step", [0, 1, 300, 500, 999])
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 5, 3, 4, 4), (2, 7)])
def test_noise_equals_the_reference(step, shape):
    pixels = _pixels(*shape)
    assert_close(diffusion_noise(pixels, step=step, seed=[3, 4]), _reference(pixels, step, [3, 4]))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = pixels.to(dtype)
        noisy = diffusion_noise(rounded, step=step, seed=[3, 4])
        assert noisy.dtype == dtype
        assert_close(noisy, _reference(rounded, step, [3, 4]).to(dtype))


def test_the_schedule_is_that_of_the_official_code():
    """There it is computed in single precision; the figures the docstring names."""
    betas = torch.sigmoid(torch.linspace(-6, 6, 1000)) * (0.5e-2 - 1e-5) + 1e-5
    official = torch.cumprod(1 - betas, dim=0)
    ours = torch.tensor([images._signal(step) for step in range(0, 1000, 37)])
    assert_close(ours, official[::37], rtol=1e-4, atol=0)
    assert math.sqrt(images._signal(500)) == pytest.approx(0.86, abs=0.005)
    assert math.sqrt(images._signal(999)) == pytest.approx(0.29, abs=0.005)


@pytest.mark.parametrize("step", [0, 500, 999])
def test_noise_is_standard_normal(step):
    noise = diffusion_noise(torch.zeros(8, 3, 64, 64), step=step, seed=range(8)) / math.sqrt(1 - _signal(step))
    n = noise.numel()
    assert abs(noise.mean()) < 4 / math.sqrt(n)
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / n)
    correlation = np.corrcoef(noise.flatten(1))[np.triu_indices(8, 1)]
    assert np.abs(correlation).max() < 5 / math.sqrt(n / 8)


def test_a_row_depends_on_its_seed_alone():
    pixels, seeds = _pixels(5, 3, 6, 6), [11, 12, 13, 12, 14]
    together = diffusion_noise(pixels, seed=seeds)
    for i, seed in enumerate(seeds):
        assert torch.equal(diffusion_noise(pixels[i : i + 1], seed=[seed])[0], together[i])
    order = [3, 0, 4, 1, 2]
    assert torch.equal(diffusion_noise(pixels[order], seed=[seeds[i] for i in order]), together[order])
    assert torch.equal(diffusion_noise(pixels[:1], seed=11), together[:1])


def test_where_the_noise_comes_from():
    pixels = _pixels(3, 3, 4, 4)
    noise = [diffusion_noise(pixels, seed=7), diffusion_noise(pixels, generator=torch.Generator().manual_seed(7))]
    torch.manual_seed(7)
    noise.append(diffusion_noise(pixels))
    assert torch.equal(noise[0], noise[1])
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], diffusion_noise(pixels))
    assert not torch.equal(
        (noise[0] - pixels * math.sqrt(_signal(500)))[0], (noise[0] - pixels * math.sqrt(_signal(500)))[1]
    )


def test_the_pixels_given_do_not_change():
    pixels = _pixels(2, 3, 4, 4)
    before = pixels.clone()
    diffusion_noise(pixels, seed=[0, 1])
    assert torch.equal(pixels, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": 1000}, "step must lie in 0..999 .* not 1000"),
        ({"step": -1}, "step must lie in 0..999 .* not -1"),
        ({"seed": [1]}, "there are 1 seeds for 2 images: pass one seed per image, or a single number"),
        ({"seed": 1, "generator": torch.Generator()}, "seed and generator are mutually exclusive"),
    ],
)
def test_noise_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        diffusion_noise(torch.zeros(2, 3, 4, 4), **arguments)


@pytest.mark.parametrize(
    ("pixels", "given"),
    [
        (torch.zeros(1, 3, 2, 2, dtype=torch.uint8), "a tensor of torch.uint8"),
        ([[0.0]], "a list"),
        (torch.tensor(0.5), ""),
    ],
)
def test_noise_refuses_what_is_not_preprocessed(pixels, given):
    with pytest.raises(TypeError, match=f"floating-point tensor, one row per image, not {given}.*return_tensors='pt'"):
        diffusion_noise(pixels)


# -------------------------------------------------------------------------------------------------------------- noised


@pytest.mark.parametrize("kind", [dict, BatchFeature])
def test_noised_changes_the_pixels_alone(kind):
    inputs = kind(
        {"input_ids": torch.tensor([[1, 2]]), "pixel_values": _pixels(2, 3, 4, 4), "pixel_values_videos": None}
    )
    before = inputs["pixel_values"].clone()
    contrast = noised(inputs, step=700, seed=[5, 6])
    assert type(contrast) is kind
    assert contrast["input_ids"] is inputs["input_ids"]
    assert contrast["pixel_values_videos"] is None
    assert torch.equal(inputs["pixel_values"], before)
    assert torch.equal(contrast["pixel_values"], diffusion_noise(before, step=700, seed=[5, 6]))


def test_noised_takes_images_then_videos():
    image, video = _pixels(2, 3, 4, 4), _pixels(1, 4, 3, 4, 4)
    contrast = noised({"pixel_values": image, "pixel_values_videos": video}, seed=[1, 2, 3])
    assert torch.equal(contrast["pixel_values"], diffusion_noise(image, seed=[1, 2]))
    assert torch.equal(contrast["pixel_values_videos"], diffusion_noise(video, seed=[3]))
    both = noised({"pixel_values": image, "pixel_values_videos": video}, seed=1)
    assert torch.equal(both["pixel_values"], diffusion_noise(image, seed=1))


def test_patches_of_one_image_share_its_seed():
    """Qwen2-VL lays the patches of all images in one row after the other."""
    grid = torch.tensor([[1, 2, 4], [1, 2, 2]])
    patches = _pixels(12, 6)
    contrast = noised({"pixel_values": patches, "image_grid_thw": grid}, seed=[8, 9])["pixel_values"]
    alone = noised({"pixel_values": patches[8:], "image_grid_thw": grid[1:]}, seed=[9])["pixel_values"]
    assert torch.equal(contrast[8:], alone)
    assert_close(contrast[:8].flatten()[None], _reference(patches[:8].flatten()[None], 500, [8]))
    with pytest.raises(ValueError, match="there are 12 seeds for 2 images"):
        noised({"pixel_values": patches, "image_grid_thw": grid}, seed=range(12))


def test_padding_stays_as_it_is():
    """Idefics tells padding images by their zeros, and an image's noise must not depend on how far it is padded."""
    processor = Idefics3ImageProcessorPil(
        do_image_splitting=False, size={"longest_edge": 64}, max_image_size={"longest_edge": 64}
    )
    large, small = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 32), "blue")
    inputs = processor([[large, small], [small]], return_tensors="pt")
    assert not inputs["pixel_attention_mask"].all()
    contrast = noised(inputs, seed=[1, 2])["pixel_values"]
    real = inputs["pixel_attention_mask"].bool().unsqueeze(2).expand_as(contrast)
    assert torch.equal(contrast[~real], inputs["pixel_values"][~real])
    assert (contrast[real] != inputs["pixel_values"][real]).float().mean() > 0.99
    alone = processor([[small]], return_tensors="pt")
    shown = noised(alone, seed=[2])["pixel_values"][0, 0]
    real_alone = alone["pixel_attention_mask"][0, 0].bool().expand_as(shown)
    assert_close(contrast[1][real[1]], shown[real_alone])


def test_a_mask_over_patches():
    pixels, mask = _pixels(2, 5, 6), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    contrast = noised({"pixel_values": pixels, "pixel_attention_mask": mask}, seed=[1, 2])["pixel_values"]
    assert torch.equal(contrast[0, 3:], pixels[0, 3:])
    assert_close(contrast[0, :3].flatten()[None], _reference(pixels[0, :3].flatten()[None], 500, [1]))


def test_noised_needs_pixels():
    with pytest.raises(
        ValueError, match=r"no pixel_values, only input_ids, attention_mask: pass what the processor returns"
    ):
        noised({"input_ids": 0, "attention_mask": 0})
    with pytest.raises(TypeError, match=r"pixel_values must be preprocessed pixels .* not a list"):
        noised({"pixel_values": [np.zeros((3, 4, 4))]})


# -------------------------------------------------------------------------------------------- RITUAL's transformations


def _photo(width=48, height=40, seed=0):
    """Smooth colours with some noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 5 + i) + np.cos(y / 7 - i) for i in range(3)]
    return Image.fromarray(
        (127 + 40 * np.stack(waves, -1) + rng.normal(0, 8, (height, width, 3))).clip(0, 255).astype(np.uint8)
    )


def _array(image):
    return np.asarray(image).astype(float)


def _draw(name, seed, image=None):
    view = ritual_transform(image or _photo(), seed=seed, transforms=[name])
    assert view.transform == name
    return view.image


def test_every_transformation_is_as_likely():
    image = Image.new("RGB", (8, 8))
    counts = Counter(ritual_transform(image, seed=seed).transform for seed in range(600))
    assert set(counts) == set(RITUAL_TRANSFORMS)
    assert all(abs(count - 100) < 4 * math.sqrt(600 * 5 / 36) for count in counts.values())


@pytest.mark.parametrize("name", RITUAL_TRANSFORMS)
def test_the_seed_decides(name):
    before = _array(_photo())
    one, two, other = _draw(name, 1), _draw(name, 1), _draw(name, 2)
    assert one.tobytes() == two.tobytes()
    assert name.endswith("flip") or one.tobytes() != other.tobytes()
    photo = _photo()
    _draw(name, 3, photo)
    assert np.array_equal(_array(photo), before)


def test_flips():
    photo = _array(_photo())
    assert np.array_equal(_array(_draw("hflip", 0)), photo[:, ::-1])
    assert np.array_equal(_array(_draw("vflip", 0)), photo[::-1])


def test_rotation_turns_about_the_centre():
    """By the drawn angle, the nearest pixel, black outside; angles lie in -180..180, evenly."""
    photo, seed = _photo(41, 41), 5
    angle = _drawn(seed, 1)[0] * 360 - 180
    turned = _array(_draw("rotation", seed, photo))
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    expected = np.zeros((41, 41, 3))
    for y in range(41):
        for x in range(41):
            source_x = cos * (x - 20) - sin * (y - 20) + 20.5
            source_y = sin * (x - 20) + cos * (y - 20) + 20.5
            if 0 <= source_x < 41 and 0 <= source_y < 41:
                expected[y, x] = _array(photo)[int(source_y), int(source_x)]
    assert (turned == expected).all(-1).mean() > 0.98
    assert turned.shape == expected.shape


def _drawn(seed, count):
    """The uniform draws behind a transformation: after the choice of its name come its own."""
    rng = random.Random(seed)
    rng.choice(["one"])
    return [rng.random() for _ in range(count)]


def test_blur_equals_a_gaussian_in_float64():
    """13 taps and mirrored edges, as torchvision; Pillow's own blur is another."""
    seed = 4
    sigma = 1.5 + 0.5 * _drawn(seed, 1)[0]
    taps = [math.exp(-(k**2) / (2 * sigma**2)) for k in range(-6, 7)]
    taps = np.array(taps) / sum(taps)
    padded = np.pad(_array(_photo()), ((6, 6), (6, 6), (0, 0)), mode="reflect")
    height, width = padded.shape[0] - 12, padded.shape[1] - 12
    rows = sum(tap * padded[:, k : k + width] for k, tap in enumerate(taps))
    expected = sum(tap * rows[k : k + height] for k, tap in enumerate(taps))
    blurred = _array(_draw("gaussian_blur", seed))
    assert np.abs(blurred - expected).max() < 0.51
    assert np.abs(_array(_photo().filter(ImageFilter.GaussianBlur(sigma))) - expected).max() > 2


def test_hue_turns_the_colour_circle():
    red = Image.new("RGB", (2, 2), (200, 0, 0))
    third = _array(images._turn_hue(red, 1 / 3))[0, 0]
    assert third[1] > 195
    assert third[0] < 10
    assert third[2] < 10
    back = _array(images._turn_hue(images._turn_hue(_photo(), 0.25), -0.25))
    assert np.abs(back - _array(_photo())).mean() < 3
    assert np.abs(_array(images._turn_hue(_photo(), 0.5)) - _array(_photo())).mean() > 10


def test_jitter_draws_what_the_paper_says(monkeypatch):
    """Brightness, contrast and saturation times 0..2, hue by -0.5..0.5, in any order."""
    from PIL import ImageEnhance

    seen = {name: [] for name in ("Brightness", "Contrast", "Color", "hue")}
    orders = Counter()
    for name in ("Brightness", "Contrast", "Color"):
        kind = getattr(ImageEnhance, name)

        def enhance(self, factor, name=name, original=kind.enhance):
            seen[name].append(factor)
            order.append(name)
            return original(self, factor)

        monkeypatch.setattr(kind, "enhance", enhance)

    def turn(image, by):
        seen["hue"].append(by)
        order.append("hue")
        return image

    monkeypatch.setattr(images, "_turn_hue", turn)
    for seed in range(300):
        order = []
        _draw("color_jitter", seed, Image.new("RGB", (8, 8), "teal"))
        orders[tuple(order)] += 1
    assert len(orders) == 24
    for name, low, high in (("Brightness", 0, 2), ("Contrast", 0, 2), ("Color", 0, 2), ("hue", -0.5, 0.5)):
        assert len(seen[name]) == 300
        assert low <= min(seen[name]) < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < max(seen[name]) <= high


def test_crops_are_of_the_paper_s_shapes():
    """8 to 100% of the area, sides between 3:4 and 4:3 (up to rounding), anywhere in the image."""
    boxes = [images._crop_box(640, 480, random.Random(seed)) for seed in range(2000)]
    areas = np.array([w * h for *_, w, h in boxes]) / (640 * 480)
    ratios = np.array([w / h for *_, w, h in boxes])
    assert all(left >= 0 and top >= 0 and left + w <= 640 and top + h <= 480 for left, top, w, h in boxes)
    assert 0.078 < areas.min() < 0.1
    assert 0.9 < areas.max() <= 1
    assert 0.74 < ratios.min() < 0.77
    assert 1.3 < ratios.max() < 1.35
    assert min(left for left, *_ in boxes) == 0
    assert max(left + w for left, _, w, _ in boxes) == 640


def test_a_crop_that_never_fits_is_the_largest_central_one():
    assert images._crop_box(1000, 10, random.Random(0)) == (493, 0, 13, 10)
    assert images._crop_box(10, 1000, random.Random(0)) == (0, 493, 10, 13)


def test_crops_are_scaled_bilinearly():
    view, photo = _draw("crop", 6), _photo()
    rng = random.Random(6)
    rng.choice(["one"])
    left, top, width, height = images._crop_box(*photo.size, rng)
    part = photo.crop((left, top, left + width, top + height))
    assert view.size == (336, 336)
    assert np.array_equal(_array(view), _array(part.resize((336, 336), Image.Resampling.BILINEAR)))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_any_mode_becomes_rgb(mode):
    assert all(_draw(name, 0, _photo().convert(mode)).mode == "RGB" for name in RITUAL_TRANSFORMS)


def test_transformations_refuse():
    with pytest.raises(TypeError, match=r"needs a PIL image, not a Tensor: apply it before the processor"):
        ritual_transform(torch.zeros(3, 8, 8), seed=0)
    with pytest.raises(ValueError, match=r"transforms must be some of hflip, .*, not shear"):
        ritual_transform(_photo(), seed=0, transforms=["shear"])
    with pytest.raises(ValueError, match=r"transforms must be some of hflip, .*, not none"):
        ritual_transform(_photo(), seed=0, transforms=[])
    with pytest.raises(
        ValueError, match="a blur with a kernel of 13 pixels needs an image of at least 7 x 7, not 8 x 6"
    ):
        _draw("gaussian_blur", 0, Image.new("RGB", (8, 6)))
