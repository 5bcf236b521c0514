"""Ten kinds of objects, drawn so that shape tells them apart, not colour, place, light or background.

The ten are CIFAR-10's; the ImageNet stand-ins are larger pictures of the same. A drawing's frame has x to the right,
y down, both about -1 to 1. Painted with: the coat, a second colour, dark, glass, or the coat on the far side.
"""

from __future__ import annotations

import colorsys

import cv2
import numpy as np

from pipeline.data.shapes import CIRCLE, DRAWINGS, Array, Canvas, Rng, photograph, texture, varied

SMOOTH = 64  # pixels along the shorter side, on which backgrounds and light are reckoned


def photo(rng: Rng, kind: str, height: int, width: int) -> Array:
    """Return a picture (height, width, 3), RGB uint8: an object of `kind` before something that is out of focus."""
    short = min(height, width)
    scale = -(-SMOOTH // short)  # a small picture is drawn larger
    size, smooth = (width * scale, height * scale), (width * SMOOTH // short, height * SMOOTH // short)
    ground = cv2.resize(_background(rng, *smooth), size, interpolation=cv2.INTER_CUBIC).clip(0, 255)
    radius = scale * short * rng.uniform(0.38, 0.5)
    middle = np.array(size) / 2
    centre = middle + (middle - 0.8 * radius) * rng.uniform(-0.5, 0.5, 2)
    turn, stretch = rng.uniform(-1, 1) * (0.6 if kind == "airplane" else 0.2), rng.uniform(0.85, 1.15)
    c, s = np.cos(turn), np.sin(turn)
    frame = np.array([[c, -s], [s, c]]) * (radius * stretch * rng.choice((-1, 1)), radius / stretch)
    coat = _apart_from(rng, ground[int(centre[1]), int(centre[0])], 70)
    paints = {
        "coat": coat,
        "second": _apart_from(rng, coat, 40),
        "dark": coat * 0.15 + 15,
        "glass": np.array([175, 190, 205]) * rng.uniform(0.5, 1.2),
        "far": coat * 0.62,
    }
    canvas = Canvas(ground.astype(np.uint8), cv2.LINE_AA)
    for part in varied(rng, DRAWINGS[kind], 0.05):
        canvas.put(part.points @ frame.T + centre, 255, paints[part.paint].tolist(), part.width * radius)
    light = _light(rng, cv2.resize(canvas.ids, smooth, interpolation=cv2.INTER_AREA), radius * SMOOTH / short / scale)
    lit = canvas.paint * cv2.resize(light, size)[..., None]
    picture = ground + (lit - ground) * (canvas.ids / np.float32(255))[..., None]
    return photograph(rng, cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA))


def _background(rng: Rng, width: int, height: int) -> Array:
    """Return a ground (height, width, 3), float32: two textured fields that meet, things lying about."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j].astype(np.float32)
    edge = y + rng.uniform(-0.25, 0.25) * (x - 0.5) - rng.uniform(0.3, 1.1)
    below = (edge * rng.uniform(6, 60) + 0.5).clip(0, 1)[..., None]
    picture = _colour(rng) * (1 - below) + _colour(rng) * below
    picture *= 1 + rng.uniform(0.05, 0.3) * texture(rng, height, width, int(rng.integers(2, 7)))[..., None]
    canvas = Canvas(picture.clip(0, 255).astype(np.uint8), cv2.LINE_AA)
    for _ in range(int(rng.integers(0, 8))):  # patches, rings and bars
        corners = CIRCLE[np.sort(rng.choice(20, rng.integers(3, 8), replace=False))]
        outline = (corners, CIRCLE[np.arange(21) % 20] * rng.uniform(0.3, 1, 2), corners[:2])[rng.integers(3)]
        size, line = SMOOTH * rng.uniform(0.04, 0.2), 0 if outline is corners else SMOOTH * rng.uniform(0.01, 0.05)
        canvas.put(outline * size + rng.uniform(0, (width, height)), None, _colour(rng).tolist(), line)
    return cv2.GaussianBlur(canvas.paint, (0, 0), rng.uniform(0.4, 0.9)).astype(np.float32)


def _light(rng: Rng, mask: Array, radius: float) -> Array:
    """Return the light (H, W) that falls on a rounded, grained thing of this outline."""
    depth = cv2.GaussianBlur(mask.astype(np.float32) / 255, (0, 0), radius * 0.12)
    angle = rng.uniform(0, 2 * np.pi)
    slope = cv2.Sobel(depth, cv2.CV_32F, 1, 0) * np.cos(angle) + cv2.Sobel(depth, cv2.CV_32F, 0, 1) * np.sin(angle)
    grain = rng.uniform(0, 0.12) * texture(rng, mask.shape[0], mask.shape[1], int(rng.integers(4, 12)))
    return (1 + (slope * radius * 0.07).clip(-0.4, 0.4) + grain).astype(np.float32)


def _colour(rng: Rng) -> Array:
    """Return any RGB colour, 0 to 255, that is neither black nor white."""
    hsv = rng.random(), 0.8 * rng.random(), rng.uniform(0.15, 0.95)
    return np.array(colorsys.hsv_to_rgb(*hsv), np.float32) * 255


def _apart_from(rng: Rng, other: Array, distance: float) -> Array:
    """Return a colour that can be told from another."""
    candidates = (_colour(rng) for _ in range(20))
    return next((colour for colour in candidates if np.abs(colour - other).mean() > distance), 255 - other)
