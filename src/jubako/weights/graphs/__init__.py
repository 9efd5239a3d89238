"""Vendors' weights: ONNX graphs that stand in for modules of a pipeline, run by ONNX Runtime."""
