"""Functions on disk: JAX alone reads them, for any batch, and a damaged file is refused."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj
from fishleg_jax.export import _onnx

PARAMS = {"w": jnp.arange(6.0).reshape(3, 2) - 2, "b": jnp.ones(2)}


X = jnp.ones((1, 3))


def predict(params, x):
    return jnp.tanh(x @ params["w"] + params["b"])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("function") / "net.stablehlo"
    flj.export.save_function(path, predict, PARAMS, jnp.ones((1, 3)))
    return path


@pytest.mark.parametrize("batch", [1, 5])
def test_any_batch(path, batch):
    x = jax.random.normal(jax.random.key(0), (batch, 3))
    np.testing.assert_allclose(flj.export.load_function(path)(x), predict(PARAMS, x), atol=1e-6)


def test_jax_alone_reads_it(path):
    """The checksum behind the function is passed over."""
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    x = jnp.ones((4, 3))
    np.testing.assert_allclose(exported.call(x), predict(PARAMS, x), atol=1e-6)


def test_masks_and_several_inputs(tmp_path):
    def scaled(params, batch, scale):
        return {"y": (batch["x"] @ params["w"]) * scale}

    masks = {"w": jnp.array([[True, False]] * 3), "b": jnp.zeros(2, bool)}
    example = ({"x": jnp.ones((1, 3))}, jax.ShapeDtypeStruct((), jnp.float32))
    flj.export.save_function(tmp_path / "f", scaled, PARAMS, example, masks)
    found = flj.export.load_function(tmp_path / "f")({"x": jnp.ones((2, 3))}, jnp.float32(2))
    np.testing.assert_allclose(found["y"], [[0, 0]] * 2)  # -2 + 0 + 2, and pruned
    found = flj.export.load_function(tmp_path / "f")({"x": jnp.eye(3)}, jnp.float32(1))
    np.testing.assert_allclose(found["y"], [[-2, 0], [0, 0], [2, 0]])


def test_a_fixed_batch(tmp_path):
    def halves(params, x):
        return jnp.stack([part.sum() * params for part in jnp.split(x, 2)])

    with pytest.raises(ValueError, match="function can't be exported for any batch size"):
        flj.export.save_function(tmp_path / "f", halves, jnp.ones(()), jnp.ones((4, 3)))
    assert not list(tmp_path.iterdir())
    flj.export.save_function(
        tmp_path / "f", halves, jnp.ones(()), jnp.ones((4, 3)), dynamic_batch=False
    )
    found = flj.export.load_function(tmp_path / "f")(jnp.ones((4, 3)))
    np.testing.assert_allclose(found, [6, 6])


def test_errors_name_the_cause(tmp_path):
    save = lambda function: flj.export.save_function(tmp_path / "f", function, PARAMS, X)
    with pytest.raises(ValueError, match=r"any batch size; write x.shape\[0\] instead of len\(x\)"):
        save(lambda params, x: x.reshape(len(x), -1) @ params["w"])
    with pytest.raises(ValueError, match="function can't be exported: dot_general") as caught:
        save(lambda params, x: x @ params["w"].T)  # of any size
    assert "batch size" not in str(caught.value)


def test_an_error_without_a_message_is_named(tmp_path):
    def function(params, x):
        raise NotImplementedError

    with pytest.raises(ValueError, match="function can't be exported: NotImplementedError"):
        flj.export.save_function(tmp_path / "f", function, PARAMS, X)
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_refused(path, tmp_path):
    content, damaged = path.read_bytes(), tmp_path / "damaged"
    for length in range(0, len(content), 97):
        damaged.write_bytes(content[:length])
        with pytest.raises(ValueError, match="path: '.*damaged' can't be read as a function"):
            flj.export.load_function(damaged)
    for i in range(0, len(content), 97):
        damaged.write_bytes(content[:i] + bytes([content[i] ^ 4]) + content[i + 1 :])
        with pytest.raises(ValueError, match="path: '.*damaged' can't be read as a function"):
            flj.export.load_function(damaged)
    with pytest.raises(ValueError, match="nothing"):
        flj.export.load_function(tmp_path / "nothing")
    for read in (flj.export.load_function, flj.export.load_params):
        with pytest.raises(ValueError, match="path: '3' can't be read"):
            read(3)


def test_a_model_stands_for_its_function(tmp_path):
    model = flj.Model(predict, flj.likelihoods.gaussian())
    flj.export.save_function(tmp_path / "f", model, PARAMS, jnp.ones((1, 3)))
    x = jnp.ones((2, 3))
    found = flj.export.load_function(tmp_path / "f")(x)
    np.testing.assert_allclose(found, predict(PARAMS, x), atol=1e-6)


WRITERS = (
    flj.export.save_function,
    flj.export.to_onnx,
    flj.export.save_params,
    flj.export.sparse_apply,
)
BAD = [
    ({"example_inputs": ()}, "example_inputs must have at least one array"),
    ({"masks": {"w": jnp.ones(3, bool)}}, "masks must have the structure"),
    ({"masks": PARAMS}, "masks must be booleans, True for weights that are kept, but 'b'"),
    ({"function": 3}, r"function must be a function \(params, inputs\) -> outputs"),
    ({"function": lambda params: params}, r"function must be a function \(params, inputs\)"),
    ({"example_inputs": (jnp.ones((1, 3)),) * 2}, r"function must be .*\(params, 2 inputs\)"),
    ({"dynamic_batch": "no"}, "dynamic_batch must be True or False, got 'no'"),
    ({"measure": 3}, r"measure must be a function .*or a mapping from such triples, got 3"),
    ({"measure": lambda shape: None}, r"measure must be a function \(shape, density, batch\)"),
    ({"platforms": ["gpuu"]}, "platforms must be .* among cpu, cuda, rocm, tpu.* got .'gpuu'"),
    ({"platforms": "cpu"}, "platforms must be a list of names"),
    ({"platforms": []}, "platforms must be a list of names"),
    ({"path": "no/such/folder/f"}, "path: the folder 'no/such/folder' does not exist"),
    ({"path": "."}, "path must be the path of a file, got the folder"),
    ({"path": 3}, "path must be the path of a file, got 3"),
]


@pytest.mark.parametrize(
    "function, changes, message",
    [
        (function, *case)
        for function in WRITERS
        for case in BAD
        if case[0].keys() <= inspect.signature(function).parameters.keys()
    ],
)
def test_bad_input_gets_one_sentence(tmp_path, monkeypatch, function, changes, message):
    """Of all functions that take the argument; before anything runs, or a package is loaded."""
    monkeypatch.chdir(tmp_path)
    arguments = {"path": "f", "function": predict, "params": PARAMS, "example_inputs": X, **changes}
    takes = inspect.signature(function).parameters
    with pytest.raises(ValueError, match=message):
        function(**{name: x for name, x in arguments.items() if name in takes})
    assert not list(tmp_path.iterdir())


TRACED = r"{} must be made of arrays with values outside of jax.jit.*, got traced arrays: "


@pytest.mark.parametrize("function", WRITERS)
@pytest.mark.parametrize("traced", ["params", "masks", "example_inputs", "nothing"])
def test_traced_arrays_get_one_sentence(tmp_path, monkeypatch, function, traced):
    """Those of jit; the functions that compute refuse a call under it, whatever it is with."""
    monkeypatch.chdir(tmp_path)
    masks = jax.tree.map(lambda x: x > 0, PARAMS)
    arguments = {"path": "f", "function": predict, "params": PARAMS, "example_inputs": X}
    takes = inspect.signature(function).parameters
    given = {name: x for name, x in (arguments | {"masks": masks}).items() if name in takes}
    called = jax.jit(lambda changes: function(**given | changes) and None)
    only_shapes = traced == "example_inputs" and function is flj.export.save_function
    if traced in given and not only_shapes:
        message = TRACED.format(traced)
    elif function is flj.export.save_params:
        called({})  # which computes nothing
        return
    else:
        message = f"{function.__name__} must be called outside of jax.jit"
    with pytest.raises(ValueError, match=message):
        called({traced: given[traced]} if traced in given else {})
    assert not list(tmp_path.iterdir())


def test_shapes_of_like_may_be_traced(tmp_path):
    flj.export.save_params(tmp_path / "net", PARAMS)
    flj.save_masks(tmp_path / "masks.npz", jax.tree.map(lambda x: x > 0, PARAMS))

    @jax.jit
    def loaded(like):
        masks = flj.load_masks(tmp_path / "masks.npz", like)
        return flj.apply_masks(flj.export.load_params(tmp_path / "net", like).params, masks)

    found = loaded(PARAMS)
    np.testing.assert_array_equal(found["w"], jax.nn.relu(PARAMS["w"]))


def test_traced_masks_get_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=TRACED.format("masks")):
        jax.jit(lambda mask: flj.save_masks(tmp_path / "masks.npz", mask))(X > 0)
    assert not list(tmp_path.iterdir())


def test_masks_are_written_into_folders_that_are_there(tmp_path):
    with pytest.raises(ValueError, match="path: the folder '.*nowhere' does not exist"):
        flj.save_masks(tmp_path / "nowhere" / "masks.npz", {"w": jnp.ones(2, bool)})


def test_nan_is_found_before_a_conversion(tmp_path):
    params = PARAMS | {"b": jnp.array([1.0, jnp.nan])}
    with pytest.raises(ValueError, match="function gives NaN on example_inputs"):
        flj.export.to_onnx(predict, params, X, tmp_path / "f")
    compare = lambda x, y: _onnx._difference([np.array(x)], [np.array(y)])
    assert compare([np.inf, 1.0], [np.inf, 2.0]) == 0.5  # infinities are outputs like others
    assert np.isnan(compare([np.nan, 1.0], [0.0, 2.0]))
