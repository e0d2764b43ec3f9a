"""The arena's results as a table for the pages of docs/."""

from collections.abc import Sequence

from experiments.arena.duels import Duel
from experiments.report import record


def of_mode(rows: Sequence[dict], best: Sequence[Duel], mode: str) -> record.Table:
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
    leads = {(duel.model, duel.sparsity): duel for duel in best if duel.mode == mode}
    cells: list[list[record.Cell]] = []
    for model, target in dict.fromkeys((row["model"], row["sparsity_target"]) for row in own):
        here = [row for row in own if (row["model"], row["sparsity_target"]) == (model, target)]
        losses = [
            record.spread([row["above_dense"] for row in here if row["method"] == method])
            for method in methods
        ]
        duel = leads.get((model, target))
        lead: list[record.Cell] = [None, None]
        if duel is not None:
            lead = [duel.other, list(duel.difference)]
        cells.append([f"{model}, {100 * target:g} %", *losses, *lead])
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
        rows=cells,
        decimals=[0, *[4] * len(methods), 0, 4],
        seed=record.seeds(own),
        data=", ".join(dict.fromkeys(row["dataset"] for row in own)),
        examples=f"{seen}; the first {' or '.join(f'{n:,}' for n in tested)} test "
        "examples, by the data set",
        note=f"{record.MEDIANS}, in nats; in the last column the paired 95 % interval, "
        "below zero where FishLeg is better.",
    )
