"""CUDA: the layout "m16" and the kernels of `lowbit._cuda`."""

from lowbit.backends.cuda.weights import CUDA, CudaBackend

__all__ = ["CUDA", "CudaBackend"]
