"""Images of every kind as RGB: bit depths, transparency, orientation, and what cannot be known."""

import io

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from contralto.decoding.images import ritual_transform
from contralto.decoding.pictures import open_image, to_rgb


def _saved(image, **how):
    file = io.BytesIO()
    image.save(file, **{"format": "PNG", **how})
    return file.getvalue()


def test_sixteen_bits_are_scaled(tmp_path):
    ramp = np.array([[0, 257, 32896, 65535, 300]], dtype=np.uint16)
    expected = [[[v, v, v] for v in (0, 1, 128, 255, 1)]]
    for name in ("a.png", "a.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        assert np.asarray(open_image(tmp_path / name)).tolist() == expected
    big = Image.frombytes("I;16B", (5, 1), ramp.astype(">u2").tobytes())
    assert np.asarray(to_rgb(big)).tolist() == expected


@pytest.mark.parametrize(("mode", "what"), [("I", "32-bit numbers"), ("F", "floating-point numbers")])
def test_pixels_of_unknown_range_are_rejected(tmp_path, mode, what):
    path = tmp_path / "a.tif"
    Image.new(mode, (2, 2), 1).save(path)
    with pytest.raises(ValueError, match=f"{path}: its pixels are {what}"):
        open_image(path)


def _with_transparency():
    see_through = Image.new("RGBA", (2, 1), (9, 9, 9, 0))
    see_through.putpixel((1, 0), (200, 0, 0, 255))
    yield see_through
    grey = Image.new("LA", (2, 1), (9, 0))
    grey.putpixel((1, 0), (200, 255))
    yield grey
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.putpixel((1, 0), 1)
    palette.info["transparency"] = 0
    yield palette
    key = Image.new("RGB", (2, 1), (9, 9, 9))
    key.putpixel((1, 0), (200, 0, 0))
    key.info["transparency"] = (9, 9, 9)
    yield key


@pytest.mark.parametrize("image", list(_with_transparency()), ids=lambda image: image.mode)
def test_transparent_pixels_are_white(image):
    for found in (to_rgb(image), open_image(_saved(image))):
        first, second = np.asarray(found)[0].tolist()
        assert first == [255, 255, 255]
        assert second[0] == 200


def test_half_transparent_pixels_are_half_white():
    assert to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 127))).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize(("orientation", "size"), [(1, (3, 2)), (3, (3, 2)), (6, (2, 3)), (8, (2, 3))])
def test_photographs_are_turned_upright(orientation, size):
    image, exif = Image.new("RGB", (3, 2), "white"), Image.Exif()
    image.putpixel((0, 0), (255, 0, 0))
    exif[0x0112] = orientation
    found = open_image(_saved(image, exif=exif))
    corner = {1: (0, 0), 3: (2, 1), 6: (1, 0), 8: (0, 2)}[orientation]
    assert (found.size, found.getpixel(corner)) == (size, (255, 0, 0))
    assert to_rgb(found).size == size  # not turned twice


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 7, (7, 7, 7)),
        ("CMYK", (0, 255, 0, 0), (255, 0, 255)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
    ],
)
def test_other_modes_are_pillows(mode, colour, expected):
    assert to_rgb(Image.new(mode, (1, 1), colour)).getpixel((0, 0)) == expected


def test_transformations_see_the_same_pixels():
    grey = Image.fromarray(np.full((8, 8), 32896, dtype=np.uint16))
    assert ritual_transform(grey, seed=1).image.getpixel((0, 0)) == (128, 128, 128)


def test_several_frames_are_rejected(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "green")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=r"a.gif: it has 3 frames, but only a single image is supported"):
        open_image(tmp_path / "a.gif")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", "is not an image that Pillow can read"),
        (_saved(Image.effect_noise((64, 64), 50))[:900], "cannot be read"),
        (_saved(Image.effect_noise((64, 64), 50), format="JPEG")[:900], "cannot be read: image file is truncated"),
    ],
)
def test_broken_files_are_named(tmp_path, content, message):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        open_image(path)


def test_no_program_is_run(tmp_path, monkeypatch):
    """Pillow gives PostScript to Ghostscript, where there is one."""
    monkeypatch.setattr(EpsImagePlugin.EpsImageFile, "load", lambda *_, **__: pytest.fail("it was run"))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", format="EPS")
    for source in (tmp_path / "a.png", (tmp_path / "a.png").read_bytes()):
        with pytest.raises(ValueError, match=r": PostScript is a program, which Pillow would run in Ghostscript: save"):
            open_image(source)


def test_bombs_are_named(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.new("L", (300, 300)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=f"{path} has too many pixels"):
        open_image(str(path))


def test_what_is_no_image():
    with pytest.raises(TypeError, match="an image must be a path, bytes or a Pillow image, not a int"):
        open_image(7)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_image("nowhere.png")
    image = Image.new("RGB", (2, 2), "red")
    assert open_image({"bytes": _saved(image), "path": None}).getpixel((0, 0)) == (255, 0, 0)
