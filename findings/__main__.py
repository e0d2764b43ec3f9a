"""Runs the findings and reports which are still as stated.

python -m findings
python -m findings convolution_gradients_sharded
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
LIMIT = 1800  # seconds for one finding, its installation included


def scripts(folder: Path = FOLDER) -> dict[str, Path]:
    """The findings by name, sorted.

    Args:
        folder: where their scripts lie.

    Returns:
        The path of every `NAME.sh`, by its name.
    """
    return {path.stem: path for path in sorted(folder.glob("*.sh"))}


def run(path: Path, limit: float = LIMIT) -> tuple[bool, str]:
    """Runs one finding.

    Args:
        path: its script.
        limit: seconds after which it counts as failed.

    Returns:
        Whether the behaviour is as stated, and the output of the script.
    """
    try:
        done = subprocess.run(
            ["bash", str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        text = output.decode(errors="replace") if isinstance(output, bytes) else output
        return False, f"{text}\nended after {limit:g} s"
    return done.returncode == 0, done.stdout


def main(argv: Sequence[str] | None = None, folder: Path = FOLDER) -> int:
    """Runs all findings, or those that are named.

    Args:
        argv: command line; None for that of the process.
        folder: where the scripts lie.

    Returns:
        Exit status: 1 where one failed, 2 where there is no finding of that name.
    """
    parser = argparse.ArgumentParser(
        prog="python -m findings", description="Run the findings; each installs its own packages."
    )
    parser.add_argument("name", nargs="*", help="findings to run; default: all")
    names, found = parser.parse_args(argv).name, scripts(folder)
    unknown = [name for name in names if name not in found]
    if unknown:
        print(f"no finding {', '.join(unknown)}; there are {', '.join(found)}", file=sys.stderr)
        return 2
    failed = 0
    for name in names or found:
        begin = time.perf_counter()
        passed, output = run(found[name])
        print(f"{'pass' if passed else 'FAIL'}  {name}  ({time.perf_counter() - begin:.0f} s)")
        if not passed:
            failed += 1
            print("".join(f"    {line}\n" for line in output.splitlines()), end="")
    print(f"{len(names or found) - failed} of {len(names or found)} as stated")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
