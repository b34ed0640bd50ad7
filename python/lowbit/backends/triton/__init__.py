"""Triton: the layout "k16" and the kernels of `lowbit.triton_kernels`, on a GPU or under Triton's interpreter."""

from lowbit.backends.triton.weights import TRITON, TritonBackend

__all__ = ["TRITON", "TritonBackend"]
