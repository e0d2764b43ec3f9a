"""Group update: the exact minimiser of the quadratic model over all kept weights."""

from typing import Any

import jax

from fishleg_jax import _text
from fishleg_jax._checks.numbers import check_count, check_flag, check_positive, check_tolerance
from fishleg_jax._curvature import Curvature
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.pruning.compensation._group_solve import Settings, solve_group
from fishleg_jax.pruning.compensation._independent import Compensation, require_labels

FISHERS = ("exact", "estimate")
CHEAP = 6  # iterations of the solves that compare masks


def group(
    *,
    damping: float | None = None,
    first_order: bool = False,
    iterations: int = 25,
    tolerance: float = 1e-3,
    attempts: int = 3,
    seconds: float | None = None,
    check_step: bool = True,
    fisher: str = "exact",
) -> Compensation:
    """Moves the kept weights K to make up for all pruned weights S at once.

    `δ_K = F_KK⁻¹ (F_KS w_S − g_K)` with the damped Fisher: the lowest point of the quadratic model
    `gᵀδ + ½ δᵀF_γδ` on the kept support, by conjugate gradients with exact Fisher products on the
    curvature's batches.  They start at the `independent` correction, and are preconditioned by the
    estimate of the inverse Fisher, cut to K.  No matrix is formed.

    Held-out batches, if there are any, decide when a solve ends: every third iteration their loss
    is measured, the iterate with the lowest counts, and the solve ends once the loss has not fallen
    twice.  They decide on the damping, too: unless it was given, each look also tries neighbouring
    dampings, in the space of all directions that the solve has taken, which needs inner products
    but no further Fisher products.  The solve itself has a twentieth of the mean diagonal of the
    Fisher on K, measured by one product with random signs and so independent of the estimate; looks
    walk down from there while the loss falls, else up.  A damping wins only if it lowers the loss
    by more than a tenth of the predicted gain.  The directions are kept meanwhile, up to
    `iterations + 1` vectors of the size of the weights, in float32 or better; not with a given
    damping or `attempts=1`, where there is nothing to compare.

    Without held-out batches there is nothing to judge a smaller damping by, as the curvature's own
    batches always favour it.  The damping begins at a fifth then, and is only raised, fourfold, if
    part of the step lowers the loss by a tenth more than the whole or if the loss was badly
    predicted.

    Args:
        damping: Damping γ of the solve, in units of the Fisher per example; None, the default,
            searches by the loss, with `fisher="estimate"` from that of the estimate.
        first_order: Whether to use the gradient, here and in the scores of one-shot pruning; False,
            the default, takes g as zero.
        iterations: Largest number of iterations of a solve, 25 by default; each is a Fisher product
            over all batches.
        tolerance: Residual at which a solve ends, relative to the right side, 0.001 by default.
        attempts: Largest number of dampings to try, 3 by default: at each look at held-out
            batches, else (and with `fisher="estimate"`) in all.
        seconds: Time after which no further iteration or attempt of a solve begins, on the host;
            each mask update, and each candidate of a choice, has as much.  None for no such limit.
            Either way the largest number of products and the time that they are expected to take
            are logged beforehand, at the level INFO of the logger `fishleg_jax`.
        check_step: Whether to choose between all, a half, a quarter or none of the change of kept
            weights by the lowest loss, True by default: on held-out batches if `prune_one_shot` has
            them.  False makes the whole change, in one attempt.
        fisher: `exact`, the default, for Fisher products on the curvature's batches; `estimate` for
            the Fisher of the gradients that the estimate holds in memory (`mfac`), cut to K and
            solved through its m×m system, without iterations.

    Returns:
        A compensation.  Its `info`: `iterations`, `residual` and `damping` of the chosen solve;
        `products`, the number of Fisher products made; `predicted`, `gᵀδ + ½ δᵀFδ` always with
        the gradient, and the `actual` change of the loss in
        nats per example; their difference over `½ δᵀF_γδ` is `ratio`, far above one where the model
        can't be trusted so far out.  `held_out` is the change on held-out batches if there are any,
        and then `losses` are theirs.  A check adds the `step` and the `losses` of `STEPS`.
        Batches without labels need `check_step=False`; `predicted` and `actual` are then missing,
        and `ratio` is NaN.  Under `jit`, `predicted`, `actual`, `ratio`, `held_out` and `products`
        are missing.

    Raises:
        ValueError: An argument out of its range; when called, or by `prune_one_shot` before the
            fit, an estimate without gradients in memory for `fisher="estimate"`, a likelihood
            without a Fisher, or missing labels that are needed.

    References:
        Yu, Serra, Ramalingam & Zhe, The combinatorial brain surgeon, ICML 2022, section 4;
        Benbaki et al., Fast as CHITA, ICML 2023.

    Example:
        >>> import jax, jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
        >>> batches = [(jnp.array([[1.0, 1.0], [1.0, 0.0]]), jnp.array([3.0, 2.0]))]
        >>> result = flj.prune_one_shot(
        ...     model, jnp.array([[2.0], [1.0]])[:, 0], flj.inverse.identity(), batches,
        ...     sparsity=0.5, prunable=lambda name, w: True,
        ...     compensation=flj.compensation.group(damping=1e-6))
        >>> result.params.round(3)  # 2.5 makes up for 1.0 on half of the examples
        Array([2.5, 0. ], dtype=float32)
    """
    # Reject invalid settings.
    if damping is not None:
        damping = check_positive(damping, "damping", " or None")
    iterations, attempts = check_count(iterations, "iterations"), check_count(attempts, "attempts")
    tolerance, first_order = check_tolerance(tolerance), check_flag(first_order, "first_order")
    if seconds is not None:
        seconds = check_positive(seconds, "seconds", " or None")
        if jax.process_count() > 1:
            raise ValueError("seconds must be None in several processes, whose clocks differ")
    check_step = check_flag(check_step, "check_step")
    if fisher not in FISHERS:
        raise ValueError(f"fisher must be one of {', '.join(FISHERS)}, got {_text.shown(fisher)}")
    settings = Settings(
        damping, first_order, iterations, tolerance, attempts, seconds, check_step, fisher
    )

    # What a pruning must have, checked before its fit.
    def check(curvature: Curvature | None, estimator: InverseFisher, state: Any) -> None:
        del state
        if curvature is None:
            raise ValueError(
                "curvature is needed for the Fisher products of a group update: in gradual "
                "pruning, pass model= and give update a batch="
            )
        if fisher == "estimate" and estimator.product is None:
            raise ValueError(
                "fisher='estimate' needs an estimate with its gradients in memory, such as "
                "inverse.mfac"
            )
        if fisher == "exact" and "product" in curvature.missing:
            raise ValueError(
                "group needs Fisher products, but the model's likelihood has fisher=None: pass "
                "one, or use another compensation"
            )
        require_labels(curvature, first_order, check_step)

    # The compensation, and what prunings read of it.
    def compensate(
        params: Any,
        old_mask: Any,
        new_mask: Any,
        curvature: Curvature,
        estimator: InverseFisher,
        state: Any,
        adjustable: Any | None = None,
    ) -> tuple[Any, dict]:
        check(curvature, estimator, state)
        return solve_group(
            settings, params, old_mask, new_mask, curvature, estimator, state, adjustable
        )

    compensate.check, compensate.measures_loss = check, True
    compensate.first_order = first_order
    # A cheaper one, for choices between masks.
    if iterations > CHEAP:
        compensate.cheap = group(
            damping=damping,
            first_order=first_order,
            iterations=CHEAP,
            tolerance=tolerance,
            attempts=1,
            seconds=seconds,
            check_step=check_step,
            fisher=fisher,
        )
    else:
        compensate.cheap = compensate
    return compensate
