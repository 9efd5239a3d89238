"""Fetching of weights: a model's repository on the Hugging Face hub into the ordinary Hugging Face cache."""

from jubako.hub.shipment import RemoteFile, Shipment, inspect
from jubako.hub.transfer import fetch

__all__ = ["RemoteFile", "Shipment", "fetch", "inspect"]
