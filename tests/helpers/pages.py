"""What can be said of a page without a browser: its colours, and the places of the texts in its plots."""

import html
import re
from importlib import resources

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

MARGIN = 1.05
"""Other fonts than DejaVu Sans, which is wide already, may be a little wider."""


def _text_width(text, size):
    """The width of a text in DejaVu Sans."""
    properties = FontProperties(family="DejaVu Sans", size=size)
    return MARGIN * text_to_path.get_text_width_height_descent(text, properties, ismath=False)[0]


def style():
    """The style sheet that all pages share."""
    return resources.files("contralto.common").joinpath("page.css").read_text(encoding="utf-8")


def colours():
    """The colours of light and dark paper, by name."""
    light, dark = (dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", part)) for part in style().split("@media", 2)[:2])
    return {"light": light, "dark": light | dark}


def contrast(first, second):
    """The contrast ratio of two colours, as WCAG 2.2 defines it: (L1 + 0.05) / (L2 + 0.05)."""
    low, high = sorted(map(_luminance, (first, second)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour):
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def plots(page):
    """The plots of a page."""
    return re.findall(r"<svg.*?</svg>", page, re.DOTALL)


def cut_texts(svg):
    """The texts of a plot that leave its box, horizontally or vertically."""
    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())
    cut = []
    for attributes, text in re.findall(r"<text([^>]*)>([^<]*)</text>", svg):
        size = float(re.search(r"font(?:-size)?: ([\d.]+)px", attributes).group(1))
        anchor = (re.search(r"text-anchor: (\w+)", attributes) or ["", "start"])[1]
        rotated = re.search(r"rotate\((-?[\d.]+)", attributes)
        if rotated and abs(float(rotated[1])) not in (0, 180):
            continue
        place = re.search(r'x="(-?[\d.]+)" y="(-?[\d.]+)"', attributes)
        x, y = map(float, (place or re.search(r"translate\((-?[\d.]+) (-?[\d.]+)\)", attributes)).groups())
        long = _text_width(html.unescape(text), size)
        left = x - long * {"start": 0, "middle": 0.5, "end": 1}[anchor]
        if left < 0 or left + long > width or not size * 0.7 <= y <= height:
            cut.append(text)
    return cut
