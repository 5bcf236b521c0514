"""Contact sheets: rows of pictures under their names, one look at a data set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

PAPER, INK, FAINT = (250, 250, 248), (30, 34, 40), (120, 126, 134)
GAP, LABEL, TITLE = 8, 22, 66


def contact_sheet(
    title: str,
    note: str,
    groups: Sequence[tuple[str, Sequence[np.ndarray]]],
    cell: tuple[int, int],
    columns: int,
) -> Image.Image:
    """Lays out groups of pictures under a title.

    Args:
        title: In large letters.
        note: Below it.
        groups: Names with their RGB pictures, side by side.
        cell: Width and height that each picture is fitted into.
        columns: Groups side by side.
    """
    each = max(len(pictures) for _, pictures in groups)
    width, height = each * (cell[0] + GAP) + 2 * GAP, cell[1] + LABEL + 2 * GAP
    lines = -(-len(groups) // columns)
    sheet = Image.new("RGB", (columns * width + 2 * GAP, TITLE + lines * height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((2 * GAP, 10), title, INK, ImageFont.load_default(22))
    pen.text((2 * GAP, 38), note, FAINT, ImageFont.load_default(13))
    for number, (name, pictures) in enumerate(groups):
        line, column = divmod(number, columns)
        left, top = 2 * GAP + column * width, TITLE + line * height
        pen.text((left, top), name, INK, ImageFont.load_default(14))
        for i, picture in enumerate(pictures):
            fitted = ImageOps.pad(
                Image.fromarray(picture), cell, Image.Resampling.BICUBIC, (226, 226, 222)
            )
            sheet.paste(fitted, (left + i * (cell[0] + GAP), top + LABEL))
    return sheet
