"""Continuous search of ranks under a composite loss, without data."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fishleg_jax.low_rank.choice import Choices

STEPS = 300
PRICES = 16  # of what factors cost, tried at once
LOWEST, HIGHEST = 1e-3, 1e3
ROUNDS = 3
COLD = 0.02  # temperature at which the search ends; it begins at 1
RATE = 0.1


def by_search(choices: Sequence[Choices], at_most: float) -> list[int]:
    """Ranks by gradient descent on their probabilities, pulled by errors and by cost.

    Each kernel has a distribution over its options, `softmax(θ / T)`, whose temperature falls.
    Adam minimises the composite loss `Σ E[‖K − K_r‖² / ‖K‖²] + π E[cost] / cost of all`: the
    relative error of every kernel and the price π of what its factors cost, both known from the
    singular values alone.  Several prices are searched at once, and the lowest whose ranks are
    within the budget is taken.

    The loss is linear in the probabilities, so that its minimum gives every kernel the option of
    least error plus price times cost: the threshold of `choice.by_threshold` on relative errors,
    without the filling up of the budget.  The search is a relaxation that finds it by descent, and
    not the algorithm of the paper.

    Args:
        choices: Options of every kernel.
        at_most: Highest total cost.

    Returns:
        Number of the chosen option among the choices of every kernel.
    """
    longest = max(len(x.cost) for x in choices)
    there = np.array([np.arange(longest) < len(x.cost) for x in choices])
    total = sum(x.cost[-1] for x in choices)

    def padded(rows):
        return jnp.asarray(np.array([np.pad(x, (0, longest - len(x))) for x in rows]), jnp.float32)

    error = padded([x.loss / (x.whole or 1) for x in choices])
    cost = padded([x.cost / total for x in choices])
    adam = optax.adam(RATE)

    def composite(theta, price, temperature):
        p = jax.nn.softmax(jnp.where(there, theta / temperature, -jnp.inf), axis=-1)
        return jnp.sum(p * (error + price * cost))

    def search(price):
        def step(carry, temperature):
            theta, state = carry
            gradient = jax.grad(composite)(theta, price, temperature)
            updates, state = adam.update(gradient, state, theta)
            return (optax.apply_updates(theta, updates), state), None

        theta = jnp.zeros(there.shape)
        temperatures = jnp.geomspace(1.0, COLD, STEPS)
        (theta, _), _ = jax.lax.scan(step, (theta, adam.init(theta)), temperatures)
        return jnp.argmax(jnp.where(there, theta, -jnp.inf), axis=-1)

    run = jax.jit(jax.vmap(search))
    low, high, best = LOWEST, HIGHEST, [0] * len(choices)
    for _ in range(ROUNDS):  # finer and finer between a price too low and one high enough
        prices = np.geomspace(low, high, PRICES)
        found = np.asarray(run(jnp.asarray(prices, jnp.float32)))
        spent = [sum(x.cost[k] for x, k in zip(choices, row, strict=True)) for row in found]
        first = next((i for i, cost in enumerate(spent) if cost <= at_most), None)
        if first is None:
            break
        best = [int(k) for k in found[first]]
        if first == 0:
            break
        low, high = prices[first - 1], prices[first]
    return best
