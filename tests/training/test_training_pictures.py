"""Pictures to train on: which files are taken, what is said of the others, what is kept."""

from __future__ import annotations

import hashlib
import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from plus import FIVE, draw

from jubako.errors import InvalidRequest, JubakoError, TooLarge
from jubako.pictures import png
from jubako.training.pictures import accept, in_folder, keep

PLUSES = [png(draw(each)) for each in FIVE]


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def noise(side: int = 64, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8))


def claiming(width: int, height: int) -> bytes:
    """A PNG file that says how large it is and has no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_png_jpeg_and_webp_are_taken_by_their_contents(tmp_path: Path) -> None:
    uploads = [PLUSES[0], encoded(draw(FIVE[1]), "JPEG"), encoded(draw(FIVE[2]), "WEBP", lossless=True)]
    accepted, _ = accept(uploads, 64)
    keep(accepted, tmp_path / "images")
    assert [each.sha256 for each in accepted] == [hashlib.sha256(upload).hexdigest() for upload in uploads]
    files = in_folder(tmp_path / "images")
    assert [file.name for file in files] == ["000.png", "001.png", "002.png"]
    with Image.open(files[2]) as image:
        assert image.tobytes() == draw(FIVE[2]).tobytes()


def test_what_is_kept_has_no_metadata(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    exif[0x0112] = 6
    photo = encoded(noise().resize((90, 64)), "JPEG", exif=exif)
    accepted, _ = accept([photo, *PLUSES[:2]], 64)
    keep(accepted, tmp_path / "images")
    with Image.open(tmp_path / "images" / "000.png") as image:
        assert image.info == {}
        assert image.size == (64, 90), "it is turned upright before its orientation is forgotten"


def test_a_zip_of_pictures_is_as_good(tmp_path: Path) -> None:
    names = ("../../a.png", "/etc/b.png", "b/../c.png", "CON", "e.png")
    content = dict(zip(names, PLUSES, strict=True))
    extra = {"__MACOSX/._a.png": b"rest", "folder/": b"", ".DS_Store": b"rest", "b/Thumbs.db": b"rest"}
    accepted, _ = accept([zipped(content | extra)], 64)
    assert len(accepted) == 5
    keep(accepted, tmp_path / "deep" / "images")
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {f"deep/images/{number:03}.png" for number in range(5)}


@pytest.mark.parametrize("count", [0, 1, 2, 51])
def test_too_few_and_too_many_are_refused(count: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"images: {count} given; 3 to 50") as caught:
        accept([png(noise(seed=number)) for number in range(count)], 64)
    assert caught.value.param == "images"


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (lambda: b"not a picture", "not a picture"),
        (lambda: encoded(noise(), "GIF"), "not a picture"),
        (lambda: PLUSES[0][:200], "damaged"),
        (lambda: encoded(noise(31), "PNG"), "31x31 pixels are too few"),
        (lambda: claiming(40_000, 40_000), "limit of 64000000 pixels"),
        (lambda: PLUSES[0], r"the same picture as images\[0\]"),
        (lambda: encoded(draw(FIVE[0]), "WEBP", lossless=True), r"the same picture as images\[0\]"),
        (lambda: zipped({"a.png": PLUSES[0]}), "a zip is taken only"),
    ],
)
def test_a_bad_picture_is_named(bad: Callable[[], bytes], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        accept([*PLUSES[:2], bad(), *PLUSES[2:]], 64)
    assert caught.value.param == "images[2]"
    assert caught.value.message.startswith("images[2]: ")


def test_pictures_that_are_nearly_the_same_are_warned_of() -> None:
    near = np.asarray(noise(), np.int16)
    nudged = Image.fromarray(np.clip(near + 2, 0, 255).astype(np.uint8))
    _, warnings = accept([png(noise()), png(noise(seed=1)), png(nudged)], 64)
    assert warnings == ("images[2] is nearly the same as images[0]",)


def test_different_pictures_are_not_warned_of() -> None:
    _, warnings = accept([png(noise(seed=number)) for number in range(5)], 64)
    assert warnings == ()


def bomb() -> bytes:
    """A zip of 400 kB that says it holds 1 kB and holds 400 MB."""
    data = bytearray(zipped({"a.png": bytes(400_000_000)}))
    real = struct.pack("<I", 400_000_000)
    while (place := data.find(real)) >= 0:
        data[place : place + 4] = struct.pack("<I", 1000)
    return bytes(data)


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        (lambda: zipped({"a.png": bytes(60 * 2**20)}), TooLarge, "more than 50 MB"),
        (lambda: zipped({f"{n}.png": bytes(45 * 2**20) for n in range(10)}), TooLarge, "holds more than"),
        (lambda: zipped({f"{n}.png": b"" for n in range(600)}), InvalidRequest, "600 entries"),
        (lambda: zipped({f"{n}.png": b"" for n in range(60)}), InvalidRequest, "60 files"),
        (lambda: zipped({"a.png": PLUSES[0]})[:-30], InvalidRequest, "can't be read"),
        (lambda: zipped({"a.png": PLUSES[0]}), InvalidRequest, "1 given"),
        (
            lambda: zipped({"z.zip": zipped({"a.png": PLUSES[0]})} | {"a": b"", "b": b""}),
            InvalidRequest,
            "a zip",
        ),
        (bomb, JubakoError, "images"),
    ],
)
def test_a_zip_that_can_not_be_right_is_refused(
    content: Callable[[], bytes], error: type[JubakoError], says: str
) -> None:
    with pytest.raises(error, match=says):
        accept([content()], 64)
