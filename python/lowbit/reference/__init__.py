"""The only truth: what every op computes, in plain torch. Every kernel is tested against it."""

from lowbit.reference.activations import (
    INT8_PART,
    apply_epilogue,
    binary_linear,
    int8_linear,
    quantize_binary,
    quantize_int8,
    requantize,
    table_int8,
)
from lowbit.reference.hadamard import matrix as hadamard_matrix
from lowbit.reference.hadamard import order as hadamard_order
from lowbit.reference.hadamard import transform as hadamard_transform
from lowbit.reference.lowrank import add_low_rank, low_rank_product
from lowbit.reference.sparse import add_outliers, outlier_product
from lowbit.reference.structured import (
    e8p_values,
    structured_values,
    trellis_states,
    trellis_values,
)
from lowbit.reference.weights import (
    apply_scales,
    chosen_tables,
    code_values,
    dequantize,
    dequantize_rows,
    dynamic_map,
    dynamic_values,
    effective_scales,
    effective_zeros,
    embedding,
    group_index,
    in_one_level,
    linear,
    of_double_quantization,
    of_two_levels,
    per_weight,
    scale_values,
    values_of,
)

__all__ = [
    "INT8_PART",
    "add_low_rank",
    "add_outliers",
    "apply_epilogue",
    "apply_scales",
    "binary_linear",
    "chosen_tables",
    "code_values",
    "dequantize",
    "dequantize_rows",
    "dynamic_map",
    "dynamic_values",
    "e8p_values",
    "effective_scales",
    "effective_zeros",
    "embedding",
    "group_index",
    "hadamard_matrix",
    "hadamard_order",
    "hadamard_transform",
    "in_one_level",
    "int8_linear",
    "linear",
    "low_rank_product",
    "of_double_quantization",
    "of_two_levels",
    "outlier_product",
    "per_weight",
    "quantize_binary",
    "quantize_int8",
    "requantize",
    "scale_values",
    "structured_values",
    "table_int8",
    "trellis_states",
    "trellis_values",
    "values_of",
]
