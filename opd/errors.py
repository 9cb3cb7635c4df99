"""Errors in the words of the command line: Hydra's and OmegaConf's as one sentence with the nearest name that exists; a run that ends early."""

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

DOMAIN_HELP = "select domains with 'domain=[a,b]', add one with +domain=NAME, drop one with '~domains.NAME'"

PREEMPTED = 75
"""Exit code of a run that is to be started again as it was (EX_TEMPFAIL of sysexits.h)."""


USER_ERROR, INTERRUPTED = 2, 130

FAILED_JOBS = 4
"""Exit code of a sweep of which some jobs have failed (opd/sweep.py)."""

STOPPED = 3
"""Exit code of a run that an alarm, or an accepted checkpoint (accept.end_run), has ended, with a checkpoint; nothing starts it again by itself."""


class Preempted(Exception):  # noqa: N818 - it is no error
    """A run has ended before its last step, with a checkpoint (opd/stopping.py). code: its exit code."""

    def __init__(self, sentence: str, code: int = PREEMPTED):
        super().__init__(sentence)
        self.code = code


class RankLost(Exception):  # noqa: N818 - the sentence is for users
    """Another rank is gone, and this one ends with it (opd/heartbeat.py). code: its exit code."""

    def __init__(self, sentence: str, code: int):
        super().__init__(sentence)
        self.code = code


def explain(error: Exception, command: str, schema: type, folders: Iterable[Path]) -> str:
    """The sentence for an error raised while composing a command's config from the given conf folders."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = " ".join(str(error).split(" full_key:")[0].split())
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing_option(str(error.missing_cfg_file), folders)
    if isinstance(error, OverrideParseException):
        return f"the override {error.override!r} cannot be read: write it as setting=value, in quotes where it holds brackets or spaces"
    foreign = re.match(r"In '(.+?)'.*?(?:Key '(.+?)' not in|Could not override '(.+?)')", text)
    if foreign:
        return f"conf/{foreign[1]}.yaml sets {foreign[2] or foreign[3]!r}, which {command} does not have: it is for another command"
    if isinstance(cause, ValidationError):
        return f"{cause.full_key}: {str(cause).splitlines()[0].rstrip('.')}"
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        key = cause.full_key or text.split("'")[1]
        if _is_new_in_mapping(key, schema):
            return f"{key.rpartition('.')[0]} has no key {key.rpartition('.')[2]!r} yet: to add it, write +{key}=VALUE"
        return f"{command} has no setting {key!r}{nearest(key, list(_keys(schema, key)))}"
    if "domain" in text:
        return f"{text.rstrip('.')}: {DOMAIN_HELP}"
    return text.rstrip(".")


def nearest(word: str, words: list[str]) -> str:
    """" (did you mean 'X'?)" for the most similar of the words, or nothing where none is similar."""
    siblings = [known for known in words if known.rpartition(".")[0] == word.rpartition(".")[0]]
    found = difflib.get_close_matches(word, siblings, n=1, cutoff=0.5) or difflib.get_close_matches(word, words, n=1, cutoff=0.7)
    return f" (did you mean {found[0]!r}?)" if found else ""


def _missing_option(path: str, folders: Iterable[Path]) -> str:
    group, _, option = path.rpartition("/")
    options = sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})
    hint = f": add conf/domain/{option}.yaml, or choose from" if group == "domain" else "; there are"
    return f"there is no {group} called {option!r}{nearest(option, options)}{hint} {', '.join(options)}"


def _is_new_in_mapping(key: str, schema: type) -> bool:
    """Whether a key stands directly in a mapping of the user's own keys, such as `columns` or `student.architecture`."""
    kind = schema
    for part in key.split(".")[:-1]:
        kind = get_args(kind)[1] if get_origin(kind) is dict else get_type_hints(kind).get(part) if is_dataclass(kind) else None
    return get_origin(kind) is dict and not is_dataclass(get_args(kind)[1])


def _keys(schema: type, like: str, prefix: str = "") -> Iterator[str]:
    """Every setting of a schema; in a mapping of dataclasses (domains, sources, stages) those of the member that `like` names."""
    for name, kind in get_type_hints(schema).items():
        yield prefix + name
        inner = f"{prefix}{name}."
        if get_origin(kind) is dict and is_dataclass(get_args(kind)[1]) and like.startswith(inner):
            kind, inner = get_args(kind)[1], f"{inner}{like.removeprefix(inner).split('.')[0]}."
        if is_dataclass(kind):
            yield from _keys(kind, like, inner)
