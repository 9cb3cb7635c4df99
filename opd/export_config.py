"""Settings of `opd export`: which model, in which format, and on what its loss is measured where there is one."""

import re
from dataclasses import dataclass, field
from enum import Enum

from teachers.config import DomainConfig

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class ExportFormat(Enum):
    """fp4: DeepSeek-V4's released layout with packed experts. plain: transformers' own. auto: fp4 for the families that have it, else plain."""

    auto = "auto"
    fp4 = "fp4"
    plain = "plain"


class RestFormat(Enum):
    """keep: what is no routed expert stays in the dtype it was trained in. fp8: attention and shared experts in FP8, which changes the model."""

    keep = "keep"
    fp8 = "fp8"


@dataclass(slots=True)
class TrainedModelConfig:
    """A model as training left it: a local folder or a hub id. It is exported in the dtype that its config.json names, so there is none to set.

    model: path or hub id.
    revision: commit, tag or branch on the hub.
    trust_remote_code: allow code that ships with the model to run.
    """

    model: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(slots=True)
class ExportConfig:
    """`opd export`: the folder to serve, verified against the model it was made from.

    run_dir: folder for student/, export.json and the resolved configuration.
    seed: key of every random choice; only the KL has any.
    threads: CPU threads of this process; null chooses.
    student: the model to export.
    format: layout of the folder.
    rest: format of what is no routed expert; fp8 needs format=fp4.
    round_experts: round experts that were not trained under FP4 to it, instead of refusing.
    max_shard_size: of one file of weights: bytes, or a number with KB, MB, GB or TB.
    domains: whose held-out prompts measure the KL of the exported from the given model, where rounding changes it; rest=fp8 needs some.
    kl_prompts: held-out prompts of each domain that the KL is measured on; null takes all.
    max_new_tokens, decode_width: as in evaluation, for the completions that the KL is measured on.
    """

    run_dir: str = "runs/export"
    seed: int = 0
    threads: int | None = None
    student: TrainedModelConfig = field(default_factory=TrainedModelConfig)
    format: ExportFormat = ExportFormat.auto
    rest: RestFormat = RestFormat.keep
    round_experts: bool = False
    max_shard_size: str = "5GB"
    domains: dict[str, DomainConfig] = field(default_factory=dict)
    kl_prompts: int | None = 256
    max_new_tokens: int = 256
    decode_width: int = 64


def check_export(cfg: ExportConfig) -> None:
    """Raises ValueError for settings that do not fit each other."""
    shard_bytes(cfg)
    if cfg.rest is RestFormat.fp8 and cfg.format is ExportFormat.plain:
        raise ValueError("rest=fp8 belongs to DeepSeek-V4's layout and would be ignored with format=plain: remove one")
    if cfg.rest is RestFormat.fp8 and not cfg.domains:
        raise ValueError("rest=fp8 changes the model, and its KL is measured on held-out prompts: select some with 'domain=[a,b]'")


def shard_bytes(cfg: ExportConfig) -> int:
    """max_shard_size as a number. Raises ValueError where it is none, or less than a byte."""
    found = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?) ?([KMGT]B)", cfg.max_shard_size)
    size = 0 if found is None else int(found[1]) if found[1] else round(float(found[2]) * UNITS[found[3]])
    if size < 1:
        raise ValueError(f"max_shard_size must be bytes or a number with KB, MB, GB or TB, as in 5GB, and not zero; it is {cfg.max_shard_size!r}")
    return size
