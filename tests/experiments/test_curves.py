"""Pictures of curves: names in the legend stay inside."""

import matplotlib.image
import pytest

from experiments.report import curves


@pytest.mark.parametrize("panels", [1, 3])
@pytest.mark.parametrize("letters", [5, 28])
def test_the_legend_fits_into_the_picture(tmp_path, panels, letters):
    own = {f"{i} {'n' * letters}": {10.0: [1.0, 2.0], 20.0: [2.0]} for i in range(5)}
    path = curves.curves(
        tmp_path / "curves.png", {str(i): own for i in range(panels)}, across="x", up="y"
    )
    image = matplotlib.image.imread(path)[..., :3]
    # nothing is cut off: the margins are white
    assert image[:, :3].min() == image[:, -3:].min() == image[-3:].min() == 1
