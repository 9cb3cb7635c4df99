"""The run folder: where a command writes, and the configuration that belongs to it.

    RUN/config.yaml          resolved configuration of the run; its first line names the command
    RUN/metrics.jsonl        opd/metrics.py
    RUN/checkpoints/         opd/checkpoint.py
    RUN/teachers.json        which teachers scored which steps, and the domains' settings then: teachers/manifest.py (of a distillation)
    RUN/warmup.json          opd/warmup.py, with warmup=sft
    RUN/rollouts/            rollout/replay.py, with rollout.save=true
    RUN/service/             rollout/service.py, with rollout.sampler=service: one folder for each sampler process
    RUN/weights/             rollout/weights.py and, with rollout.sampler=vllm, rollout/vllm_sampler.py: the newest weights that others sample with
    RUN/log/                 rollout/wal.py: tokens of the steps after the last checkpoint
    RUN/profile/             opd/profiling.py, with profile.steps
    RUN/student/             Hugging Face folder of the trained model, when the run is finished; experts that trained under FP4 hold its values in
                             the dtype of training (their masters are in the checkpoints)
    RUN/evaluation.json      opd/comparison.py (in a folder of `opd evaluate`)
    RUN/export.json          opd/export.py (in a folder of `opd export`)
    RUN/divergence.csv       opd/bench_divergence.py (in a folder of `opd bench`)
    RUN/qat.csv              opd/bench_qat.py (the same)
    RUN/teachers.csv         opd/bench_teachers.py (the same)
    RUN/rollout.csv          opd/bench_rollout.py (the same)
    RUN/step.csv             opd/bench_step.py (the same)
    RUN/.lock                held by the process that writes here

Files with a schema version may gain fields under the same version; a field that changes its meaning or goes raises it.

Nothing is written before every part of the run has been built and checked. A folder that holds a run with another
configuration is refused rather than mixed. What stands under `domains` may change with teachers.allow_change=true: when the resume has been
accepted, config.yaml gets the new domains; the old ones stay in teachers.json.
"""

import fcntl
import json
import shutil
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerBase

from opd.config import DistillConfig, RunConfig
from opd.distributed import barrier, broadcast_object, is_main
from opd.engine import Engine
from rollout.files import replace_text
from rollout.model import save_model
from teachers.config import RUNNING_SETTINGS, DomainConfig

MAY_DIFFER = (
    "fresh", "threads", "logger", "checkpoint", "profile", "run_dir", "check", "alarms", "rollout.vllm", "rollout.service",
    *(f"teachers.{name}" for name in RUNNING_SETTINGS),
)  # fmt: skip
"""Fields that may change when a run is resumed."""

LOCK_FILE = ".lock"

_LOCKS: dict[Path, IO] = {}
"""Lock files this process holds open, by folder; a lock lasts as long as its process."""


def open_run(cfg: RunConfig, command: str) -> Path:
    """Make or take up the run folder; every rank calls it.

    Raises ValueError where it holds another configuration or another command's, where another process writes to it, and where
    `fresh` would delete something that is not a run of this command, or that the run reads.
    """
    folder = Path(cfg.run_dir)
    problem = _prepare(folder, cfg, command) if is_main() else None
    problem = broadcast_object(problem)
    if problem is not None:
        raise ValueError(problem)
    return folder


def is_new_run(cfg: RunConfig) -> bool:
    """Whether a run will begin, rather than go on from a checkpoint in its folder; looks only."""
    return cfg.fresh or not any((Path(cfg.run_dir) / "checkpoints").glob("step-*"))


def write_config(folder: Path, cfg: Any, command: str) -> None:
    """Write FOLDER/config.yaml, whose first line says whose folder it is."""
    replace_text(folder / "config.yaml", _mark(command) + OmegaConf.to_yaml(OmegaConf.structured(cfg)))


def replace_domains(folder: Path, domains: dict[str, DomainConfig]) -> None:
    """Put the present domains into FOLDER/config.yaml, in place of those that stand there."""
    stored = folder / "config.yaml"
    text = stored.read_text()
    config = OmegaConf.create(text)
    config.domains = OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(RunConfig(domains=domains)))).domains
    new = text.partition("\n")[0] + "\n" + OmegaConf.to_yaml(config)
    if new != text:
        replace_text(stored, new)


def belongs_to(folder: Path, command: str) -> bool:
    """Whether a folder holds what a command wrote."""
    stored = folder / "config.yaml"
    return stored.is_file() and stored.read_text().startswith(_mark(command))


def require_own_folder(folder: Path, command: str) -> None:
    """Raises ValueError where a folder holds something that is not of a command; a lock file alone is what one leaves that was killed at its start."""
    is_used = folder.exists() and (not folder.is_dir() or any(path.name != LOCK_FILE for path in folder.iterdir()))
    if is_used and not belongs_to(folder, command):
        raise ValueError(f"{folder} is not a folder of `opd {command}`: choose another run_dir")


def lock(folder: Path) -> str | None:
    """Keep other processes out of a folder until this one ends; returns the problem where one is in it already."""
    if folder.resolve() in _LOCKS:
        return None
    file = (folder / LOCK_FILE).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return f"another process is writing to {folder}: wait for it, end it, or choose another run_dir"
    _LOCKS[folder.resolve()] = file
    return None


def _mark(command: str) -> str:
    return f"# written by opd {command}\n"


def _prepare(folder: Path, cfg: RunConfig, command: str) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        require_own_folder(folder, command)
        problem = lock(folder)
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"run_dir={folder} cannot be used: {error.strerror}"
    return problem or (_clear(folder, cfg) if cfg.fresh else None) or _compare(folder, cfg, command)


def _clear(folder: Path, cfg: RunConfig) -> str | None:
    """Delete what a run writes, and nothing else."""
    inputs = [cfg.student.model, *(domain.teacher.model for domain in cfg.domains.values())]
    inputs += [domain.teacher.adapter for domain in cfg.domains.values()]
    inputs += [cfg.rollout.replay, cfg.rollout.compare] if isinstance(cfg, DistillConfig) else []
    inside = [path for path in inputs if path is not None and folder.resolve() in (Path(path).resolve(), *Path(path).resolve().parents)]
    if inside:
        return f"fresh=true would delete {inside[0]}, which the run reads: choose another run_dir"
    for name in ("config.yaml", "metrics.jsonl", "wandb_id", "evaluation.json", "teachers.json", "warmup.json"):
        (folder / name).unlink(missing_ok=True)
    for name in ("checkpoints", "rollouts", "log", "service", "weights", "student", "wandb", "profile"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return None


def _compare(folder: Path, cfg: RunConfig, command: str) -> str | None:
    """Write the configuration where there is none; else the first setting that differs from it, as a problem."""
    stored = folder / "config.yaml"
    if not stored.is_file():
        write_config(folder, cfg, command)
        return None
    old = OmegaConf.to_container(OmegaConf.load(stored))
    new = OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(cfg))))
    has_teachers = isinstance(cfg, DistillConfig)
    changed = _first_difference(old, new, ("domains",) if has_teachers and cfg.teachers.allow_change else ())
    if changed is None:
        return None
    ways = ["choose another run_dir", "begin anew with fresh=true"]
    if has_teachers and changed.startswith("domains"):
        ways.append("go on with these domains with teachers.allow_change=true")
    return f"{folder} holds a run with another configuration ({changed}): {', '.join(ways[:-1])}, or {ways[-1]}"


def _first_difference(old: dict, new: dict, allowed: tuple[str, ...], path: str = "") -> str | None:
    """The first setting that differs, in words; None where all that do are in MAY_DIFFER or `allowed`."""
    for key in sorted(set(old) | set(new)):
        name, before, after = f"{path}{key}", old.get(key), new.get(key)
        if name in (*MAY_DIFFER, *allowed):
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            inner = _first_difference(before, after, allowed, name + ".")
            if inner is None and name == "domains" and list(before) != list(after):  # it decides which prompts a step draws
                inner = f"domains were {', '.join(before)} and are {', '.join(after)}, in this order"
            if inner is not None:
                return inner
        elif before != after and not _is_new_address(name, before, after):
            is_whole = path == "domains." and None in (before, after)
            return f"{name} is {'new' if before is None else 'gone'}" if is_whole else f"{name} was {json.dumps(before)} and is {json.dumps(after)}"
    return None


def _is_new_address(name: str, before: Any, after: Any) -> bool:
    """Whether a teacher's server has moved; that it holds the same model is seen when the run is taken up (teachers/manifest.py)."""
    return name.startswith("domains.") and name.endswith(".teacher.server") and None not in (before, after)


def config_dict(cfg: RunConfig) -> dict:
    """The config as plain values, for W&B."""
    return OmegaConf.to_container(OmegaConf.structured(cfg), enum_to_str=True)


def finish_run(run_dir: Path, engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the trained model to RUN/student; every rank calls it."""
    weights = engine.full_weights()
    if is_main():
        save_model(run_dir / "student", engine.model, tokenizer, weights)
    barrier()
