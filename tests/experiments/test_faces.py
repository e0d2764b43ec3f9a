"""The Olivetti faces."""

import numpy as np
import pytest

from experiments.data import faces
from experiments.running import files


def test_views_turn_and_enlarge():
    ramp = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (1, 64, 1))

    class Fixed:
        """Chooses the middle of every range: no angle, and a scale of 1.6."""

        def uniform(self, low, high, size):
            return np.full(size, (low + high) / 2)

    [view] = faces.cropped(ramp, 1, Fixed())
    assert view.shape == (25, 25)
    inside = 31.5 + 64 / 25 / 1.6 * np.array([-12, 12])
    np.testing.assert_allclose(view[:, [0, -1]], np.tile(inside / 63, (25, 1)), atol=1e-5)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "faces.mat"
    path.write_bytes(b"no faces")
    with pytest.raises(ValueError, match="has no faces"):
        faces.read(path)


def test_people_are_trained_on_or_tested_on():
    try:
        path = files.shared(faces.FILE)
    except ValueError as error:
        pytest.skip(str(error))
    pictures = faces.read(path)
    # an upright face is nearly symmetric left and right, and not at all up and down
    assert abs(pictures - pictures[:, :, ::-1]).mean() < abs(pictures - pictures[:, ::-1]).mean()
    (images, targets), (test, _) = faces.load(path, copies=(2, 1))
    assert images.shape == (600, 25, 25, 1) and test.shape == (100, 25, 25, 1)
    np.testing.assert_array_equal(targets, images.reshape(600, -1))
    np.testing.assert_allclose(images.mean(axis=0), 0, atol=1e-5)
    assert images.var(axis=0).mean() == pytest.approx(1, rel=1e-4)
