"""The one reader of pictures: prepare, training and predict accept and refuse the same files."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pipeline.data.manifest import fault, read_file
from pipeline.errors import UserError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # 8 bits per channel
SIDES = (4, 32_768)
PIXELS = 80_000_000
Image.MAX_IMAGE_PIXELS = None  # `_unfit` is stricter, and PIL's own limit warns before it refuses


def read_picture(
    source: Path | bytes, expected: str | None = None, *, upright: bool = False
) -> np.ndarray:
    """A picture as (H, W, 3) RGB uint8, whatever colour space its file has.

    Args:
        source: A file, or the content of one.
        expected: The file's digest in the manifest; None to accept any content.
        upright: Turn a photo as its EXIF data say; published results do not.

    Raises:
        UserError: It is not a whole 8-bit still picture of a reasonable size in a regular file.
    """
    is_file = isinstance(source, Path)
    content = read_file(source, expected) if is_file else source
    with opened(content, source if is_file else Path("picture")) as image:
        return np.array((ImageOps.exif_transpose(image) if upright else image).convert("RGB"))


def picture_size(content: bytes, name: Path) -> tuple[int, int]:
    """The (width, height) of a picture that is decoded to its end.

    Raises:
        UserError: `read_picture` would raise it.
    """
    with opened(content, name) as image:
        size = image.size
        image.draft("L", (1, 1))  # of a JPEG all is read, but few pixels are made
        image.load()
    return size


@contextlib.contextmanager
def opened(content: bytes, name: Path) -> Iterator[Image.Image]:
    """The picture in `content`, whose decoding inside may fail; `name` is for the errors."""
    if not content:
        raise fault(name, "an empty file")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if reason := _unfit(image):
                raise fault(name, reason)
            yield image
    except UserError:
        raise
    except Exception as error:  # PIL raises whatever its decoders meet
        raise fault(name, f"not a readable picture ({error})") from None


def _unfit(image: Image.Image) -> str:
    width, height = image.size
    size = f"{width} x {height} pixels"
    if min(width, height) < SIDES[0]:
        return f"{size}: too small for a picture"
    if max(width, height) > SIDES[1] or width * height > PIXELS:
        return f"{size}: too large; scale it down"
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a photo with its preview
        return "an animation; keep one frame"
    if image.mode not in MODES or ";16" in str(getattr(image, "tile", "")):
        return "not an 8-bit picture; convert it"
    return ""
