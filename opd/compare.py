"""A comparison: several ways ("arms") to make one student of the same base and teachers, each judged on the same held-out prompts.

The stages that make base and teachers come first, then a stage and an evaluation for each seed of each arm, run and resumed as a pipeline's are
(opd/stages.py): a comparison that is cut off goes on with the same command, arm by arm. Arms that are to have another arm's seconds come last, since the
number of their steps follows from what was measured.

    RUN/ARM-SEED/                   what the arm's command writes
    RUN/ARM-SEED-evaluation/        opd/comparison.py
    RUN/evaluations/                opd/evaluation_cache.py: base and teachers are evaluated once for all arms
    RESULTS/ARM-SEED.json           opd/compare_summary.py: what is kept of a finished arm; the table is made of these files alone

An arm whose summary is there, with the same settings, is not run again, nor are base and teachers where no arm needs them any more. A summary names the hashes
of base and teachers: the table marks arms that were made of others.
"""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from opd.compare_config import ArmConfig, CompareConfig
from opd.compare_summary import Summaries, is_of, read_summaries, summarize, write_summary
from opd.compare_table import print_tables
from opd.pipeline_config import PipelineConfig, StageConfig
from opd.run import require_own_folder
from opd.run_lock import lock
from opd.stages import Stage, run_stages

EVALUATION = "evaluation"


def compare(cfg: CompareConfig) -> None:
    """Run the arms that are not finished, then print the tables. Raises ValueError where a stage fails, Preempted where one ends early."""
    if not cfg.arms or cfg.base_model is None or not cfg.teachers:
        raise ValueError("there is nothing to compare: choose a comparison, as in `opd compare experiment=twelve_domains`")
    results = results_folder(cfg)
    if not cfg.table_only:
        chosen = {name: arm for name, arm in cfg.arms.items() if cfg.only is None or name in cfg.only}
        if cfg.fresh:  # first of all, so that what is cut off goes on without `fresh`
            _own(Path(cfg.run_dir))
            _forget(cfg, chosen, results)
        _run(cfg, {name: arm for name, arm in chosen.items() if arm.seconds_of is None}, results)
        matched = {name: matched_arm(cfg, arm, results) for name, arm in chosen.items() if arm.seconds_of is not None}
        _run(replace(cfg, fresh=False), matched, results)
    summaries = read_summaries(results)
    print_tables(cfg, summaries, results, outdated(cfg, summaries, results))


def results_folder(cfg: CompareConfig) -> Path:
    """Where summaries are."""
    return Path(cfg.results or Path(cfg.run_dir) / "results")


def matched_arm(cfg: CompareConfig, arm: ArmConfig, results: Path) -> ArmConfig:
    """An arm whose settings named in `scaled` grow so that it takes the seconds of another, of each the fastest seed, since others may have shared the
    machine with more. The first of them, where the arm that it is like does not write it, has the number of that arm's steps.

    Raises ValueError where no seed of an arm that it follows from is finished, or another of `scaled` is not among that one's overrides.
    """
    fastest = {}
    found = read_summaries(results)
    for name in (arm.like, arm.seconds_of):
        budgets = [found[name, seed]["budget"] for seed in range(cfg.arms[name].seeds) if is_of(found, cfg, name, seed)]
        if not budgets:
            raise ValueError(f"the arm that is to have the seconds of {arm.seconds_of} needs {name} to be finished: take {name} into `only`")
        fastest[name] = min(budgets, key=lambda budget: budget["seconds"])
    factor = fastest[arm.seconds_of]["seconds"] / fastest[arm.like]["seconds"]
    model = cfg.arms[arm.like]
    written = dict(override.split("=", 1) for override in model.overrides if "=" in override)
    written = {arm.scaled[0]: fastest[arm.like]["steps"]} | written
    missing = [setting for setting in arm.scaled if setting not in written]
    if missing:
        raise ValueError(f"an arm like {arm.like} is to have more of {missing[0]}, which is not among that arm's overrides: write it there")
    scaled = [f"{setting}={max(1, round(float(written[setting]) * factor))}" for setting in arm.scaled]
    return ArmConfig(
        label=arm.label,
        role=arm.role,
        command=model.command,
        overrides=[*model.overrides, *arm.overrides, *scaled],
        seeds=arm.seeds,
        processes=arm.processes,
    )


def _run(cfg: CompareConfig, arms: dict[str, ArmConfig], results: Path) -> None:
    """Run the seeds of the arms that have no summary yet, one pipeline for all of them, and summarise."""
    waiting = list(unfinished(cfg, arms, results))
    if not waiting:
        return
    stages = dict(cfg.stages)
    for name, seed in waiting:
        stages |= arm_stages(cfg, name, arms[name], seed)
    pipeline = PipelineConfig(run_dir=cfg.run_dir, seed=cfg.seed, fresh=cfg.fresh, logger=cfg.logger, stages=stages)

    run_stages(pipeline, "compare", cfg, partial(_keep, cfg, arms, results))


def _keep(cfg: CompareConfig, arms: dict[str, ArmConfig], results: Path, stage: Stage) -> None:
    """Summarise an arm when its evaluation is done; its student has been made before."""
    trained, _, suffix = stage.name.rpartition("-")
    if suffix == EVALUATION:
        name, _, seed = trained.rpartition("-")
        write_summary(results, summarize(cfg, name, arms[name], int(seed)))


def _own(run_dir: Path) -> None:
    """Raises ValueError for a folder that is not a comparison's, or that another process writes to: nothing there may be deleted."""
    require_own_folder(run_dir, "compare")
    run_dir.mkdir(parents=True, exist_ok=True)
    problem = lock(run_dir)
    if problem is not None:
        raise ValueError(problem)


def _forget(cfg: CompareConfig, arms: dict[str, ArmConfig], results: Path) -> None:
    """Delete the summaries of some arms, and what their stages have written."""
    for name, arm in arms.items():
        for seed in range(arm.seeds):
            (results / f"{name}-{seed}.json").unlink(missing_ok=True)
            for stage in (f"{name}-{seed}", f"{name}-{seed}-{EVALUATION}"):
                shutil.rmtree(Path(cfg.run_dir) / stage, ignore_errors=True)
                (Path(cfg.run_dir) / "stages" / f"{stage}.json").unlink(missing_ok=True)


def outdated(cfg: CompareConfig, found: Summaries, results: Path) -> set[str]:
    """Arms with a summary whose settings they no longer have, or whose number of steps follows from one that is outdated."""
    names = set()
    for name, seed in found:
        arm = cfg.arms.get(name)
        if arm is None:
            continue
        try:
            now = arm if arm.seconds_of is None else matched_arm(cfg, arm, results)
        except ValueError:  # the arms that it follows from have no summary of their settings
            names.add(name)
            continue
        if not is_of(found, replace(cfg, arms={name: now}), name, seed):
            names.add(name)
    return names


def unfinished(cfg: CompareConfig, arms: dict[str, ArmConfig], results: Path) -> Iterator[tuple[str, int]]:
    """(arm, seed) of those without a summary of the same settings; seed by seed, so that every arm has its first before any has its second."""
    found = {} if cfg.fresh else read_summaries(results)
    for seed in range(max((arm.seeds for arm in arms.values()), default=0)):
        for name, arm in arms.items():
            if seed < arm.seeds and not is_of(found, replace(cfg, arms=arms), name, seed):
                yield name, seed


def arm_stages(cfg: CompareConfig, name: str, arm: ArmConfig, seed: int) -> dict[str, StageConfig]:
    """The two stages of one seed of an arm: what makes its student, and what judges it."""
    trained = f"{name}-{seed}"
    teachers = [f"domains.{domain}.teacher.model={model}" for domain, model in cfg.teachers.items()]
    own = {
        "distill": [f"student.model={cfg.base_model}", *teachers],
        "specialize": [f"student.model={cfg.base_model}"],
        "merge": [f"base.model={cfg.base_model}", *teachers],
    }[arm.command]
    judged = [f"student.model={cfg.run_dir}/{trained}/student", f"base.model={cfg.base_model}", *teachers, f"cache={cfg.run_dir}/evaluations"]
    making = joined([*cfg.settings.get(arm.command, []), *own, *arm.overrides])
    judging = joined([*cfg.settings.get("evaluate", []), *judged])
    return {
        trained: StageConfig(command=arm.command, overrides=making, processes=arm.processes, after=list(cfg.stages), seed=seed),
        f"{trained}-{EVALUATION}": StageConfig(command="evaluate", overrides=judging, processes=1, after=[trained]),
    }


def joined(overrides: list[str]) -> list[str]:
    """Overrides of which the last of each key counts: Hydra refuses a group that is chosen twice, as experiment=A experiment=B."""
    last = {override.partition("=")[0]: number for number, override in enumerate(overrides)}
    return [override for number, override in enumerate(overrides) if last[override.partition("=")[0]] == number]
