"""The documentation: it builds with every link in place, and every command that it shows is one that opd takes."""

import re
import shlex
from pathlib import Path

import pytest

from opd.__main__ import COMMANDS, load_config, split_command, split_question
from opd.config import SCHEMAS
from opd.run import write_config
from opd.settings import select, settings_of
from opd.sweep import plan

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / ".docs" / "pages").glob("*.md"))


def commands_of(text: str) -> list[str]:
    """Every `opd ...` of a page: lines of its blocks, and commands between back quotes."""
    blocks = "\n".join(text.split("\n```")[1::2])  # what stands between an opening fence, of whatever language, and the closing one
    lines = [line.partition("  #")[0].removeprefix("$ ") for line in blocks.splitlines() if line.removeprefix("$ ").startswith("opd ")]
    return lines + list(re.findall(r"`(opd [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)))


SHOWN = [(page.stem, command) for page in PAGES for command in commands_of(page.read_text())]


@pytest.fixture
def somewhere(tmp_path, monkeypatch) -> Path:
    """A working directory with the run folders and the domain that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    cfg = load_config("distill", ["domain=[arithmetic,tools]", "student.model=runs/base/student"])
    for name in ("RUN", "runs/merged", "runs/quickstart/distill", "runs/first", "runs/second"):
        (tmp_path / name).mkdir(parents=True)
        write_config(tmp_path / name, cfg, "distill")
    (tmp_path / "conf" / "domain").mkdir(parents=True)
    (tmp_path / "conf" / "domain" / "reverse.yaml").write_text("# @package domains.reverse\ngrader: exact\n")
    (tmp_path / "conf" / "domain" / "D.yaml").write_text("# @package domains.D\ngrader: exact\n")
    return tmp_path


def test_the_pages_show_commands():
    assert len(SHOWN) > 40
    assert {command.split()[1] for _, command in SHOWN} >= {"distill", "check", "plan", "inspect", "runs", "report", "export", "evaluate", "specialize"}


@pytest.mark.parametrize(("page", "command"), SHOWN, ids=lambda part: part[:60])
def test_a_command_that_is_shown_is_one_that_opd_takes(page, command, somewhere):
    words = shlex.split(command.replace("'domains.D.", "domains.arithmetic.").replace("domains.D.", "domains.arithmetic."))[1:]
    words = ["100" if word == "N" else word for word in words]
    if words in (["COMMAND", "--help", "[PATH]"], ["COMMAND", "...", "--cfg", "[PATH]"]):
        return
    asked, words = split_question(words)
    assert words[0] in COMMANDS
    if "-m" in words:
        assert len(plan(*split_command([word for word in words if word != "-m"]))[2]) > 1
        return
    name, overrides = split_command(words)
    cfg = load_config(name, [override for override in overrides if override != "..."])
    assert type(cfg) is SCHEMAS[name]
    if asked is not None and asked[0] == "help" and asked[1]:
        assert select(list(settings_of(SCHEMAS[name])), asked[1], name)



def test_the_site_builds_and_every_link_leads_somewhere(tmp_path):
    """mkdocs' strict mode: a link or an anchor that is not there, or a page that is not in the index, is an error."""
    build = pytest.importorskip("mkdocs.commands.build", reason="pip install -e '.[docs]'")
    config = pytest.importorskip("mkdocs.config")
    pytest.importorskip("mkdocstrings")
    loaded = config.load_config(str(ROOT / ".docs" / "mkdocs.yml"), site_dir=str(tmp_path / "site"))
    build.build(loaded)
    for page in PAGES:
        assert (tmp_path / "site" / f"{page.stem}.html").is_file()
    settings = (tmp_path / "site" / "settings.html").read_text()
    assert "rollout.vllm.tolerance" in settings
