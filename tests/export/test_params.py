"""Parameters on disk: every bit comes back, and a damaged file is refused as a whole."""

import json
import re
import subprocess
import sys
from typing import NamedTuple

import hypothesis.extra.numpy as arrays_of
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fishleg_jax as flj
from experiments import pages
from fishleg_jax.export import _packed, _safetensors

export = flj.export
BOTH = pytest.mark.parametrize("packed", [False, True], ids=["safetensors", "packed"])
DTYPES = ("bool", "int8", "uint16", "int32", "uint64", "float16", "float32", "float64")
DTYPES += ("complex64", "bfloat16", "float8_e4m3fn", "float8_e5m2")


def pruned(shape, dtype=np.float32, density=0.3, seed=0):
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < density, rng.normal(size=shape), 0.0).astype(dtype)


def assert_same_bits(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype.name, x.shape) == (y.dtype.name, y.shape)
        assert x.tobytes() == y.astype(y.dtype.newbyteorder("<")).tobytes()


TREES = {
    "nested": {"a": {"b": {"kernel": pruned((3, 5))}}, "c": pruned((9,))},
    "lists, tuples and none": {"l": [pruned(3), (pruned(2), None)], "empty": {}, "n": None},
    "odd names": {"a:b": pruned(3), "": pruned(2), "..": pruned(3), "ü\n": pruned(1)},
    "scalars": {"s": np.float32(3), "zero": jnp.array(0), "negative": np.float32(-0.0)},
    "empty arrays": {"e": np.zeros((0, 3), np.float32), "f": np.zeros((2, 0)), "w": pruned(3)},
    "only empty": {"e": np.zeros((0, 3), np.float32)},
    "one array": pruned((4, 4)),
    "nothing": {},
    "all zero": {"w": np.zeros((5, 7), np.float32)},
    "no zero": {"w": np.ones(100, np.float32)},
    "transposed": {"w": pruned((4, 6)).T, "k": pruned((3, 3, 2, 4)).transpose(3, 2, 0, 1)},
    "strided": {"w": pruned((8, 9))[::2, ::-3], "b": np.broadcast_to(np.float32(2), (3, 4))},
    "other byte order": {"w": pruned((4, 5), ">f4"), "i": np.arange(3, dtype=">i8")},
    "fortran": {"w": np.asfortranarray(pruned((6, 5)))},
    "dtypes": {name: pruned((5, 3)).astype(name) for name in DTYPES},
}


@BOTH
@pytest.mark.parametrize("name", TREES)
def test_every_bit_comes_back(tmp_path, name, packed):
    path, tree = tmp_path / "net", TREES[name]
    export.save_params(path, tree, packed=packed)
    loaded = export.load_params(str(path))
    assert_same_bits(loaded.params, tree)
    assert loaded.masks is None and loaded.metadata == {}
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


@BOTH
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_bits_of_any_array(tmp_path_factory, packed, data):
    """NaN with payloads, infinities and subnormal numbers among them."""
    dtype = np.dtype(data.draw(st.sampled_from(DTYPES)))
    raw = data.draw(
        arrays_of.arrays(
            f"u{dtype.itemsize}",
            arrays_of.array_shapes(min_dims=0, min_side=0),
            elements={"max_value": 1} if dtype.kind == "b" else None,
            fill=st.just(0),
        )
    )
    array = raw.reshape(-1).view(dtype).reshape(raw.shape)
    path = tmp_path_factory.mktemp("any") / "net"
    export.save_params(path, {"w": array}, packed=packed)
    assert_same_bits(export.load_params(path).params, {"w": array})


@BOTH
def test_special_numbers(tmp_path, packed):
    bits = np.array([0x7FC12345, 0xFFC00001, 0x7F800000, 0xFF800000, 0x80000000, 1, 0], np.uint32)
    tree = {"w": bits.view(np.float32), "b": np.array([-0.0, np.nan], ml_dtypes.bfloat16)}
    export.save_params(tmp_path / "net", tree, packed=packed)
    assert_same_bits(export.load_params(tmp_path / "net").params, tree)


@BOTH
def test_masks_and_metadata(tmp_path, packed):
    """A kept weight may be zero, and one outside the masks is written as zero whatever it is."""
    params = {"w": jnp.array([[0.0, 2.0, 3.0]]), "b": jnp.array([0.0, 5.0]), "e": jnp.ones((0, 2))}
    masks = {"w": jnp.array([[True, False, True]]), "b": jnp.array([False, True])}
    masks["e"] = jnp.ones((0, 2), bool)
    export.save_params(tmp_path / "net", params, masks, {"seed": "0", "ü": "a\n"}, packed)
    loaded = export.load_params(tmp_path / "net")
    assert_same_bits(loaded.params, flj.apply_masks(params, masks))
    assert_same_bits(loaded.masks, masks)
    assert loaded.metadata == {"seed": "0", "ü": "a\n"}
    again = export.load_params(tmp_path / "net", like=params)
    assert_same_bits(again.masks, masks)
    assert len(repr(loaded)) < 200


class Layer(NamedTuple):
    kernel: object
    bias: object


@BOTH
def test_other_containers_need_like(tmp_path, packed):
    params = {"fc": Layer(jnp.array(pruned((3, 2))), jnp.ones(2, jnp.bfloat16))}
    export.save_params(tmp_path / "net", params, packed=packed)
    assert_same_bits(export.load_params(tmp_path / "net", like=params).params, params)
    shapes = jax.eval_shape(lambda: params)
    assert_same_bits(export.load_params(tmp_path / "net", like=shapes).params, params)
    plain = {"fc": {"kernel": params["fc"].kernel, "bias": params["fc"].bias}}
    assert_same_bits(export.load_params(tmp_path / "net").params, plain)


@BOTH
def test_keys_become_text_unless_like_has_them(tmp_path, packed):
    params = {0: jnp.array(pruned(3)), 10: {2: jnp.ones(2)}}
    export.save_params(tmp_path / "net", params, packed=packed)
    text = {"0": params[0], "10": {"2": params[10][2]}}
    assert_same_bits(export.load_params(tmp_path / "net").params, text)
    assert_same_bits(export.load_params(tmp_path / "net", like=params).params, params)


@pytest.mark.parametrize("name", ["nested", "transposed", "empty arrays", "scalars"])
def test_other_programs_read_the_safetensors_file(tmp_path, name):
    """With the library of safetensors and names by key path."""
    from safetensors import safe_open

    export.save_params(tmp_path / "net", TREES[name], metadata={"seed": "0"})
    with safe_open(tmp_path / "net", framework="flax") as file:
        assert file.metadata()["seed"] == "0"
        leaves = jax.tree_util.tree_leaves_with_path(TREES[name])
        names = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}
        assert set(file.keys()) == set(names)
        for key, leaf in names.items():
            found = np.asarray(file.get_tensor(key))
            np.testing.assert_array_equal(found, np.asarray(leaf).astype(found.dtype))


def test_a_safetensors_file_of_another_program(tmp_path):
    from safetensors.numpy import save_file

    arrays = {"model.w": pruned((3, 4)), "model.b": np.ones(2, np.float32)}
    save_file(arrays, tmp_path / "net", {"format": "np"})
    loaded = export.load_params(tmp_path / "net")
    assert_same_bits(loaded.params, arrays)
    assert loaded.masks is None and loaded.metadata == {"format": "np"}


@BOTH
def test_equal_content_gives_equal_files(tmp_path, packed):
    metadata = {name: name for name in "gfedcba"}
    for i in range(5):
        export.save_params(tmp_path / f"{i}", TREES["nested"], None, metadata, packed)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


READER = re.search(
    r"^```python\n(.*?)^```",
    (pages.ROOT / "docs/guide/packed.md").read_text(encoding="utf-8"),
    re.DOTALL | re.MULTILINE,
)[1]


@pytest.mark.parametrize("name", [name for name in TREES if name != "nothing"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_reader_of_the_page(tmp_path, name, masked):
    tree, namespace = TREES[name], {}
    masks = jax.tree.map(lambda x: np.arange(np.size(x)).reshape(np.shape(x)) % 3 > 0, tree)
    export.save_params(tmp_path / "net", tree, masks if masked else None, packed=True)
    exec(READER, namespace)
    found = namespace["read"](tmp_path / "net")
    wanted = export.load_params(tmp_path / "net").params
    assert_same_bits(list(found.values()), jax.tree.leaves(wanted))


def test_the_reader_of_the_page_is_short_and_needs_nothing_of_ours(tmp_path):
    assert len(READER[READER.index("def read") :].splitlines()) <= 20
    export.save_params(tmp_path / "net", TREES["nested"], packed=True)
    program = READER + (
        f"\narrays = read({str(tmp_path / 'net')!r})\nimport sys\n"
        "assert not {'jax', 'fishleg_jax'} & set(sys.modules)\nprint(sorted(arrays))"
    )
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.strip() == "['a/b/kernel', 'c']"


def written(tmp_path_factory, packed):
    """A file, and its content."""
    path = tmp_path_factory.mktemp("damaged") / "net"
    params = {"a": pruned((7, 5)), "b": pruned(11, density=1.0).astype(ml_dtypes.bfloat16)}
    masks = {"a": pruned((7, 5), bool, 0.5), "b": np.ones(11, bool)}
    export.save_params(path, params, masks, {"k": "v"}, packed)
    return path, path.read_bytes()


def assert_refused(path, content, packed):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="path: '.*net' can't be read as parameters"):
        export.load_params(path)


@BOTH
def test_a_truncated_file_is_refused(tmp_path_factory, packed):
    path, content = written(tmp_path_factory, packed)
    for length in range(len(content)):
        assert_refused(path, content[:length], packed)


@BOTH
def test_one_flipped_bit_is_refused(tmp_path_factory, packed):
    """At every byte; other whitespace behind safetensors' header changes nothing."""
    path, content = written(tmp_path_factory, packed)
    wanted = export.load_params(path)
    harmless = 0
    for i in range(len(content)):
        damaged = bytearray(content)
        damaged[i] ^= 1 << (i % 8)
        path.write_bytes(damaged)
        try:
            found = export.load_params(path)
        except ValueError:
            continue
        harmless += 1
        assert_same_bits(found[:2], wanted[:2])
        assert found.metadata == wanted.metadata
    assert harmless == 0 if packed else harmless <= 8


@BOTH
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damage_of_any_kind_is_refused(tmp_path_factory, packed, data):
    path, content = written(tmp_path_factory, packed)
    begin = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(begin, len(content)))
    damaged = content[:begin] + data.draw(st.binary(max_size=40)) + content[end:]
    if damaged == content:
        return
    wanted = export.load_params(path)
    path.write_bytes(damaged)
    try:
        found = export.load_params(path)
    except ValueError:
        return
    assert not packed
    assert_same_bits(found[:2], wanted[:2])
    assert found.metadata == wanted.metadata


@pytest.mark.parametrize("content", [b"", b"hello", b"FLJPACK1", b"FLJPACK1" + bytes(40)])
def test_other_files_are_refused(tmp_path, content):
    assert_refused(tmp_path / "net", content, None)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="nothing.net"):
        export.load_params(tmp_path / "nothing.net")


@BOTH
@pytest.mark.parametrize(
    "params, options, message",
    [
        ({"a/b": np.ones(1), "a": {"b": np.ones(1)}}, {}, "two leaves have the key path 'a/b'"),
        ({"w": np.ones(2)}, {"masks": {"w": np.ones(2)}}, "masks must be booleans.* but 'w' has"),
        ({"w": np.ones(2)}, {"masks": {"w": np.ones(3, bool)}}, "'w' must have shape \\(2,\\)"),
        ({"w": np.ones(2)}, {"masks": {"v": np.ones(2, bool)}}, "masks must have the structure"),
        ({"w": np.ones(2)}, {"metadata": {"a": 1}}, "metadata must map strings to strings"),
        ({"w": np.ones(2)}, {"metadata": {1: "a"}}, "metadata must map strings to .* got 1: 'a'"),
        ({"w": np.ones(2)}, {"metadata": {"a": b"b"}}, "metadata must map strings to strings"),
        ({"w": np.ones(2)}, {"metadata": {"a": "\ud800"}}, "strings, without lone surrogates"),
        ({"w": np.ones(2)}, {"metadata": "abc"}, "metadata must be a dictionary .* got 'abc'"),
        ({"w": np.ones(2)}, {"metadata": ["a"]}, "metadata must be a dictionary .* got ..a"),
        ({"w": np.ones(2)}, {"metadata": ""}, "metadata must be a dictionary .* or None, got ''"),
        ({"w": np.ones(2)}, {"metadata": {"fishleg_jax": ""}}, "the library's own"),
        ({"w": np.array(["a"])}, {}, "'w' must be an array of numbers"),
        ({"w": np.array([{}])}, {}, "'w' must be an array of numbers"),
        ({"w": jax.random.key(0)}, {}, "'w' must be an array of numbers, got a random key"),
    ],
)
def test_bad_input_gets_one_sentence(tmp_path, params, options, message, packed):
    with pytest.raises(ValueError, match=message):
        export.save_params(tmp_path / "net", params, packed=packed, **options)
    assert not list(tmp_path.iterdir())


def test_names_and_dtypes_that_only_safetensors_lacks(tmp_path):
    for tree in ({"w": np.ones(2, complex)}, {"__metadata__": np.ones(2)}):
        with pytest.raises(ValueError, match="safetensors"):
            export.save_params(tmp_path / "net", tree)
        export.save_params(tmp_path / "net", tree, packed=True)
        assert_same_bits(export.load_params(tmp_path / "net").params, tree)
        (tmp_path / "net").unlink()


@BOTH
@pytest.mark.parametrize("dtype", [">f4", ">i2", ">c8"])
def test_byte_order_does_not_matter(tmp_path, dtype, packed):
    """Files are little-endian, and `like` may be the big-endian tree that was saved."""
    tree = {"w": np.arange(6).reshape(2, 3).astype(dtype)}
    export.save_params(tmp_path / "net", tree, packed=packed)
    native = {"w": tree["w"].astype(tree["w"].dtype.newbyteorder("="))}
    for like in (tree, native, jax.eval_shape(lambda: native)):
        assert_same_bits(export.load_params(tmp_path / "net", like).params, native)
    with pytest.raises(ValueError, match=r"but like has float64\[2, 3\]"):
        export.load_params(tmp_path / "net", {"w": np.ones((2, 3), ">f8")})


def test_a_flag_is_a_boolean(tmp_path):
    with pytest.raises(ValueError, match="packed must be True or False, got 'no'"):
        export.save_params(tmp_path / "net", {"w": np.ones(2)}, packed="no")


@BOTH
@pytest.mark.parametrize(
    "like, message",
    [
        ({"w": jnp.ones((3, 2))}, r"'w' is float32\[2, 3\], but like has float32\[3, 2\]"),
        ({"w": jnp.ones((2, 3), jnp.bfloat16)}, "but like has bfloat16"),
        ({"v": jnp.ones((2, 3))}, "holds w, but like has v"),
        ({}, "holds w, but like has nothing"),
    ],
)
def test_another_model_is_refused(tmp_path, like, message, packed):
    export.save_params(tmp_path / "net", {"w": jnp.ones((2, 3))}, packed=packed)
    with pytest.raises(ValueError, match=message):
        export.load_params(tmp_path / "net", like)


@BOTH
def test_a_save_that_fails_keeps_the_file_before(tmp_path, packed, monkeypatch):
    path = tmp_path / "net"
    export.save_params(path, {"w": jnp.ones(3)}, packed=packed)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("No space left")))
    with pytest.raises(OSError, match="No space left"):
        export.save_params(path, {"w": jnp.zeros(3)}, packed=packed)
    assert [p.name for p in tmp_path.iterdir()] == ["net"] and path.read_bytes() == before


@pytest.mark.parametrize("packed, name", [(False, "safetensors"), (True, "zstandard")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, packed, name):
    for module in [m for m in sys.modules if m.partition(".")[0] == name] + [name]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'needs {name}.*pip install "fishleg-jax\[export\]"'):
        export.save_params(tmp_path / "net", {"w": jnp.ones(3)}, packed=packed)


def test_many_zeros_take_few_bytes(tmp_path):
    params = {"w": pruned((1000, 100), density=0.1)}
    export.save_params(tmp_path / "dense", params)
    export.save_params(tmp_path / "packed", params, packed=True)
    sizes = [(tmp_path / name).stat().st_size for name in ("packed", "dense")]
    assert sizes[0] < 0.12 * sizes[1]


def test_negative_zeros_take_room(tmp_path):
    """As the docstring says, and masks given to the function help."""
    w = np.random.default_rng(0).normal(size=(100, 100)).astype(np.float32)
    masks, size = {"w": pruned((100, 100), density=0.1) != 0}, {}
    for name, tree in [("product", w * masks["w"]), ("masks", w)]:
        given = masks if name == "masks" else None
        export.save_params(tmp_path / name, {"w": tree}, given, packed=True)
        size[name] = (tmp_path / name).stat().st_size
    assert size["product"] > 1.3 * size["masks"]


def test_the_header_of_safetensors_is_json(tmp_path):
    export.save_params(tmp_path / "net", {"w": pruned(3)}, {"w": np.ones(3, bool)})
    header, data = _safetensors._split((tmp_path / "net").read_bytes())
    assert json.loads(header["__metadata__"]["fishleg_jax"])["masks"] == ["w"]
    assert header["w:mask"]["shape"] == [1] and len(data) == 4 * 3 + 1
    assert _packed.MAGIC not in data
