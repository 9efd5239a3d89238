"""Which pictures a fine-tuning accepts, and how they are kept: PNG, JPEG or WebP, one by one or in a zip.

A file's own name is never used, nor its claim of a type: contents decide. Kept are pixels alone, as PNG
without metadata, numbered in their order. No torch.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from jubako.errors import InvalidRequest, TooLarge
from jubako.pictures import opaque, open_picture, png
from jubako.request import MAX_FILE_BYTES

__all__ = ["LEAST", "MOST", "Accepted", "accept", "in_folder", "keep"]

LEAST, MOST = 3, 50
MAX_TOTAL_BYTES = 3 * MAX_FILE_BYTES  # no body is larger
MAX_ZIP_ENTRIES = 500  # folders and what systems add included
# Sides beyond it are scaled down when kept: no model here is trained on more.
MAX_SIDE = 2048

_HASH_SIDE = 16
_NEAR_BITS = 8  # of 256


@dataclass(frozen=True)
class Accepted:
    """One picture as a PNG file, upright and opaque, with the SHA-256 of the file that was sent."""

    png: bytes
    sha256: str


def accept(
    uploads: Sequence[bytes], resolution: int, field: str = "images"
) -> tuple[tuple[Accepted, ...], tuple[str, ...]]:
    """The pictures of the uploads, and warnings; InvalidRequest or TooLarge name ``images[2]`` and say why.

    A single upload may be a zip of them. Every picture is decoded here, one after the other.
    """
    if len(uploads) == 1 and _is_zip(uploads[0]):
        uploads = _unzipped(uploads[0], field)
    if not LEAST <= len(uploads) <= MOST:
        raise InvalidRequest(
            f"{field}: {len(uploads)} given; {LEAST} to {MOST} pictures are taken", param=field
        )
    if sum(map(len, uploads)) > MAX_TOTAL_BYTES:
        raise TooLarge(f"{field}: more than {MAX_TOTAL_BYTES // 2**20} MB in all are not taken", param=field)
    accepted: list[Accepted] = []
    pixels: dict[str, int] = {}
    outlines: list[int] = []
    warnings: list[str] = []
    for number, data in enumerate(uploads):
        name = f"{field}[{number}]"
        image = _opened(data, resolution, name)
        digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
        if (twin := pixels.setdefault(digest, number)) != number:
            raise InvalidRequest(f"{name}: the same picture as {field}[{twin}]; send each once", param=name)
        outline = _outline(image)
        warnings += [
            f"{name} is nearly the same as {field}[{other}]"
            for other, before in enumerate(outlines)
            if (before ^ outline).bit_count() <= _NEAR_BITS
        ]
        outlines.append(outline)
        accepted.append(Accepted(png(_plain(image)), hashlib.sha256(data).hexdigest()))
    return tuple(accepted), tuple(warnings)


def keep(pictures: Sequence[Accepted], folder: Path) -> None:
    """Write pictures into a new folder as ``000.png``, ``001.png``, …"""
    folder.mkdir(parents=True)
    for number, each in enumerate(pictures):
        (folder / f"{number:03}.png").write_bytes(each.png)


def in_folder(folder: Path) -> tuple[Path, ...]:
    """The kept pictures, in their order."""
    return tuple(sorted(folder.glob("[0-9]*.png")))


def _opened(data: bytes, resolution: int, field: str) -> Image.Image:
    if len(data) > MAX_FILE_BYTES:
        raise TooLarge(f"{field}: a file of more than {MAX_FILE_BYTES // 2**20} MB is not taken", param=field)
    if _is_zip(data):
        raise InvalidRequest(f"{field}: a zip is taken only where it is all that is sent", param=field)
    image = opaque(open_picture(data, field))
    least = resolution // 2
    if min(image.size) < least:
        raise InvalidRequest(
            f"{field}: {image.width}x{image.height} pixels are too few to learn {resolution}x{resolution} "
            f"from; send pictures of at least {least} pixels a side",
            param=field,
        )
    return image


def _plain(image: Image.Image) -> Image.Image:
    """The pixels alone, no more than are of use."""
    if max(image.size) > MAX_SIDE:
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return Image.fromarray(np.asarray(image))


def _is_zip(data: bytes) -> bool:
    return data[:4] in {b"PK\x03\x04", b"PK\x05\x06"}


def _unzipped(data: bytes, field: str) -> list[bytes]:
    """The files of a zip in its order, without folders and without what operating systems add."""
    if len(data) > MAX_TOTAL_BYTES:
        raise TooLarge(f"{field}: a zip of more than {MAX_TOTAL_BYTES // 2**20} MB is not taken", param=field)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = list(_members(archive, field))
            return [_read(archive, member, f"{field}[{number}]") for number, member in enumerate(members)]
    except _DAMAGED as error:
        raise InvalidRequest(f"{field}: the zip can't be read: {error}", param=field) from error


# A missing password and an unknown compression are RuntimeErrors.
_DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, OSError, ValueError, RuntimeError),
)


def _members(archive: zipfile.ZipFile, field: str) -> Iterator[zipfile.ZipInfo]:
    entries = archive.infolist()
    if len(entries) > MAX_ZIP_ENTRIES:
        raise InvalidRequest(
            f"{field}: the zip has {len(entries)} entries; {MOST} pictures are the most", param=field
        )
    files = [entry for entry in entries if not entry.is_dir() and not _is_litter(entry.filename)]
    if len(files) > MOST:
        raise InvalidRequest(
            f"{field}: {len(files)} files in the zip; {LEAST} to {MOST} pictures are taken", param=field
        )
    if sum(entry.file_size for entry in files) > MAX_TOTAL_BYTES:
        raise TooLarge(f"{field}: the zip holds more than {MAX_TOTAL_BYTES // 2**20} MB", param=field)
    yield from files


def _is_litter(name: str) -> bool:
    last = name.replace("\\", "/").rpartition("/")[2]
    return name.startswith("__MACOSX/") or last.startswith(".") or last in {"Thumbs.db", "desktop.ini"}


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo, field: str) -> bytes:
    """A member's bytes; never more than it claims, since a zip bomb claims little and holds much."""
    if member.file_size > MAX_FILE_BYTES:
        raise TooLarge(f"{field}: a file of more than {MAX_FILE_BYTES // 2**20} MB is not taken", param=field)
    with archive.open(member) as file:
        return file.read(member.file_size)


def _outline(image: Image.Image) -> int:
    """A perceptual hash of 256 bits: where a small grey copy is brighter than its neighbour to the left."""
    grey = image.convert("L").resize((_HASH_SIDE + 1, _HASH_SIDE), Image.Resampling.BOX)
    levels = np.asarray(grey, np.int16)
    bits = (levels[:, 1:] > levels[:, :-1]).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
