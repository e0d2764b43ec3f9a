"""Masks on disk: what is written comes back, and what is broken is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj


def masks_of(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.uniform(size=s) < 0.5), shapes, is_leaf=lambda x: type(x) is tuple
    )


TREES = {
    "nested": {"a": {"b": {"kernel": (3, 5)}}, "c": [(2, 2), (9,)]},
    "odd names": {"a:b": (3,), "a/c": (2, 3), "": (2,), "..": (3,)},
    "scalar": {"s": (), "w": (2, 2)},
    "empty leaf": {"e": (0, 3), "w": (2, 2)},
    "one array": (4, 4),
    "large": {"w": (130, 77)},
}


@pytest.mark.parametrize("name", TREES)
def test_round_trip(tmp_path, name):
    masks = masks_of(TREES[name])
    path = tmp_path / "masks.npz"
    flj.save_masks(path, masks)
    loaded = flj.load_masks(str(path), like=jax.tree.map(lambda m: m.astype(float), masks))
    assert jax.tree.structure(loaded) == jax.tree.structure(masks)
    jax.tree.map(np.testing.assert_array_equal, loaded, masks)
    assert all(m.dtype == bool for m in jax.tree.leaves(loaded))
    assert [p.name for p in tmp_path.iterdir()] == ["masks.npz"]


def test_names_that_collide_do_not_mix(tmp_path):
    """Two leaves whose key paths read the same: refused, or kept apart."""
    masks = {"a/b": jnp.array([True, False]), "a": {"b": jnp.array([False, True])}}
    path = tmp_path / "masks.npz"
    try:
        flj.save_masks(path, masks)
    except ValueError as error:
        assert "a/b" in str(error)
    else:
        jax.tree.map(np.testing.assert_array_equal, flj.load_masks(path, masks), masks)


def test_a_bit_a_weight(tmp_path):
    path = tmp_path / "masks.npz"
    flj.save_masks(path, masks_of({"w": (1000, 100)}))
    assert path.stat().st_size < 100_000 / 8 * 1.1


def test_saving_replaces(tmp_path):
    path, masks = tmp_path / "m.npz", {"w": jnp.array([True, False])}
    flj.save_masks(path, {"v": jnp.ones(3, bool)})
    flj.save_masks(path, masks)
    jax.tree.map(np.testing.assert_array_equal, flj.load_masks(path, masks), masks)


def test_a_save_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    """Neither a temporary file nor a change of the file of before."""
    path, masks = tmp_path / "m.npz", {"w": jnp.array([True, False])}
    flj.save_masks(path, masks)
    before = path.read_bytes()

    def full_disk(file, **arrays):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full_disk)
    with pytest.raises(OSError, match="No space left"):
        flj.save_masks(path, {"w": jnp.array([False, False])})
    assert [p.name for p in tmp_path.iterdir()] == ["m.npz"] and path.read_bytes() == before


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9, 0.999])
def test_truncated_files(tmp_path, share):
    path, masks = tmp_path / "m.npz", masks_of({"w": (50, 40)})
    flj.save_masks(path, masks)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="path: '.*m.npz' is not a file of masks"):
        flj.load_masks(path, masks)


def write_array(path):
    with open(path, "wb") as file:
        np.save(file, np.ones(3))


def flip_a_byte(path):
    flj.save_masks(path, masks_of({"w": (50, 40)}))
    content = bytearray(path.read_bytes())
    content[120] ^= 0xFF
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text("hello"),
        lambda path: np.savez(path, w=np.ones((50, 40))),
        lambda path: np.savez(path, **{"w:shape": np.array([50, 40])}),
        lambda path: np.savez(path, **{"w:bits": np.zeros(1, "u1"), "w:shape": np.array([50, 40])}),
        write_array,
        flip_a_byte,
    ],
    ids=["text", "weights", "no bits", "too few bits", "npy", "flipped"],
)
def test_other_files(tmp_path, write):
    path = tmp_path / "m.npz"
    write(path)
    with pytest.raises(ValueError, match="path: "):
        flj.load_masks(path, {"w": jnp.ones((50, 40))})


@pytest.mark.parametrize(
    "like, message",
    [
        ({"w": jnp.ones((3, 2))}, "the mask of 'w' has shape \\(2, 3\\)"),
        ({"v": jnp.ones((2, 3))}, "holds masks of w, but the parameters are v"),
        ({"w": jnp.ones((2, 3)), "v": jnp.ones(2)}, "holds masks of w, but the parameters are"),
        ({}, "holds masks of w"),
    ],
)
def test_masks_of_another_model(tmp_path, like, message):
    path = tmp_path / "m.npz"
    flj.save_masks(path, {"w": jnp.ones((2, 3), bool)})
    with pytest.raises(ValueError, match=message):
        flj.load_masks(path, like)


def test_weights_are_no_masks(tmp_path):
    with pytest.raises(ValueError, match="masks: 'w' must be an array of booleans, got float32"):
        flj.save_masks(tmp_path / "m.npz", {"w": jnp.ones(3)})
    assert not list(tmp_path.iterdir())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match="nothing.npz"):
        flj.load_masks(tmp_path / "nothing.npz", {})
