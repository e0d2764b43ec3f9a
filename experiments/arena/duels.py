"""Wins and losses of FishLeg against each other method, with paired intervals."""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.arena.contestants import OURS, PEERS
from experiments.report import paired, tables


class Duel(NamedTuple):
    """FishLeg and another method on one network at one sparsity, over the seeds of both.

    Attributes:
        model: name of the network.
        mode: `one_shot` or `gradual`.
        sparsity: the sparsity asked for.
        other: name of the other method.
        seeds: number of seeds that both have.
        difference: FishLeg's test loss less the other's, in nats.
        collapsed: whether neither is better than the network with all prunable weights zero.
    """

    model: str
    mode: str
    sparsity: float
    other: str
    seeds: int
    difference: paired.Difference
    collapsed: bool

    @property
    def outcome(self) -> str:
        """`win`, `loss`, or `tie` where the interval contains zero."""
        if self.difference.high < 0:
            return "win"
        return "loss" if self.difference.low > 0 else "tie"


def cells(rows: Sequence[dict]) -> Iterator[tuple[tuple, dict[str, dict[int, dict]]]]:
    """Rows by network, mode and sparsity, and in each of these by method and seed.

    Args:
        rows: the objects of a `results.json`.
    """
    found: dict[tuple, dict[str, dict[int, dict]]] = {}
    for row in rows:
        cell = found.setdefault((row["model"], row["mode"], row["sparsity_target"]), {})
        cell.setdefault(row["method"], {})[row["seed"]] = row
    yield from found.items()


def _losses(folder: Path, rows: Sequence[dict]) -> list[np.ndarray]:
    # NaN and infinity are losses that no finite one is as bad as
    worst = np.finfo(np.float32).max
    return [
        np.nan_to_num(np.load(folder / row["losses"]).astype(float), nan=worst, posinf=worst)
        for row in rows
    ]


def fight(folder: Path, rows: Sequence[dict]) -> list[Duel]:
    """All duels of FishLeg.

    Args:
        folder: the folder of the `results.json`, with the losses of each example.
        rows: its objects.
    """
    duels = []
    for cell, methods in cells(rows):
        ours = methods.get(OURS, {})
        for other, theirs in methods.items():
            seeds = sorted(ours.keys() & theirs.keys())
            if other == OURS or not seeds:
                continue
            pair = [[own[seed] for seed in seeds] for own in (ours, theirs)]
            difference = paired.loss_difference(*(_losses(folder, own) for own in pair))
            collapsed = all(_median(own) >= own[0]["zero_loss"] for own in pair)
            duels.append(Duel(*cell, other, len(seeds), difference, collapsed))
    return duels


def _median(rows: Sequence[dict]) -> float:
    losses = [float("inf") if row["loss"] is None else row["loss"] for row in rows]
    return statistics.median(losses)


def best_peers(rows: Sequence[dict], duels: Sequence[Duel], peers: Sequence[str]) -> list[Duel]:
    """FishLeg's duel against the best of some methods, in each cell.

    Args:
        rows: the objects of a `results.json`.
        duels: the result of `fight`.
        peers: methods to choose the best from, by the median loss over seeds.
    """
    medians = {
        (cell, method): _median(list(own.values()))
        for cell, methods in cells(rows)
        for method, own in methods.items()
    }
    best: dict[tuple, Duel] = {}
    for duel in duels:
        cell = duel[:3]
        if duel.other not in peers:
            continue
        if cell not in best or medians[cell, duel.other] < medians[cell, best[cell].other]:
            best[cell] = duel
    return list(best.values())


def show(duels: Sequence[Duel], best: Sequence[Duel]) -> str:
    """Counts by method and mode, each loss to the best of the peers, and a summary.

    Args:
        duels: the result of `fight`.
        best: the result of `best_peers` for `PEERS`.
    """
    shown = []
    for mode in dict.fromkeys(duel.mode for duel in duels):
        own = [duel for duel in duels if duel.mode == mode]
        header = [f"{mode}: FishLeg against", "wins", "ties", "losses", "both collapsed"]
        lines = []
        for other in dict.fromkeys(duel.other for duel in own):
            against = [duel for duel in own if duel.other == other]
            alive = [duel.outcome for duel in against if not duel.collapsed]
            counts = [alive.count(outcome) for outcome in ("win", "tie", "loss")]
            lines.append([other, *map(str, counts), str(len(against) - len(alive))])
        shown.append(tables.table(header, lines))
    lines = [
        [
            f"{duel.model}, {duel.mode}, {100 * duel.sparsity:g} %",
            duel.other,
            _text(duel.difference),
            str(duel.seeds),
            f"{duel.outcome}{', both collapsed' if duel.collapsed else ''}",
        ]
        for duel in best
    ]
    header = ["cell", "best of the others", "FishLeg's loss less theirs, nats", "seeds", "FishLeg"]
    return "\n\n".join([*shown, tables.table(header, lines), summary(best)])


def _text(difference: paired.Difference) -> str:
    return "{:+.3g} ({:+.3g} to {:+.3g})".format(*difference)


def summary(best: Sequence[Duel]) -> str:
    """Whether FishLeg is worse anywhere than the best of the peers, and how often it is better.

    Args:
        best: the result of `best_peers`.
    """
    alive = [duel for duel in best if not duel.collapsed]
    counts: dict[str, int] = {
        outcome: sum(duel.outcome == outcome for duel in alive)
        for outcome in ("win", "tie", "loss")
    }
    verdict = f"worse outside its paired interval in {counts['loss']} cells"
    if not counts["loss"]:
        verdict = "nowhere worse outside its paired interval"
    return (
        f"FishLeg against the best of {', '.join(PEERS)}, in {len(alive)} cells of {len(best)} in "
        f"which not both have collapsed: {verdict}, better in {counts['win']}, neither in "
        f"{counts['tie']}"
    )


def as_json(duels: Sequence[Duel]) -> list[dict[str, Any]]:
    """Objects for a file."""
    return [
        {**duel._asdict(), "difference": duel.difference._asdict(), "outcome": duel.outcome}
        for duel in duels
    ]
