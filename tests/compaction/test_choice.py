"""Units go for what they cost, until the smaller network itself is cheap enough."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj
from fishleg_jax.compaction import choice, timing
from fishleg_jax.compaction.analysis import Network
from tests.compaction import networks

X = jax.random.normal(jax.random.key(0), (4, 5))
PARAMS = networks.mlp_params((5, 16, 12, 3))
SQUARES = jax.tree.map(jnp.square, PARAMS)


def chosen(goal, **options):
    """Masks, and the compact network that they lead to."""
    masks = flj.choose_units(networks.mlp, PARAMS, SQUARES, goal, X, **options)
    return masks, flj.compact(networks.mlp, PARAMS, masks, X)


@pytest.mark.parametrize(
    "goal, measure, largest",
    [  # the cost of the dearest unit: 16 + 3 weights and a bias
        (flj.targets.flops(300), lambda report: report.flops[1], 2 * (16 + 3) + 1),
        (flj.targets.bytes(600), lambda report: report.bytes[1], 4 * 20),
        (flj.targets.weights(150), lambda report: report.weights[1], 20),
    ],
    ids=["flops", "bytes", "weights"],
)
def test_the_smaller_network_reaches_the_goal(goal, measure, largest):
    """And not by far: with one unit more it would not."""
    _, small = chosen(goal)
    assert goal.at_most - largest < measure(small.report) <= goal.at_most


def test_units_with_low_scores_for_their_cost_go_first():
    """Costs of units differ between couplings: a score of 2 at half the cost stays."""
    params = {"w": jnp.ones((4, 6)), "v": jnp.ones((6, 6)), "u": jnp.ones((6, 20))}
    f = lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"]) @ p["v"]) @ p["u"]
    x = jax.random.normal(jax.random.key(0), (3, 4))
    scores = jax.tree.map(jnp.zeros_like, params)
    scores["w"] = scores["w"].at[0].set(jnp.array([5.0, 6, 7, 8, 9, 10]))  # 20 operations each
    scores["u"] = scores["u"].at[:, 0].set(jnp.array([9.0, 10, 20, 30, 40, 50]))  # 52 each
    goal = flj.targets.flops(2 * (4 * 6 + 6 * 6 + 6 * 20) - 100)
    masks = flj.choose_units(f, params, scores, goal, x)
    assert masks["v"].any(axis=0).tolist() == [False, False, True, True, True, True]
    assert masks["v"].any(axis=1).all()


def test_sizes_are_multiples():
    masks, small = chosen(flj.targets.flops(300), multiple_of=4)
    for units in small.report.units:
        assert units.after % 4 == 0 and not units.stay
    norms = np.asarray(SQUARES["b1"] + SQUARES["w1"].sum(0) + SQUARES["w2"].sum(1))
    stays = np.asarray(masks["b1"])
    assert norms[stays].min() > norms[~stays].max()  # the best of them stay
    assert choice._removals(0, np.arange(10.0), 1.0, 4)[0].units == (0, 1)  # ten to eight
    assert [len(x.units) for x in choice._removals(0, np.ones(10), 1.0, 4)] == [2, 4]
    assert choice._removals(0, np.ones(3), 1.0, 4) == []


def test_times_are_measured(monkeypatch):
    masks, _ = chosen(flj.targets.seconds(1e3))
    assert all(jax.tree.leaves(jax.tree.map(jnp.all, masks)))
    clock = timing.Clock(Network(networks.mlp, PARAMS, None), X)
    assert clock.whole > 0 and clock.share(Network(networks.mlp, PARAMS, None)) > 0


@pytest.mark.parametrize("target, at_most", [("seconds", 2.0), ("time_share", 0.5)])
def test_units_go_until_the_time_is_short_enough(monkeypatch, target, at_most):
    timed, size = [], lambda network: sum(x.size for x in jax.tree.leaves(network.params))

    class Clock:
        """A second for so many weights that the whole network takes four."""

        whole = 4.0

        def __init__(self, network, inputs):
            self.size = size(network)

        def share(self, network):
            timed.append(size(network) / self.size)
            return timed[-1]

    monkeypatch.setattr(choice, "Clock", Clock)
    _, small = chosen(getattr(flj.targets, target)(at_most))
    before, after = small.report.weights
    assert before / 2 - 20 < after <= before / 2
    assert len(timed) <= 7  # halves the range each time


class FirstLayerClock:
    """The first layer takes all of the time."""

    whole = 1.0

    def __init__(self, network, inputs):
        pass

    def share(self, network):
        return network.params["w1"].shape[1] / 16


def test_units_that_take_time_go_first(monkeypatch):
    """At equal scores: the first layer takes all of the time, the second has more operations."""

    monkeypatch.setattr(choice, "Clock", FirstLayerClock)
    even = jax.tree.map(jnp.zeros_like, PARAMS) | {"b1": jnp.ones(16), "b2": jnp.ones(12)}

    def left(goal):
        masks = flj.choose_units(networks.mlp, PARAMS, even, goal, X)
        return [int(masks["b1"].sum()), int(masks["b2"].sum())]

    assert left(flj.targets.time_share(9 / 16)) == [9, 12]
    assert left(flj.targets.flops(550)) == [16, 9]  # 2 · 251 products, and biases


@pytest.mark.parametrize("seed", range(5))
def test_several_goals_are_reached_at_nearly_the_lowest_score(monkeypatch, seed):
    """Against all numbers of units in both layers."""
    monkeypatch.setattr(choice, "Clock", FirstLayerClock)
    keys = jax.random.split(jax.random.key(seed))
    own = [np.asarray(jax.random.uniform(key, (n,))) for key, n in zip(keys, (16, 12), strict=True)]
    scores = jax.tree.map(jnp.zeros_like, PARAMS) | {"b1": own[0], "b2": own[1]}
    goals = [flj.targets.time_share(0.75), flj.targets.flops(350)]
    masks = flj.choose_units(networks.mlp, PARAMS, scores, goals, X)
    stay = [np.asarray(masks["b1"]), np.asarray(masks["b2"])]
    lost = sum(x[~m].sum() for x, m in zip(own, stay, strict=True))

    def operations(n, m):
        return 2 * (5 * n + n * m + 3 * m) + n + m + 3

    def lowest(x, left):
        return np.sort(x)[: x.size - left].sum()

    _, small = chosen(goals[1])
    assert operations(*small.params["w2"].shape) == small.report.flops[1]
    assert operations(stay[0].sum(), stay[1].sum()) <= 350 and stay[0].sum() <= 12
    least = min(
        lowest(own[0], n) + lowest(own[1], m)
        for n in range(1, 13)
        for m in range(1, 13)
        if operations(n, m) <= 350
    )
    assert least - 1e-6 <= lost <= 1.25 * least


@pytest.mark.parametrize("target", ["seconds", "time_share"])
def test_zeros_alone_save_no_time(target):
    with pytest.raises(ValueError, match=f"zeros alone save no time, so targets.{target}"):
        model = flj.Model(networks.mlp, flj.likelihoods.gaussian())
        batches, goal = [(X, jnp.zeros((4, 3)))], getattr(flj.targets, target)(1.0)
        flj.prune_one_shot(model, PARAMS, flj.inverse.identity(), batches, sparsity=goal)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"goal": 0.5}, "goal must be targets.weights"),
        ({"goal": flj.targets.loss_increase(0.1)}, "goal must be targets.weights"),
        ({"goal": []}, r"several of them in a list, got \[\]"),
        ({"goal": [flj.targets.flops(9), 0.5]}, "goal must be targets.weights"),
        ({"goal": [flj.targets.bytes(600), flj.targets.flops(3)]}, "cheaper than .* flops"),
        ({"goal": flj.targets.flops(3)}, "can't become cheaper than"),
        ({"scores": PARAMS["w1"]}, "scores must have the structure"),
        ({"scores": jax.tree.map(lambda x: x * jnp.nan, PARAMS)}, "NaN or infinite scores"),
        ({"scores": jax.tree.map(jnp.negative, SQUARES)}, "scores: 'b1' must be at least 0"),
        ({"multiple_of": 1.5}, "multiple_of must be a whole number"),
        ({"couplings": [[("w1", 1)]]}, "permuting its 16 units"),
    ],
)
def test_bad_input(changes, message):
    arguments = {"scores": SQUARES, "goal": flj.targets.flops(300), **changes}
    with pytest.raises(ValueError, match=message):
        flj.choose_units(networks.mlp, PARAMS, inputs=X, **arguments)
