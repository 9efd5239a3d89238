"""Moving the bytes: every file of a shipment into the Hugging Face cache.

Big files are fetched here and not by ``hf_hub_download``, which throws away what it has of a file when it is
interrupted: here that stays, is continued by the next pull, and counts only when its SHA-256 is the hub's.
The cache's layout stays the hub's own, so other programs find the files too.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from huggingface_hub import constants, get_session, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import WeakFileLock, build_hf_headers, hf_raise_for_status

from jubako.adapters.store import Adapter, AdapterStore
from jubako.catalog import AdapterEntry
from jubako.hub.reasons import explained
from jubako.hub.shipment import Parcel, RemoteFile, Shipment, size_of
from jubako.weights.checkpoint import content_digest
from jubako.weights.graphs.store import write_graph_record
from jubako.weights.layout import PullFailed
from jubako.weights.store import WeightRecord, write_record

__all__ = ["fetch", "fetch_adapter"]

READ_SECONDS = 30
# Waits of 1, 2, 4, 8 and 16 s bridge a network that is away for half a minute.
ATTEMPTS = 6

Report = Callable[[str, int], None]


def fetch(shipment: Shipment, home: Path, report: Report) -> WeightRecord:
    """Bring every missing file, then write the record that makes the model servable.

    ``report(name, gained)`` hears of bytes as they come; a file that starts again reports a negative gain.
    """
    _bring_all(shipment.record.model, shipment.parcels, report)
    shipment = _with_digests(shipment)
    record = shipment.record
    if not (shipment.graphs or record).is_whole():
        raise PullFailed(f"some files of {record.model} did not arrive whole; run the same command again")
    if shipment.graphs is not None:
        write_graph_record(home, record.model, shipment.graphs)
    else:
        write_record(home, record)
    return record


def fetch_adapter(entry: AdapterEntry, parcel: Parcel, store: AdapterStore, report: Report) -> Adapter:
    """Bring an adapter's file and take it in, with a card of where it is from; reports as :func:`fetch`."""
    _bring_all(entry.name, (parcel,), report)
    card = {**entry.card(), "commit": parcel.commit}
    try:
        return store.add(entry.name, parcel.folder / parcel.files[0].name, card)
    except OSError as error:
        raise PullFailed(
            f"{entry.name} arrived, but can't be copied to JUBAKO_HOME: {error.strerror}"
        ) from error


def _bring_all(name: str, parcels: Sequence[Parcel], report: Report) -> None:
    _refuse_without_space(name, sum(parcel.missing for parcel in parcels))
    todo = [(parcel, file) for parcel in parcels for file in parcel.files]
    # Small files first: when the hub refuses, it does so before gigabytes have come.
    for parcel, file in sorted(todo, key=lambda each: each[1].size):
        with explained(parcel.repo):
            _bring(parcel, file, report)


def _with_digests(shipment: Shipment) -> Shipment:
    """The shipment whose records know what each file that has come contains."""
    come = {parcel.folder / file.name: file.sha256 for parcel in shipment.parcels for file in parcel.files}

    def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
        there = {name: folder / name for name in names if (folder / name) in come}
        return {name: come[path] or content_digest(path) for name, path in there.items()}

    record, graphs = shipment.record, shipment.graphs
    record = record.model_copy(update={"digests": digests(record.folder, record.files)})
    if (overlay := record.overlay) is not None:
        sha256 = digests(overlay.folder, [overlay.file]).get(overlay.file, "")
        record = record.model_copy(update={"overlay": overlay.model_copy(update={"sha256": sha256})})
    if graphs is not None:
        own = digests(graphs.folder, graphs.files)
        graphs = graphs.model_copy(update={"digests": own, "base": record})
    return replace(shipment, record=record, graphs=graphs)


def _bring(parcel: Parcel, file: RemoteFile, report: Report) -> None:
    if size_of(parcel.folder / file.name) == file.size:
        return
    parcel.discard_torn(file)
    if file.sha256:
        _bring_blob(parcel, file, report)
    # Small files come with this; for a big one it only links the blob into the commit's folder.
    hf_hub_download(parcel.repo, file.name, revision=parcel.commit)
    if not file.sha256:
        report(file.name, file.size)


def _bring_blob(parcel: Parcel, file: RemoteFile, report: Report) -> None:
    blob = parcel.blob(file)
    lock = parcel.storage.parent / ".locks" / parcel.storage.name / f"{file.sha256}.lock"
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if size_of(blob) == file.size:
            return
        partial = parcel.partial(file)
        _complete(hf_hub_url(parcel.repo, file.name, revision=parcel.commit), file, partial, report)
        with partial.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if digest != file.sha256:
            partial.unlink()
            raise PullFailed(f"{file.name} arrived damaged and was thrown away; run the same command again")
        partial.replace(blob)


def _complete(url: str, file: RemoteFile, partial: Path, report: Report) -> None:
    """Continue a partial file until it has its size, through breaks of the connection."""
    failures = 0
    while (have := size_of(partial)) < file.size:
        broken: Exception | None = None
        try:
            _stream(url, file, partial, report)
        except HTTPError as error:
            if isinstance(error, HfHubHTTPError):
                raise
            broken = error
        failures = 0 if size_of(partial) > have else failures + 1
        if failures == ATTEMPTS:
            raise PullFailed(
                f"the connection broke off at {file.name}; what has come is kept: run the same command again"
            ) from broken
        if size_of(partial) < file.size:
            time.sleep(2**failures)


def _stream(url: str, file: RemoteFile, partial: Path, report: Report) -> None:
    have = max(size_of(partial), 0)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with get_session().stream("GET", url, headers=headers, timeout=READ_SECONDS) as response:
        if response.is_error:
            response.read()
        hf_raise_for_status(response)
        continued = response.status_code == 206
        if have and not continued:
            report(file.name, -have)
        with partial.open("ab" if continued else "wb") as content:
            for chunk in response.iter_bytes():
                content.write(chunk)
                content.flush()  # a pull that is killed leaves what has come
                report(file.name, len(chunk))


def _refuse_without_space(name: str, missing: int) -> None:
    folder = Path(constants.HF_HUB_CACHE)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise PullFailed(
            f"{name} needs {missing / 1e9:.1f} GB more, but the disk of "
            f"{constants.HF_HUB_CACHE} has {free / 1e9:.1f} GB free; make room or set HF_HOME to another disk"
        )
