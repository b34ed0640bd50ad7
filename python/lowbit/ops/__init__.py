"""The ops of torch.ops.lowbit, a file for each family; importing this package registers all of them, which
`import lowbit` alone does not.
"""

from lowbit.ops import (
    adamw,
    binary,
    fp8,
    fp8_matmul,
    hadamard,
    int8,
    linear,
    lowrank,
    many,
    pruned,
    sparse,
    weights,
)
from lowbit.ops.weights import embedding

__all__ = [
    "adamw", "binary", "embedding", "fp8", "fp8_matmul", "hadamard", "int8", "linear", "lowrank",
    "many", "pruned", "sparse", "weights",
]  # fmt: skip
