"""llama.cpp's matmul through the C interface of ggml: plain and repacked weights, int8 activations."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from ctypes import CFUNCTYPE, POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adapters.base import Candidate, Unsupported, num_copies

# enum ggml_type of ggml.h
TYPES = {
    "F32": 0, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12,
    "Q5_K": 13, "Q6_K": 14, "IQ4_NL": 20, "IQ3_S": 21, "IQ2_S": 22, "IQ4_XS": 23, "TQ1_0": 34, "TQ2_0": 35,
}  # fmt: skip
_TENSOR_BYTES = 4096  # more than one struct ggml_tensor with its bookkeeping


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _TypeTraits(ctypes.Structure):
    _fields_ = (
        ("type_name", c_char_p),
        ("blck_size", c_int64),
        ("blck_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
    )


_BASE = {
    "ggml_log_set": (None, c_void_p, c_void_p),
    "ggml_init": (c_void_p, _InitParams),
    "ggml_free": (None, c_void_p),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_new_graph_custom": (c_void_p, c_void_p, c_size_t, c_bool),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_quantize_chunk": (
        c_size_t,
        c_int,
        c_void_p,
        c_void_p,
        c_int64,
        c_int64,
        c_int64,
        c_void_p,
    ),
    "ggml_get_type_traits": (POINTER(_TypeTraits), c_int),
    "ggml_quantize_init": (None, c_int),
    "ggml_row_size": (c_size_t, c_int, c_int64),
    "ggml_backend_cpu_buffer_type": (c_void_p,),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_free": (None, c_void_p),
    "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_tensor_get": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_get_device": (c_void_p, c_void_p),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
    "ggml_backend_dev_supports_op": (c_bool, c_void_p, c_void_p),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
}
_CPU = {
    "ggml_backend_cpu_init": (c_void_p,),
    "ggml_backend_cpu_reg": (c_void_p,),
    "ggml_backend_cpu_set_n_threads": (None, c_void_p, c_int),
}


class _Library:
    """The functions of one build of ggml. A process takes one: two would share names of libraries."""

    def __init__(self, package: str) -> None:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise Unsupported(f"package {package} is not installed")
        folder = Path(spec.origin).parent
        for library, functions in (("libggml-base.so", _BASE), ("libggml-cpu.so", _CPU)):
            handle = ctypes.CDLL(str(next(folder.rglob(library))), mode=ctypes.RTLD_GLOBAL)
            for name, (result, *arguments) in functions.items():
                function = getattr(handle, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name.removeprefix("ggml_"), function)

        self.quiet = CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda level, text, data: None)
        self.log_set(ctypes.cast(self.quiet, c_void_p), None)

    def context(self, tensors: int, graph: int = 0) -> int:
        """A context for this many tensors, and a graph of this many nodes, without their data."""
        return self.init(_InitParams((tensors + 4 * graph + 8) * _TENSOR_BYTES, None, True))

    def repack_buffer_type(self, backend: int) -> int:
        """The CPU's extra buffer type that stores weights interleaved."""
        name = b"ggml_backend_dev_get_extra_bufts"
        address = self.backend_reg_get_proc_address(self.backend_cpu_reg(), name)
        if not address:
            raise Unsupported("this build has no extra buffer types")
        function = CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)
        first = function(self.backend_get_device(backend))
        if not first or not first[0]:
            raise Unsupported("this build has no extra buffer types")
        return first[0]


@functools.cache
def _library(package: str) -> _Library:
    return _Library(package)


def quantized(
    weight: Tensor, kind: str, importance: Tensor | None = None, package: str = "libggml"
) -> tuple[Tensor, int]:
    """The values of a weight (N, K) in type `kind`, fp32, and its bytes.

    Rows that are no whole number of blocks are put together until they are.

    Args:
        importance: what each input feature counts, (K,): a line of an imatrix.

    Raises:
        Unsupported: N is no multiple of the rows that go together.
    """
    lib = _library(package)
    n, k = weight.shape
    code = TYPES[kind]
    traits = lib.get_type_traits(code).contents
    together = traits.blck_size // math.gcd(k, traits.blck_size)
    if n % together:
        raise Unsupported(f"N must be a multiple of {together} where K is {k}, got {n}")
    rows, width = n // together, k * together
    lib.quantize_init(code)
    source = np.ascontiguousarray(weight.numpy(), np.float32)
    counts = None if importance is None else importance.repeat(together).float().numpy()
    data = np.empty((rows, lib.row_size(code, width)), np.uint8)
    pointer = None if counts is None else counts.ctypes.data
    lib.quantize_chunk(code, source.ctypes.data, data.ctypes.data, 0, rows, width, pointer)
    values = np.empty((n, k), np.float32)
    traits.to_float(data.ctypes.data, values.ctypes.data, n * k)
    return torch.from_numpy(values), data.nbytes


def ggml(
    weight: Tensor, threads: int, kind: str, repack: bool = False, package: str = "llama_cpp"
) -> Candidate:
    """ggml_mul_mat with a weight of type `kind`, in the plain or the repacked buffer type."""
    lib = _library(package)
    n, k = weight.shape
    code = TYPES[kind]
    traits = lib.get_type_traits(code).contents
    if k % traits.blck_size:
        raise Unsupported(f"K must be a multiple of {traits.blck_size}")
    row = lib.row_size(code, k)
    source = np.ascontiguousarray(weight.numpy(), np.float32)
    data = np.empty((n, row), np.uint8)
    lib.quantize_chunk(code, source.ctypes.data, data.ctypes.data, 0, n, k, None)
    values = np.empty((n, k), np.float32)
    traits.to_float(data.ctypes.data, values.ctypes.data, n * k)
    copies = num_copies(data.nbytes)
    backend = lib.backend_cpu_init()
    lib.backend_cpu_set_n_threads(backend, threads)
    plain = lib.backend_cpu_buffer_type()
    kept = lib.context(copies)
    tensors = [lib.new_tensor_2d(kept, code, k, n) for _ in range(copies)]
    buffer = lib.backend_alloc_ctx_tensors_from_buft(
        kept, lib.repack_buffer_type(backend) if repack else plain
    )
    if repack:
        probe = lib.context(4)
        product = lib.mul_mat(probe, tensors[0], lib.new_tensor_2d(probe, TYPES["F32"], k, 1))
        usable = lib.backend_dev_supports_op(lib.backend_get_device(backend), product)
        lib.free(probe)
        if not usable:
            lib.backend_buffer_free(buffer)
            raise Unsupported(f"{kind} has no repacked kernel here")
    for i, t in enumerate(tensors):
        one = np.ascontiguousarray(np.roll(data, i, axis=0))
        lib.backend_tensor_set(t, one.ctypes.data, 0, one.nbytes)
    made: list[tuple[int, int]] = []
    products: list[int] = []
    rows = 0

    def release() -> None:
        for context, held in made:
            lib.backend_buffer_free(held)
            lib.free(context)
        made.clear()

    def prepare(x: Tensor) -> Callable[[], object]:
        nonlocal rows
        release()
        rows = x.shape[0]
        context = lib.context(copies + 1, copies)
        given = lib.new_tensor_2d(context, TYPES["F32"], k, rows)
        products[:] = [lib.mul_mat(context, t, given) for t in tensors]
        graph = lib.new_graph_custom(context, 2 * copies + 8, False)
        for y in products:
            lib.build_forward_expand(graph, y)
        made.append((context, lib.backend_alloc_ctx_tensors_from_buft(context, plain)))
        a = np.ascontiguousarray(x.numpy(), np.float32)
        lib.backend_tensor_set(given, a.ctypes.data, 0, a.nbytes)

        def run() -> None:
            status = lib.backend_graph_compute(backend, graph)
            if status != 0:
                raise RuntimeError(f"ggml_backend_graph_compute returned {status}")

        return run

    def outputs() -> list[Tensor]:
        results = []
        for product in products:
            y = np.full((rows, n), np.nan, np.float32)
            lib.backend_tensor_get(product, y.ctypes.data, 0, y.nbytes)
            results.append(torch.from_numpy(y))
        return results

    def close() -> None:
        release()
        lib.backend_buffer_free(buffer)
        lib.free(kept)
        lib.backend_free(backend)

    name = f"{'libggml' if package == 'libggml' else 'ggml'} {kind}{' repacked' if repack else ''}"
    return Candidate(
        name,
        8 * row / k,
        "int8",
        torch.from_numpy(values),
        copies,
        prepare,
        outputs,
        close,
    )
