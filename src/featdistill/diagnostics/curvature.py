"""How sharply a loss bends around a model's weights: top eigenvalues and trace of its Hessian.

The Hessian is never formed. Its product with a vector is a second backward pass through the
gradient; Lanczos iteration (ARPACK, by scipy) makes eigenvalues of such products, and random
vectors make the trace.

n parameters, k eigenvalues, m random vectors, B images of a batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from featdistill.core.errors import ModelError, NonFiniteError, RunError
from featdistill.core.seeds import generator

with warnings.catch_warnings():  # it imports BackPACK, which uses torch.jit
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    from curvlinops import HessianLinearOperator

Phase = Literal["eigenvalues", "residuals", "trace"]
# how torch says that a function has no second derivative
_ONCE = ("not implemented", "differentiate twice")
_BASIS = 20  # vectors that Lanczos keeps at least, ARPACK's own rule


class HessianOperator(HessianLinearOperator):  # type: ignore[misc]
    """The Hessian of a mean loss over fixed images, as a linear operator (n, n).

    curvlinops' operator with another product: by double backward. Its own differentiates
    `torch.func.jacrev` in forward mode, which gives wrong numbers for the weights of a layer norm
    (torch 2.15; a test shows it) and fails for SiLU: vision transformers have both.

    Args:
        parameters: with respect to which; all require gradients.
        losses: a batch's loss for each image, (B,), differentiable twice.
        batches: the images, the same in each iteration; each has a length, B.
        images: in all batches, of all processes.
        total: sum of a tensor over processes, each of which has its own batches.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        losses: Callable[[Any], Tensor],
        batches: Iterable[Sized],
        *,
        images: int,
        total: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        super().__init__(
            losses,
            _Mean(),
            list(parameters),
            _Unanswered(batches),
            check_deterministic=False,
            num_data=images,
            batch_size_fn=len,
        )
        self.parameters, self.losses, self.batches = list(parameters), losses, batches
        self.images, self.total = images, total

    def by_differences(self, vector: Tensor, step: float) -> Tensor:
        """The product with a vector (n,) by central differences of the gradient, (n,): a check.

        It takes no second derivative. The parameters are moved, and put back exactly.
        """
        parts = vector.split([p.numel() for p in self.parameters])
        moves = [v.view_as(p) for v, p in zip(parts, self.parameters, strict=True)]
        centre = [p.detach().clone() for p in self.parameters]
        sides = []
        try:
            for sign in (1, -1):
                with torch.no_grad():
                    for p, c, move in zip(self.parameters, centre, moves, strict=True):
                        p.copy_(c).add_(move, alpha=sign * step)
                sides.append(self._gradient())
        finally:
            with torch.no_grad():
                for p, c in zip(self.parameters, centre, strict=True):
                    p.copy_(c)
        return (sides[0] - sides[1]) / (2 * step)

    def _gradient(self) -> Tensor:
        sums = [torch.zeros_like(p) for p in self.parameters]
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for batch in self.batches:
                loss = self.losses(batch).sum() / self.images
                found = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
                for sum_, gradient in zip(sums, found, strict=True):
                    sum_ += gradient
        return torch.cat([self.total(s).flatten() for s in sums])

    def _matmat(self, M: list[Tensor]) -> list[Tensor]:
        return [self.total(part) for part in super()._matmat(M)]

    def _matmat_batch(self, X: Any, y: Tensor, M: list[Tensor]) -> list[Tensor]:
        """Of each column; the graph of the gradient is made once for all of them."""
        del y
        result = [torch.zeros_like(m) for m in M]
        columns = M[0].shape[-1]
        # fused attention has no second derivative
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            gradients = torch.autograd.grad(
                self.losses(X).mean(), self.parameters, create_graph=True, materialize_grads=True
            )
            # where the loss is linear in a parameter its gradient depends on none
            bent = [i for i, g in enumerate(gradients) if g.requires_grad]
            for column in range(columns) if bent else ():
                products = torch.autograd.grad(
                    [gradients[i] for i in bent],
                    self.parameters,
                    [M[i][..., column] for i in bent],
                    retain_graph=column < columns - 1,
                    materialize_grads=True,
                )
                for sum_, product in zip(result, products, strict=True):
                    sum_[..., column] = product
        return result


class _Mean(torch.nn.Module):
    """What curvlinops calls the loss: the mean of each image's, which here is the output."""

    reduction = "mean"

    def forward(self, losses: Tensor, _: Tensor) -> Tensor:
        return losses.mean()


class _Unanswered:
    """Batches as pairs, as curvlinops wants them; the answers are in the batches themselves."""

    def __init__(self, batches: Iterable[Sized]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Sized, Tensor]]:
        return ((batch, torch.empty(0)) for batch in self.batches)


@dataclass(frozen=True)
class Curvature:
    """What was found.

    Attributes:
        eigenvalues: the largest ones, falling; fewer than were asked for if not all converged.
        residuals: |H v - lambda v| of each with its eigenvector v of length 1: there is an
            eigenvalue of H within this distance.
        asked: k.
        settled: whether all k were found, with residuals as small as the tolerance wants.
        trace: of the Hessian; None without random vectors.
        trace_error: its standard error over the random vectors.
        deviation: of the first eigenvector's product from differences of the gradient, as a share:
            small (1e-2 and less) if every function of the model has a right second derivative.
        products: of the Hessian with a vector, in all.
    """

    eigenvalues: np.ndarray
    residuals: np.ndarray
    asked: int
    settled: bool
    trace: float | None
    trace_error: float | None
    deviation: float
    products: int


@dataclass(frozen=True)
class Search:
    """How to look for eigenvalues and the trace.

    Attributes:
        count: k, less than n.
        probes: m random vectors for the trace; none, or at least two.
        tolerance: Lanczos ends when residuals are below this share of their eigenvalues.
        products: the most that Lanczos may take.
        seed: of its start and of the random vectors.
    """

    count: int = 5
    probes: int = 20
    tolerance: float = 1e-3
    products: int = 400
    seed: int = 0

    def basis(self, parameters: int) -> int:
        """Vectors that Lanczos keeps."""
        return min(parameters, max(2 * self.count + 1, _BASIS))

    def most(self, parameters: int) -> int:
        """Products in all, at most."""
        return self._restarts(parameters)[1] + self.count + self.probes

    def _restarts(self, parameters: int) -> tuple[int, int]:
        """How often ARPACK may restart within the products, and what that takes at most."""
        basis = self.basis(parameters)
        times = max(1, (self.products - basis - 1) // max(1, basis - self.count))
        # counted: the start, and each restart's new vectors
        return times, basis + 1 + times * (basis - self.count)

    def memory(self, parameters: int, dtype: torch.dtype) -> int:
        """Bytes of its vectors, on the host: Lanczos's own, the eigenvectors and their products."""
        return (self.basis(parameters) + 2 * self.count + 4) * parameters * dtype.itemsize


def curvature(
    hessian: HessianOperator,
    search: Search,
    *,
    each: Callable[[Phase, int], None] = lambda _phase, _done: None,
) -> Curvature:
    """Largest eigenvalues with their residuals, and the trace with its error.

    The same seed gives the same vectors, whatever the batch size. The trace is the eigenvalues'
    part, which is known, and an estimate of the rest (Hutchinson 1989, with the eigenvectors
    projected out as Hutch++ of Meyer et al. 2021, arXiv 2010.09649, projects its sketch): unbiased,
    and without the noise of the largest directions.

    Args:
        hessian: symmetric (n, n).
        each: told after each product which phase it was for, and how many there were in all.

    Raises:
        RunError: no eigenvalue converged.
        ModelError: the loss cannot be differentiated twice.
        NonFiniteError: a product is not finite.
    """
    multiply = _Products(hessian, each)
    n = hessian.shape[0]
    assert 0 < search.count < n, (search.count, n)
    values, vectors = _lanczos(multiply, n, search)
    multiply.phase = "residuals"
    images = [multiply(vectors[:, i]) for i in range(len(values))]
    residuals = np.array(
        [
            np.linalg.norm(image.astype(np.float64) - value * vectors[:, i].astype(np.float64))
            for i, (value, image) in enumerate(zip(values, images, strict=True))
        ]
    )
    allowed = 10 * search.tolerance * float(np.abs(values).max())
    settled = len(values) == search.count and bool((residuals <= allowed).all())
    deviation = _deviation(hessian, vectors[:, 0], values[0], images[0])
    trace, error = None, None
    if search.probes:
        multiply.phase = "trace"
        trace, error = _trace(multiply, vectors, images, search)
    return Curvature(
        values, residuals, search.count, settled, trace, error, deviation, multiply.done
    )


class _Products:
    """Counted products of the Hessian with a vector (n,) on the host."""

    def __init__(self, hessian: HessianOperator, each: Callable[[Phase, int], None]) -> None:
        self.hessian, self.each = hessian, each
        self.phase: Phase = "eigenvalues"
        self.done = 0
        self.dtype = np.dtype(str(hessian.dtype).removeprefix("torch."))

    def __call__(self, vector: np.ndarray) -> np.ndarray:
        on_device = torch.as_tensor(
            np.ascontiguousarray(vector), dtype=self.hessian.dtype, device=self.hessian.device
        )
        try:
            product = self.hessian @ on_device.flatten()
        except (RuntimeError, NotImplementedError) as error:
            if not any(sign in str(error) for sign in _ONCE):
                raise
            line = " ".join(str(error).split())[:120]
            raise ModelError(
                f"the loss cannot be differentiated twice ({line})",
                expected="a model whose every function has a second derivative",
            ) from None
        if not bool(torch.isfinite(product).all()):
            raise NonFiniteError(
                "a product with the Hessian is not finite", fix="look at the model's weights"
            )
        self.done += 1
        self.each(self.phase, self.done)
        return product.detach().cpu().numpy()


def _lanczos(multiply: _Products, n: int, search: Search) -> tuple[np.ndarray, np.ndarray]:
    """Largest eigenvalues (k,), falling, and their vectors (n, k)."""
    start = generator("lanczos", search.seed).standard_normal(n).astype(multiply.dtype)
    operator = LinearOperator((n, n), matvec=multiply, dtype=multiply.dtype)
    options: dict[str, Any] = {
        "which": "LA",
        "v0": start,
        "ncv": search.basis(n),
        "maxiter": search._restarts(n)[0],
        "tol": search.tolerance,
    }
    try:
        values, vectors = eigsh(operator, search.count, **options)
    except ArpackNoConvergence as error:
        values, vectors = error.eigenvalues, error.eigenvectors
        if not len(values):
            raise RunError(
                f"no eigenvalue converged within {multiply.done} products with the Hessian",
                fix="give more --products, or a larger --tolerance",
            ) from None
    except ArpackError:  # a Hessian of zeros
        raise ModelError(
            "every product with the Hessian is zero",
            expected="a loss that bends, made of functions that have second derivatives",
        ) from None
    order = np.argsort(values)[::-1]
    return values[order].astype(np.float64), vectors[:, order]


def _deviation(
    hessian: HessianOperator, vector: np.ndarray, value: float, image: np.ndarray
) -> float:
    """How far a product is from differences of the gradient, relative to its length.

    Functions of compiled libraries (attention kernels, say) may give gradients that torch takes
    for constants: nothing else would tell.
    """
    share = 1e-4 if hessian.dtype == torch.float32 else 1e-8
    step = float(np.sqrt(2 * share / max(abs(value), 1e-12)))  # the loss rises by about `share`
    on_device = torch.from_numpy(vector.copy()).to(hessian.device, hessian.dtype)
    differences = hessian.by_differences(on_device, step).double().cpu().numpy()
    length = float(np.linalg.norm(image.astype(np.float64)))
    return float(np.linalg.norm(differences - image)) / max(length, 1e-300)


def _trace(
    multiply: _Products, vectors: np.ndarray, images: Sequence[np.ndarray], search: Search
) -> tuple[float, float]:
    n = len(vectors)
    basis, turn = np.linalg.qr(vectors)  # ARPACK's are orthonormal to rounding alone
    inside = basis.T @ np.stack(images, 1) @ np.linalg.inv(turn)
    known = float(np.trace(inside, dtype=np.float64))
    found: list[float] = []
    for number in range(search.probes):
        probe = generator("trace", search.seed, number).integers(0, 2, n) * 2.0 - 1
        rest = probe - basis @ (basis.T @ probe)
        found.append(float(np.dot(rest, multiply(rest).astype(np.float64))))
    return known + float(np.mean(found)), float(np.std(found, ddof=1) / np.sqrt(len(found)))
