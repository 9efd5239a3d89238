"""Jubako serves the Stable Diffusion family: one BentoML service per model family behind one gateway."""

__all__ = ["__version__"]

__version__ = "0.1.0"
