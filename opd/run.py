"""The run folder: where a command writes, and the configuration that belongs to it.

    RUN/config.yaml          resolved configuration of the run; its first line names the command
    RUN/state.json           opd/run_state.py: running, done, preempted, stopped or failed, and why
    RUN/starts.jsonl         opd/run_facts.py: command line, code, versions, hardware, hashes of model and data at each start; RUN/starts/ has its diffs
    RUN/logs/                opd/run_log.py: what each rank printed
    RUN/changes.jsonl        opd/config_changes.py
    RUN/lineage.json         opd/branch.py, with branch_from
    RUN/metrics.jsonl        opd/metrics.py
    RUN/alarms.jsonl         opd/alarm_actions.py: the episodes of which somebody has been told
    RUN/scores.json          opd/scores.py: scores of each held-out prompt at the newest evaluation
    RUN/checkpoints/         opd/checkpoint.py
    RUN/teachers.json        which teachers scored which steps, and the domains' settings then: teachers/manifest.py (of a distillation)
    RUN/warmup.json          opd/warmup.py, with warmup=sft
    RUN/samples/             opd/samples.py: a few rollouts with the divergence of each token
    RUN/rollouts/            rollout/replay.py, with rollout.save=true
    RUN/service/             rollout/service.py, with rollout.sampler=service: one folder for each sampler process
    RUN/weights/             rollout/weights.py and, with rollout.sampler=vllm, rollout/vllm_sampler.py: the newest weights that others sample with
    RUN/log/                 rollout/wal.py: tokens of the steps after the last checkpoint
    RUN/profile/             opd/profiling.py, with profile.steps
    RUN/reference/           opd/grpo.py, with grpo.kl: Hugging Face folder of the model that GRPO began with
    RUN/student/             Hugging Face folder of the trained model, when the run is finished; experts that trained under FP4 hold its values in
                             the dtype of training (their masters are in the checkpoints)
    RUN/students/            opd/checkpoint_model.py: models of checkpoints that were asked for as RUN@STEP
    RUN/evaluations/         opd/checkpoint_evaluation.py: what `opd evaluate RUN` found of the checkpoints, and which is chosen
    RUN/wandb/, wandb_id     opd/wandb_log.py, with a logger
    RUN/report.html          opd/report.py
    RUN/evaluation.json      opd/comparison.py (in a folder of `opd evaluate`)
    RUN/export.json          opd/export.py (in a folder of `opd export`)
    RUN/merge.json           opd/merge.py (in a folder of `opd merge`)
    RUN/stages/              opd/stages.py (in a folder of `opd pipeline` or `opd compare`), with a folder for each stage
    RUN/results/             opd/compare.py (in a folder of `opd compare`)
    RUN/divergence.csv       opd/bench_divergence.py (in a folder of `opd bench`)
    RUN/qat.csv              opd/bench_qat.py (the same)
    RUN/teachers.csv         opd/bench_teachers.py (the same)
    RUN/rollout.csv          opd/bench_rollout.py (the same)
    RUN/step.csv             opd/bench_step.py (the same)
    RUN/.lock                opd/run_lock.py: held by the process that writes here

Files with a schema version may gain fields under the same version; a field that changes its meaning or goes raises it.

Nothing is written before every part of the run has been built and checked. A folder that holds a run with another
configuration is refused rather than mixed; opd/config_changes.py says what may differ when it is taken up.
"""

import shutil
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerBase

from opd.branch import begin_branch
from opd.checkpoint_writer import settle
from opd.config import DistillConfig, RunConfig, rollout_settings
from opd.config_changes import FILE as CHANGES
from opd.config_changes import Change, Rule, find_changes, forget_unmade
from opd.distributed import Group, barrier, broadcast_object, is_main, rank
from opd.engine import Engine
from opd.run_facts import read_starts, record_command
from opd.run_folder import MARK, command_of
from opd.run_lock import LOCK_FILE, is_held, lock
from opd.run_log import open_log
from opd.run_state import begin_state
from rollout.files import append_lines, replace_text
from rollout.model import save_model

FILES = (
    "config.yaml", "state.json", "starts.jsonl", "metrics.jsonl", "scores.json", "wandb_id", "evaluation.json", "teachers.json", "warmup.json", "changes.jsonl",
    "lineage.json", "alarms.jsonl",
)  # fmt: skip
FOLDERS = (
    "logs", "starts", "checkpoints", "rollouts", "log", "service", "weights", "student", "students", "reference", "wandb", "profile", "samples", "evaluations",
)  # fmt: skip
"""What a run writes, and `fresh` deletes."""


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
    open_log(folder, rank(Group.data))
    return folder


def is_new_run(cfg: RunConfig) -> bool:
    """Whether a run will begin, rather than go on from a checkpoint, its own or another run's; looks only."""
    return cfg.branch_from is None and (cfg.fresh or not any((Path(cfg.run_dir) / "checkpoints").glob("step-*")))


def write_config(folder: Path, cfg: Any, command: str) -> None:
    """Write FOLDER/config.yaml, whose first line says whose folder it is."""
    replace_text(folder / "config.yaml", f"{MARK}{command}\n" + OmegaConf.to_yaml(OmegaConf.structured(cfg)))


def begin_folder(folder: Path, cfg: Any, command: str) -> None:
    """Begin what a command without checkpoints writes to its folder: its settings, what it is made with, and that it is at work. The main rank calls it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, cfg, command)
    record_command(folder)
    begin_state(folder, command, None)


def require_own_folder(folder: Path, command: str) -> None:
    """Raises ValueError where a folder holds something that is not of a command; a lock file alone is what one leaves that was killed at its start."""
    is_used = folder.exists() and (not folder.is_dir() or any(path.name != LOCK_FILE for path in folder.iterdir()))
    if is_used and command_of(folder) != command:
        raise ValueError(f"{folder} is not a folder of `opd {command}`: choose another run_dir")


def _prepare(folder: Path, cfg: RunConfig, command: str) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        require_own_folder(folder, command)
        problem = lock(folder)
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"run_dir={folder} cannot be used: {error.strerror}"
    return problem or (_clear(folder, cfg) if cfg.fresh else None) or _begin(folder, cfg, command)


def _begin(folder: Path, cfg: RunConfig, command: str) -> str | None:
    """Write the configuration where there is none, and hold it to what is there; a branch gets its checkpoint."""
    problem = _compare(folder, cfg)
    if problem is not None:
        return problem
    if not (folder / "config.yaml").is_file():
        write_config(folder, cfg, command)
    try:
        begin_branch(folder, cfg)
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"branch_from={cfg.branch_from} cannot be taken up: {error.filename}: {error.strerror}"
    return None


def _clear(folder: Path, cfg: RunConfig) -> str | None:
    """Delete what a run writes, and nothing else."""
    inputs = [cfg.student.model, *(domain.teacher.model for domain in cfg.domains.values())]
    inputs += [domain.teacher.adapter for domain in cfg.domains.values()]
    rollout = rollout_settings(cfg)
    inputs += [] if rollout is None else [rollout.replay, rollout.compare]
    inside = [path for path in inputs if path is not None and folder.resolve() in (Path(path).resolve(), *Path(path).resolve().parents)]
    if inside:
        return f"fresh=true would delete {inside[0]}, which the run reads: choose another run_dir"
    if is_held(folder / "evaluations"):
        return f"fresh=true would delete {folder / 'evaluations'}, to which an opd evaluate writes: end that first"
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    for name in FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    return None


def _compare(folder: Path, cfg: RunConfig) -> str | None:
    """The settings that must not differ from those of the run in the folder and do, as a problem."""
    if not (folder / "config.yaml").is_file():
        return None
    refused = [change for change in _changes(folder, cfg) if change.rule is Rule.refused]
    if not refused:
        return None
    ways = ["choose another run_dir", "begin anew with fresh=true"]
    if isinstance(cfg, DistillConfig) and refused[0].setting.startswith("domains"):
        ways.append("go on with these domains with teachers.allow_change=true")
    more = f", and {len(refused) - 1} more" if len(refused) > 1 else ""
    return f"{folder} holds a run with another configuration ({refused[0]}{more}): {', '.join(ways[:-1])}, or {ways[-1]}"


def _changes(folder: Path, cfg: RunConfig) -> list[Change]:
    """How a config differs from the one in a run folder."""
    new = OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(cfg))))
    return find_changes(_settings(folder), new, isinstance(cfg, DistillConfig) and cfg.teachers.allow_change)


def _settings(folder: Path) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))


def record_changes(folder: Path, cfg: RunConfig, step: int) -> list[Change]:
    """Make a config that a run was taken up with after `step` updates the run's own, and return how it differs from the one before."""
    found, start = _changes(folder, cfg), len(read_starts(folder))
    forget_unmade(folder, _settings(folder), start)
    if found:
        append_lines(folder / CHANGES, [change.record(step, start) for change in found if change.rule is Rule.recorded])
        first_line = (folder / "config.yaml").read_text().partition("\n")[0]
        replace_text(folder / "config.yaml", first_line + "\n" + OmegaConf.to_yaml(OmegaConf.structured(cfg)))
    return found


def config_dict(cfg: RunConfig) -> dict:
    """The config as plain values, for W&B."""
    return OmegaConf.to_container(OmegaConf.structured(cfg), enum_to_str=True)


def finish_run(run_dir: Path, engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the trained model to RUN/student; every rank calls it."""
    settle()
    weights = engine.full_weights()
    if is_main():
        save_model(run_dir / "student", engine.model, tokenizer, weights)
    barrier()
