"""What the stand-in paints: landscapes as PNG files, in pure Python.

The colours come from the prompt, the composition from the prompt and the number of the image, so that the images
of one prompt differ and belong together, and the same number of the same prompt is the same image again.
"""

import colorsys
import hashlib
import math
import random
import struct
import zlib
from collections.abc import Callable

# The palette of 256 colours: so many shades of each layer of hills, the sun and its halo, and the rest for the sky.
LAYERS = 4
LAYER_SHADES = 24
SUN, SKY = LAYERS * LAYER_SHADES, LAYERS * LAYER_SHADES + 2
SKY_SHADES = 256 - SKY
COMPRESSION_LEVEL = 6

Colour = tuple[float, float, float]
Outline = Callable[[float], float]


def paint(prompt: str, number: int, width: int, height: int) -> bytes:
    """The `number`th image of `prompt` as a PNG file, with a palette: 1024 × 1024 is a few dozen KiB."""
    palette = _palette(_dice(prompt))
    dice = _dice(f"{number}\n{prompt}")
    sky = bytes(SKY + SKY_SHADES * y // height for y in range(height))
    outlines = [_outline(dice, layer) for layer in range(LAYERS)]
    # Each layer is lit from above: the further below its outline, the deeper its colour.
    strips = [
        bytes(layer * LAYER_SHADES + min(LAYER_SHADES - 1, LAYER_SHADES * y * 2 // height) for y in range(height))
        for layer in range(LAYERS)
    ]
    sun_x, sun_y = dice.uniform(0.2, 0.8) * width, dice.uniform(0.18, 0.36) * height
    radius = dice.uniform(0.07, 0.12) * min(width, height)

    # Columns are slices put end to end, which is fast; the file wants rows, which are every height-th pixel of them.
    columns = bytearray()
    for x in range(width):
        column = bytearray(sky)
        for shade, size in ((SUN + 1, 1.35 * radius), (SUN, radius)):
            if abs(x - sun_x) < size:
                half = math.sqrt(size**2 - (x - sun_x) ** 2)
                top, end = max(0, round(sun_y - half)), min(height, round(sun_y + half))
                column[top:end] = bytes((shade,)) * (end - top)
        for outline, strip in zip(outlines, strips, strict=True):
            top = min(height, max(0, round(outline(x / width) * height)))
            column[top:] = strip[: height - top]
        columns += column
    rows = b"".join(b"\0" + columns[y::height] for y in range(height))
    return _png(width, height, palette, rows)


def _outline(dice: random.Random, layer: int) -> Outline:
    """How far down a layer begins, from 0 (top) to 1, at each place from 0 (left) to 1; the first is the furthest."""
    base = 0.48 + 0.13 * layer + dice.uniform(-0.02, 0.02)
    waves = [(dice.uniform(0.5, 1.0) / n, dice.uniform(0.6, 1.4) * n, dice.uniform(0, math.tau)) for n in (1, 2, 3, 5)]
    rough = dice.random() < 0.4 and layer < LAYERS - 1
    swing = dice.uniform(0.035, 0.07)

    def rounded(x: float) -> float:
        return base + swing * sum(share * math.sin(math.tau * speed * x + start) for share, speed, start in waves)

    def peaked(x: float) -> float:
        return base + swing * sum(
            share * (abs((speed * x * 2 + start) % 2 - 1) * 2 - 1) for share, speed, start in waves
        )

    return peaked if rough else rounded


def _palette(dice: random.Random) -> list[Colour]:
    """256 colours: the shades of each layer from light to deep, the sun, its halo, and the sky from top to horizon."""
    hue = dice.random()
    warm = hue + dice.choice((-0.18, -0.12, 0.1, 0.16, 0.5))
    top, horizon = _colour(hue, 0.55, 0.62), _colour(warm, 0.75, 0.86)
    colours: list[Colour] = []
    haze = [_mix(_colour(hue + 0.03 * layer, 0.50, 0.26), horizon, 0.62 - 0.19 * layer) for layer in range(LAYERS)]
    for layer in haze:
        light, deep = _mix(layer, horizon, 0.22), _mix(layer, (0.0, 0.0, 0.0), 0.18)
        colours += [_mix(light, deep, (shade / (LAYER_SHADES - 1)) ** 0.7) for shade in range(LAYER_SHADES)]
    sun = _mix(_colour(warm, 0.9, 0.80), (1.0, 1.0, 1.0), 0.55)
    colours += [sun, _mix(sun, horizon, 0.6)]
    colours += [_mix(top, horizon, min(1.0, 1.6 * shade / (SKY_SHADES - 1))) for shade in range(SKY_SHADES)]
    return colours


def _colour(hue: float, saturation: float, lightness: float) -> Colour:
    return colorsys.hls_to_rgb(hue % 1, lightness, saturation)


def _mix(one: Colour, other: Colour, share: float) -> Colour:
    red, green, blue = (a + (b - a) * share for a, b in zip(one, other, strict=True))
    return red, green, blue


def _png(width: int, height: int, palette: list[Colour], rows: bytes) -> bytes:
    """A PNG with one byte for each pixel; every row of `rows` begins with its filter, 0."""
    colours = bytes(round(255 * part) for colour in palette for part in colour)
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"PLTE", colours), (b"IDAT", zlib.compress(rows, COMPRESSION_LEVEL)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def _dice(seed: str) -> random.Random:
    return random.Random(hashlib.sha256(seed.encode("utf-8", "surrogatepass")).digest())
