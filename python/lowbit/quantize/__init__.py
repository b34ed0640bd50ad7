"""Quantizers: each makes a QuantTensor from a weight matrix, one file per method; `model.py` runs
them on a model.
"""

from lowbit.quantize.allocate import allocate
from lowbit.quantize.allocation import Allocation
from lowbit.quantize.calibrate import InputStatistics, attach, collect
from lowbit.quantize.fisher import Fisher, output_fisher
from lowbit.quantize.llm_int8 import quantize_llm_int8
from lowbit.quantize.methods import METHODS, quantize
from lowbit.quantize.model import quantize_model
from lowbit.quantize.names import Rule, Selection
from lowbit.quantize.observers import OBSERVERS, Grid, Observer
from lowbit.quantize.recipe import Recipe
from lowbit.quantize.report import LayerReport, Report
from lowbit.quantize.sensitivity import fisher_diagonal

__all__ = [
    "METHODS",
    "OBSERVERS",
    "Allocation",
    "Fisher",
    "Grid",
    "InputStatistics",
    "LayerReport",
    "Observer",
    "Recipe",
    "Report",
    "Rule",
    "Selection",
    "allocate",
    "attach",
    "collect",
    "fisher_diagonal",
    "output_fisher",
    "quantize",
    "quantize_llm_int8",
    "quantize_model",
]
