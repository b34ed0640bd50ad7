"""Optimizers whose states are FP8."""

from lowbit.optim.adamw import FP8AdamW

__all__ = ["FP8AdamW"]
