"""Solutions at any damping in the space of the vectors that one solve has multiplied."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _tree
from fishleg_jax._jit import jitted

CUT = 100.0  # machine epsilons below which a direction counts as one of the others


class Subspace:
    """Span of vectors V with known products, in which `(F + γ) x = b` is solved for any γ.

    The solution is the lowest point of the quadratic model among all `V y`:
    `(Vᵀ(F + γ₀)V + (γ − γ₀) VᵀV) y = Vᵀb`, with γ₀ the damping of the products.  Search directions
    of conjugate gradients are conjugate at γ₀, so that the first matrix is nearly diagonal and the
    small system well conditioned.  It needs inner products, but no further product with F.
    """

    def __init__(self, right: Any, damping: float):
        """Starts empty, for a right side b and products at a damping γ₀."""
        self.right, self.damping = right, damping
        self.vectors: list[Any] = []
        self._curved = self._gram = np.zeros((0, 0))
        self._towards = np.zeros(0)
        self._epsilon = np.finfo(np.float32).eps

    def add(self, vector: Any, image: Any) -> None:
        """Adds a vector and its product `(F + γ₀) v`; nothing if they are zero or not finite."""
        pairs = [jitted(_pair)(v, vector, image) for v in [*self.vectors, vector]]
        towards = jitted(_tree.dot)(self.right, vector)
        gram, curved = np.asarray(jax.device_get(pairs), np.float64).T
        if not (np.isfinite([*gram, *curved]).all() and curved[-1] > 0):
            return
        self._epsilon = np.finfo(towards.dtype).eps
        self.vectors.append(vector)
        self._gram, self._curved = _bordered(self._gram, gram), _bordered(self._curved, curved)
        self._towards = np.append(self._towards, float(towards))

    def solver(self) -> Callable[[float], tuple[np.ndarray, float]]:
        """Function of γ for the coefficients y, and the fall of the quadratic model by `V y`."""
        if not self.vectors:
            return lambda damping: (np.zeros(0), 0.0)
        # a basis W with Wᵀ(F + γ₀)W = 1 and WᵀW = diag μ
        scale = 1 / np.sqrt(np.diag(self._curved))
        values, basis = np.linalg.eigh(self._curved * scale * scale[:, None])
        kept = values > CUT * self._epsilon * values[-1]
        basis = scale[:, None] * basis[:, kept] / np.sqrt(values[kept])
        lengths, turn = np.linalg.eigh(basis.T @ self._gram @ basis)
        lengths = np.clip(lengths, 0, 1 / self.damping)  # up to rounding, as F has no negative ones
        basis = basis @ turn
        towards = basis.T @ self._towards

        def solve(damping: float) -> tuple[np.ndarray, float]:
            along = towards / (1 + (damping - self.damping) * lengths)
            return basis @ along, float(towards @ along) / 2

        return solve

    def combined(self, coefficients: np.ndarray) -> Any:
        """The vector `V y`."""
        total = jax.tree.map(jnp.zeros_like, self.right)
        for y, vector in zip(coefficients, self.vectors, strict=True):
            total = jitted(_added)(total, vector, y)
        return total


def _pair(known: Any, vector: Any, image: Any) -> tuple[jax.Array, jax.Array]:
    return _tree.dot(known, vector), _tree.dot(known, image)


def _bordered(matrix: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Symmetric matrix with one more column and row."""
    return np.block([[matrix, column[:-1, None]], [column[None, :]]])


def _added(total: Any, vector: Any, share: jax.Array) -> Any:
    return jax.tree.map(lambda t, v: t + share.astype(t.dtype) * v, total, vector)
