"""Trained centroids: the code of every weight is fixed by k-means, and the table is learned.

Two rules for the table. Deep Compression (Han et al. 2016, arXiv 1510.00149) gives an entry the sum of the gradients of
its weights: `train_tables`, on packed layers. `ClusterMeans` trains a weight behind the table instead, whose cluster
means the entries are: with SGD an entry then moves by the mean of these gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.formats import Format
from lowbit.methods import grid, kmeans
from lowbit.nn.product import PackedProduct
from lowbit.qat.base import WeightQuantizer, set_codes
from lowbit.weights.quantized import QuantTensor


def train_tables(model: nn.Module, bias: bool = True) -> list[nn.Parameter]:
    """Makes the tables of all packed linears and convolutions with fitted formats learnable, and their biases.

    dL/dtable[e] is the sum of scale * dL/dw over the weights of entry e; of a format without scales,
    `Format.lut(bits=b, group=None, scale=None)`, it is the rule of Deep Compression. Entries that are
    0, as those of pruned weights, stay 0. The model stays packed, and computes with the packed
    kernels, throughout.

    Returns:
        The Parameters, for an optimizer.

    Raises:
        ValueError: no layer has a fitted format.
    """
    layers = [m for m in model.modules() if isinstance(m, PackedProduct) and m.format.fitted]
    if not layers:
        raise ValueError("model has no packed linear or convolution whose format is fitted")
    learned = []
    for layer in layers:
        names = ["table", "bias"] if bias and layer.bias is not None else ["table"]
        learned += layer.train_parameters(names)
        table = layer._parameters["table"]
        assert table is not None
        zeros = table.detach() == 0
        if bool(zeros.any()):
            table.register_hook(
                lambda grad, zeros=zeros: grad.masked_fill(zeros.to(grad.device), 0)
            )
    return learned


class ClusterMeans(WeightQuantizer):
    """Every weight counts as the mean of its cluster; k-means on the first weight makes the clusters.

    Surrogate: the weight. As labels are fixed and means are linear, a step of SGD, with momentum or
    without, moves an entry as if the weights were overwritten with their means after every step.

    Args:
        weight: (N, K), what is clustered.
        bits: of a code; 2^bits clusters for the whole weight. Entries without weights stay as
            k-means gave them.

    Attributes:
        labels: (N, K) uint8.
    """

    labels: Tensor
    _start: Tensor

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__(Format.lut(bits=bits, group=None, scale=None))
        qt = kmeans.quantize(weight, self.format)
        self.register_buffer("labels", qt.unpack())
        self.register_buffer("_start", qt.table)

    def encode(self, weight: Tensor) -> QuantTensor:
        """The means, summed in fp64, and the labels."""
        qt = grid.empty(weight, self.format)
        index = self.labels.flatten().long()
        entries = len(self._start)
        sums = torch.zeros(entries, dtype=torch.float64, device=weight.device)
        sums.index_add_(0, index, weight.flatten().double())
        count = torch.bincount(index, minlength=entries)
        means = (sums / count.clamp(min=1)).float()
        qt.tensors["table"].copy_(torch.where(count > 0, means, self._start))
        return set_codes(qt, self.labels)
