"""Scenes of the demo data: coloured shapes on a cluttered background, drawn with PIL.

    (seed, index) --sample_scene--> Scene --render_scene--> JPEG bytes
                                      +---text.py----> captions, questions and answers

A scene is a pure function of seed and index, for any number of processes.
"""

import io
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 150, 66),
    "blue": (38, 84, 201),
    "yellow": (245, 205, 40),
    "purple": (136, 52, 170),
    "orange": (243, 128, 30),
}
SHAPES = ("circle", "square", "triangle", "star")
DIAMETERS = {"small": 0.19, "large": 0.31}
"""Diameter of an object as a share of the image's short side."""

ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
BACKGROUNDS = {
    "gray": (176, 178, 182),
    "beige": (222, 208, 184),
    "sky": (176, 205, 224),
    "mint": (190, 217, 200),
}
IMAGE_SIZES = ((160, 120), (192, 128), (208, 156), (224, 168), (168, 168), (132, 176))
SUPERSAMPLING = 3
JPEG_QUALITY = 88


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One shape."""

    shape: str
    colour: str
    size: str
    row: int
    column: int
    shift: tuple[float, float]
    """Offset from the centre of its cell, in cells."""

    turn: float
    """Rotation in degrees."""

    @property
    def name(self) -> str:
        """Colour and shape; unique in its scene."""
        return f"{self.colour} {self.shape}"

    @property
    def position(self) -> str:
        """Cell in words: top left, center, bottom, ..."""
        row, column = ROWS[self.row], COLUMNS[self.column]
        if row == "middle":
            return column
        return row if column == "center" else f"{row} {column}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Content of an image."""

    size: tuple[int, int]
    """Width and height, pixels."""

    background: str
    objects: tuple[SceneObject, ...]
    """Two to four, in reading order, in different cells."""

    clutter_seed: int
    """Seed of the lines and dots behind the objects, which no text mentions."""


def sample_scene(seed: int, index: int) -> Scene:
    """Draw scene number `index` of the demo data with this seed."""
    rng = random.Random(f"scene/{seed}/{index}")
    count = rng.choice((2, 3, 3, 4))
    names = rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], count)
    cells = sorted(rng.sample(range(9), count))
    objects = tuple(
        SceneObject(
            shape=shape,
            colour=colour,
            size=rng.choice(tuple(DIAMETERS)),
            row=cell // 3,
            column=cell % 3,
            shift=(rng.uniform(-0.1, 0.1), rng.uniform(-0.06, 0.06)),
            turn=rng.uniform(-15, 15),
        )
        for (colour, shape), cell in zip(names, cells, strict=True)
    )
    return Scene(
        size=rng.choice(IMAGE_SIZES),
        background=rng.choice(tuple(BACKGROUNDS)),
        objects=objects,
        clutter_seed=rng.getrandbits(32),
    )


def render_scene(scene: Scene) -> bytes:
    """Render a scene as JPEG; equal bytes for equal scenes and Pillow versions."""
    width, height = (side * SUPERSAMPLING for side in scene.size)
    image = _draw_background(width, height, scene)
    draw = ImageDraw.Draw(image)
    for item in scene.objects:
        _draw_object(draw, item, width, height)
    buffer = io.BytesIO()
    image.reduce(SUPERSAMPLING).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _shade(colour: tuple[int, int, int], factor: float) -> tuple[int, int, int]:
    red, green, blue = (min(255, round(level * factor)) for level in colour)
    return red, green, blue


def _draw_background(width: int, height: int, scene: Scene) -> Image.Image:
    """Draw a gradient with faint lines and dots."""
    rng = random.Random(scene.clutter_seed)
    colour = BACKGROUNDS[scene.background]
    light, dark = Image.new("RGB", (width, height), _shade(colour, 1.08)), _shade(colour, 0.86)
    image = Image.new("RGB", (width, height), dark)
    image.paste(light, mask=Image.linear_gradient("L").rotate(180).resize((width, height)))
    draw = ImageDraw.Draw(image)
    unit = min(width, height) // 60
    for _ in range(rng.randint(4, 8)):
        ends = [(rng.randint(0, width), rng.randint(0, height)) for _ in range(2)]
        draw.line(ends, fill=_shade(colour, rng.uniform(0.78, 1.15)), width=unit)
    for _ in range(rng.randint(10, 25)):
        x, y, radius = rng.randint(0, width), rng.randint(0, height), rng.randint(unit, 2 * unit)
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(box, fill=_shade(colour, rng.uniform(0.75, 1.15)))
    return image


def _draw_object(draw: ImageDraw.ImageDraw, item: SceneObject, width: int, height: int) -> None:
    """Draw a shape with an outline and a soft drop shadow."""
    radius = DIAMETERS[item.size] * min(width, height) / 2
    margin = 1.2 * radius  # no object is cut off by the border
    x = min(max((item.column + 0.5 + item.shift[0]) * width / 3, margin), width - margin)
    y = min(max((item.row + 0.5 + item.shift[1]) * height / 3, margin), height - margin)
    colour = COLOURS[item.colour]
    for dx, fill in ((0.12, (110, 110, 114)), (0.0, _shade(colour, 0.6))):
        draw.polygon(_outline(item, x + dx * radius, y + dx * radius, radius), fill=fill)
    draw.polygon(_outline(item, x, y, 0.86 * radius), fill=colour)


def _outline(item: SceneObject, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Compute the corners of a shape; all shapes have similar areas."""
    reach = {
        "circle": [1.0] * 48,
        "square": [1.2] * 4,
        "triangle": [1.3] * 3,
        "star": [1.35, 0.58] * 5,
    }[item.shape]
    start = math.radians(item.turn - 90) + (math.pi / 4 if item.shape == "square" else 0.0)
    step = 2 * math.pi / len(reach)
    return [
        (
            x + radius * far * math.cos(start + corner * step),
            y + radius * far * math.sin(start + corner * step),
        )
        for corner, far in enumerate(reach)
    ]
