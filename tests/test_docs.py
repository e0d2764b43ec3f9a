"""README.md and docs/: their Python runs, their tables are those of the data, their links hold."""

import functools
import inspect
import json
import re
import warnings

import pytest

import fishleg_jax as flj
from experiments import pages
from findings import __main__ as findings

ROOT = pages.ROOT
PAGES = pages.pages()
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
NOT_RUN = "<!-- not run: "  # and a reason, in the line before a block
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")
MODULES = (
    "",
    "bases",
    "compensation",
    "export",
    "inverse",
    "inverse.factors",
    "likelihoods",
    "low_rank",
    "patterns",
    "schedules",
    "selection",
    "storage",
    "targets",
)
UNDOCUMENTED = ("compensation.STEPS",)  # a constant, which has no docstring of its own


def by_name(found):
    return [str(page.relative_to(ROOT)) for page in found]


def blocks(page):
    """Python blocks of a page, padded so that a traceback shows the page's own lines."""
    text = page.read_text(encoding="utf-8")
    for match in PYTHON.finditer(text):
        before = text[: match.start()].rstrip().rpartition("\n")[2]
        if not before.startswith(NOT_RUN):
            yield "\n" * text[: match.start(1)].count("\n") + match[1]


WITH_CODE = [page for page in PAGES if any(blocks(page))]


def test_pages_with_code_are_found():
    """Or a change of the markers would silently run nothing."""
    assert {"README.md", "docs/getting_started.md", "docs/guide/your_model.md"} <= set(
        by_name(WITH_CODE)
    )


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] * (page.name != "README.md"), id=name)
        for page, name in zip(WITH_CODE, by_name(WITH_CODE), strict=True)
    ],
)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """One after the other, as a reader would paste them; a block may use those above."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a page must not show code that is warned of
        for block in blocks(page):
            exec(compile(block, str(page), "exec"), namespace)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=by_name(PAGES))
def test_relative_links_hold(page):
    """Files that a page links to or shows; anchors are for `mkdocs build` to check."""
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    files = [t.partition("#")[0] for t in targets if not t.startswith(("http", "#"))]
    missing = [name for name in files if not (page.parent / name).exists()]
    assert not missing


def test_tables_are_those_of_the_data():
    found = [str(page.relative_to(ROOT)) for page, _ in pages.stale()]
    assert not found, (
        f"run python -m experiments.pages: {', '.join(found)} differ from docs/results"
    )


def test_every_table_of_the_data_is_shown():
    data = {path.stem for path in (ROOT / "docs" / "results").glob("*.json")}
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert data == set(re.findall(r"<!-- table: (\w+) -->", text))


def copied(tmp_path, **changes):
    """A repository of one page with one table."""
    table = {
        **dict.fromkeys(pages.FIELDS, "x"),
        "command": ["run"],
        "columns": ["", "90 %"],
        "decimals": [None, 2],
        "rows": [["FishLeg", 91.5], ["K-FAC", [91.25, 91.0, 91.5]], ["dense", None]],
        **changes,
    }
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results" / "one.json").write_text(json.dumps(table))
    (tmp_path / "README.md").write_text("above\n<!-- table: one -->\n<!-- end -->\nbelow\n")
    return tmp_path


def test_a_table_is_written_once_and_then_agrees(tmp_path):
    root = copied(tmp_path)
    ((page, text),) = pages.stale(root)
    assert text.startswith("above\n<!-- table: one -->\n") and text.endswith("-->\nbelow\n")
    for line in ("| FishLeg | 91.50 |", "| K-FAC | 91.25 (91.00–91.50) |", "| dense | |"):
        assert line in text.splitlines()
    page.write_text(text, encoding="utf-8")
    assert not list(pages.stale(root))
    page.write_text(text.replace("91.50 |", "91.51 |"), encoding="utf-8")
    assert [found for found, _ in pages.stale(root)] == [page]


def test_a_summary_takes_figures_from_other_tables(tmp_path):
    root = copied(tmp_path)
    cell = {"table": "one", "row": "FishLeg", "column": "90 %"}
    summary = {"summary": True, "columns": ["", "figure"], "rows": [["a network", cell]]}
    (root / "docs" / "results" / "two.json").write_text(json.dumps(summary))
    assert "| a network | 91.50 |" in pages.render("two", root)


@pytest.mark.parametrize(
    "changes, message",
    [({"rows": [["FishLeg"]]}, "1 cells for 2 columns"), ({"commit": None}, "must have commit")],
)
def test_unsound_data_is_refused(tmp_path, changes, message):
    root = copied(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        list(pages.stale(root))


@pytest.mark.parametrize(
    "text", ["<!-- table: one -->\n", "<!-- end -->\n", "<!-- table: three -->\n<!-- end -->"]
)
def test_unsound_markers_are_refused(tmp_path, text):
    with pytest.raises(ValueError, match="followed by one|no data"):
        pages.rendered(text, copied(tmp_path))


def reached(name):
    return functools.reduce(getattr, [part for part in name.split(".") if part], flj)


def test_the_api_pages_list_every_public_name_once():
    text = "".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / "docs/api").glob("*.md")))
    listed = re.findall(r"^::: fishleg_jax\.([\w.]+)$", text, re.MULTILINE)
    assert len(listed) == len(set(listed))
    shown = [reached(name) for name in listed]  # none that does not exist
    for module in MODULES:
        for name in reached(module).__all__:
            full, value = f"{module}.{name}".lstrip("."), getattr(reached(module), name)
            if full not in UNDOCUMENTED and not inspect.ismodule(value):
                assert any(value is x for x in shown), f"docs/api lacks {full}"


def test_findings_are_run_and_reported(tmp_path, capsys):
    (tmp_path / "holds.sh").write_text("echo fine")
    assert findings.main([], tmp_path) == 0
    (tmp_path / "changed.sh").write_text("echo other output; exit 3")
    assert findings.main([], tmp_path) == 1
    said = capsys.readouterr().out
    assert re.search(r"^FAIL  changed ", said, re.MULTILINE) and "    other output\n" in said
    assert re.search(r"^pass  holds ", said, re.MULTILINE) and "1 of 2 as stated" in said
    assert findings.main(["holds"], tmp_path) == 0 and findings.main(["absent"], tmp_path) == 2


def test_a_finding_that_takes_too_long_fails(tmp_path):
    (tmp_path / "slow.sh").write_text("echo begun; exec sleep 60")
    passed, output = findings.run(tmp_path / "slow.sh", limit=0.5)
    assert not passed and output.startswith("begun") and "ended after 0.5 s" in output


def test_every_finding_is_listed_and_installs_in_a_folder_of_its_own():
    listed = (ROOT / "findings" / "README.md").read_text(encoding="utf-8")
    assert findings.scripts()
    for name, path in findings.scripts().items():
        script = path.read_text(encoding="utf-8")
        assert f"]({path.name})" in listed, name
        assert "mktemp -d" in script and "==" in script and "import fishleg_jax" not in script
