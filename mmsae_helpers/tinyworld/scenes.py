"""Scenes of one object on a ground: sampling, rendering and the pixel mask.

A scene is six attributes. Shape and colour, crossed, give the 100 fine classes; shape and the colour's warmth give the
20 coarse ones; size, vertical and horizontal place and ground are nuisances, and so are the jitter of place, radius and
colour and the pixel noise. Everything is drawn from integer generators and rendered with integer arithmetic, so a seed
gives the same bytes on any machine.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 64
SUPERSAMPLING = 4

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": ("circle", "square", "triangle", "star", "cross", "ring", "crescent", "arrow", "heart", "diamond"),
    "color": ("red", "orange", "yellow", "pink", "brown", "green", "cyan", "blue", "purple", "white"),
    "size": ("small", "large"),
    "vertical": ("top", "middle", "bottom"),
    "horizontal": ("left", "center", "right"),
    "ground": ("gray", "black", "navy", "olive", "maroon"),
}
WARM = ("red", "orange", "yellow", "pink", "brown")
FINE_NAMES = tuple(f"{color} {shape}" for shape in ATTRIBUTES["shape"] for color in ATTRIBUTES["color"])
COARSE_NAMES = tuple(f"{warmth} {shape}" for shape in ATTRIBUTES["shape"] for warmth in ("warm", "cool"))

_COLOR_RGB = {
    "red": (220, 40, 40), "orange": (240, 140, 30), "yellow": (235, 215, 50), "pink": (245, 140, 190),
    "brown": (150, 85, 45), "green": (40, 170, 60), "cyan": (60, 200, 215), "blue": (50, 80, 220),
    "purple": (140, 50, 180), "white": (245, 245, 245),
}  # fmt: skip
_GROUND_RGB = {
    "gray": (110, 110, 110), "black": (20, 20, 20), "navy": (15, 20, 70), "olive": (70, 85, 25), "maroon": (90, 20, 35),
}  # fmt: skip


class Scene(NamedTuple):
    """The attributes of one scene, each one of the words of ``ATTRIBUTES``."""

    shape: str
    color: str
    size: str
    vertical: str
    horizontal: str
    ground: str

    @property
    def fine_label(self) -> int:
        """Index into ``FINE_NAMES``."""
        return FINE_NAMES.index(f"{self.color} {self.shape}")

    @property
    def coarse_label(self) -> int:
        """Index into ``COARSE_NAMES``."""
        return COARSE_NAMES.index(f"{'warm' if self.color in WARM else 'cool'} {self.shape}")


def sample_scene(rng: np.random.Generator, fine_label: int | None = None) -> Scene:
    """Draw a scene; with ``fine_label`` its shape and colour are those of that class."""
    chosen = {name: values[rng.integers(len(values))] for name, values in ATTRIBUTES.items()}
    if fine_label is not None:
        chosen["color"], chosen["shape"] = FINE_NAMES[fine_label].split()
    return Scene(**chosen)


def render(scene: Scene, rng: np.random.Generator, size=(IMAGE_SIZE, IMAGE_SIZE)) -> tuple[np.ndarray, np.ndarray]:
    """Render a scene on a canvas of ``size`` (height, width); objects keep their size, places spread with the canvas.

    Returns the image, uint8 [64, 64, 3], and the object's mask, bool [64, 64] (pixels at least half covered).
    ``rng`` draws the jitter (place +-3 px, radius, colour +-20 of 255) and noise (standard deviation 9 of 255).
    """
    unit = SUPERSAMPLING
    low, high = (8, 10) if scene.size == "small" else (13, 16)
    radius = int(rng.integers(low * unit, high * unit + 1))
    height, width = size
    place = [
        (11 + 21 * ATTRIBUTES[axis].index(getattr(scene, axis))) * unit * edge // IMAGE_SIZE
        + int(rng.integers(-3 * unit, 3 * unit + 1))
        for axis, edge in (("horizontal", width), ("vertical", height))
    ]
    x, y = (min(max(p, radius), edge * unit - radius) for p, edge in zip(place, (width, height), strict=True))
    coverage = Image.new("L", (width * unit, height * unit), 0)
    _draw_shape(ImageDraw.Draw(coverage), scene.shape, x, y, radius)
    alpha = np.asarray(coverage.reduce(unit), dtype=np.int32)[..., None]
    color = np.clip(np.array(_COLOR_RGB[scene.color]) + rng.integers(-20, 21, 3), 0, 255)
    ground = np.array(_GROUND_RGB[scene.ground])
    clean = (color * alpha + ground * (255 - alpha)) // 255
    noise = rng.integers(-9, 10, (3, height, width, 3), dtype=np.int8).sum(0, dtype=np.int32)
    return np.clip(clean + noise, 0, 255).astype(np.uint8), alpha[..., 0] >= 128


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: int, y: int, r: int) -> None:
    def ring_points(n, radius, rotation=0.0, inner=None):
        count = n * (2 if inner else 1)
        for i in range(count):
            angle = 2 * math.pi * i / count + rotation
            length = radius * (inner if inner and i % 2 else 1)
            yield length * math.sin(angle), -length * math.cos(angle)

    def polygon(points):
        draw.polygon([(x + round(px), y + round(py)) for px, py in points], fill=255)

    def ellipse(left, top, right, bottom, fill=255):
        draw.ellipse([x + round(left * r), y + round(top * r), x + round(right * r), y + round(bottom * r)], fill=fill)

    if shape == "circle":
        ellipse(-1, -1, 1, 1)
    elif shape == "square":
        polygon(ring_points(4, r * 1.2, math.pi / 4))
    elif shape == "triangle":
        polygon(ring_points(3, r * 1.15))
    elif shape == "star":
        polygon(ring_points(5, r * 1.2, 0, 0.42))
    elif shape == "cross":
        polygon([(-r, -r / 3), (r, -r / 3), (r, r / 3), (-r, r / 3)])
        polygon([(-r / 3, -r), (r / 3, -r), (r / 3, r), (-r / 3, r)])
    elif shape == "ring":
        ellipse(-1, -1, 1, 1)
        ellipse(-0.55, -0.55, 0.55, 0.55, fill=0)
    elif shape == "crescent":
        ellipse(-1, -1, 1, 1)
        ellipse(-0.4, -0.9, 1.3, 0.8, fill=0)
    elif shape == "arrow":
        polygon([(-r, -r * 0.3), (0, -r * 0.3), (0, -r * 0.9), (r, 0), (0, r * 0.9), (0, r * 0.3), (-r, r * 0.3)])
    elif shape == "heart":
        ellipse(-1, -0.8, 0, 0.2)
        ellipse(0, -0.8, 1, 0.2)
        polygon([(-r * 0.95, -r * 0.1), (r * 0.95, -r * 0.1), (0, r)])
    else:  # diamond
        polygon([(0, -r * 1.15), (r * 0.75, 0), (0, r * 1.15), (-r * 0.75, 0)])
