"""mkdocs' hook that writes the pages which are made from the code: every command's settings, the modules, the results of the README."""

import sys
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def on_files(files, config):
    """Add the pages to those that are written by hand."""
    for name, text in {"settings.md": _settings(), "modules.md": _modules(), "results.md": _results()}.items():
        files.append(File.generated(config, name, content=text))
    return files


def _settings() -> str:
    from opd.config import SCHEMAS
    from opd.settings import group_lines, settings_of_command

    parts = ["# Settings\n\nEvery setting of every command, from its dataclass. In a terminal: `opd COMMAND --help [PATH]`.\n"]
    for command in SCHEMAS:
        name = command.replace("_", " ")
        parts.append(f"## opd {name}\n")
        parts += [f"- `{line}`" for line in group_lines(command)]
        parts.append("\n| setting | default | type, unit, range | |\n| --- | --- | --- | --- |")
        for setting in settings_of_command(command):
            kind = "; ".join(part for part in (setting.kind, setting.unit, setting.allowed) if part)
            parts.append(f"| `{setting.path}` | `{_cell(setting.default)}` | {_cell(kind)} | {_cell(setting.text)} |")
        parts.append("")
    return "\n".join(parts)


def _modules() -> str:
    names = [f"{package}.{path.stem}" for package in ("opd", "teachers", "rollout") for path in sorted((ROOT / package).glob("*.py")) if path.stem[:2] != "__"]
    return "# Modules\n\nThe design notes at the head of each module, with its public names.\n\n" + "\n\n".join(f"::: {name}" for name in names)


def _results() -> str:
    text = (ROOT / "README.md").read_text()
    sections = [text[text.index(f"## {title}\n") :].split("\n## ")[0] for title in ("Does it distil?", "Results", "What this is not")]
    return "# Results\n\n" + "\n\n".join(section.strip() for section in sections)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
