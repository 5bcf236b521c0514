"""What the generated sets are drawn with: outlines written as text, a canvas that keeps labels, noise, exposure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray
Rng = np.random.Generator
ANGLES = np.linspace(0, 2 * np.pi, 20, endpoint=False)
CIRCLE = np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1).astype(np.float32)


@dataclass(frozen=True)
class Part:
    """Outlines (..., N, 2) to fill or, if `width` is not 0, lines that thick; `swings`: about its first point."""

    label: str
    paint: str
    points: Array
    width: float = 0.0
    swings: bool = False


def _read(text: str) -> dict[str, list[Part]]:
    """Return the drawings that a text holds, in the form that drawings.txt explains."""
    found: dict[str, list[Part]] = {}
    parts, label = [], ""
    for line in text.splitlines():
        if not line.startswith("    "):
            parts = found[line] = []  # a name; or a comment, which has no parts
            continue
        for words in map(str.split, line.split(";")):
            if words[0].endswith(":"):
                label = words.pop(0)[:-1]
            paint, shape, *pairs = words
            points = np.array([pair.split(",") for pair in pairs]).astype(np.float32)
            kind, width, mirrored = shape[:4].rstrip("+"), float(shape[4:].rstrip("+") or 0), shape.endswith("+")
            if kind == "blob":
                points = _smooth(points)
            elif kind == "box":
                points = rectangles(*points.reshape(-1, 4).T)
            elif kind in ("disc", "ring"):
                points = points[::2, None] + points[1::2, None] * CIRCLE[np.arange(21 if width else 20) % 20]
            for side in (1, -1)[: 1 + mirrored]:
                parts.append(Part(label, paint, points * (side, 1), width, kind == "limb"))
    return found


def _smooth(p1: Array) -> Array:
    """Return a closed curve through points (Catmull-Rom)."""
    p0, p1, p2, p3 = (np.roll(p1, shift, 0)[:, None] for shift in (1, 0, -1, -2))
    t = np.linspace(0, 1, 6, endpoint=False)[:, None]
    square, cube = 2 * p0 - 5 * p1 + 4 * p2 - p3, 3 * p1 - p0 - 3 * p2 + p3
    return ((2 * p1 + (p2 - p0) * t + square * t**2 + cube * t**3) / 2).reshape(-1, 2)


def rectangles(left: ArrayLike, low: ArrayLike, right: ArrayLike, high: ArrayLike) -> Array:
    """Return the corners (N, 4, 2) of rectangles, their edges broadcast against each other."""
    left, low, right, high = (edge.ravel() for edge in np.broadcast_arrays(left, low, right, high))
    return np.stack([left, low, right, low, right, high, left, high], 1).reshape(-1, 4, 2)


def varied(rng: Rng, parts: list[Part], amount: float) -> list[Part]:
    """Return a drawing in other proportions: bent by one smooth random wave, its limbs swung."""
    if not amount:
        return parts
    waves, phase, shift = rng.normal(0, 1.5, (2, 3)), rng.uniform(0, 6, 3), rng.normal(0, amount, (3, 2))
    changed = []
    for part in parts:
        points = part.points + np.sin(part.points @ waves + phase) @ shift
        if part.swings:
            points = points + np.linspace(0, 1, len(points))[:, None] * rng.normal(0, amount, 2) * (2.5, 0.7)
        changed.append(replace(part, points=points, width=part.width * rng.uniform(1 - 2 * amount, 1 + 2 * amount)))
    return changed


class Canvas:
    """Colours (H, W, 3 or 4) and, in `ids` (H, W), the label of what was drawn last."""

    def __init__(self, paint: Array, line_type: int = cv2.LINE_8) -> None:
        """Draw onto `paint` (uint8); `line_type` is OpenCV's."""
        self.paint, self.line_type, self.ids = paint, line_type, np.zeros(paint.shape[:2], np.uint8)

    def put(self, points: Array, label: int | None, colour: Sequence[float] | None, width: float = 0.0) -> None:
        """Fill outlines (..., N, 2) in pixels, or draw lines `width` pixels thick; None leaves label or colour."""
        lines = list((points.reshape(-1, *points.shape[-2:]) * 8).round().clip(-(2**18), 2**18).astype(np.int32))
        for layer, value in ((self.ids, label), (self.paint, colour)):
            if value is None:
                continue
            if width:
                cv2.polylines(layer, lines, False, value, max(1, round(width)), self.line_type, 3)
            else:
                cv2.fillPoly(layer, lines, value, self.line_type, 3)


def texture(rng: Rng, height: int, width: int, coarsest: int) -> Array:
    """Return smooth noise (height, width) around 0 with a spread of about 1: three octaves from `coarsest` cells on."""
    field = np.zeros((height, width), np.float32)
    for octave in range(3):
        cells = max(2, coarsest * 2**octave)
        grid = rng.standard_normal((cells, max(2, cells * width // height)), np.float32)
        field += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC) * 0.6**octave
    return field


def photograph(rng: Rng, picture: Array) -> Array:
    """Return the photograph (uint8) of a float32 picture: exposure, colour of the light, its gradient, the sensor."""
    height, width = picture.shape[:2]
    down, across = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)
    light = rng.uniform(0.6, 1.2) * (1 + rng.uniform(-0.25, 0.25) * across + rng.uniform(-0.25, 0.25) * down)
    picture = picture * (light[..., None] * rng.uniform(0.88, 1.12, 3)).astype(np.float32)
    picture += rng.standard_normal(picture.shape, np.float32) * rng.uniform(1, 6)
    return picture.clip(0, 255).astype(np.uint8)


DRAWINGS = _read(Path(__file__).with_name("drawings.txt").read_text(encoding="utf-8"))
