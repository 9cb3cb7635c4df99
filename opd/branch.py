"""A run that begins from the full state of another run: branch_from=RUN@STEP, or RUN for the one in force there.

The checkpoint is verified and linked (copied where that cannot be) into the new run's folder, which is then taken up as any: weights, optimizer, step and
prompt stream are the other run's, settings are this one's. What shapes the state has to be equal (SHAPING); teachers may differ. Its metrics begin after
that step. RUN/lineage.json, schema version 1: {"schema": 1, "from": the run's folder, "step": S, "manifest": sha256 of its manifest.json}.

A checkpoint holds pickled files, and reading them runs what they say: branch from runs of people you trust.
"""

import json
import logging
import os
import shutil
from pathlib import Path

from omegaconf import OmegaConf

from opd import checkpoint_files as files
from opd.checkpoint_record import chosen_step
from opd.config import RunConfig
from rollout.files import read_json, replace_text

SCHEMA = 1
SHAPING = ("student.model", "student.architecture", "student.dtype", "quant.experts", "optim.kind")
"""Settings that a checkpoint's files depend on."""

LOG = logging.getLogger(__name__)


def begin_branch(folder: Path, cfg: RunConfig) -> None:
    """Put the other run's checkpoint into a run folder, unless it holds one; the main rank calls it.

    Raises ValueError where the other run or its checkpoint is not there or damaged, was shaped by other settings, or has no step left to do.
    """
    checkpoints = folder / "checkpoints"
    if cfg.branch_from is None or any(checkpoints.glob("step-*")):
        return
    source = branch_source(cfg.branch_from)
    run, tag = source.parents[1], source.name
    problem = files.problem_of(source)
    if problem is not None:
        raise ValueError(f"branch_from={cfg.branch_from} cannot be taken up: {problem}")
    step = read_json(source / "opd.json")["step"]
    _require_same_shape(run, cfg)
    if step >= cfg.total_steps:
        raise ValueError(f"branch_from={cfg.branch_from} has done {step} steps and num_steps={cfg.total_steps}: set num_steps to more")
    LOG.info("branch of %s after step %d; its files are pickled: branch from runs of people you trust", run, step)
    files.begin_partial(checkpoints)
    for path in source.rglob("*"):
        if path.is_file():
            _link(path, checkpoints / files.PARTIAL / path.relative_to(source))
    lineage = {"schema": SCHEMA, "from": str(run), "step": step, "manifest": files.digest_of(source)}
    replace_text(folder / "lineage.json", json.dumps(lineage))
    (checkpoints / files.PARTIAL).rename(checkpoints / tag)
    files.point_to(checkpoints, step)


def branch_source(name: str) -> Path:
    """The folder of the checkpoint that branch_from names. Raises ValueError where it is not there."""
    run, _, step = name.rpartition("@") if "@" in name else (name, "", "")
    if step == "chosen":
        step = str(chosen_step(Path(run)))
    if step and not step.isdecimal():
        raise ValueError(f"branch_from must be RUN@STEP, RUN@chosen or RUN, not {name!r}")
    found = files.find(Path(run) / "checkpoints").tags
    if not found:
        raise ValueError(f"branch_from={name}: {run} holds no checkpoint")
    tag = files.tag_of(int(step)) if step else found[0]
    if not (Path(run) / "checkpoints" / tag).is_dir():
        steps = ", ".join(str(int(other.removeprefix("step-"))) for other in sorted(found))
        raise ValueError(f"branch_from={name}: {run} holds no checkpoint of step {step}; there are {steps}")
    return Path(run) / "checkpoints" / tag


def branched_at(folder: Path) -> int | None:
    """The step from which a run folder's run was branched off; None where it was not."""
    return read_json(folder / "lineage.json")["step"] if (folder / "lineage.json").is_file() else None


def _require_same_shape(run: Path, cfg: RunConfig) -> None:
    old, new = OmegaConf.load(run / "config.yaml"), OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(cfg)))
    for name in SHAPING:
        before, after = OmegaConf.select(old, name), OmegaConf.select(new, name)
        if before != after:
            words = f"was shaped by {name}={before} and this run has {after}"
            raise ValueError(f"branch_from={cfg.branch_from} {words}: keep it, or begin from weights alone with student.model")


def _link(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(path, target)
