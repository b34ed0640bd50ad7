"""Quantizers: each makes a QuantTensor from a weight matrix, one file per method; `model.py` runs
them on a model.
"""

from lowbit.quantize.calibrate import InputStatistics, attach, collect
from lowbit.quantize.methods import METHODS, quantize
from lowbit.quantize.model import quantize_model
from lowbit.quantize.names import Recipe, Selection
from lowbit.quantize.observers import OBSERVERS, Grid, Observer
from lowbit.quantize.report import LayerReport, Report

__all__ = [
    "METHODS",
    "OBSERVERS",
    "Grid",
    "InputStatistics",
    "LayerReport",
    "Observer",
    "Recipe",
    "Report",
    "Selection",
    "attach",
    "collect",
    "quantize",
    "quantize_model",
]
