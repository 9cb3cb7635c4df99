"""Settings of a command, read off its dataclasses (`opd COMMAND --help [PATH]`), and the values that they have in a composed config (`--cfg [PATH]`).

A setting's text stands in the docstring of its dataclass (`name: text`, or `name, name: text` for several), its type, default and allowed values in the
field, its range in opd/ranges.py: so nothing here repeats them, and tests/opd/test_settings.py refuses a field without a text. Members of a mapping of
dataclasses stand under NAME, as in domains.NAME.teacher.model; a path may have the true name there. A field that is a word or a mapping names the dataclass
of the mapping's settings in its metadata.
"""

import inspect
import re
from collections.abc import Iterator
from dataclasses import Field, dataclass, fields, is_dataclass, replace
from enum import Enum
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf

from opd.composition import compose_config, group_choices, group_defaults
from opd.console import print_definition, print_line
from opd.errors import nearest
from opd.ranges import range_of

WIDEST = 70
"""Columns of a setting with its value, up to which the origins stand in one column."""

MEMBER = "NAME"
"""Stands for the name of a member of a mapping, in a setting's path."""

UNITS = (
    (r"seconds", "seconds"), (r"minutes", "minutes"), (r"hours", "hours"), (r"gb", "10^9 bytes"), (r"gib", "GiB"), (r"mib", "MiB"),
    (r"tokens?|length|budget", "tokens"), (r"every|steps?|window|staleness", "steps"), (r"prompts?", "prompts"), (r"completions", "completions"),
    (r"rows|width", "rows"), (r"processes|ranks", "processes"), (r"threads", "threads"), (r"tolerance|cap|mismatch", "nats"), (r"rollouts", "rollouts"),
    (r"examples", "examples"), (r"teachers", "teachers"), (r"temperature", "of the logits"), (r"parallel", "jobs"),
)  # fmt: skip
"""What a number counts, by the first or the last word of its name that says so."""

WITHOUT_UNIT = ("domains.NAME.grader.tolerance", "domains.NAME.grader.relative_tolerance")
"""Paths whose names say otherwise."""

KINDS = {int: "integer", float: "number", bool: "true or false", str: "text", Any: "text or list"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting of a command: its path, its type in words, unit, default, allowed values and text; each may be empty but for path and type."""

    path: str
    kind: str
    unit: str
    default: str
    allowed: str
    text: str


def settings_of(schema: type, prefix: str = "", made: Any = None) -> Iterator[Setting]:
    """Every setting of a dataclass, those of its parts included, in the order of the fields. made: an instance with the defaults, where they are not the
    dataclass's own but those that a larger one gives it.
    """
    hints, made = get_type_hints(schema), schema() if made is None else made
    for field in fields(schema):
        path, kind = prefix + field.name, hints[field.name]
        member = get_args(kind)[1] if get_origin(kind) is dict and is_dataclass(get_args(kind)[1]) else None
        inner = member or (kind if is_dataclass(kind) else None)
        if inner is None:
            yield _setting(schema, field, path, kind, getattr(made, field.name))
            if "settings" in field.metadata:
                yield from settings_of(field.metadata["settings"], f"{path}.")
        elif member:
            yield from settings_of(inner, f"{path}.{MEMBER}.")
        else:
            yield from settings_of(inner, f"{path}.", getattr(made, field.name))


def settings_of_command(command: str) -> list[Setting]:
    """Every setting of a command, those of a sweep of it included, with the defaults that the command has: conf/COMMAND.yaml and the groups that it chooses
    stand over the dataclass.
    """
    from opd.config import SCHEMAS
    from opd.sweep import COMMANDS, SweepConfig

    composed = OmegaConf.to_container(compose_config(command, []), enum_to_str=True)
    found = list(settings_of(SCHEMAS[command])) + (list(settings_of(SweepConfig, "sweep.")) if command in COMMANDS else [])
    return [replace(setting, default=_default_in(composed, setting)) for setting in found]


def _default_in(composed: Any, setting: Setting) -> str:
    for name in setting.path.split("."):
        if not isinstance(composed, dict) or name not in composed:
            return setting.default
        composed = composed[name]
    return in_words(composed)


def group_lines(command: str) -> list[str]:
    """The groups of files that a command chooses from, each with its files and the one that is chosen where none is named."""
    chosen = group_defaults(command)
    names = {name: "; ".join([f"files of conf/{name}/", *([f"default {chosen[name]}"] if chosen[name] else [])]) for name in chosen}
    return [f"{name}=  {' | '.join(options)}   ({names[name]})" for name, options in group_choices(command).items()]


def field_texts(schema: type) -> dict[str, str]:
    """The text of each field that the docstring of a dataclass, or of one that it is made from, describes."""
    found: dict[str, str] = {}
    for parent in reversed([parent for parent in schema.__mro__ if is_dataclass(parent)]):
        names: list[str] = []
        for line in inspect.cleandoc(parent.__doc__ or "").splitlines():
            entry = re.match(r"([a-z_0-9]+(?:, [a-z_0-9]+)*): (.+)", line)
            if entry and set(entry[1].split(", ")) <= {field.name for field in fields(parent)}:
                names = entry[1].split(", ")
                found |= dict.fromkeys(names, entry[2])
            elif line.startswith(" ") and names:
                found |= {name: f"{found[name]} {line.strip()}" for name in names}
            else:
                names = []
    return found


def _setting(schema: type, field: Field, path: str, hint: Any, default: Any) -> Setting:
    is_optional = type(None) in get_args(hint)
    kind = next(part for part in get_args(hint) if part is not type(None)) if is_optional else hint
    choices = kind if isinstance(kind, type) and issubclass(kind, Enum) else None
    text = field_texts(schema).get(field.name, "")
    meaning = " ".join((choices.__doc__ or "").split()) if choices else ""
    return Setting(
        path=path,
        kind=("text or mapping" if "settings" in field.metadata else _kind_in_words(kind, text)) + (" or null" if is_optional else ""),
        unit=_unit(field.name) if kind in (int, float) and path not in WITHOUT_UNIT else "",
        default=in_words(default),
        allowed="|".join(member.value for member in choices) if choices else range_of(path),
        text=f"{text} {meaning}".strip(),
    )


def _kind_in_words(kind: Any, text: str = "") -> str:
    if kind is Any and "schedule" in text:
        return "number or schedule, as {0: 0.5, 200: 0.25}"
    if get_origin(kind) is list:
        return f"list of {_kind_in_words(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return "mapping"
    return "choice" if isinstance(kind, type) and issubclass(kind, Enum) else KINDS[kind]


def _unit(name: str) -> str:
    if name.startswith("per_"):  # a rate, whose text says of what
        return ""
    words = name.partition("_per_")[0].split("_")
    for word in (words[-1], *words[:-1]):
        for pattern, unit in UNITS:
            if re.fullmatch(pattern, word):
                return unit
    return ""


def in_words(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(in_words, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{in_words(member)}" for key, member in value.items()) + "}"
    return str(value) if value != "" else "''"


def select(settings: list[Setting], path: str, command: str) -> list[Setting]:
    """The settings at or under a path. Raises ValueError, with the nearest path, where there are none."""
    if not path:
        return settings
    parts = path.split(".")
    found = [setting for setting in settings if _is_under(setting.path.split("."), parts)]
    if not found:
        known = sorted({".".join(setting.path.split(".")[:length]) for setting in settings for length in range(1, setting.path.count(".") + 2)})
        raise ValueError(f"{command} has no setting {path!r}{nearest(path, known)}")
    return found


def _is_under(path: list[str], asked: list[str]) -> bool:
    return len(path) >= len(asked) and all(own in (MEMBER, part) for own, part in zip(path, asked, strict=False))


def print_help(command: str, head: str, path: str) -> None:
    """What `opd COMMAND --help [PATH]` prints. head: what stands above all settings. Raises ValueError for a path that leads nowhere."""
    found = select(settings_of_command(command), path, f"opd {command.replace('_', ' ')}")
    if not path:
        print_line(head)
        for line in group_lines(command):
            print_line(f"  {line}")
        print_line("")
    for setting in found:
        notes = [note for note in (setting.kind, setting.unit, setting.allowed) if note]
        print_definition(setting.path, f" = {setting.default}   ({'; '.join(notes)})", setting.text)


def print_config(config: dict[str, Any], found: dict[str, str], path: str, command: str) -> None:
    """What is at or under a path of a composed config, as YAML that can be read again, with the origin of each value (opd/composition.py) as a comment.

    Raises ValueError where there is nothing.
    """
    part: Any = config
    parts = path.split(".") if path else []
    for number, name in enumerate(parts):
        if not isinstance(part, dict) or name not in part:
            known = [".".join([*parts[:number], str(key)]) for key in part] if isinstance(part, dict) else []
            raise ValueError(f"the config of opd {command.replace('_', ' ')} has no {path!r}{nearest(path, known)}")
        part = part[name]
    for name in reversed(parts):
        part = {name: part}
    lines = list(_lines(part, "", 0))
    width = min(WIDEST, max(len(text) for text, _ in lines))
    for text, at in lines:
        print(text if at is None else f"{text:<{width}}  # {found.get(at, 'default')}")


def _lines(part: dict[Any, Any], prefix: str, depth: int) -> Iterator[tuple[str, str | None]]:
    """Lines of YAML, each with the path of the value that it holds; None where it holds none."""
    for key, value in part.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        name = "  " * depth + _yaml(key)
        if isinstance(value, dict) and value:
            yield f"{name}:", None
            yield from _lines(value, path, depth + 1)
        else:
            yield f"{name}: {_yaml(value)}", path


def _yaml(value: Any) -> str:
    """On one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("\n").removesuffix("\n...")
