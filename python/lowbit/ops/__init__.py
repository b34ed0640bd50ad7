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
    sparse,
    weights,
)
from lowbit.ops.weights import embedding

# isort: split
# Of ops that are defined above.
from lowbit.ops import decompositions

__all__ = [
    "adamw", "binary", "decompositions", "embedding", "fp8", "fp8_matmul", "hadamard", "int8", "linear", "lowrank",
    "many", "sparse", "weights",
]  # fmt: skip
