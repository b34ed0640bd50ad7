"""Types of the compiled module; csrc/bindings."""

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

BLOCK_N: int
CHUNK_K: int

class Kernel(TypedDict):
    index: int
    name: str
    op: str
    compute: str
    codec: str
    bits: int
    scope: str
    isa: str
    available: bool
    group_multiple: int
    cost: (
        tuple[list[float], float, float] | None
    )  # `Cost` of csrc/core/kernel.h; None of FP8 products
    half_groups: bool
    bf16_table: bool
    x: list[str]

def use_tensor_class(tensor: type, parameter: type) -> bool: ...
def use_dynamic_map(values: list[float]) -> None: ...
def plan(weight: Weight) -> object: ...
def poison_outputs(on: bool) -> None: ...
def poison_scratch(on: bool) -> None: ...
def linear_tensors(
    plan: object, threads: int, x: object, *operands_and_bias: object
) -> Any: ...  # a tensor, or None
def linear_many_tensors(
    plans: list[object], threads: int, x: object, *operands_and_bias: object
) -> Any: ...  # a list of tensors, or None
def kernels() -> list[Kernel]: ...
def take_kernels_run() -> list[str]: ...
def uncrowded_threads(threads: int) -> int: ...
def note_wait(waited_ns: int, worked_ns: int) -> None: ...
def waited_for_cores_ns() -> int: ...
def usable_threads(threads: int) -> int: ...
def isa_detected() -> list[str]: ...
def isa_active() -> list[str]: ...
def isa_capped(detected: list[str], value: str) -> list[str]: ...
def pack(
    codes: NDArray[np.uint8], bits: int, base: int = 0, threads: int = 1
) -> NDArray[np.uint8]: ...
def unpack(
    packed: NDArray[np.uint8], k: int, bits: int, base: int = 0, threads: int = 1
) -> NDArray[np.uint8]: ...
def prepack(
    packed: NDArray[np.uint8], n: int, k: int, bits: int, base: int = 0, threads: int = 1
) -> NDArray[np.uint8]: ...
def unprepack(
    codes: NDArray[np.uint8], n: int, k: int, bits: int, base: int = 0, threads: int = 1
) -> NDArray[np.uint8]: ...
def kmeans_1d(
    values: NDArray[np.float32], weights: NDArray[np.float64] | None, k: int
) -> NDArray[np.float32]: ...
def kmeans_rows(
    values: NDArray[np.float32], weights: NDArray[np.float64] | None, k: int, threads: int = 1
) -> NDArray[np.float32]: ...
def search_scales(
    weights: NDArray[np.float32],
    importance: NDArray[np.float32] | None,
    group: int,
    scales: NDArray[np.float32],
    steps: NDArray[np.float32] | None,
    top: int,
    floats: tuple[int, int, float],
    table: NDArray[np.float32],
    ratios: NDArray[np.float32],
    chosen: NDArray[np.uint8] | None = None,
    threads: int = 1,
    isa: str = "",
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.uint8]]: ...

class StructuredWeight:
    def __init__(
        self,
        *,
        codec: int,
        bits: int,
        dim: int,
        n: int,
        k: int,
        row_bytes: int,
        codes: int,
        table: int,
        signs: int,
        grid: int,
        second: float,
        scales: int,
        scale_dtype: int,
        group: int,
    ) -> None: ...

def structured_rows(
    weight: StructuredWeight,
    *,
    rows: int,
    count: int,
    out: int,
    out_dtype: int,
    threads: int,
    isa: str = "",
) -> None: ...
def structured_linear(
    weight: StructuredWeight,
    *,
    x: int,
    x_dtype: int,
    m: int,
    x_stride: int,
    bias: int,
    bias_dtype: int,
    out: int,
    out_dtype: int,
    threads: int,
    isa: str = "",
) -> None: ...
def structured_isa(codec: int) -> str: ...
def encode_trellis(
    numbers: NDArray[np.float32],
    values: NDArray[np.float32],
    bits: int,
    next: NDArray[np.int32] | None = None,
    first: NDArray[np.int32] | None = None,
    threads: int = 1,
    isa: str = "",
) -> NDArray[np.uint8]: ...
def quantize_int8_ptr(
    *,
    x: int,
    x_dtype: int,
    m: int,
    k: int,
    x_stride: int,
    group: int,
    scales: int,
    static_scales: bool,
    q: int,
    threads: int,
) -> None: ...
def quantize_binary_ptr(
    *, x: int, x_dtype: int, m: int, k: int, x_stride: int, scales: int, bits: int, threads: int
) -> None: ...

class ConvShape:
    def __init__(self, **numbers: int | Sequence[int]) -> None: ...

def conv_ptr(
    weight: BoundWeight,
    shape: ConvShape,
    *,
    x: int,
    x_dtype: int,
    x_scales: int,
    bias: int,
    bias_dtype: int,
    activation: int,
    out: int,
    out_dtype: int,
    threads: int,
    kernel: int = -1,
) -> None: ...
def grouped_conv_ptr(
    weight: BoundWeight, shape: ConvShape, *, threads: int, isa: str = "", **numbers: int
) -> None: ...
def grouped_conv_isa() -> str: ...
def multiply_outliers_ptr(
    *,
    x: int,
    x_dtype: int,
    m: int,
    k: int,
    x_stride: int,
    columns: int,
    values: int,
    value_dtype: int,
    n: int,
    count: int,
    out: int,
    threads: int,
    isa: str = "",
) -> None: ...
def outliers_isa() -> str: ...
def multiply_pruned_ptr(*, threads: int, isa: str = "", **numbers: int) -> None: ...
def pruned_isa() -> str: ...

class Fp8State:
    def __init__(self, *, codes: int, type: int, terms: int) -> None: ...

def fp8_adamw_ptr(
    *,
    param: int,
    grad: int,
    dtype: int,
    numel: int,
    exp_avg: Fp8State,
    exp_avg_sq: Fp8State,
    expand: bool,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    threads: int,
    isa: str = "",
) -> None: ...

class Fp8Blocks:
    def __init__(
        self, *, rows: int, k: int, block_rows: int, block_k: int, row_blocks: int
    ) -> None: ...

def fp8_maxima_ptr(
    blocks: Fp8Blocks,
    *,
    x: int,
    dtype: int,
    stride: int,
    maxima: int,
    threads: int,
    isa: str = "",
) -> None: ...
def fp8_quantize_ptr(
    blocks: Fp8Blocks,
    *,
    x: int,
    dtype: int,
    stride: int,
    type: int,
    scale_type: int,
    maxima: int,
    scales: int,
    q: int,
    transposed: int,
    stochastic: bool,
    seed: int,
    threads: int,
    isa: str = "",
) -> None: ...
def fp8_dequantize_ptr(
    blocks: Fp8Blocks,
    *,
    q: int,
    type: int,
    scales: int,
    scale_type: int,
    out: int,
    out_dtype: int,
    threads: int,
    isa: str = "",
) -> None: ...
def fp8_cast_ptr(
    *,
    x: int,
    dtype: int,
    count: int,
    type: int,
    saturate: bool,
    q: int,
    threads: int,
    isa: str = "",
) -> None: ...

class Fp8Operand:
    def __init__(
        self,
        *,
        codes: int,
        stride: int,
        type: int,
        scales: int,
        scale_type: int,
        row_shift: int,
        k_shift: int,
        scale_stride: int,
    ) -> None: ...

def fp8_matmul_ptr(
    *,
    m: int,
    n: int,
    k: int,
    a: Fp8Operand,
    b: Fp8Operand,
    bias: int,
    bias_dtype: int,
    out: int,
    out_dtype: int,
    threads: int,
    isa: str = "",
) -> None: ...
def fp8_matmul_name(isa: str = "") -> str: ...

class DecoderLinear: ...

def dense_linear(*, n: int, k: int, weight: int, bias: int, bias_dtype: int) -> DecoderLinear: ...

class DecoderConfig:
    dtype: int
    cache_dtype: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_length: int
    eps: float
    late_norms: bool
    activation: str
    score_scale: float
    score_cap: float
    embedding_scale: float
    residual_scale: float
    logit_divisor: float
    logit_cap: float
    sequences: int
    threads: int

class DecoderLayer:
    input_norm: int
    mlp_norm: int
    attention_out_norm: int
    out_norm: int
    q_norm: int
    k_norm: int
    key_balance: int
    rope: int
    window: int
    qkv: list[DecoderLinear]
    gate_up: list[DecoderLinear]
    o: DecoderLinear
    down: DecoderLinear

class DecoderRope:
    dim: int
    cos: int
    sin: int

class DecoderModel:
    embedding: DecoderLinear
    head: DecoderLinear
    layers: list[DecoderLayer]
    ropes: list[DecoderRope]
    norm: int
    logits: int

class Decoder:
    def __init__(self, config: DecoderConfig, model: DecoderModel) -> None: ...
    def run_ptr(self, *, ids: int, count: int, sequence: int, position: int) -> None: ...
    def step(self, ids: list[int], places: list[tuple[int, int]]) -> None: ...
    def likeliest(self, row: int) -> int: ...

class Weight:
    code_bytes: int
    lane_terms: int
    table_size: int

    def __init__(
        self,
        *,
        n: int,
        k: int,
        bits: int,
        group: int,
        codec: str = "lut",
        scope: str = "shared",
        table_groups: int = 1,
        zero: str = "none",
        scale_dtype: str | None = None,
        zero_dtype: str | None = None,
        scale2_dtype: str | None = None,
        scale2_extent: int = 0,
        int8_x: bool = False,
        x_group: int = 0,
        table_step: float = 0.0,
        bf16_table: bool = False,
        trits: bool = False,
    ) -> None: ...
    def linear(
        self,
        x: NDArray[np.float32],
        codes: NDArray[np.uint8],
        table: NDArray[np.float32],
        scales: NDArray[np.float32] | None = None,
        zeros: NDArray[np.float32] | None = None,
        bias: NDArray[np.float32] | None = None,
        threads: int = 1,
    ) -> NDArray[np.float32]: ...
    def select(self, op: str, x: str, m: int, threads: int = 1) -> str: ...
    def explain(
        self, op: str, x: str, m: int, threads: int = 1
    ) -> list[tuple[str, Any, Any, Any]]: ...

class BoundLinear:
    def __call__(self) -> None: ...

class BoundWeight:
    def __init__(
        self,
        weight: Weight,
        *,
        codes: int,
        scales: int,
        zeros: int,
        table: int,
        scales2: int,
        zeros2: int,
    ) -> None: ...
    def linear(
        self,
        *,
        x: int,
        x_dtype: int,
        m: int,
        x_stride: int,
        bias: int,
        bias_dtype: int,
        out: int,
        threads: int,
        kernel: int = -1,
    ) -> None: ...
    def bind_linear(
        self,
        *,
        x: int,
        x_dtype: int,
        m: int,
        x_stride: int,
        bias: int,
        bias_dtype: int,
        out: int,
        threads: int,
    ) -> BoundLinear: ...
    def linear_epilogue(
        self,
        *,
        x: int,
        x_dtype: int,
        m: int,
        x_stride: int,
        bias: int,
        bias_dtype: int,
        out: int,
        out_dtype: int,
        threads: int,
        activation: int,
        gate: int,
        gate_stride: int,
        residual: int,
        residual_stride: int,
        epilogue_dtype: int,
    ) -> None: ...
    def linear_quantized(
        self,
        *,
        x: int,
        x_dtype: int,
        x_scales: int,
        x_group: int,
        m: int,
        x_stride: int,
        bias: int,
        bias_dtype: int,
        out: int,
        out_dtype: int,
        out_scale: float,
        threads: int,
        kernel: int,
    ) -> None: ...
    def dequantize(self, *, out: int, out_dtype: int, threads: int, kernel: int) -> None: ...
    def embedding(
        self, *, indices: int, count: int, out: int, out_dtype: int, threads: int
    ) -> None: ...
    def decoder_linear(self, *, bias: int, bias_dtype: int, x_scale: float) -> DecoderLinear: ...

class Product:
    def __init__(self, weight: BoundWeight, *, bias: int, bias_dtype: int, out: int) -> None: ...

def linear_many(
    products: list[Product], *, x: int, x_dtype: int, m: int, x_stride: int, threads: int
) -> None: ...
