"""The package itself: what it needs, what it ships, what it documents."""

import ast
import doctest
import importlib.resources
import inspect
import pickle
import pydoc
import re
import subprocess
import sys

import pytest

import fishleg_jax as flj

NOT_NEEDED = (
    "flax",
    "equinox",
    "haiku",
    "tensorflow",
    "matplotlib",
    "sklearn",
    "dimod",
    "safetensors",
    "onnx",
    "onnxruntime",
    "jax2onnx",
    "experiments",
)


def test_import_needs_jax_and_optax_only():
    modules = {name.partition(".")[0] for name in modules_after("from fishleg_jax import *")}
    assert {"jax", "optax", "fishleg_jax"} <= modules
    assert not modules & set(NOT_NEEDED)


def modules_after(statement):
    """Names of the modules that a fresh process has loaded after a statement."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    command = [sys.executable, "-c", code]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_import_loads_no_room_and_no_name_loads_pallas():
    alone = modules_after("import fishleg_jax")
    assert {name for name in alone if name.startswith("fishleg_jax")} == {"fishleg_jax"}
    assert {"jax", "optax"} <= alone  # a missing dependency shows at once
    everything = modules_after("from fishleg_jax import *")
    assert "fishleg_jax.pruning.gradual.wrapper" in everything
    assert not {name for name in everything if "pallas" in name}


def test_names_come_from_where_type_checkers_see_them():
    tree = ast.parse(inspect.getsource(flj))
    seen = {
        alias.name: ".".join([*node.module.split(".")[1:]])
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("fishleg_jax")
        for alias in node.names
    }
    assert sorted(seen) == flj.__all__
    for name, home in seen.items():
        if name in flj._HOMES:
            assert flj._HOMES[name] == home
        else:
            assert flj._MODULES[name] == f"{home}.{name}".lstrip(".")
    assert set(flj._HOMES) <= set(seen)
    with pytest.raises(AttributeError, match="module 'fishleg_jax' has no attribute 'prun'"):
        flj.prun  # noqa: B018


def test_import_neither_computes_nor_changes_settings():
    """No device is looked for and no flag of jax is set, which is for the user's program to do."""
    code = (
        "import jax; before = dict(jax.config.values)\n"
        "from fishleg_jax import *\n"
        "assert dict(jax.config.values) == before\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


def test_types_are_shipped():
    assert (importlib.resources.files("fishleg_jax") / "py.typed").is_file()


MODULES = (
    flj,
    flj.bases,
    flj.compensation,
    flj.export,
    flj.inverse,
    flj.inverse.factors,
    flj.likelihoods,
    flj.low_rank,
    flj.schedules,
    flj.selection,
    flj.storage,
    flj.targets,
)
WITHOUT_DOCSTRING = ("Selection", "Compensation", "Constructor", "STEPS")  # aliases, a constant


def public():
    for module in MODULES:
        for name in module.__all__:
            if name not in WITHOUT_DOCSTRING:
                yield pytest.param(getattr(module, name), id=f"{module.__name__}.{name}")


@pytest.mark.parametrize("thing", list(public()))
def test_public_names_have_docstrings(thing):
    """Of its own: a NamedTuple is given one like `Row(name, shape)` when it has none."""
    text = thing.__doc__ or ""
    assert text.strip() and not text.startswith(f"{getattr(thing, '__name__', '')}(")


def test_all_lists_what_exists_and_no_more():
    assert sorted(flj.__all__) == flj.__all__ and len(set(flj.__all__)) == len(flj.__all__)
    own = {
        name
        for name, value in vars(flj).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert own <= set(flj.__all__)
    assert flj.__version__.count(".") == 2


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_completion_shows_public_names_only(module):
    """All of them are there, are reached by pickle, and are what help() shows."""
    assert dir(module) == sorted(module.__all__) and len(set(dir(module))) == len(module.__all__)
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isroutine(value) or inspect.isclass(value):
            assert pickle.loads(pickle.dumps(value)) is value
    shown = pydoc.render_doc(module, renderer=pydoc.plaintext)
    assert all(re.search(rf"\b{name}\b", shown) for name in module.__all__)
    own = {
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
    }
    made = {"Budget", "Given", "Limit"}  # by the targets
    assert own - made <= set(module.__all__)


def test_doctests_of_public_modules_are_collected():
    """Doctest looks at the modules themselves, not at what dir() shows."""
    found = {
        test.name
        for module in (flj.likelihoods, flj.targets)
        for test in doctest.DocTestFinder(exclude_empty=True).find(module)
        if test.examples
    }
    assert {f"fishleg_jax.likelihoods.{name}" for name in ("categorical", "gaussian")} <= found
    assert {f"fishleg_jax.pruning.targets.{name}" for name in ("weights", "bytes")} <= found


def test_the_front_door_stays_narrow():
    """Fourteen arguments of `prune_one_shot`, and `pattern`; those of stages are in `Stages`."""
    assert len(inspect.signature(flj.prune_one_shot).parameters) <= 15
