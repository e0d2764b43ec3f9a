"""README.md and docs/: their Python runs, their tables are those of the data, their links lead on."""

import re
from pathlib import Path

import pytest

import fishleg_jax as flj
from experiments import pages

ROOT = pages.ROOT
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def names(found):
    return [str(page.relative_to(ROOT)) for page in found]


def blocks(page):
    """Python blocks of a page, padded so that a traceback shows the page's own lines."""
    text = page.read_text(encoding="utf-8")
    for match in PYTHON.finditer(text):
        yield "\n" * (text[: match.start(1)].count("\n")) + match[1]


WITH_CODE = [page for page in pages.pages() if any(blocks(page))]


@pytest.mark.parametrize("page", WITH_CODE, ids=names(WITH_CODE))
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """One after the other, as a reader would paste them; what a block defines is there below."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), namespace)
