"""The arena's results as a table for the pages of docs/."""

from collections.abc import Sequence

from experiments.arena import duels
from experiments.report import record


def of_mode(rows: Sequence[dict], best: Sequence[duels.Duel], mode: str) -> record.Table:
    """A row for each network and sparsity, a column for each method, and FishLeg's difference.

    Args:
        rows: the objects of a `results.json`.
        best: the result of `duels.best_peers`.
        mode: `one_shot` or `gradual`.

    Returns:
        The table: losses above that of the dense network, and FishLeg's loss less that of the best
        of the others, with its paired interval.
    """
    own = [row for row in rows if row["mode"] == mode]
    methods = list(dict.fromkeys(row["method"] for row in own))
    against = {duel[:3]: [duel.other, list(duel.difference)] for duel in best}
    lines: list[list[record.Cell]] = []
    for cell, by_method in duels.cells(own):
        losses = [
            record.spread([row["above_dense"] for row in by_method.get(method, {}).values()])
            for method in methods
        ]
        model, _, target = cell
        lines.append([f"{model}, {100 * target:g} %", *losses, *against.get(cell, [None, None])])
    settings = own[0]["settings"]
    tested = sorted({row["settings"]["test_examples"] for row in own})
    seen = (
        f"{settings['examples']:,} training examples for every method"
        if mode == "one_shot"
        else f"the same {settings['steps']:,} training steps for every method"
    )
    return record.Table(
        title=f"Loss above dense, {mode.replace('_', ' ')}, every method at its defaults",
        columns=["", *methods, "best of the others", "FishLeg's loss less theirs"],
        rows=lines,
        decimals=[0, *[4] * len(methods), 0, 4],
        seed=record.seeds(own),
        data=", ".join(dict.fromkeys(row["dataset"] for row in own)),
        examples=f"{seen}; the first {' or '.join(f'{n:,}' for n in tested)} test "
        "examples, by the data set",
        note=f"{record.MEDIANS}, in nats; in the last column the paired 95 % interval, "
        "below zero where FishLeg is better.",
    )
