"""Quantizing models after training: plans, calibration, sensitivities, bit allocation and reports."""

from lowbit.nn.names import Rule, Selection
from lowbit.ptq.allocate import allocate
from lowbit.ptq.allocation import Allocation
from lowbit.ptq.calibration import InputStatistics, attach, collect
from lowbit.ptq.fisher import Fisher, fisher_diagonal, output_fisher
from lowbit.ptq.folding import fold_norms
from lowbit.ptq.importance import collect_importance, load_importance, save_importance
from lowbit.ptq.llm_int8 import quantize_llm_int8
from lowbit.ptq.model import quantize_model
from lowbit.ptq.observers import OBSERVERS, Grid, Observer
from lowbit.ptq.recipe import Recipe
from lowbit.ptq.report import LayerReport, Report

__all__ = [
    "OBSERVERS", "Allocation", "Fisher", "Grid", "InputStatistics", "LayerReport", "Observer", "Recipe", "Report",
    "Rule", "Selection", "allocate", "attach", "collect", "collect_importance", "fisher_diagonal", "fold_norms",
    "load_importance", "output_fisher", "quantize_llm_int8", "quantize_model", "save_importance",
]  # fmt: skip
