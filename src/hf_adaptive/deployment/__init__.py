"""The same answers elsewhere: exported by stages, quantised. What runs an exported classifier needs no torch."""

from .onnx_classifier import OnnxClassifierWithExits, OnnxOutput

__all__ = ["OnnxClassifierWithExits", "OnnxOutput"]
