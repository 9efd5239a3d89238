"""What a pull brings: the files of one commit of a model's repository, and how much of them is here."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import disable_progress_bars, logging

from jubako.catalog import Model
from jubako.hub.reasons import explained
from jubako.weights.layout import INDEX, PullFailed, choose_files

__all__ = ["RemoteFile", "Shipment", "inspect", "size_of"]

ASK_SECONDS = 20


@dataclass(frozen=True)
class RemoteFile:
    """A file of the repository: name, size in bytes, and its SHA-256 where the hub has one (big files)."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class Shipment:
    """What a pull brings: the files of one commit of a model's repository."""

    model: Model
    repo: str
    commit: str
    files: tuple[RemoteFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def missing(self) -> int:
        """Bytes that are not in the cache yet; a file that was broken off counts with what there is of it."""
        return self.size - sum(self._here(file) for file in self.files)

    @property
    def folder(self) -> Path:
        """The folder of this commit in the cache."""
        return self.storage / "snapshots" / self.commit

    @property
    def storage(self) -> Path:
        """The folder of this repository in the cache."""
        name: str = repo_folder_name(repo_id=self.repo, repo_type="model")
        return Path(constants.HF_HUB_CACHE) / name

    def blob(self, file: RemoteFile) -> Path:
        """Where the content of a big file lies in the cache."""
        return self.storage / "blobs" / str(file.sha256)

    def partial(self, file: RemoteFile) -> Path:
        """Where a big file grows until it is whole."""
        return self.storage / "blobs" / f"{file.sha256}.jubako.incomplete"

    def discard_torn(self, file: RemoteFile) -> None:
        """Remove a file that is in the commit's folder with another size than the hub's, and its blob."""
        path = self.folder / file.name
        if size_of(path) == file.size:
            return
        blob = path.resolve()
        path.unlink(missing_ok=True)
        if blob.parent == (self.storage / "blobs").resolve():
            blob.unlink(missing_ok=True)

    def _here(self, file: RemoteFile) -> int:
        whole = [self.folder / file.name, *([self.blob(file)] if file.sha256 else [])]
        if any(size_of(path) == file.size for path in whole):
            return file.size
        return min(max(size_of(self.partial(file)), 0), file.size) if file.sha256 else 0


def inspect(model: Model) -> Shipment:
    """Ask the hub which commit the model's revision is now and which of its files to take."""
    repo = str(model.weights.repo)
    _quiet()
    with explained(model):
        info = HfApi().model_info(
            repo, revision=model.weights.revision, files_metadata=True, timeout=ASK_SECONDS
        )
        remote = {entry.rfilename: _remote_file(entry) for entry in info.siblings or ()}
        if INDEX not in remote:
            raise PullFailed(f"{repo} holds no {INDEX}: it is no diffusers repository")
        shipment = Shipment(model, repo, str(info.sha), (remote[INDEX],))
        shipment.discard_torn(remote[INDEX])
        index = json.loads(Path(hf_hub_download(repo, INDEX, revision=info.sha)).read_text(encoding="utf-8"))
        names = choose_files(remote, index, model)
    return replace(shipment, files=tuple(remote[name] for name in names))


def size_of(path: Path) -> int:
    """Bytes of a file, -1 when there is none."""
    return path.stat().st_size if path.is_file() else -1


def _remote_file(entry: Any) -> RemoteFile:
    sha256 = entry.lfs.sha256 if entry.lfs else None
    if entry.size is None or (sha256 and not re.fullmatch("[0-9a-f]{64}", sha256)):
        raise PullFailed(f"the hub does not tell the size and the SHA-256 of {entry.rfilename}")
    return RemoteFile(entry.rfilename, entry.size, sha256)


def _quiet() -> None:
    """The library's own bars and hints would run across ours."""
    disable_progress_bars()
    logging.set_verbosity_error()
