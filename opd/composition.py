"""The config of a command: composed by Hydra from conf/ (and ./conf), or from what a run was started with, and the overrides of a command line.

`opd distill RUN` takes RUN/config.yaml in the place of conf/distill.yaml: its values stand where that file's would, no group of files is chosen but on the
command line, and overrides are what they always are (+domain=law, '~domains.code', optim.lr=1e-4). run_dir is RUN, wherever it was when it was begun, and
`fresh` is not taken over.
"""

import functools
import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd.errors import explain
from opd.evaluate_config import settings_of_run
from opd.merge_config import merge_of_run
from opd.run_folder import command_of

CONF = Path(__file__).resolve().parent.parent / "conf"
STORED = "config_of="
"""Before the run whose config.yaml takes the place of a command's file of conf/, among a command's overrides."""
SAME_SETTINGS = {"check": "distill", "plan": "distill"}
"""Commands whose settings are another's and more: what is stored by the one can be read by the other."""
COMMAND_LINE = "command line"


def load_config(command: str, overrides: list[str]) -> Any:
    """The typed config of a command: composed by Hydra, checked against its dataclass."""
    from opd.config import SCHEMAS, parse

    return parse(compose_config(command, overrides), SCHEMAS[command])


@functools.cache
def register_schemas() -> None:
    """Make the schemas known to Hydra, under the names in conf/COMMAND.yaml; once, since it takes a third of the time of composing."""
    from opd.config import SCHEMAS

    store = ConfigStore.instance()
    for name, schema in SCHEMAS.items():
        store.store(name=f"{name}_schema", node=schema)


def compose_config(command: str, overrides: list[str]) -> DictConfig:
    """Compose conf/COMMAND.yaml, or what a run was started with, with overrides. Raises ValueError in words of the command line."""
    from opd.config import SCHEMAS

    own = Path.cwd() / "conf"
    _require_visible(own)
    stray = [override for override in overrides if "=" not in override and not override.startswith("~")]
    if stray:
        raise ValueError(f"{stray[0]!r} is not a setting: write setting=value")
    with _sources(command, overrides) as (name, given, _):
        try:
            added = [override for override in given if _adds_member(override, SCHEMAS[command])]
            config = compose(config_name=name, overrides=[override for override in given if override not in added])
            values = OmegaConf.create(OmegaConf.to_container(config))  # with + Hydra adds any key
            for override in OverridesParser.create().parse_overrides(added):
                OmegaConf.update(values, override.key_or_group, override.value(), merge=True)
            return OmegaConf.merge(OmegaConf.structured(SCHEMAS[command]), values)
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(explain(error, command.replace("_", " "), SCHEMAS[command], [CONF, own])) from error


def origins(command: str, overrides: list[str]) -> dict[str, str]:
    """Path of each value of a composed config that is not the dataclass's own -> the file, or the command line, that is the last to set it.

    A list is one value; a mapping is looked into. What a command makes of a run's settings, and so is not what its file says, is from `opd COMMAND RUN`.
    """
    found: dict[str, str] = {}
    groups, run = group_choices(command), _stored_run(overrides)
    with _sources(command, overrides) as (name, given, folders):
        loader = GlobalHydra.instance().config_loader()
        merged = loader.compute_defaults_list(config_name=name, overrides=given, run_mode=RunMode.RUN).defaults
        parsed = OverridesParser.create(config_loader=loader).parse_overrides(given)
        for entry in merged:
            file = next((file for folder in folders if (file := folder / f"{entry.config_path}.yaml").is_file()), None)
            if file is not None:
                prefix = f"{entry.package}." if entry.package else ""
                shown = f"{run}/config.yaml" if entry.config_path == name and run is not None else f"conf/{entry.config_path}.yaml"
                content = OmegaConf.to_container(OmegaConf.load(file))
                found |= {prefix + path: shown for path, _ in leaves(content) if path.split(".")[0] != "defaults"}
                if entry.config_path == name and run is not None:
                    found |= _made_of_a_run(command, content, run)
    for override in parsed:
        key = override.key_or_group
        if not (override.is_delete() or override.is_hydra_override() or key in groups):
            found |= dict.fromkeys((f"{key}.{path}" if path else key for path, _ in leaves(override.value())), COMMAND_LINE)
    return found


def group_choices(command: str) -> dict[str, list[str]]:
    """The groups that a command's file of conf/ chooses from, and the names of the files of each, of ./conf too."""
    names = group_defaults(command)
    return {name: sorted({file.stem for folder in (CONF, Path.cwd() / "conf") for file in (folder / name).glob("*.yaml")}) for name in names}


def group_defaults(command: str) -> dict[str, Any]:
    """The groups that a command's file of conf/ chooses from, and what it chooses of each: a name, a list of names, or None."""
    return {name: chosen for entry in _defaults(command) if isinstance(entry, dict) for name, chosen in entry.items()}


def choices(overrides: list[str]) -> list[dict[str, str | None]]:
    """Every combination of the values that overrides choose from, in Hydra's grammar: key -> value, None where a key is deleted.

    Raises ValueError for what cannot be read, or has no end of values.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise ValueError(explain(error, "a sweep", dict, [CONF])) from error
    options: dict[str, list[str | None]] = {}
    for override in parsed:
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise ValueError(f"{override.input_line} has no end of values: write them out, as in a,b,c or range(1,4)")
        values = list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.get_value_element_as_str()]
        options[override.get_key_element()] = [None] if override.is_delete() else values
    return [dict(zip(options, combination, strict=True)) for combination in itertools.product(*options.values())]


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no mapping, or an empty one, with its path."""
    if not isinstance(value, dict) or not value:
        yield path, value
        return
    for key, member in value.items():
        yield from leaves(member, f"{path}.{key}" if path else str(key))


def quoted(text: str) -> str:
    """A value as Hydra reads it back, whatever is in it."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


@contextmanager
def _sources(command: str, overrides: list[str]) -> Iterator[tuple[str, list[str], list[Path]]]:
    """Hydra, set up to compose a command: the name of the first file, the overrides as it takes them, and the folders in which it looks for files."""
    register_schemas()
    GlobalHydra.instance().clear()
    own, run = Path.cwd() / "conf", _stored_run(overrides)
    searched = [own] if own.is_dir() and own.resolve() != CONF else []
    given = _join_domains([override for override in overrides if not override.startswith(STORED)])
    if run is None:
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
            yield command, [*_search_path(searched), *given], [CONF, *searched]
        return
    with tempfile.TemporaryDirectory() as folder:
        stored = {"defaults": [f"{command}_schema", "_self_", *({key: [] if key == "domain" else None} for key in group_choices(command))]}
        stored |= _stored_values(command, run)
        (Path(folder) / "stored.yaml").write_text(yaml.safe_dump(stored, sort_keys=False))
        with initialize_config_dir(config_dir=folder, version_base="1.3"):
            yield "stored", [*_search_path([CONF, *searched]), *given], [Path(folder), CONF, *searched]


def _search_path(folders: list[Path]) -> list[str]:
    return [f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in folders)}]"] if folders else []


def _stored_run(overrides: list[str]) -> Path | None:
    return next((Path(override.removeprefix(STORED)) for override in overrides if override.startswith(STORED)), None)


def _stored_values(command: str, run: Path) -> dict[str, Any]:
    """What RUN/config.yaml says. Raises ValueError where it is not there, or is another command's."""
    file = run / "config.yaml"
    if not file.is_file():
        raise ValueError(f"{run} is not a folder of a run: it has no config.yaml")
    stored, writer = yaml.safe_load(file.read_text()), command_of(run) or "something else"
    if command == "merge" and writer == "distill":
        return merge_of_run(stored, str(run))
    if command == "evaluate":
        if writer in ("distill", "specialize"):
            return settings_of_run(stored, str(run))
        if writer == "evaluate":
            return stored | {"run_dir": str(run)}
    if writer != SAME_SETTINGS.get(command, command):
        inside = sorted(str(path.parent) for path in run.glob("*/config.yaml"))
        hint = f": name one of its runs, {', '.join(inside)}" if inside else ""
        raise ValueError(f"{run} is a folder of opd {writer}, not of opd {SAME_SETTINGS.get(command, command)}{hint}")
    return stored | {"run_dir": str(run), "fresh": False}


def _made_of_a_run(command: str, content: dict[str, Any], run: Path) -> dict[str, str]:
    """The origin of those values of a composed run that are others than in RUN/config.yaml."""
    said = dict(leaves(yaml.safe_load((run / "config.yaml").read_text())))
    return {path: f"opd {command} {run}" for path, value in leaves(content) if path not in said or said[path] != value}


def _adds_member(override: str, schema: type) -> bool:
    """Whether an override adds to a mapping of dataclasses (+alarms.rules.NAME={...}, +domains.NAME.prompts.sources.NAME.path=...), which Hydra cannot."""
    kind: Any = schema
    for part in override.removeprefix("+").partition("=")[0].split(".") if override.startswith("+") else ():
        if get_origin(kind) is dict and is_dataclass(get_args(kind)[1]):
            return True
        kind = get_type_hints(kind).get(part) if is_dataclass(kind) else None
    return False


def _defaults(command: str) -> list[Any]:
    return OmegaConf.to_container(OmegaConf.load(CONF / f"{command}.yaml")).get("defaults", [])


def _require_visible(own: Path) -> None:
    """Raises ValueError for a file of ./conf that would not be read, since one of that name ships with opd."""
    if not own.is_dir() or own.resolve() == CONF:
        return
    for file in own.rglob("*.yaml"):
        shipped = CONF / file.relative_to(own)
        if shipped.is_file() and shipped.read_text() != file.read_text():
            raise ValueError(f"{file.relative_to(Path.cwd())} would be hidden by the file of that name that ships with opd: give it another name")


def _join_domains(overrides: list[str]) -> list[str]:
    """`domain=[a]` and `+domain=b` together as `domain=[a,b]`: Hydra would silently drop b."""
    chosen = [override for override in overrides if override.startswith("domain=")]
    added = [override.removeprefix("+domain=").strip("[]") for override in overrides if override.startswith("+domain=")]
    if not chosen or not added:
        return overrides
    names = [name for name in [chosen[-1].removeprefix("domain=").strip("[]"), *added] if name]
    return [override for override in overrides if not override.startswith(("domain=", "+domain="))] + [f"domain=[{','.join(names)}]"]
