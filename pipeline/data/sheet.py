"""Contact sheets: rows of pictures under their names, one look at a data set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FAINT = (250, 250, 248), (30, 34, 40), (120, 126, 134)
GAP = 6
TITLE = 46


def contact_sheet(
    title: str,
    note: str,
    rows: Sequence[tuple[str, Sequence[np.ndarray]]],
    *,
    cell: tuple[int, int],
    across: int,
) -> Image.Image:
    """Lay out pictures under a title.

    Args:
        rows: Groups of (name, RGB pictures); a group is a row, or part of one where `across` leaves room.
        cell: Width and height that each picture is fitted into.
        across: Pictures side by side in all.
    """
    each = max(len(pictures) for _, pictures in rows)
    groups = max(1, across // each)
    lines = -(-len(rows) // groups)
    label = 22
    group = (each * (cell[0] + GAP) + 3 * GAP, cell[1] + label + 2 * GAP)
    sheet = Image.new("RGB", (groups * group[0] + 3 * GAP, TITLE + 20 + lines * group[1] + 2 * GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((3 * GAP, 10), title, INK, ImageFont.load_default(22))
    pen.text((3 * GAP, 38), note, FAINT, ImageFont.load_default(13))
    for number, (name, pictures) in enumerate(rows):
        line, column = divmod(number, groups)
        left, top = 3 * GAP + column * group[0], TITLE + 20 + line * group[1]
        pen.text((left, top), name, INK, ImageFont.load_default(14))
        for i, picture in enumerate(pictures):
            sheet.paste(fitted(picture, cell), (left + i * (cell[0] + GAP), top + label))
    return sheet


def fitted(picture: np.ndarray, cell: tuple[int, int]) -> Image.Image:
    """Scale a picture into a cell (small ones in whole steps: pixels stay pixels), on a grey ground."""
    image = Image.fromarray(picture)
    scale = min(cell[0] / image.width, cell[1] / image.height)
    if scale >= 2:
        size = (image.width * int(scale), image.height * int(scale))
        image = image.resize(size, Image.Resampling.NEAREST)
    else:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    ground = Image.new("RGB", cell, (226, 226, 222))
    ground.paste(image, ((cell[0] - image.width) // 2, (cell[1] - image.height) // 2))
    return ground
