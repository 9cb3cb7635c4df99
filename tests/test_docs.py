"""The documentation: it builds with every link in place, and every command that it shows is one that opd takes, and (slow) that runs."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from opd.__main__ import COMMANDS, load_config, split_command, split_question
from opd.config import SCHEMAS
from opd.run import write_config
from opd.settings import select, settings_of
from opd.sweep import plan

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / ".docs" / "pages").glob("*.md"))
README = ROOT / "README.md"


def commands_of(text: str) -> list[str]:
    """Every `opd ...` of a page: lines of its blocks, fenced or indented, and commands between back quotes."""
    blocks = "\n".join(text.split("\n```")[1::2])  # what stands between an opening fence, of whatever language, and the closing one
    blocks += "\n" + "\n".join(line[4:] for line in text.splitlines() if line.startswith("    opd "))
    lines = [line.partition("  #")[0].removeprefix("$ ") for line in blocks.splitlines() if line.removeprefix("$ ").startswith("opd ")]
    return lines + list(re.findall(r"`(opd [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)))


SHOWN = [(page.stem, command) for page in (*PAGES, README) for command in commands_of(page.read_text())]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """A working directory with the run folders and the domain that the pages speak of."""
    place = tmp_path_factory.mktemp("places")
    (place / "conf" / "domain").mkdir(parents=True)
    for name in ("law", "code"):
        text = f"# @package domains.{name}\nteacher: {{model: org/{name}}}\ngrader: exact\nheld_out: {{path: x.jsonl}}\n"
        (place / "conf" / "domain" / f"{name}.yaml").write_text(text)
    with contextlib.chdir(place):
        cfg = load_config("distill", ["domain=[arithmetic,tools,law]", "student.model=runs/base/student"])
    for name in ("RUN", "runs/merged", "runs/quickstart/distill", "runs/first", "runs/second"):
        (place / name).mkdir(parents=True)
        write_config(place / name, cfg, "distill")
    (place / "conf" / "domain" / "reverse.yaml").write_text("# @package domains.reverse\ngrader: exact\n")
    (place / "conf" / "domain" / "D.yaml").write_text('# @package domains.D\ngrader: exact\nheld_out: {path: "synthetic:parity"}\n')
    return place


@pytest.fixture
def somewhere(places, monkeypatch) -> None:
    monkeypatch.chdir(places)


def test_the_pages_show_commands():
    assert len(SHOWN) > 40
    assert {command.split()[1] for _, command in SHOWN} >= {"distill", "check", "plan", "inspect", "runs", "report", "export", "evaluate", "specialize"}


@pytest.mark.parametrize(("page", "command"), SHOWN, ids=lambda part: part[:60])
def test_a_command_that_is_shown_is_one_that_opd_takes(page, command, somewhere):
    words = shlex.split(command.replace("'domains.D.", "domains.arithmetic.").replace("domains.D.", "domains.arithmetic."))[1:]
    words = ["100" if word == "N" else word.replace("STEP", "100") for word in words]
    words = [word.replace("@chosen", "@100") for word in words]
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


# The same commands, run (slow): after the quickstart, whose models they speak of


SHORT = {
    "distill": ["rollout.prompts_per_step=16", "samples.every=1", "checkpoint.every=2", "evaluation.prompts=16"],
    "evaluate": ["evaluation.max_new_tokens=20"],
}
"""Settings that make a command of the pages short; of `opd evaluate`, the length of completions that the small models have room for."""
DONE = 200
"""Steps of the quickstart's distillation, which stands for RUN."""


def opd(workspace: Path, *words: str, code: int = 0) -> str:
    """Run a command as a user does; what it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "180"}
    result = subprocess.run([sys.executable, "-m", "opd", *words], cwd=workspace, capture_output=True, text=True, timeout=1800, env=environment)
    assert result.returncode == code, f"opd {shlex.join(words)}: exit code {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def after_the_quickstart(tmp_path_factory) -> Path:
    """A directory in which `opd` was called, and a teacher of parity was made, which one page adds."""
    workspace = tmp_path_factory.mktemp("quickstart")
    opd(workspace)
    opd(workspace, "specialize", "experiment=quickstart_teacher", "domain=[parity]", "run_dir=runs/twelve_domains/teacher_parity")
    return workspace


def run_of(command: str, number: int) -> str:
    """The folder that RUN stands for: one of its own for a command that changes the run, else one for the page."""
    return f"runs/copy-{number}" if command.startswith("opd distill") and "@chosen" not in command else "runs/copy"


def words_of(command: str, number: int) -> list[str]:
    """A command of a page with names in the place of its letters, and short: it does few steps, or two more than the run that it goes on with has done."""
    asked = "parity" if "+domain=D" in command else "arithmetic"  # what is added is not there yet
    words = shlex.split(re.sub(r"\bD\b", asked, command))[1:]
    words = [word.replace("RUN", run_of(command, number)).replace("STEP", str(DONE)) for word in words if word != "..."]
    is_new_run = not any("=" not in word and "/" in word for word in words)
    if words[0] == "distill" and not {"--help", "--cfg", "rehearse=true"} & set(words):
        words += SHORT["distill"] if is_new_run or "fresh=true" in words else []
        done = DONE if words[1].startswith(("runs/copy", "runs/quickstart")) else 0
        words += ["num_steps=2"] if is_new_run or "fresh=true" in words else [f"num_steps={done + 2 * number}"]
        words += ["warmup.steps=2"] if "warmup=sft" in words else []
        words += [f"run_dir=runs/new-{number}"] if is_new_run and not any(word.startswith("run_dir=") for word in words) else []
    return words + (SHORT["evaluate"] if words[0] == "evaluate" and any(word.startswith("student.model=") for word in words) else [])


PLAIN = [page for page in PAGES if page.stem not in ("first_day", "concepts")]


@pytest.mark.slow
@pytest.mark.parametrize("page", PLAIN, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run_one_after_the_other(page, after_the_quickstart, tmp_path):
    """RUN is a copy of the quickstart's distillation; runs that the page makes are there for its later commands."""
    (tmp_path / "runs").mkdir()
    for folder in ("quickstart", "twelve_domains"):
        shutil.copytree(after_the_quickstart / "runs" / folder, tmp_path / "runs" / folder)
    if page.stem == "cluster":
        shutil.copytree(tmp_path / "runs/quickstart/distill", tmp_path / "runs/merged")
    for number, command in enumerate(commands_of(page.read_text()), start=1):
        if command.split()[1:2] == ["COMMAND"] or (len(command.split()) == 2 and command != "opd runs"):
            continue  # the name of a command in a sentence
        if "RUN" in command and not (tmp_path / run_of(command, number)).is_dir():
            shutil.copytree(tmp_path / "runs/quickstart/distill", tmp_path / run_of(command, number))
        if "RUN/export" in command:
            opd(tmp_path, "export", run_of(command, number))
        opd(tmp_path, *words_of(command, number))


@pytest.mark.slow
def test_the_first_day_goes_as_it_is_told(after_the_quickstart, tmp_path):
    """Every block of the page in its order: files are written, Python and commands run (lm_eval where it is installed), refusals come in the words shown."""
    shutil.copytree(after_the_quickstart / "runs", tmp_path / "runs")
    text = (ROOT / ".docs" / "pages" / "first_day.md").read_text()
    blocks = [(found[1], found[2], text[: found.start()]) for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]
    chosen = ""
    for number, (language, block, before) in enumerate(blocks):
        answer = blocks[number + 1][1] if number + 1 < len(blocks) else ""
        if language == "yaml":
            file = tmp_path / re.findall(r"`([\w/]+\.yaml)`", before)[-1]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block)
        elif language == "python":
            block = block.replace("export-step-000080", chosen)
            printed = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=True).stdout
            assert [line.strip() for line in re.findall(r"# (<bos>.*)", block)] == printed.split("\n")[:-1]
        for line in block.splitlines() if block.startswith("opd ") else ():
            words = shlex.split(line.replace("export-step-000080", chosen))[1:]
            if answer.startswith("opd: ended after step"):
                assert _ended_at(41, tmp_path, words).startswith(answer.partition(" step ")[0])
            elif answer.startswith("opd: "):
                assert answer.strip() in opd(tmp_path, *words, code=2)
            elif find_spec("lm_eval") is not None or "lm_eval" not in line:
                opd(tmp_path, *words)
        chosen = next((folder.name for folder in tmp_path.glob("runs/second/export-step-*")), "")
    assert chosen, "the chosen checkpoint was exported"
    card = (tmp_path / "runs/second" / chosen / "student/README.md").read_text()
    assert re.search(r"\| reverse \| 0\.0\d\d .*\| 0\.9\d\d ", card), "from never right to nearly always"


def _ended_at(step: int, workspace: Path, words: list[str]) -> str:
    """Run a command until it has done so many steps, and end it with SIGTERM; its last line."""
    folder = workspace / next(word.partition("=")[2] for word in words if word.startswith("run_dir="))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command, quiet = [sys.executable, "-m", "opd", *words], subprocess.DEVNULL
    with subprocess.Popen(command, cwd=workspace, stderr=subprocess.PIPE, stdout=quiet, text=True, env=environment) as run:
        metrics = folder / "metrics.jsonl"
        while run.poll() is None and not (metrics.is_file() and f'"step": {step}' in metrics.read_text()):
            time.sleep(0.2)
        run.send_signal(signal.SIGTERM)
        said = run.stderr.read()
    assert run.returncode == 75, said[-3000:]
    return said.strip().splitlines()[-1]
