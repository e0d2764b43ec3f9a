"""The linear system of one group update, solved by conjugate gradients that are watched."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import fishleg_jax as flj
from fishleg_jax._conjugate_gradients import Solve, conjugate_gradients

# the library's own parts of the group update, so that its own work is measured
from fishleg_jax._jit import jitted
from fishleg_jax.pruning.compensation._group_system import damped, precondition, right_side
from fishleg_jax.pruning.compensation._independent import to_zero


class System(NamedTuple):
    """The equations `(F_KK + γ) x = F_KS w_S`, by which kept weights make up for pruned ones.

    Attributes:
        product: `v -> (F_KK + γ) v`.
        right: `F_KS w_S`.
        masks: K as a pytree of booleans.
        cost: `½ w_Sᵀ(F_SS + γ) w_S`, the quadratic model's rise of the loss at x = 0.
    """

    product: Callable[[Any], Any]
    right: Any
    masks: Any
    cost: float


class Record(NamedTuple):
    """Record of a solve: an entry for its start, and one for every iteration.

    Attributes:
        residual: `‖b − A x‖ / ‖b‖` as conjugate gradients carry it along.
        cost: the quadratic model's rise of the loss, in nats per example, with γ in it.
        seconds: since the beginning, without those of the record itself.
        true_residual: that of the last x, computed anew.
        sound: whether no number was other than it has to be.
    """

    residual: list[float]
    cost: list[float]
    seconds: list[float]
    true_residual: float
    sound: bool


def make_system(curvature: flj.Curvature, params: Any, masks: Any, damping: float) -> System:
    """The system of one group update, from dense to the masks.

    Args:
        curvature: exact Fisher products on fixed images.
        params: the weights, none of them pruned yet.
        masks: which of them are kept.
        damping: γ.
    """
    gamma = jnp.asarray(damping)
    zero = jax.tree.map(jnp.zeros_like, params)
    pruned = to_zero(params, zero, masks)
    image = curvature.product(params, pruned)
    form = optax.tree.vdot(pruned, image) + gamma * optax.tree.vdot(pruned, pruned)

    def product(v: Any) -> Any:
        return jitted(damped)(curvature.product(params, v), v, gamma, masks)

    return System(product, jitted(right_side)(image, zero, masks), masks, float(form) / 2)


def solve(
    system: System,
    estimator: flj.InverseFisher,
    state: Any,
    *,
    iterations: int,
    tolerance: float,
) -> tuple[Any, Record]:
    """Solves a system from zero, with an estimate of the inverse Fisher for a preconditioner.

    Everything is compiled before the clock starts, by a solve of one iteration.

    Args:
        system: the system.
        estimator: the estimate.
        state: its fitted state.
        iterations: the maximum number of iterations.
        tolerance: the relative residual at which the solve ends.

    Returns:
        The solution, and the record of the solve.
    """
    zero = jax.tree.map(jnp.zeros_like, system.right)

    @jax.jit
    def cost_of(x, residual):
        # ½ xᵀA x − bᵀx, with A x = b − r
        return system.cost - optax.tree.vdot(x, optax.tree.add(system.right, residual)) / 2

    def run(most: int) -> tuple[Solve, list[tuple[float, float, float]]]:
        seen, paused = [], 0.0
        begin = time.perf_counter()

        def look(now: Solve) -> None:
            nonlocal paused
            jax.block_until_ready(now)
            came = time.perf_counter()
            cost = float(cost_of(now.x, now.residual))
            seen.append((float(now.relative), cost, came - begin - paused))
            paused += time.perf_counter() - came

        done = conjugate_gradients(
            system.product,
            jitted(precondition, estimator),
            (state, system.masks),
            system.right,
            zero,
            iterations=most,
            tolerance=tolerance,
            on_iteration=look,
        )
        return done, seen

    run(1)
    done, seen = run(iterations)
    # an iteration that went wrong is reported too, with the x before it
    residual, cost, seconds = map(list, zip(*seen[: int(done.iterations) + 1], strict=True))
    left = optax.tree.sub(system.right, system.product(done.x))
    true = float(optax.tree.norm(left) / optax.tree.norm(system.right))
    return done.x, Record(residual, cost, seconds, true, bool(done.sound))
