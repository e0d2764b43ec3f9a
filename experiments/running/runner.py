"""The runner: takes results that exist from a `results.json`, and keeps each new one at once."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.running import processes, results


class Runner:
    """Results of one command, in the order in which they are found or made.

    Attributes:
        path: the `results.json`.
        rows: the results so far.
        failures: one line per method that failed.
    """

    def __init__(self, path: Path):
        """Starts with no results, whatever the file has."""
        self.path = path
        self.rows: list[dict] = []
        self.failures: list[str] = []

    def missing(
        self, identity: Mapping[str, Any], wanted: Sequence[Mapping[str, Any]]
    ) -> list[Mapping[str, Any]]:
        """Takes stored results into `rows`, and returns those still to be made.

        Args:
            identity: fields that all results wanted have in common.
            wanted: further fields of each.

        Returns:
            Those of `wanted` without a stored result.
        """
        stored = results.load(self.path)
        found = [results.find(stored, **identity, **one) for one in wanted]
        self.rows += [row for row in found if row is not None]
        # the first process writes the file, and others may see its content later
        there = [processes.agreed(row is not None) for row in found]
        return [one for one, known in zip(wanted, there, strict=True) if not known]

    def keep(self, row: dict) -> None:
        """Writes a result to the file, and adds it to `rows`."""
        results.add(self.path, [row])
        self.rows.append(row)

    def once(self, identity: Mapping[str, Any], make: Callable[[], dict]) -> dict:
        """The stored result with these fields, or else the one that `make` returns, then stored."""
        row = results.find(results.load(self.path), **identity)
        if row is None:
            row = {**identity, **make()}
            results.add(self.path, [row])
        return row

    @contextlib.contextmanager
    def attempt(self, name: str, *errors: type[Exception]) -> Iterator[None]:
        """Turns errors of these types into a line of `failures`, so that other methods go on."""
        try:
            yield
        except errors as error:
            self.failures.append(f"{name}: {error}")

    def exit_code(self) -> int:
        """Prints the failures to stderr; 1 if there are any, else 0."""
        for failure in self.failures if processes.is_first() else ():
            print(f"failed: {failure}", file=sys.stderr)
        return 1 if self.failures else 0
