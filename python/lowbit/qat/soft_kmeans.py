"""Soft k-means that can be differentiated: DKM (arXiv 2108.12659), IDKM and its Jacobian-free form (arXiv 2312.07759).

Vectors W (m, d), centers C (k, d), attention A(W, C) = softmax(-distance(w_i, c_j) / tau) over j. The map
F(C, W) = (A^T W) / (A^T 1) is iterated to C*, and W~ = A(W, C*) C*. What the gradient of C* is:
    "unrolled"  DKM: through every iteration; what is saved grows with their number.
    "implicit"  IDKM: dC*/dW = (I - dF/dC)^-1 dF/dW at C*, by the implicit function theorem.
    "jfb"       dF/dW at C*: the inverse is left out.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbit import modes
from lowbit.formats import BITS, Format
from lowbit.methods import grid, kmeans
from lowbit.qat.base import WeightQuantizer
from lowbit.weights.quantized import QuantTensor

MODES = ("unrolled", "implicit", "jfb")
DISTANCES = ("plain", "squared")
SOLVERS = ("direct", "neumann")
# Of the Neumann iteration: the residual, relative to the gradient, and how often it may step.
_NEUMANN_TOLERANCE = 1e-6
_NEUMANN_STEPS = 1000


class Clusters(NamedTuple):
    """What `cluster` gives.

    Attributes:
        values: W~ (m, d), differentiable.
        centers: C* (k, d), differentiable.
        iterations: how often F was applied.
        change: how far the last application moved a coordinate, at most.
    """

    values: Tensor
    centers: Tensor
    iterations: int
    change: float


def attention(weight: Tensor, centers: Tensor, tau: float, distance: str = "plain") -> Tensor:
    """softmax(-distance / tau), (m, k); rows sum to 1.

    Args:
        weight, centers: (m, d) and (k, d) of one floating dtype.
        tau: the temperature, positive, in units of the distance.
        distance: "plain", the Euclidean distance of the paper, whose gradient at 0 is taken as 0; or
            "squared", its square, as coremltools has it.
    """
    if distance == "plain":
        away = torch.cdist(weight, centers, compute_mode="donot_use_mm_for_euclid_dist")
        return torch.softmax(-away / tau, 1)
    # |w|^2 is the same for all centers and softmax does not see it; about the mean no digits cancel.
    middle = weight.detach().mean(0)
    w, c = weight - middle, centers - middle
    return torch.softmax((2 * w @ c.T - c.square().sum(1)) / tau, 1)


def update(weight: Tensor, centers: Tensor, tau: float, distance: str = "plain") -> Tensor:
    """F: the means of the vectors by attention, (k, d). A center that no vector attends to stays."""
    a = attention(weight, centers, tau, distance)
    mass = a.sum(0)[:, None]
    moved = (a.T @ weight) / torch.where(mass > 0, mass, 1.0)
    return torch.where(mass > 0, moved, centers.detach())


def cluster(
    weight: Tensor,
    centers: Tensor,
    tau: float,
    *,
    mode: str = "implicit",
    distance: str = "plain",
    iterations: int = 30,
    tolerance: float = 1e-6,
    solver: str = "direct",
) -> Clusters:
    """Clusters vectors and gives their soft values.

    Args:
        weight: (m, d), floating and finite, m > 0.
        centers: (k, d), where the iteration starts; it has no gradient.
        tau, distance: as in `attention`.
        mode: "unrolled", "implicit" or "jfb". The latter two save O(m k), whatever the number of
            iterations; "implicit" is the gradient of the fixed point, so it differs from "unrolled"
            by as much as the iteration has not converged.
        iterations: at most so many, at least 1.
        tolerance: the iteration ends when no coordinate moves by more than this times the largest |weight|.
        solver: of "implicit": "direct" makes the (k d, k d) matrix of I - dF/dC, which takes k d backward
            passes of F, and factors it; "neumann" iterates v <- v + a (g + (dF/dC)^T v - v), with a halved
            from 1 when the residual grows (damping, our reading of the paper's).

    Raises:
        TypeError, ValueError: an argument is not what is said above.
        RuntimeError: in backward, "neumann" does not converge or I - dF/dC is singular.
    """
    _check(weight, centers, tau, mode, distance, iterations, solver)
    if not torch.compiler.is_compiling() and modes.active():
        raise NotImplementedError(
            "cluster has gradients in plain autograd alone, not inside transforms of torch.func or "
            "forward-mode AD"
        )
    limit = tolerance * float(weight.detach().abs().max())
    if mode == "unrolled":
        fixed, count, change = _iterate(weight, centers.detach(), tau, distance, iterations, limit)
    else:
        with torch.no_grad():
            fixed, count, change = _iterate(weight, centers, tau, distance, iterations, limit)
        how = solver if mode == "implicit" else None
        fixed = _FixedPoint.apply(weight, fixed, tau, distance, how)
    return Clusters(attention(weight, fixed, tau, distance) @ fixed, fixed, count, change)


def harden(weight: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest center of every vector: dense values (m, d) and codes (m,) int64.

    What is left of vector codebooks (d > 1) after training: no packed kernel has them, and log2(k) / d bits a
    weight are what the codes would take.
    """
    away = torch.cdist(weight, centers, compute_mode="donot_use_mm_for_euclid_dist")
    codes = away.argmin(1)
    return centers[codes], codes


def _iterate(
    weight: Tensor, centers: Tensor, tau: float, distance: str, iterations: int, limit: float
) -> tuple[Tensor, int, float]:
    count, change = 0, math.inf
    while count < iterations and change > limit:
        moved = update(weight, centers, tau, distance)
        change = float((moved - centers).detach().abs().max())
        centers, count = moved, count + 1
    return centers, count, change


class _FixedPoint(torch.autograd.Function):
    """C* as a function of W: saves both, and evaluates F again in backward."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, fixed: Tensor, tau: float, distance: str, solver: str | None
    ) -> Tensor:
        ctx.save_for_backward(weight, fixed)
        ctx.how = tau, distance, solver
        return fixed.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tau, distance, solver = ctx.how
        weight, fixed = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            moved = update(weight, fixed, tau, distance)
        v = grads[0]
        if solver == "direct":
            v = _solve(moved, fixed, v)
        elif solver == "neumann":
            v = _neumann(moved, fixed, v)
        return torch.autograd.grad(moved, weight, v)[0], None, None, None, None


def _transposed(moved: Tensor, fixed: Tensor, v: Tensor) -> Tensor:
    """(dF/dC)^T v."""
    return torch.autograd.grad(moved, fixed, v, retain_graph=True)[0]


def _solve(moved: Tensor, fixed: Tensor, grad: Tensor) -> Tensor:
    eye = torch.eye(fixed.numel(), dtype=fixed.dtype, device=fixed.device)
    rows = [_transposed(moved, fixed, e.view_as(fixed)).flatten() for e in eye]
    solution, info = torch.linalg.solve_ex((eye - torch.stack(rows)).T, grad.flatten())
    if int(info) != 0:
        raise RuntimeError(
            "I - dF/dC is singular: the fixed point has no derivative; use mode 'jfb'"
        )
    return solution.view_as(fixed)


def _neumann(moved: Tensor, fixed: Tensor, grad: Tensor) -> Tensor:
    v, rate = grad, 1.0
    residual = grad + _transposed(moved, fixed, v) - v
    size = float(residual.norm())
    for _ in range(_NEUMANN_STEPS):
        if size <= _NEUMANN_TOLERANCE * float(grad.norm()):
            return v
        trial = v + rate * residual
        next_residual = grad + _transposed(moved, fixed, trial) - trial
        next_size = float(next_residual.norm())
        if next_size < size:
            v, residual, size = trial, next_residual, next_size
        else:
            rate /= 2
    raise RuntimeError(
        f"the Neumann iteration has not converged in {_NEUMANN_STEPS} steps: use solver='direct'"
    )


def _check(
    weight: Tensor,
    centers: Tensor,
    tau: float,
    mode: str,
    distance: str,
    iterations: int,
    solver: str,
) -> None:
    for name, value, known in (
        ("mode", mode, MODES),
        ("distance", distance, DISTANCES),
        ("solver", solver, SOLVERS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, got {value!r}")
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau!r}")
    if iterations < 1:
        raise ValueError(f"iterations must be 1 or more, got {iterations!r}")
    if not weight.is_floating_point() or weight.dtype != centers.dtype:
        raise TypeError(
            f"weight and centers must have one floating dtype, got {weight.dtype} and {centers.dtype}"
        )
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight must be a non-empty (m, d) matrix, got {tuple(weight.shape)}")
    if centers.dim() != 2 or centers.shape[1] != weight.shape[1] or not len(centers):
        raise ValueError(
            f"centers must have shape (k, {weight.shape[1]}) with k > 0, got {tuple(centers.shape)}"
        )
    if not bool(torch.isfinite(weight).all() & torch.isfinite(centers).all()):
        raise ValueError("weight and centers must be finite, they hold NaN or inf")


class SoftKMeans(WeightQuantizer):
    """Weights as `cluster` values in training, and as their nearest centers in evaluation and after `convert`.

    The centers of one training step are where the next one starts. With dim = 1 `convert` gives a
    fitted table for the whole weight; with more, the weight has no packed form (`harden`).

    Args:
        weight: (N, K). The centers start at the best of 1-D k-means, or with dim > 1 where scikit-learn's k-means
            ends.
        bits: log2 k, 1, 2, 3, 4, 5, 6 or 8.
        dim: d; it divides N * K. Vectors are consecutive weights of the flattened matrix.
        tau: in units of the distance between weights; the default is our choice.
        mode, distance, iterations, solver: as in `cluster`.
        seed: of scikit-learn's k-means.

    Attributes:
        centers: (k, d) fp32.

    Raises:
        ImportError: dim > 1 and scikit-learn is missing.
    """

    centers: Tensor

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        dim: int = 1,
        tau: float = 5e-4,
        *,
        mode: str = "implicit",
        distance: str = "plain",
        iterations: int = 30,
        solver: str = "direct",
        seed: int = 0,
    ) -> None:
        if bits not in BITS:
            raise ValueError(f"bits must be one of {BITS}, got {bits!r}")
        super().__init__(Format.lut(bits=bits, group=None, scale=None))
        grid.check_weight(weight, self.format)
        if dim < 1 or weight.numel() % dim:
            raise ValueError(f"dim must divide the {weight.numel()} weights, got {dim!r}")
        self.dim, self.tau, self.mode, self.distance = dim, tau, mode, distance
        self.iterations, self.solver = iterations, solver
        w = weight.detach().to(torch.float32)
        if dim == 1:
            table = kmeans.quantize(w, self.format).tensors["table"]
            centers = table[:, None].clone()
        else:
            centers = _k_means(w.reshape(-1, dim), 2**bits, seed)
        self.register_buffer("centers", centers)
        _check(w.reshape(-1, dim), centers, tau, mode, distance, iterations, solver)

    def forward(self, weight: Tensor) -> Tensor:
        """Soft values in training, hard values in evaluation."""
        vectors = weight.reshape(-1, self.dim)
        if not self.training:
            return harden(vectors.float(), self.centers)[0].to(weight.dtype).view_as(weight)
        clusters = cluster(
            vectors.float(),
            self.centers,
            self.tau,
            mode=self.mode,
            distance=self.distance,
            iterations=self.iterations,
            solver=self.solver,
        )
        # Not in place: what is saved for backward may be the old one.
        self.centers = clusters.centers.detach()
        return clusters.values.to(weight.dtype).view_as(weight)

    def encode(self, weight: Tensor) -> QuantTensor:
        """The centers as a table and the nearest codes.

        Raises:
            NotImplementedError: dim > 1.
        """
        if self.dim > 1:
            raise NotImplementedError(
                f"vectors of dim {self.dim} have no packed kernel: soft_kmeans.harden gives dense values and codes"
            )
        qt = grid.empty(weight, self.format)
        grid.set_table(qt, self.centers[:, 0])
        grid.fill_codes(qt, weight)
        return qt

    def extra_repr(self) -> str:
        """Size, temperature and mode."""
        return f"bits={self.format.bits}, dim={self.dim}, tau={self.tau}, mode={self.mode}"


def _k_means(vectors: Tensor, k: int, seed: int) -> Tensor:
    try:
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning
    except ImportError as e:
        raise ImportError("dim > 1 needs scikit-learn: pip install 'lowbit[qat]'") from e
    if len(vectors) < k:
        raise ValueError(
            f"weight must have at least {k} vectors for {k} centers, got {len(vectors)}"
        )
    with warnings.catch_warnings():
        # Fewer distinct vectors than centers: the rest of the centers lie on others.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = KMeans(k, n_init=1, random_state=seed).fit(vectors.cpu().numpy())
    return torch.from_numpy(fitted.cluster_centers_).to(vectors)
