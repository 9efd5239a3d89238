"""Fetching of weights: from repositories on the Hugging Face hub into the ordinary Hugging Face cache."""

from jubako.hub.shipment import Parcel, RemoteFile, Shipment, inspect, inspect_graphs
from jubako.hub.transfer import fetch

__all__ = ["Parcel", "RemoteFile", "Shipment", "fetch", "inspect", "inspect_graphs"]
