"""What mypy and pyright see of the library: real signatures, in any folder, by any install."""

import importlib.metadata
import inspect
import json
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import fishleg_jax as flj
from fishleg_jax.pruning.gradual.wrapper import Options

ROOT = Path(__file__).parents[1]
MODULES = {"flj": flj, "flj.inverse": flj.inverse, "flj.inverse.factors": flj.inverse.factors}
MODULES |= {"flj.likelihoods": flj.likelihoods, "flj.compensation": flj.compensation}
MODULES |= {"flj.export": flj.export}
MODULES |= {"flj.schedules": flj.schedules, "flj.selection": flj.selection}
MODULES |= {"flj.targets": flj.targets}
# functions and classes that users can reach, by the expression that does
PUBLIC = {
    f"{name}.{own}": getattr(module, own)
    for name, module in MODULES.items()
    for own in module.__all__
    if inspect.isroutine(getattr(module, own)) or inspect.isclass(getattr(module, own))
}

RIGHT = """\
from typing import Any

import jax
import jax.numpy as jnp
import optax

import fishleg_jax as flj

model = flj.Model(lambda params, x: x @ params, flj.likelihoods.gaussian())
params = jnp.ones((4, 1))
batches = [(jnp.ones((8, 4)), None)]


def keep(params: Any, old: Any, new: Any, curvature: Any, estimator: Any, state: Any):
    return params, {}


estimator: flj.InverseFisher = flj.inverse.fishleg(model, damping=0.1)
result: flj.Result = flj.prune_one_shot(
    model, params, estimator, batches, sparsity=0.5, prunable=["kernel"], compensation=keep,
    key=jax.random.key(0),
    stages=flj.Stages(2, on_stage=lambda result: print(result.report.to_dict())),
)
flj.prune_one_shot(model, params, estimator, batches, sparsity=flj.targets.weights(3))
state = flj.fit(estimator, params, batches, key=jax.random.key(0), masks=result.masks)
estimator.multiply(state, params, mask=result.masks)
loss: jax.Array = flj.loss(model, params, batches[0], examples_per_chunk=4)
memory: int = flj.peak_memory(estimator, params, batches[0]).peak
own = flj.InverseFisher(
    init=lambda params: (),
    update=lambda state, params, batch, key, mask=None: state,
    multiply=lambda state, tangent, mask=None: tangent,
    diagonal=lambda state, params, mask=None: params,
)
schedule = flj.schedules.cubic(0.9, begin=10, end=20)
tx = flj.prune(optax.sgd(0.1), model, schedule, prunable="kernel", estimator=own, seed=1)
tx = optax.chain(optax.sgd(0.1), flj.fishleg_prune(model, lambda step: 0.5, regrow=0.1))
flj.MultiSteps(tx, every_k_schedule=4, use_grad_mean=False)
"""

# every line must be reported, and no other
WRONG = """\
import jax
import jax.numpy as jnp
import optax

import fishleg_jax as flj

model = flj.Model(lambda params, x: x @ params, flj.likelihoods.gaussian())
params, key = jnp.ones((4, 1)), jax.random.key(0)
batches = [(jnp.ones((8, 4)), None)]
estimator = flj.inverse.identity()
result = flj.prune_one_shot(model, params, estimator, batches, sparsity=0.5)
flj.prune_one_shot(model, params, estimator, batches, sparsity="0.5")  # wrong type
flj.prune_one_shot(model, params, batches, sparsity=0.5)  # no estimator
flj.prune_one_shot(model, params, estimator, batches, sparsity=0.5, prunabel="k")  # misspelt
flj.prune_one_shot(model, params, estimator, batches, sparsity=0.5, compensation=lambda p: p)  # one
flj.prune_one_shot(model, params, estimator, batches, sparsity=0.5).mask  # masks
flj.fit(estimator, params, batches, key=key, stages=3)  # unknown
flj.fit(model, params, batches, key=key)  # not an estimator
flj.fisher_vector_product(model, params, batches[0])  # no vector
flj.losses(model, params, batches[0], chunk=3)  # unknown
flj.loss(model, params)  # no batch
flj.per_example_gradients(model, params, batches[0], label="sampled")  # labels
flj.peak_memory(estimator, params, batches[0], examples_per_chunk=1)  # unknown
flj.curvature(model, batches).product(params)  # no vector
flj.trust(model, params, estimator, batches, sparsity=None)  # wrong type
flj.Model(lambda params, x: x @ params, flj.likelihoods.gaussian)  # not called
flj.inverse.fishleg(model, dampening=0.1)  # damping
flj.inverse.kfac(model, damping="0.1")  # wrong type
estimator.multiply((), params, masks=None)  # mask
estimator.update((), params, batches[0])  # no key
flj.compensation.group(iteration=3)  # iterations
flj.selection.swaps(border="256")  # wrong type
flj.stage_sparsities("0.5", 3)  # wrong type
flj.fishleg_prune(model, 0.5, prunabel="kernel")  # misspelt
flj.gradual_prune(model, 0.5)  # not an estimator
flj.prune(optax.sgd(0.1), model, 0.5, prunabel="kernel")  # misspelt
flj.prune(optax.sgd(0.1), model, 0.5, mask_every="100")  # wrong type
flj.MultiSteps(optax.sgd(0.1))  # no number
result.report.totals  # total
flj.prune_oneshot  # misspelt
"""


def editable_install():
    """The distribution that is an editable install of this very folder; None where there is none.

    Beside it there may be the egg-info of a build in this folder, and what others installed.
    """
    for found in importlib.metadata.distributions(name="fishleg_jax"):
        url = json.loads(found.read_text("direct_url.json") or "{}").get("url")
        if url == ROOT.as_uri():
            return found
    return None


def is_path(install):
    """Whether an editable install is this folder's path in a .pth file, and not an import hook."""
    files = [] if install is None else install.files
    texts = [path.read_text().strip() for path in files if path.suffix == ".pth"]
    return texts == [str(ROOT)]


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """For each checker a list of (file, line, whether it is an error, message)."""
    folder = tmp_path_factory.mktemp("user")
    names = [f"reveal_type({name})" for name in PUBLIC]
    revealing = "\n".join(["import fishleg_jax as flj", *names])
    texts = {"right": RIGHT, "wrong": WRONG, "names": revealing}
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text + "\n")
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")}
    config = {}
    if not is_path(editable_install()):  # else the checkers have to find it as they do for a user
        env["MYPYPATH"], config["extraPaths"] = str(ROOT), [str(ROOT)]
    # jax and optax take mypy ten seconds to read; pyright, which is quicker, reads them
    skip = "[mypy-jax.*,optax.*,numpy.*]\nfollow_imports = skip\nignore_missing_imports = True\n"
    (folder / "mypy.ini").write_text(f"[mypy]\n{skip}")
    (folder / "pyrightconfig.json").write_text(json.dumps(config))
    files = [f"{name}.py" for name in texts]
    mypy = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file=mypy.ini",
        "--cache-dir=cache",
    ]
    mypy += ["--follow-imports=silent", "--no-error-summary", "--hide-error-context"]
    pyright = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    pipes = {"cwd": folder, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    quiet = env | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    runs = (
        subprocess.Popen([*mypy, *files], env=env, **pipes),
        subprocess.Popen([*pyright, "-p", str(folder)], env=quiet, **pipes),
    )
    (mypy_out, mypy_error), (pyright_out, pyright_error) = (run.communicate() for run in runs)
    assert not mypy_error and pyright_out, mypy_error + pyright_error
    lines = [re.fullmatch(r"(\w+)\.py:(\d+): (\w+): (.*)", x) for x in mypy_out.splitlines()]
    found = [
        (
            Path(x["file"]).stem,
            x["range"]["start"]["line"] + 1,
            x["severity"] == "error",
            x["message"],
        )
        for x in json.loads(pyright_out)["generalDiagnostics"]
    ]
    return {
        "mypy": [(x[1], int(x[2]), x[3] == "error", x[4]) for x in lines if x],
        "pyright": found,
    }


CHECKERS = pytest.mark.parametrize("checker", ["mypy", "pyright"])


@CHECKERS
def test_right_calls_pass(reported, checker):
    assert [x for x in reported[checker] if x[0] == "right" and x[2]] == []


@CHECKERS
def test_every_wrong_call_is_reported_and_nothing_else(reported, checker):
    lines = enumerate(WRONG.splitlines(), 1)
    wrong = {number for number, line in lines if re.search(r"  # [\w ]+$", line)}
    assert {x[1] for x in reported[checker] if x[0] == "wrong" and x[2]} == wrong


@CHECKERS
def test_all_public_names_show_their_arguments(reported, checker):
    """Each argument that there is at run time is in the signature that a checker shows."""
    shown = {line: text for file, line, _, text in reported[checker] if file == "names"}
    for line, (name, thing) in enumerate(PUBLIC.items(), 2):
        if inspect.isclass(thing) and checker == "pyright":
            assert f"type[{thing.__name__}]" in shown[line]  # it shows no constructor
            continue
        parameters = inspect.signature(thing).parameters.values()
        assert not any(p.kind is p.VAR_POSITIONAL for p in parameters), name
        text = shown[line].replace("**options: **Options", " ".join(Options.__annotations__))
        missing = [p.name for p in parameters if not re.search(rf"\b{p.name}\b", text)]
        assert not missing, f"{name}: {shown[line]}"


def test_the_options_of_prune_are_those_of_fishleg_prune():
    """With the same types: completion and checkers read them, and nothing else holds them equal."""
    parameters = inspect.signature(flj.fishleg_prune).parameters.values()
    wanted = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert typing.get_type_hints(Options) == wanted


def test_an_editable_install_is_a_path_that_type_checkers_read():
    install = editable_install()
    if install is None:
        pytest.skip("this folder is not what is installed as fishleg_jax")
    assert is_path(install), "an import hook, which type checkers can't read: run pip install -e ."
