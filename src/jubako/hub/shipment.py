"""What a pull brings: files of a model's repository and of its overlay's, and how much of them is here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import disable_progress_bars, logging

from jubako.catalog import AdapterEntry, CheckerEntry, Model, Overlay
from jubako.hub.reasons import explained
from jubako.weight_sets import GraphSet, Vendor
from jubako.weights.graphs.store import GraphRecord, left_to_pytorch
from jubako.weights.layout import (
    CHECKER_FILES,
    INDEX,
    PullFailed,
    choose_files,
    choose_graphs,
    components,
)
from jubako.weights.siblings import siblings
from jubako.weights.store import (
    OverlayRecord,
    WeightRecord,
    find_weights,
    require_configs,
    require_weights,
)

__all__ = [
    "Parcel",
    "RemoteFile",
    "Shipment",
    "inspect",
    "inspect_adapter",
    "inspect_checker",
    "inspect_graphs",
    "size_of",
]

ASK_SECONDS = 20


@dataclass(frozen=True)
class RemoteFile:
    """A file of the repository: name, size in bytes, and its SHA-256 where the hub has one (big files)."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class Parcel:
    """Files of one commit of one repository, and where each of them lies in the cache."""

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


@dataclass(frozen=True)
class Shipment:
    """What a pull brings for one model, and the record that is written when all of it has come.

    Of a vendor's graphs that is ``graphs``, and ``record`` is of what of the standard weights goes with them.
    """

    parcels: tuple[Parcel, ...]
    record: WeightRecord
    graphs: GraphRecord | None = None


def inspect(model: Model, home: Path, models: Mapping[str, Model]) -> Shipment:
    """Ask the hub which commits the model's revisions are now and which of their files to take.

    ``models`` are those of the family: one file of the user's borrows the configs of another model.
    """
    _quiet()
    weights = model.weights
    if weights.file is not None:
        base, record = _configs(model, home, models)
    elif weights.folder is not None:
        base, record = None, WeightRecord(model=model.name, folder=weights.folder)
    else:
        base = _pipeline(model)
        record = _record(model, base)
    overlay = _overlay(weights.overlay) if weights.overlay and weights.overlay.repo else None
    if overlay is not None and weights.overlay is not None:
        file = overlay.files[0]
        arrived = OverlayRecord(
            repo=overlay.repo,
            commit=overlay.commit,
            folder=overlay.folder,
            file=file.name,
            kind=weights.overlay.kind,
            size=file.size,
        )
        record = record.model_copy(update={"overlay": arrived})
    return Shipment(tuple(parcel for parcel in (base, overlay) if parcel is not None), record)


def inspect_graphs(model: Model, vendor: Vendor, graphs: GraphSet) -> Shipment:
    """Ask the hub for a vendor's weight set, and for what of the standard weights goes with it."""
    _quiet()
    base, repo = _pipeline(model, graphs=graphs), str(graphs.repo)
    with explained(repo, graphs.revision):
        commit, remote = _listing(repo, graphs.revision)
        parcel = Parcel(repo, commit, tuple(remote[name] for name in choose_graphs(remote, graphs)))
    record = _record(model, base)
    files = {file.name: file.size for file in parcel.files}
    arrived = GraphRecord(
        name=f"{vendor}-{graphs.precision}",
        repo=repo,
        commit=commit,
        folder=parcel.folder,
        files=files,
        base=record,
    )
    return Shipment((base, parcel), record, arrived)


def inspect_adapter(entry: AdapterEntry) -> Parcel:
    """Ask the hub which commit the adapter's revision is now, and for the one file of it."""
    _quiet()
    parcel, _ = _one_file(entry.repo, entry.revision, entry.file)
    return parcel


def inspect_checker(entry: CheckerEntry) -> Shipment:
    """Ask the hub which commit a safety checker's revision is now, and for the three files of it."""
    _quiet()
    repo = str(entry.repo)
    with explained(repo, entry.revision):
        commit, remote = _listing(repo, entry.revision)
    for name in CHECKER_FILES:
        if name not in remote:
            raise PullFailed(f"{repo} holds no {name}: it is no safety checker as safetensors")
    parcel = Parcel(repo, commit, tuple(remote[name] for name in CHECKER_FILES))
    files = {file.name: file.size for file in parcel.files}
    record = WeightRecord(model=entry.name, repo=repo, commit=commit, folder=parcel.folder, files=files)
    return Shipment((parcel,), record)


def _record(model: Model, parcel: Parcel) -> WeightRecord:
    return WeightRecord(
        model=model.name,
        repo=parcel.repo,
        commit=parcel.commit,
        folder=parcel.folder,
        files={file.name: file.size for file in parcel.files},
        left_out=model.weights.left_out,
    )


def _configs(model: Model, home: Path, models: Mapping[str, Model]) -> tuple[Parcel | None, WeightRecord]:
    """Configs and tokenizers for one file: of a model that is on disk, else of the one that fits best."""
    donors = siblings(model, models)
    if not donors:
        require_configs(home, model, models)
    on_disk = next((donor for donor in donors if find_weights(home, donor)), None)
    donor = on_disk or donors[0]
    if donor.weights.repo is None:
        folder = require_weights(home, donor)
        record = WeightRecord(model=model.name, folder=folder, files={INDEX: size_of(folder / INDEX)})
        return None, record.model_copy(update={"config": donor.name})
    kept = {"components_left_out": model.weights.components_left_out, "overlay": None}
    weights = donor.weights.model_copy(update={**kept, "text_encoder_3": model.weights.text_encoder_3})
    parcel = _pipeline(donor.model_copy(update={"weights": weights}), only_configs=True)
    return parcel, _record(model, parcel).model_copy(update={"config": donor.name})


def _pipeline(model: Model, *, only_configs: bool = False, graphs: GraphSet | None = None) -> Parcel:
    repo = str(model.weights.repo)
    with explained(repo, model.weights.revision, model.moved_from):
        commit, remote = _listing(repo, model.weights.revision)
        if INDEX not in remote:
            raise PullFailed(f"{repo} holds no {INDEX}: it is no diffusers repository")
        parcel = Parcel(repo, commit, (remote[INDEX],))
        parcel.discard_torn(remote[INDEX])
        index = json.loads(Path(hf_hub_download(repo, INDEX, revision=commit)).read_text(encoding="utf-8"))
        bare: tuple[str, ...] = components(index, model) if only_configs else ()
        if graphs is not None:
            bare = tuple(
                set(components(index, model)) - set(left_to_pytorch(graphs, components(index, model)))
            )
        names = choose_files(remote, index, model, bare=bare)
    return replace(parcel, files=tuple(remote[name] for name in names))


def _overlay(overlay: Overlay) -> Parcel:
    parcel, remote = _one_file(str(overlay.repo), overlay.revision, overlay.file)
    # What motion modules look like is told by the config beside them, where there is one.
    config = str(PurePosixPath(overlay.file).with_name("config.json"))
    beside = (remote[config],) if overlay.kind == "motion" and config in remote else ()
    return replace(parcel, files=(*parcel.files, *beside))


def _one_file(repo: str, revision: str, file: str) -> tuple[Parcel, Mapping[str, RemoteFile]]:
    """The file's parcel, and all that lies in its repository."""
    with explained(repo, revision):
        commit, remote = _listing(repo, revision)
    if file not in remote:
        others = ", ".join(sorted(name for name in remote if name.endswith(".safetensors")))
        raise PullFailed(f"{repo} holds no {file}; its safetensors are: {others or 'none'}")
    return Parcel(repo, commit, (remote[file],)), remote


def _listing(repo: str, revision: str) -> tuple[str, Mapping[str, RemoteFile]]:
    info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=ASK_SECONDS)
    return str(info.sha), {entry.rfilename: _remote_file(entry) for entry in info.siblings or ()}


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
