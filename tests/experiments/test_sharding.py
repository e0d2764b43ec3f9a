"""Prunings over eight virtual devices against one, in a process that has them.

`python -m experiments.sharding` goes through all combinations; here each estimate goes through one,
or two.
"""

import json

import pytest

from tests import programs

pytestmark = pytest.mark.slow

RUN = """
import contextlib, functools, itertools, json, sys, tempfile, warnings
import jax, numpy
import fishleg_jax as flj
from experiments.sharding import __main__ as sharding
from experiments.sharding import text as sharding_text
sharding.make_devices()
jax.config.update("jax_enable_x64", True)
told = []
for name, kind, layout, how in json.loads(sys.argv[1]):
    prune = sharding.HOW[how]
    # a training step has so much to compile that it goes without the convolution
    make_case = functools.partial(
        sharding.make_case, network="dense" if how == "gradual" else "convolution")
    if how != "gradual":
        prune = functools.partial(prune, stages=1)
    if how == "one_shot":  # the default solves for the group as well
        prune = functools.partial(prune, compensation=flj.compensation.independent())
    expected = prune(name, make_case())
    with jax.set_mesh(sharding.make_mesh(kind)):
        case = make_case(sharding.make_mesh(kind), layout)
        found = prune(name, case)
        row = [*sharding.differences(found, expected), found.placed]
        row.append(sharding.largest(sharding.gathered(name, case)) if layout != "data" else 0)
    told.append(row)
def functions(case):
    given = case.model, case.params, case.batch
    yield flj.losses(*given, examples_per_chunk=20)  # which leaves a rest
    yield flj.fisher_vector_product(*given, case.params)
    yield flj.fisher_vector_product(*given, case.params, examples_per_chunk=20)
    yield flj.curvature(case.model, [case.batch] * 2).product(case.params, case.params)
    yield flj.curvature(case.model, [case.batch] * 2).gradient(case.params)
    with tempfile.TemporaryDirectory() as folder:
        path = folder + "/masks.npz"
        flj.save_masks(path, jax.tree.map(lambda p: p > 0, case.params))
        yield flj.load_masks(path, case.params)
    how = {"cap": 16, "examples_per_chunk": 24}
    learned = {"learn": True, "start": 2, "updates": 3}
    # on a mesh by default, on one device on request: a sample of each of four parts
    closed = {"samples": None if case.params["one"].sharding.num_devices > 1 else 4, "updates": 2}
    for phases in (closed, learned):
        estimator = flj.inverse.fishleg(case.model, 0.1, **how, **phases)
        state = flj.fit(estimator, case.params, [case.batch], key=jax.random.key(0))
        yield estimator.diagonal(state, case.params)
expected = list(functions(sharding.make_case()))
runs = ("auto", "full", 8), ("explicit", "mixed", 7), ("explicit", "full", 2)
for kind, layout, number in runs:
    mesh = sharding.make_mesh(kind)
    # the last time none is set: that of the weights is used; FishLeg learns under Explicit axes in
    # a case above
    with jax.set_mesh(mesh) if number > 2 else contextlib.nullcontext():
        case = sharding.make_case(mesh, layout)
        for one, found in zip(expected, itertools.islice(functions(case), number)):
            pairs = zip(jax.tree.leaves(one), jax.tree.leaves(found), strict=True)
            placed = not isinstance(found, dict) or all(
                x.sharding.is_equivalent_to(w.sharding, w.ndim)
                for x, w in zip(jax.tree.leaves(found), jax.tree.leaves(case.params)))
            apart = [float(abs(numpy.asarray(a, float) - b).max()) for a, b in pairs]
            told.append([placed, *apart])
# of a convolution XLA alone would get these wrong; without a mesh that is set, too
single = sharding.make_case()
def gradients(params, batch):
    return [flj.per_example_gradients(single.plain, params, batch, **how)
            for how in ({}, {"examples_per_gradient": 2}, {"examples_per_chunk": 24})]
expected, apart = gradients(single.params, single.batch), []
for layout in sharding.LAYOUTS:
    case = sharding.make_case(sharding.make_mesh("auto"), layout)
    for function in (gradients, jax.jit(gradients))[layout != "mixed" :]:
        found = function(case.params, case.batch)
        apart += [float(abs(numpy.asarray(a) - numpy.asarray(b)).max())
                  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected))]
told.append(apart)
# where only `jit` knows how they are spread, nothing can be done but to warn
rows = jax.NamedSharding(sharding.make_mesh("auto"), sharding.LAYOUTS["data"][0])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    spread = jax.jit(gradients, in_shardings=(None, rows))
    spread.lower(single.params, jax.tree.map(numpy.asarray, single.batch))
warned = ["XLA computes wrong numbers" in str(w.message) for w in caught]
with warnings.catch_warnings():
    warnings.simplefilter("error")
    diagonal = flj.inverse.diagonal(single.plain)
    flj.fit(diagonal, single.params, [single.batch], key=jax.random.key(0))
told.append(warned)
# a gather that is there is found, and one that is not is not
with jax.set_mesh(sharding.make_mesh("auto")):
    kernel = sharding.make_case(sharding.make_mesh("auto"), "mixed").params["one"]
    functions = lambda x: jax.numpy.sort(x.reshape(-1)), lambda x: 2 * x
    told.append([sharding.largest({"": sharding_text.compiled(f, x)})
                 for f in functions for x in (kernel, kernel > 0)])  # a mask, too
print(json.dumps(told))
"""
CASES = [
    ("identity", "explicit", "full", "one_shot"),
    ("diagonal", "auto", "full", "gradual"),
    ("kfac", "explicit", "mixed", "group"),
    ("woodfisher", "auto", "mixed", "one_shot"),
    ("mfac_all", "explicit", "mixed", "one_shot"),
    ("fishleg", "explicit", "mixed", "gradual"),
]


@pytest.fixture(scope="module")
def told():
    return json.loads(programs.told("-c", RUN, json.dumps(CASES)).splitlines()[-1])


@pytest.mark.parametrize("index", range(len(CASES)), ids=["-".join(case) for case in CASES])
def test_eight_devices_are_as_one(told, index):
    masks, weights, placed, gather = told[index]
    assert masks == 0
    assert weights < 1e-9
    assert placed
    assert gather < 32 * 64, "a kernel is gathered"


def test_functions_give_what_they_give_on_one_device_and_where_the_weights_are(told):
    rows = told[len(CASES) : -3]
    assert len(rows) == 8 + 7 + 2
    for placed, *differences in rows:
        assert placed
        assert max(differences) < 1e-9


def test_gradients_example_by_example_are_those_of_one_device(told):
    assert len(told[-3]) == (3 + 1) * 3 * 4
    assert max(told[-3]) < 1e-12
    assert any(told[-2])


def test_a_gather_is_found(told):
    assert told[-1] == [32 * 64, 32 * 64, 0, 0]
