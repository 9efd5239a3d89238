"""Fetching of weights: from repositories on the Hugging Face hub into the ordinary Hugging Face cache."""

from jubako.hub.shipment import (
    Parcel,
    RemoteFile,
    Shipment,
    inspect,
    inspect_adapter,
    inspect_checker,
    inspect_graphs,
)
from jubako.hub.transfer import fetch, fetch_adapter

__all__ = [
    "Parcel",
    "RemoteFile",
    "Shipment",
    "fetch",
    "fetch_adapter",
    "inspect",
    "inspect_adapter",
    "inspect_checker",
    "inspect_graphs",
]
