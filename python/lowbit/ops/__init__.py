"""The ops of torch.ops.lowbit, a file for each family; importing this package registers all of them, which
`import lowbit` alone does not.
"""

from lowbit.ops import binary, int8, linear, many, sparse, weights

__all__ = ["binary", "int8", "linear", "many", "sparse", "weights"]
