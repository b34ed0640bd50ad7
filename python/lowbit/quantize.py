"""`lowbit.quantize` is a function; what a package of this name held is in `lowbit.ptq` and `lowbit.methods`."""

raise ImportError(
    "lowbit.quantize is the function that quantizes a weight, not a package: import what quantizes "
    "models (Recipe, Rule, allocate, collect, ...) from lowbit.ptq, and METHODS from lowbit.methods"
)
