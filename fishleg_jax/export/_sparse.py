"""Dense layers with sparse kernels on a CPU, where that is measured to pay."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from fishleg_jax import _jaxpr, _text, _tree
from fishleg_jax._checks import numbers
from fishleg_jax._checks.arrays import check_untraced
from fishleg_jax.export._arguments import OUTSIDE, as_tuple, function_of, masked
from fishleg_jax.export._sparse_times import (
    MatmulTimes,
    measure_sparse_matmul,
    sparse_product,
    transposed_bcsr,
)

MARGIN = 0.9  # times of less than a millisecond vary by some per cent from run to run
Measure = Callable[[tuple[int, int], float, int], MatmulTimes]


class SparseLayer(NamedTuple):
    """The choice for one kernel.

    Attributes:
        name: Key path of the kernel.
        density: Fraction of its weights that are not zero.
        times: Seconds of dense and sparse products.
        sparse: Whether products with it are sparse.
    """

    name: str
    density: float
    times: MatmulTimes
    sparse: bool

    def __repr__(self) -> str:
        """One line."""
        return _text.one_line(self)


class SparseApply(NamedTuple):
    """A function whose dense layers are sparse where that pays; call it with the inputs.

    Attributes:
        function: Compiled function `(*inputs) -> outputs`.
        layers: One entry for every kernel that is multiplied with inputs.
    """

    function: Callable[..., Any]
    layers: tuple[SparseLayer, ...]

    def __call__(self, *inputs: Any) -> Any:
        """Applies the function to inputs."""
        return self.function(*inputs)

    def __repr__(self) -> str:
        """One line, without the entries of arrays."""
        return _text.one_line(self)


def sparse_apply(
    function: Callable[..., Any],
    params: Any,
    example_inputs: Any,
    masks: Any | None = None,
    *,
    measure: Measure | Mapping[tuple, MatmulTimes] = measure_sparse_matmul,
) -> SparseApply:
    """Replaces products with sparse kernels by sparse products, where that is faster.

    For every kernel of shape (in, out) that is multiplied with inputs of shape (..., in), dense
    products and products with the transposed kernel in BCSR are timed on this machine, for the
    number of rows of the example.  BCSR is taken where it needs less than 0.9 of the time; where it
    never does, the function stays dense.  Convolutions stay dense, and so do kernels that the
    function transforms first or uses inside of a loop or a `cond`; `jit` and `checkpoint` inside
    of it are dissolved.

    `jax.experimental.sparse`, which has BCSR, is frozen: JAX mends it but does not develop it.

    Args:
        function: Function `(params, *inputs) -> outputs`, or a `Model`.
        params: Pytree of arrays.
        example_inputs: Array, or tuple of pytrees of arrays, of the shapes that the function is
            to be fast for.
        masks: Pytree of booleans like the parameters, applied first; None for none.
        measure: Function `(shape, density, batch) -> MatmulTimes`, by default
            `measure_sparse_matmul`; or a mapping from such triples, with the density rounded to
            hundredths, in which missing ones stay dense.

    Returns:
        A `SparseApply`: call it with inputs; `layers` has the measurements.

    Raises:
        ValueError: Something else than a function, masks of another structure or dtype, no arrays
            in the example, a call under jit, an invalid `measure`, or one that gives something else
            than `MatmulTimes`.

    References:
        JAX documentation, `jax.experimental.sparse`.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> params = {"w": jnp.eye(4)}
        >>> times = {((4, 4), 0.25, 2): flj.export.MatmulTimes(dense=2e-6, sparse=1e-6)}
        >>> predict = lambda params, x: jnp.tanh(x @ params["w"])
        >>> apply = flj.export.sparse_apply(predict, params, jnp.ones((2, 4)), measure=times)
        >>> apply.layers[0].sparse, float(apply(jnp.zeros((2, 4))).sum())
        (True, 0.0)
    """
    inputs = as_tuple(example_inputs)
    check_untraced(OUTSIDE, "sparse_apply", params=params, example_inputs=inputs, masks=masks)
    function = function_of(function, inputs)
    params = jax.tree.map(jax.numpy.asarray, masked(params, masks))
    ask = _asked(measure)

    # find the kernels that are multiplied with inputs, and the number of rows of these
    rows: dict[int, int] = {}

    def record(x: jax.Array, kernel: jax.Array) -> None:
        rows.setdefault(id(kernel), math.prod(x.shape[:-1]))

    jax.eval_shape(_with_products(function, params, record), *inputs)

    # measure, and choose kernel by kernel
    layers, transposed = [], {}
    for name, kernel in _tree.named_leaves(params):
        zeros = kernel.size - int(np.count_nonzero(np.asarray(kernel)))
        if id(kernel) not in rows or zeros in (0, kernel.size):
            continue
        density = 1 - zeros / kernel.size
        times = ask(tuple(kernel.shape), density, rows[id(kernel)])
        pays = times.sparse < MARGIN * times.dense
        layers.append(SparseLayer(name, density, times, pays))
        if pays:
            transposed[id(kernel)] = transposed_bcsr(kernel)

    def product(x: jax.Array, kernel: jax.Array) -> jax.Array | None:
        if id(kernel) not in transposed:
            return None
        flat = sparse_product(x.reshape(-1, x.shape[-1]), transposed[id(kernel)])
        return flat.reshape(*x.shape[:-1], kernel.shape[-1])

    return SparseApply(jax.jit(_with_products(function, params, product)), tuple(layers))


def _asked(measure: Any) -> Measure:
    """Function that measures or looks up times, and checks them.

    Raises:
        ValueError: Neither a function nor a mapping.
    """
    if isinstance(measure, Mapping):
        dense = MatmulTimes(dense=0.0, sparse=float("inf"))
        find = lambda shape, density, batch: measure.get((shape, round(density, 2), batch), dense)
    else:
        expected = "a function (shape, density, batch) -> MatmulTimes, or a mapping from such"
        numbers.check_function(measure, "measure", 3, f"{expected} triples")
        find = measure

    def ask(shape: tuple[int, int], density: float, batch: int) -> MatmulTimes:
        times = find(shape, density, batch)
        if not isinstance(times, MatmulTimes):
            raise ValueError(
                f"measure must give MatmulTimes for shape={shape}, density={density:.2f}, "
                f"batch={batch}, got {_text.shown(times)}"
            )
        return times

    return ask


def _with_products(
    function: Callable[..., Any],
    params: Any,
    product: Callable[[jax.Array, jax.Array], jax.Array | None],
) -> Callable[..., Any]:
    """Function of the inputs in which `product(x, kernel)` may replace `x @ kernel`."""
    kernels = {id(x) for x in jax.tree.leaves(params)}

    def replacement(equation: Any, in_loop: bool) -> Callable[..., Any] | None:
        if in_loop or not _is_layer(equation):
            return None

        def run(x: Any, kernel: Any) -> Any:
            # a kernel that the function has changed, or that is traced, is not one of these
            found = product(x, kernel) if id(kernel) in kernels else None
            if found is None:
                found = jax.lax.dot_general(x, kernel, **equation.params)
            return found

        return run

    # inside of an inner `jit` kernels would be traced, and not known again
    changed = _jaxpr.with_replaced(function, replacement, inline=True)
    return lambda *inputs: changed(params, *inputs)


def _is_layer(equation: Any) -> bool:
    """Whether an operation is `x @ kernel` in full precision, with a kernel of two dimensions."""
    if equation.primitive.name != "dot_general":
        return False
    x, kernel = (operand.aval for operand in equation.invars)
    last = ((x.ndim - 1,), (0,)), ((), ())
    dtypes = {x.dtype, kernel.dtype, equation.outvars[0].aval.dtype}
    wide = dtypes in ({np.dtype("float32")}, {np.dtype("float64")})
    return kernel.ndim == 2 and wide and equation.params["dimension_numbers"] == last
