"""The one reader of pictures: what it refuses, everything refuses, in one line."""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from pipeline.data import imagenet, manifest, pictures
from pipeline.errors import UserError

PHOTO = Image.effect_noise((40, 30), 60)
DEEP = cv2.imencode(".png", np.full((9, 9, 3), 40_000, np.uint16))[1].tobytes()


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def written(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def a_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's address is short
    socket.socket(socket.AF_UNIX).bind(path.name)
    os.chdir(here)


def a_sparse_file(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(manifest.BYTES + 1)


MOVING = {"save_all": True, "append_images": [PHOTO.rotate(90)]}
REFUSED = {
    "cut short": (written(encoded(PHOTO)[:500]), "not a readable picture"),
    "without its last bytes": (written(encoded(PHOTO)[:-40]), "not a readable picture"),
    "png cut short": (written(encoded(PHOTO, "PNG")[:-40]), "not a readable picture"),
    "empty": (written(b""), "an empty file"),
    "text": (written(b"not a picture"), "not a readable picture"),
    "a program": (written(encoded(PHOTO, "EPS")), "not a readable picture"),
    "one pixel": (written(encoded(PHOTO.resize((1, 1)))), "too small for a picture"),
    "16 bits": (written(encoded(Image.new("I;16", (9, 9)), "PNG")), "not an 8-bit picture"),
    "16 bit colours": (written(DEEP), "not an 8-bit picture"),
    "floats": (written(encoded(Image.new("F", (9, 9)), "TIFF")), "not an 8-bit picture"),
    "gif": (written(encoded(PHOTO, "GIF", **MOVING)), "an animation"),
    "png": (written(encoded(PHOTO, "PNG", **MOVING)), "an animation"),
    "webp": (written(encoded(PHOTO, "WEBP", **MOVING)), "an animation"),
    "many pixels": (written(encoded(Image.new("1", (9_000, 9_000)), "PNG")), "too large"),
    "a bomb": (written(encoded(Image.new("1", (20_000, 9_000)), "PNG")), "too large"),
    "a long side": (written(encoded(Image.new("1", (40_000, 9)), "PNG")), "too large"),
    "many bytes": (a_sparse_file, "at most"),
    "a pipe": (os.mkfifo, "not a regular file"),
    "a socket": (a_socket, "cannot be read"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "a folder": (Path.mkdir, "cannot be read"),
    "a loop": (lambda path: path.symlink_to(path), "cannot be read"),
    "missing": (lambda path: None, "cannot be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_picture_that_cannot_be_used_is_refused_in_one_line_everywhere(
    tmp_path: Path, name: str
) -> None:
    make, reason = REFUSED[name]
    path = tmp_path / "train" / "a\nb" / os.fsdecode(b"\xe9$x_1$.JPEG")
    path.parent.mkdir(parents=True)
    make(path)
    found = (path.relative_to(tmp_path).as_posix(),)
    for read in (pictures.read_picture, lambda _: imagenet.inspect(tmp_path, found)):
        with pytest.raises(UserError) as caught:
            read(path)
        message = str(caught.value)
        assert reason in message and r"a\nb/\udce9$x_1$.JPEG" in message
        assert len(message) < 600 and message.isprintable()


TURNED = Image.Exif()
TURNED[0x0112] = 6
ACCEPTED = {
    "grey": encoded(PHOTO),
    "cmyk": encoded(PHOTO.convert("CMYK")),
    "palette": encoded(PHOTO.convert("P"), "GIF"),
    "two colours": encoded(PHOTO.convert("1"), "PNG"),
    "transparent": encoded(PHOTO.convert("RGBA"), "PNG"),
    "png": encoded(PHOTO, "PNG"),
    "turned": encoded(PHOTO, exif=TURNED),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_any_still_8_bit_picture_is_read_as_rgb(tmp_path: Path, name: str) -> None:
    path = tmp_path / os.fsdecode(b"\xff a,b.JPEG")
    path.write_bytes(ACCEPTED[name])
    whole = pictures.read_picture(path)
    assert whole.shape == (30, 40, 3) and whole.dtype == np.uint8
    assert pictures.picture_size(ACCEPTED[name], path) == (40, 30)
    assert np.array_equal(pictures.read_picture(ACCEPTED[name]), whole)
    grey = np.asarray(PHOTO)[..., None].astype(int)
    if name not in ("two colours", "cmyk", "palette"):
        assert np.abs(whole - grey).mean() < 8


def test_a_photo_is_turned_only_where_that_is_asked_for(tmp_path: Path) -> None:
    assert pictures.read_picture(ACCEPTED["turned"], upright=True).shape == (40, 30, 3)
    assert pictures.read_picture(ACCEPTED["turned"]).shape == (30, 40, 3)


def test_hidden_files_belong_to_no_folder(tmp_path: Path) -> None:
    for name in ("b.JPEG", "a.JPEG", "._a.JPEG", ".DS_Store"):
        (tmp_path / name).write_bytes(b"")
    assert manifest.files(tmp_path) == ["a.JPEG", "b.JPEG"]
    (tmp_path / "link.JPEG").symlink_to("a.JPEG")
    (tmp_path / "more").mkdir()
    with pytest.raises(UserError, match="more: not a file"):
        manifest.files(tmp_path)
    assert manifest.folders(tmp_path) == ["more"]
