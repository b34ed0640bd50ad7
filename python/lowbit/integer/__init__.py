"""Networks that run in integers alone: from a `torch.export` program to a graph of integer tensors.

`trace` reads a program, `calibrate` learns the ranges of its tensors, `quantize_qmn` and `quantize_tflite` make an
`IntegerGraph`, whose `run` is the definition of every result; `lowbit.export.c` writes the same graph as C.
`quantize_transformer` makes one of a transformer, for Python alone.
"""

from __future__ import annotations

from lowbit.integer.calibration import calibrate
from lowbit.integer.execution import IntegerGraph
from lowbit.integer.graph import Graph
from lowbit.integer.post_training import quantize_transformer
from lowbit.integer.qmn import quantize_qmn
from lowbit.integer.tflite import quantize_tflite
from lowbit.integer.tracing import trace

__all__ = [
    "Graph",
    "IntegerGraph",
    "calibrate",
    "quantize_qmn",
    "quantize_tflite",
    "quantize_transformer",
    "trace",
]
