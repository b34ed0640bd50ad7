"""Weights: what a quantized matrix consists of."""
