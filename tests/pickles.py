"""Pickles in every disguise in which a server may be given one. Opened, each makes the canary's folder."""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

__all__ = ["Canary", "carriers"]


class Canary:
    """Unpickled, it makes a folder: that it has been is seen from any process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        """What unpickling calls."""
        return os.mkdir, (str(self.folder),)

    @property
    def sang(self) -> bool:
        """Whether anybody has opened a carrier; asking lets it sing again."""
        if self.folder.exists():
            self.folder.rmdir()
            return True
        return False


def carriers(canary: Canary) -> Mapping[str, bytes]:
    """Files by their names."""
    bare = pickle.dumps(canary)
    picture = Image.new("RGB", (64, 64), (220, 40, 40))
    return {
        **{f"protocol-{number}.pkl": pickle.dumps(canary, protocol=number) for number in range(6)},
        "model.ckpt": _torch(canary, zipped=False),
        "model.pth": _torch({"state_dict": canary}, zipped=False),
        "model.pt": _torch(canary),
        "diffusion_pytorch_model.bin": _torch({"weight": torch.zeros(1), "more": canary}),
        "pytorch_lora_weights.bin": _torch({"lora_A": canary}),
        "bare.safetensors": bare,
        "zipped.safetensors": _torch(canary),
        "legacy.safetensors": _torch(canary, zipped=False),
        "within.safetensors": _safetensors({"lora_A": {"dtype": "U8", "shape": [len(bare)]}}, bare),
        "header.safetensors": len(bare).to_bytes(8, "little") + bare,
        "metadata.safetensors": _safetensors({"__metadata__": {"p": base64.b64encode(bare).decode()}}, b""),
        "array.npy": _npy(canary),
        "arrays.npz": _zip({"a.npy": _npy(canary)}),
        "archive.zip": _zip({"data.pkl": bare, "archive/data.pkl": bare}),
        "pictures.zip": _zip({f"{number}.png": bare for number in range(5)}),
        "model.pkl.gz": gzip.compress(bare),
        "model.pkl.bz2": bz2.compress(bare),
        "model.pkl.xz": lzma.compress(bare),
        "model.joblib": zlib.compress(bare),
        "model.tar": _tar(bare, "w"),
        "model.nemo": _tar(bare, "w:gz"),
        "graph.onnx": b"\x08\x08\x12\x07pytorch" + bare,
        "behind.png": _saved(picture, "PNG") + bare,
        "text.png": _saved(picture, "PNG", pnginfo=_text(bare)),
        "comment.jpg": _saved(picture, "JPEG", comment=bare),
        "exif.webp": _saved(picture, "WEBP", exif=b"Exif\x00\x00" + bare),
        "named.png": bare,
        "named.jpg": _npy(canary),
    }


def _torch(value: Any, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def _npy(canary: Canary) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([canary], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def _safetensors(header: Mapping[str, Any], data: bytes) -> bytes:
    for entry in header.values():
        if "dtype" in entry:
            entry["data_offsets"] = [0, len(data)]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _zip(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _tar(content: bytes, mode: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        entry = tarfile.TarInfo("data.pkl")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def _saved(picture: Image.Image, kind: str, **more: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **more)
    return buffer.getvalue()


def _text(content: bytes) -> PngInfo:
    """The chunks that this program's own pictures have."""
    text = PngInfo()
    for name in ("parameters", "jubako"):
        text.add_text(name, base64.b64encode(content).decode())
    return text
