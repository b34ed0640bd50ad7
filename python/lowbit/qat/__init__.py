"""Training through the quantizer, and conversion to packed weights afterwards.

`prepare(model, recipe)` puts fake quantizers into linears and convolutions, any loop trains them, and
`convert(model)` packs the weights they stand for, bit for bit.
"""

from lowbit.qat import soft_kmeans
from lowbit.qat.activations import (
    PACT,
    ActivationQuantizer,
    DoReFaActivation,
    Int8Activation,
    XNORActivation,
)
from lowbit.qat.base import STE, WeightQuantizer, scale_gradient, straight_through
from lowbit.qat.centroids import ClusterMeans, train_tables
from lowbit.qat.few_levels import BWN, TTQ, TWN, BitNet, DoReFa
from lowbit.qat.layers import BitLinear, FakeQuantLinear, Spec, convert, prepare
from lowbit.qat.learned_step import LSQ, LSQActivation
from lowbit.qat.pruning import Mask, mask, unmask
from lowbit.qat.soft_kmeans import Clusters, SoftKMeans

__all__ = [
    "BWN", "LSQ", "PACT", "STE", "TTQ", "TWN", "ActivationQuantizer", "BitLinear", "BitNet", "ClusterMeans",
    "Clusters", "DoReFa", "DoReFaActivation", "FakeQuantLinear", "Int8Activation", "LSQActivation", "Mask",
    "SoftKMeans", "Spec", "WeightQuantizer", "XNORActivation", "convert", "mask", "prepare", "scale_gradient",
    "soft_kmeans", "straight_through", "train_tables", "unmask",
]  # fmt: skip
