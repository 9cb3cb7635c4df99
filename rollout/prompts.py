"""PromptMixture: the data sets of all domains as one weighted, shuffled, resumable stream of prompts.

How many prompts of each domain a step holds is drawn by systematic sampling: one uniform number per step, and each domain
gets the integers that fall into its share, so a count never differs from share times step size by one or more, and is right on
average. Independent draws would starve small domains in some steps. Within a domain, rows follow a permutation keyed
by (seed, source, epoch). The whole state is the number of rows consumed per source.

This is the only module that imports `datasets`.
"""

import hashlib
import json
import math
import random
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from rollout.chat import Turns, encode_prompts, turns_of
from rollout.config import PromptsConfig, SourceConfig, TooLong, schedule_value
from rollout.errors import first_sentence
from rollout.overlap import DomainOverlap, OverlapSearch
from rollout.synthetic import synthetic_rows
from rollout.types import Prompt
from rollout.words import GRAM_WORDS

FILE_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
ROW_FIELDS = ("prompt", "messages", "answer", "slip")
DROP_REASONS = ("too_long", "held_out")


@dataclass(slots=True)
class DomainPrompts:
    """The rows of one domain, tokenised: what `PromptMixture` and evaluation draw from.

    sources: source name -> rows; each has "index" (its place in the source), "tokens", "answer" and "slip" (None where the data has none); those of a
        synthetic domain with a backspace have "repaired" too.
    dropped: rows left out, by reason: too_long, or held_out (they overlap with a held-out prompt).
    overlap: of the rows that are not too long; those left out as held_out included.
    held_out: number and sha256 of the domain's held-out rows, as they were read; None where it has none, or they were not asked for.
    """

    name: str
    cfg: PromptsConfig
    sources: dict[str, list[dict[str, Any]]]
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DROP_REASONS, 0))
    overlap: DomainOverlap = field(default_factory=DomainOverlap)
    consumed: dict[str, int] = field(default_factory=dict)
    held_out: tuple[int, str] | None = None

    @property
    def num_rows(self) -> int:
        """Rows in use."""
        return sum(len(rows) for rows in self.sources.values())

    @property
    def num_dropped(self) -> int:
        """Rows left out, for whatever reason; with those in use, all that were read."""
        return sum(self.dropped.values())

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(row["tokens"]) for rows in self.sources.values() for row in rows)

    def row(self, source: str, position: int, seed: int) -> dict[str, Any]:
        """The row at a position of the endless shuffled order of one source."""
        rows = self.sources[source]
        epoch, place = divmod(position, len(rows))
        return rows[int(_permutation(len(rows), f"{seed}/{self.name}/{source}/{epoch}")[place])]

    def prompt(self, source: str, row: dict[str, Any], request: int) -> Prompt:
        """A row of one source as a prompt with that number."""
        return Prompt(domain=self.name, request=request, row=f"{source}:{row['index']}", tokens=tuple(row["tokens"]), answer=row["answer"])

    def all_rows(self) -> list[tuple[str, dict[str, Any]]]:
        """(source, row) of all rows in use, in order."""
        return [(source, row) for source, rows in self.sources.items() for row in rows]


class PromptMixture:
    """The stream of prompts of all domains. `state()` and `restore()` make it resumable."""

    def __init__(self, domains: dict[str, DomainPrompts], prompts_per_step: int, seed: int, excluded: Collection[str] = ()):
        """excluded: domains that are asked for no prompts; it may grow during the run, on all ranks alike."""
        if not domains:
            raise ValueError("no domain is selected: add one, as in 'domain=[arithmetic,sorting]'")
        self.domains, self.prompts_per_step, self.seed, self.excluded = domains, prompts_per_step, seed, excluded
        self.absent: dict[str, dict[str, int]] = {}

    def next(self, step: int) -> list[Prompt]:
        """The prompts of one step, the same on every rank; the step's number keys the random choices."""
        return [self.draw(name, step * self.prompts_per_step + slot)[0] for slot, name in enumerate(self._domains_of(step))]

    def next_rows(self, step: int) -> list[tuple[Prompt, dict[str, Any]]]:
        """As `next`, with each prompt's data row (for supervised fine-tuning, which needs its answers)."""
        return [self.draw(name, step * self.prompts_per_step + slot) for slot, name in enumerate(self._domains_of(step))]

    def asked_shares(self, step: int) -> dict[str, float]:
        """Fraction of the step's prompts that each domain asks for; they sum to 1."""
        shares = {name: schedule_value(d.cfg.share, step, f"domains.{name}.prompts.share") for name, d in self.domains.items() if name not in self.excluded}
        total = sum(shares.values())
        if total == 0:
            raise ValueError(f"every domain's prompts.share is 0 at step {step}, so there is nothing to sample")
        return {name: share / total for name, share in shares.items()}

    def state(self) -> dict[str, dict[str, int]]:
        return self.absent | {name: dict(domain.consumed) for name, domain in self.domains.items()}

    def restore(self, state: dict[str, dict[str, int]]) -> None:
        """Take up a state; a domain that it lacks begins at its first row, and one that is not here is remembered for when it comes back."""
        self.absent = {name: dict(consumed) for name, consumed in state.items() if name not in self.domains}
        for name, domain in self.domains.items():
            domain.consumed = {source: count for source, count in state.get(name, {}).items() if source in domain.sources}

    def draw(self, name: str, request: int) -> tuple[Prompt, dict[str, Any]]:
        """The domain's next prompt, and its data row."""
        domain = self.domains[name]
        source = _choose_source(domain, f"{self.seed}/source/{request}")
        position = domain.consumed.get(source, 0)
        domain.consumed[source] = position + 1
        row = domain.row(source, position, self.seed)
        return domain.prompt(source, row, request), row

    def choose(self, name: str, count: int, purpose: str, first_request: int) -> list[Prompt]:
        """Some of a domain's prompts, drawn by the purpose's own key and numbered from `first_request`; the stream does not notice."""
        rows = self.domains[name].all_rows()
        rows = random.Random(f"{self.seed}/{purpose}/{name}").sample(rows, min(count, len(rows)))
        return [self.domains[name].prompt(source, row, first_request + number) for number, (source, row) in enumerate(rows)]

    def _domains_of(self, step: int) -> list[str]:
        offset = random.Random(f"{self.seed}/mixture/{step}").random()
        names, cumulative = [], 0.0
        for name, share in self.asked_shares(step).items():
            begin, cumulative = cumulative, cumulative + share * self.prompts_per_step
            names += [name] * (int(np.floor(cumulative + offset)) - int(np.floor(begin + offset)))
        while len(names) < self.prompts_per_step:  # only by rounding of the last cumulative sum
            names.append(name)
        return names[: self.prompts_per_step]


def load_domain_prompts(
    name: str, cfg: PromptsConfig, tokenizer: PreTrainedTokenizerBase, longest: int, search: OverlapSearch | None = None
) -> DomainPrompts:
    """Read and tokenise the rows of one domain; `longest` is the number of prompt tokens that still fit. Rows that fit are added to `search`.

    Raises ValueError for a missing or empty data set, unknown columns, settings that would be ignored, and a prompt too long under
    `too_long: error`.
    """
    domain = DomainPrompts(name=name, cfg=cfg, sources={})
    for source_name, source in _sources_of(name, cfg).items():
        rows = load_rows(source, f"domain {name}, source {source_name}")
        kept = []
        for index, (row, tokens) in enumerate(zip(rows, encode_prompts(rows, cfg, tokenizer, f"{name}/{source_name}"), strict=True)):
            if len(tokens) <= longest:
                texts = {name: row.get(name) for name in ("answer", "slip")} | ({"repaired": row["repaired"]} if "repaired" in row else {})
                kept.append({"index": index, "tokens": tokens, **texts})
            elif cfg.too_long is TooLong.error:
                raise ValueError(
                    f"the prompt in row {name}/{source_name}:{index} has {len(tokens)} tokens and only {longest} fit before the completion: "
                    "shorten it, or set prompts.too_long=drop"
                )
        domain.dropped["too_long"] += len(rows) - len(kept)
        if not kept:
            raise ValueError(f"domain {name}, source {source_name} ({source.path}) has no usable prompt")
        domain.sources[source_name] = kept
        if search is not None:
            indices = [row["index"] for row in kept]
            search.add(name, source_name, indices, _turns_of_rows([rows[index] for index in indices], cfg.raw, f"{name}/{source_name}"))
    return domain


def load_prompts(
    cfgs: dict[str, PromptsConfig], tokenizer: PreTrainedTokenizerBase, longest: int, held_out: dict[str, SourceConfig] | None = None
) -> dict[str, DomainPrompts]:
    """`load_domain_prompts` for every domain, and what their rows share with each other and with the `held_out` prompts of all domains.

    Held-out prompts are read for their text alone, so no length is asked of them here. Rows that overlap are left out where
    `exclude_held_out` says so; elsewhere they are in use, and `require_no_overlap` refuses them.
    """
    sources = {name: source for name, source in (held_out or {}).items() if source.path is not None}
    rows = {name: load_rows(source, f"domain {name}, source held_out") for name, source in sources.items()}
    search = OverlapSearch({name: _turns_of_rows(rows[name], cfgs[name].raw, f"{name}/held_out") for name in sources})
    domains = {name: load_domain_prompts(name, cfg, tokenizer, longest, search) for name, cfg in cfgs.items()}
    for name, found in rows.items():
        text = "\n".join(json.dumps(row, sort_keys=True, default=str) for row in found)
        domains[name].held_out = len(found), hashlib.sha256(text.encode()).hexdigest()
    for name, overlap in search.findings().items():
        domains[name].overlap = overlap
        if cfgs[name].exclude_held_out:
            _leave_out_held_out(domains[name])
    return domains


def require_no_overlap(prompts: dict[str, DomainPrompts]) -> None:
    """Raises ValueError for the first training row in use that overlaps with a held-out prompt (rollout/overlap.py)."""
    for name, domain in prompts.items():
        if domain.overlap.held_out and not domain.cfg.exclude_held_out:
            row = domain.overlap.held_out[0]
            relation = "is equal to" if row.is_equal else f"shares {GRAM_WORDS} consecutive words with"
            raise ValueError(
                f"training row {name}/{row.source}:{row.index} {relation} the held-out prompt {row.held_out} ({len(domain.overlap.held_out)} of "
                f"{domain.num_rows} rows of domain {name} overlap like this): remove such rows from the data, or leave them out with "
                f"domains.{name}.prompts.exclude_held_out=true"
            )


def load_held_out(
    cfgs: dict[str, PromptsConfig], sources: dict[str, SourceConfig], tokenizer: PreTrainedTokenizerBase, longest: int
) -> dict[str, DomainPrompts]:
    """The held-out prompts of the domains that have any, rendered as their training prompts are."""
    loaded = {}
    for name, source in sources.items():
        if source.path is not None:
            own = PromptsConfig(sources={"held_out": source}, too_long=cfgs[name].too_long)
            rendering = replace(own, system_prompt=cfgs[name].system_prompt, template_kwargs=cfgs[name].template_kwargs, raw=cfgs[name].raw)
            loaded[name] = load_domain_prompts(name, rendering, tokenizer, longest)
    return loaded


def require_answers(prompts: dict[str, DomainPrompts], names: Iterable[str], purpose: str) -> None:
    """Raises ValueError for the first row of the named domains that has no answer."""
    for name in names:
        for source, rows in prompts[name].sources.items():
            missing = [row["index"] for row in rows if row["answer"] is None]
            if missing:
                raise ValueError(f"row {name}/{source}:{missing[0]} has no answer to {purpose}: map the column with columns.answer")


def load_rows(cfg: SourceConfig, where: str) -> list[dict[str, Any]]:
    """The rows of one data set, with our column names. Raises ValueError, beginning with `where`."""
    if cfg.path is None:
        raise ValueError(f"{where} has no prompts: set its path to a .jsonl or .parquet file, a hub id, or synthetic:NAME")
    if cfg.rows is not None and cfg.rows < 1:
        raise ValueError(f"{where} asks for rows={cfg.rows}: ask for one at least, or null for all")
    if cfg.path.startswith("synthetic:"):
        if cfg.rows is None:
            raise ValueError(f"{where} is synthetic, hence endless: set rows")
        return synthetic_rows(cfg.path.removeprefix("synthetic:"), cfg.split, cfg.rows, cfg.difficulty)
    if cfg.difficulty != 1:
        raise ValueError(f"{where}: {cfg.path} is not synthetic, so difficulty={cfg.difficulty} would be ignored: leave it out")
    table = _load_table(cfg, where)
    if cfg.rows is not None:
        table = table.select(range(min(cfg.rows, len(table))))
    if len(table) == 0:
        raise ValueError(f"{where}: the data set {cfg.path} is empty")
    return [_rename(row, cfg.columns, where) for row in table]


def _turns_of_rows(rows: list[dict[str, Any]], raw: bool, where: str) -> list[Turns]:
    return [turns_of(row, raw, f"{where}:{index}") for index, row in enumerate(rows)]


def _leave_out_held_out(domain: DomainPrompts) -> None:
    """Take the rows out of use that overlap with a held-out prompt. Raises ValueError for a source of which nothing is left."""
    overlapping = {(row.source, row.index) for row in domain.overlap.held_out}
    for source, rows in domain.sources.items():
        domain.sources[source] = [row for row in rows if (source, row["index"]) not in overlapping]
        if not domain.sources[source]:
            raise ValueError(f"every prompt of domain {domain.name}, source {source} overlaps with a held-out prompt: give it other data")
    domain.dropped["held_out"] = len(overlapping)


def _load_table(cfg: SourceConfig, where: str) -> datasets.Dataset:
    path = Path(cfg.path).expanduser()
    if path.suffix in FILE_BUILDERS:
        if not path.is_file():
            raise ValueError(f"{where}: there is no file {cfg.path}")
        if path.stat().st_size == 0:
            raise ValueError(f"{where}: the data set {cfg.path} is empty")
    try:
        if path.suffix in FILE_BUILDERS:
            return datasets.load_dataset(FILE_BUILDERS[path.suffix], data_files=str(path), split=_split_of_file(cfg, where))
        return datasets.load_dataset(cfg.path, cfg.name, revision=cfg.revision, split=cfg.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, ConnectionError) as error:
        raise ValueError(f"{where}: the data set {cfg.path} cannot be read: {first_sentence(error.__cause__ or error)}") from error


def _split_of_file(cfg: SourceConfig, where: str) -> str:
    """A file is one split, which `datasets` calls train, whatever ours is called; a slice such as train[90%:] is taken of it."""
    split, bracket, part = cfg.split.partition("[")
    if cfg.name is not None or cfg.revision is not None or split not in ("train", "test"):
        raise ValueError(f"{where}: {cfg.path} is a file, so name, revision and a split other than train (or a slice of it) would be ignored")
    return f"train{bracket}{part}"


def _sources_of(name: str, cfg: PromptsConfig) -> dict[str, SourceConfig]:
    """The sources of a domain, by name. Raises ValueError for settings that would be ignored, and for weights that are no shares."""
    if not cfg.sources:
        if cfg.weight != 1.0:
            raise ValueError(f"domain {name} has one source, so prompts.weight={cfg.weight} would be ignored: its part of a step is prompts.share")
        return {"prompts": cfg}
    outside_sources = (cfg.path, cfg.name, cfg.revision, cfg.rows, cfg.columns, cfg.weight, cfg.split, cfg.difficulty)
    if outside_sources != (None, None, None, None, {}, 1.0, "train", 1):
        raise ValueError(f"domain {name} has prompts.sources, so a path, rows, columns and the like beside them would be ignored: move them into a source")
    weights = [source.weight for source in cfg.sources.values()]
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or sum(weights) == 0:
        raise ValueError(f"domain {name}: the weights of its sources must be numbers >= 0 that are not all 0, not {weights}")
    return cfg.sources


def _rename(row: dict[str, Any], columns: dict[str, str], where: str) -> dict[str, Any]:
    unknown = set(columns) - set(ROW_FIELDS)
    if unknown:
        raise ValueError(f"{where}: columns maps {sorted(unknown)[0]!r}, but the names to map are {', '.join(ROW_FIELDS)}")
    absent = [column for column in columns.values() if column not in row]
    if absent:
        raise ValueError(f"{where}: the data has no column {absent[0]!r}; it has {', '.join(row)}")
    other = {"messages": "prompt", "prompt": "messages"}
    claimed = {other[name] for name in columns if name in other and other[name] not in columns}
    names = {**{name: name for name in ROW_FIELDS if name not in claimed}, **columns}
    found = {name: row.get(column) for name, column in names.items() if row.get(column) is not None}
    return {name: value if name in ("prompt", "messages") else str(value) for name, value in found.items()}


def _choose_source(domain: DomainPrompts, key: str) -> str:
    sources = domain.cfg.sources
    if not sources:
        return next(iter(domain.sources))
    return random.Random(key).choices(list(sources), weights=[source.weight for source in sources.values()])[0]


_PERMUTATIONS: dict[tuple[int, str], np.ndarray] = {}


def _permutation(size: int, key: str) -> np.ndarray:
    """A permutation keyed by text; the ones in use are kept, since a step asks for the same one many times."""
    if (size, key) not in _PERMUTATIONS:
        if len(_PERMUTATIONS) > 64:
            _PERMUTATIONS.clear()
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
        _PERMUTATIONS[size, key] = np.random.default_rng(seed).permutation(size)
    return _PERMUTATIONS[size, key]
