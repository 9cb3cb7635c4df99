"""Hydra's and OmegaConf's errors as one sentence in the words of the command line, with the nearest name that exists."""

import difflib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

DOMAIN_HELP = "select domains with 'domain=[a,b]', add one with +domain=NAME, drop one with '~domains.NAME'"


def explain(error: Exception, command: str, schema: type, folders: Iterable[Path]) -> str:
    """The sentence for an error raised while composing a command's config from the given conf folders."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = " ".join(str(error).split(" full_key:")[0].split())
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing_option(str(error.missing_cfg_file), folders)
    if isinstance(error, OverrideParseException):
        return f"the override {error.override!r} cannot be read: write it as setting=value, in quotes where it holds brackets or spaces"
    foreign = re.match(r"In '(.+?)'.*Key '(.+?)' not in", text)
    if foreign:
        return f"conf/{foreign[1]}.yaml sets {foreign[2]!r}, which {command} does not have: it is for another command"
    if isinstance(cause, ValidationError):
        return f"{cause.full_key}: {str(cause).splitlines()[0].rstrip('.')}"
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        key = cause.full_key or text.split("'")[1]
        return f"{command} has no setting {key!r}{nearest(key, list(_keys(schema)))}"
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


def _keys(schema: type) -> Iterator[str]:
    def walk(node: DictConfig, prefix: str) -> Iterator[str]:
        for key in node:
            yield f"{prefix}{key}"
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none():
                yield from walk(child, f"{prefix}{key}.")

    return walk(OmegaConf.structured(schema), "")
