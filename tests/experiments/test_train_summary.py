"""Tables and the picture of `experiments.train`, from results made up by hand."""

import pytest

from experiments.train import plots, summary


def row(name, losses, seconds, *, sitting="a", seed=0, epochs=None, backend="cpu"):
    history = [
        {
            "epoch": i + 1,
            "step": 10 * (i + 1),
            "train_loss": loss,
            "accuracy": 90.0 + i,
            "process_seconds": seconds,
            "seconds": 2 * seconds,
            "sitting": sitting,
        }
        for i, loss in enumerate(losses)
    ]
    return {
        "optimizer": name,
        "epochs": epochs or len(losses),
        "seed": seed,
        "learning_rate": 0.1,
        "state_bytes": 2_000_000,
        "history": history,
        "settings": {
            "backend": backend,
            "trial_rates": [0.1, 1.0, 10.0] if name == "sgd" else None,
        },
    }


ADAM = row("adam", [9.0, 5.0, 4.0, 3.5], 2.0)


def test_cost_is_of_epochs_made_in_turn():
    assert summary.cost(row("sgd", [8.0, 7.0, 6.0, 5.0], 1.0), ADAM) == 0.5
    assert summary.cost(row("sgd", [8.0], 1.0, sitting="b"), ADAM) is None
    mixed = row("sgd", [8.0, 7.0, 6.0, 5.0], 1.0)
    mixed["history"][0] |= {"sitting": "b", "process_seconds": 100.0}
    assert summary.cost(mixed, ADAM) == 0.5
    assert summary.cost(row("sgd", [8.0], 3.0, backend="gpu"), ADAM) == 1.5


def test_seconds_to_the_last_loss_of_the_reference():
    assert summary.until(ADAM, ADAM) == 1
    fast = row("fishleg", [6.0, 3.0, 2.0, 1.0], 3.0)
    assert summary.until(fast, ADAM) == pytest.approx(2 * 1.5 / 4)
    assert summary.until(row("sgd", [9.0, 8.0, 7.0, 6.0], 1.0), ADAM) is None


def test_tables_have_losses_scores_and_ratios():
    rows = [row("fishleg", [6.0, 3.0, 2.0, 1.0], 3.0), ADAM]
    lines = summary.show(rows, "accuracy").splitlines()
    header = ["4 epochs", "rate", "1", "2", "3", "4", "s/adam's", "adam's last loss at"]
    assert [part.strip() for part in lines[0].split("  ") if part][:8] == header
    assert lines[2].split()[:6] == ["fishleg", "0.1", "6.0000", "(90.00)", "3.0000", "(91.00)"]
    assert lines[2].split()[-3:] == ["1.50", "0.75", "2.0"]
    assert lines[3].split()[-3:] == ["1.00", "1.00", "2.0"]


def test_seeds_are_medians_and_divergence_has_no_number():
    rows = [row("adam", [x, x / 2], 2.0, seed=i) for i, x in enumerate((4.0, 20.0, 6.0))]
    rows.append(row("sgd", [None], 1.0, epochs=2))
    rows[-1]["history"][0]["accuracy"] = None
    lines = summary.show(rows, "accuracy").splitlines()
    assert lines[2].split()[2:6] == ["6.0000", "(90.00)", "3.0000", "(91.00)"]
    assert lines[3].split()[1:4] == ["0.1*", "–", "–"]


def test_lengths_have_a_table_together():
    rows = [row("adam", [4.0, 2.0], 2.0), row("adam", [3.0], 2.0)]
    last = summary.show(rows, "accuracy").split("\n\n")[-1].splitlines()
    assert last[0].startswith("epochs, each its own schedule")
    assert last[2].split() == ["adam", "3.0000", "(90.00)", "2.0000", "(91.00)"]


def test_the_picture_has_steps_and_seconds(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure) or path)
    plots.draw(tmp_path / "loss.png", [ADAM, row("sgd", [9.0, None], 1.0, epochs=4)], "title")
    left, right = figures[0].axes
    adam, sgd = left.lines
    assert list(adam.get_xdata()) == [10, 20, 30, 40]
    assert list(adam.get_ydata()) == [9.0, 5.0, 4.0, 3.5]
    assert list(right.lines[0].get_xdata()) == [2, 4, 6, 8]
    assert list(sgd.get_xdata()) == [10]  # until it diverged
