"""Adapters: what is laid over a model for one request, and what is beside it in the same forward."""
