"""The README says what the code does."""

import ast
import re
import shutil
from pathlib import Path

import pytest

from opd.__main__ import load_config
from opd.compare import compare

README = Path("README.md").read_text()


def test_the_loop_in_the_readme_is_the_loop_of_the_code():
    source = Path("opd/distill.py").read_text()
    function = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "distill")
    text = "\n".join(source.splitlines()[function.lineno - 1 : function.end_lineno])
    assert f"```python\n{text}\n```" in README


def test_the_loop_fits_on_a_page():
    function = next(node for node in ast.parse(Path("opd/distill.py").read_text()).body if isinstance(node, ast.FunctionDef))
    assert function.end_lineno - function.lineno + 1 <= 40
    assert _depth(function.body) <= 3


def test_the_readme_has_at_most_240_lines():
    """A newcomer reads it whole; the tables of results are 30 of them."""
    assert len(README.splitlines()) <= 240


def test_the_tree_of_the_readme_names_every_file_and_no_other():
    package, named = "", set()
    for line in README.split("## Files")[1].split("```")[1].splitlines():
        package = next((name for name in ("rollout", "teachers", "opd", "conf") if line.startswith(name + "/")), package)
        named |= {f"{package}/{name}" for name in re.findall(r"\b\w+\.py\b", line)}
    assert named == {str(path) for package in ("rollout", "teachers", "opd") for path in Path(package).glob("*.py") if not path.name.startswith("__")}


@pytest.mark.parametrize("experiment", ["twelve_domains", "self_repair", "off_support"])
def test_the_tables_that_ship_are_those_of_the_summaries_beside_them(experiment, tmp_path):
    """And that of the twelve domains' arms is the README's."""
    results = shutil.copytree(f"conf/compared/{experiment}", tmp_path / "results")
    compare(load_config("compare", [f"experiment={experiment}", f"results={results}", "table_only=true"]))
    shipped = Path(f"conf/compared/{experiment}/table.md").read_text()
    assert (results / "table.md").read_text() == shipped
    assert "‡" not in shipped, "made with other settings than the experiment has"
    if experiment == "twelve_domains":
        arms, _ = shipped.strip().split("\n\n")
        assert arms in README


def _depth(body: list[ast.stmt]) -> int:
    inner = [_depth(node.body) for node in body if isinstance(node, ast.For | ast.With | ast.If)]
    return max(inner, default=-1) + 1 if inner else 0
