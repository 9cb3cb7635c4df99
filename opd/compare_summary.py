"""What is kept of a finished arm of a comparison: small files, from which the table can be made again without any model.

    RESULTS/ARM-SEED.json (schema version 1)
    {"schema": 1, "arm", "label", "role", "seed", "identity", "command": [COMMAND, OVERRIDE, ...],
     "budget": {"steps", "student_tokens", "seconds"}, "models": {"base": HASH, "teachers": {DOMAIN: HASH}},
     "chosen": {"scale", "density"} of a merge, "machine": {"processor", "cores", "device"}, "versions": {...},
     "evaluation": the record of opd/comparison.py}

identity: of the settings as they are written, those of the stages before the arm and the files of conf/experiment that they choose included, and not of the
    resolved configuration, so that a new setting with its default leaves finished arms finished; the folder of the comparison does not count. What other
    files of conf/ say (those of a domain, a student, a quantisation) is not in it: `fresh=true` after a change there.
budget: optimizer steps; tokens of completions that the student was trained on; seconds of sampling, scoring and updates, of a warm-up too, start and
    evaluation left out. Of a merge no steps and tokens, and the seconds of the command.
models: opd's fingerprints of the weights.
"""

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from opd.compare_config import ArmConfig, CompareConfig
from opd.distributed import num_cores
from opd.pipeline import versions
from rollout.config import ModelConfig
from rollout.files import read_json, replace_text
from teachers.fingerprint import weights_fingerprint

SCHEMA = 1
CONF = Path(__file__).resolve().parent.parent / "conf"
PHASES = ("seconds/data", "seconds/rollout", "seconds/score", "seconds/update")

Summaries = dict[tuple[str, int], dict[str, Any]]
"""By arm and seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What an arm took: optimizer steps, tokens that the student was trained on, and seconds."""

    steps: int
    student_tokens: int
    seconds: float


def arm_identity(cfg: CompareConfig, arm: ArmConfig, seed: int) -> str:
    """Hash of all settings that an arm's student and its evaluation follow from, as they are written."""
    stages = {name: asdict(stage) for name, stage in cfg.stages.items()}
    settings = [*cfg.settings.get(arm.command, []), *cfg.settings.get("evaluate", [])]
    own = [arm.command, arm.overrides, settings, cfg.base_model, cfg.teachers, cfg.seed, seed]
    written = [*settings, *arm.overrides, *(override for stage in cfg.stages.values() for override in stage.overrides)]
    files: dict[str, Any] = {}
    for override in written:
        key, _, names = override.lstrip("+").partition("=")
        if key == "experiment":
            for name in names.strip("[]").split(","):
                _read_experiment(name.strip(" \"'").removesuffix(".yaml"), files)
    settings_text = json.dumps([stages, own], sort_keys=True).replace(f"{cfg.run_dir}/", "RUN/")
    return hashlib.sha256((settings_text + json.dumps(files, sort_keys=True)).encode()).hexdigest()


def _read_experiment(name: str, files: dict[str, Any]) -> None:
    """Add what conf/experiment/NAME.yaml says to `files`, and the experiments that it begins with; comments do not count."""
    if name in files:
        return
    found = next((path for folder in (Path.cwd() / "conf", CONF) if (path := folder / "experiment" / f"{name}.yaml").is_file()), None)
    if found is None:
        raise ValueError(f"an arm chooses experiment={name}, and there is no conf/experiment/{name}.yaml")
    files[name] = yaml.safe_load(found.read_text()) or {}
    for entry in files[name].get("defaults") or []:
        if isinstance(entry, str) and entry != "_self_":
            _read_experiment(entry, files)


def measure(run: Path, command: str) -> Budget:
    """The budget of a finished run, from its metrics or its log."""
    if command == "merge":
        return Budget(steps=0, student_tokens=0, seconds=read_json(run / "merge.json")["seconds"])
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = records[0]
    return Budget(
        steps=int(first.get("warmup/steps", 0)) + records[-1]["step"],
        student_tokens=int(first.get("warmup/tokens", 0) + sum(record.get("step/completion_tokens", 0) for record in records)),
        seconds=first.get("warmup/seconds", 0.0) + sum(record.get(phase, 0.0) for record in records for phase in PHASES),
    )


def summarize(cfg: CompareConfig, name: str, arm: ArmConfig, seed: int) -> dict[str, Any]:
    """The summary of an arm whose stages are done."""
    run = Path(cfg.run_dir) / f"{name}-{seed}"
    teachers = {domain: weights_fingerprint(ModelConfig(model=model), f"teacher of {domain}") for domain, model in cfg.teachers.items()}
    return {
        "schema": SCHEMA,
        "arm": name,
        "label": arm.label or name,
        "role": arm.role.value,
        "seed": seed,
        "identity": arm_identity(cfg, arm, seed),
        "command": [arm.command, *cfg.settings.get(arm.command, []), *arm.overrides],
        "budget": asdict(measure(run, arm.command)),
        "models": {"base": weights_fingerprint(ModelConfig(model=cfg.base_model), "base"), "teachers": teachers},
        **({"chosen": read_json(run / "merge.json")["chosen"]} if arm.command == "merge" else {}),
        "machine": {"processor": _processor(), "cores": num_cores(), "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"},
        "versions": versions(),
        "evaluation": read_json(run.with_name(f"{run.name}-evaluation") / "evaluation.json"),
    }


def write_summary(results: Path, summary: dict[str, Any]) -> None:
    """RESULTS/ARM-SEED.json."""
    results.mkdir(parents=True, exist_ok=True)
    replace_text(results / f"{summary['arm']}-{summary['seed']}.json", json.dumps(summary) + "\n")


def read_summaries(results: Path) -> Summaries:
    """All summaries of a folder. Raises ValueError for a file that is none, or of another version."""
    found: Summaries = {}
    for path in sorted(results.glob("*.json")):
        summary = read_json(path)
        if summary.get("schema") != SCHEMA or "arm" not in summary:
            raise ValueError(f"{path} is no summary of a comparison that this version of opd reads: move it, or name another folder in results")
        found[summary["arm"], summary["seed"]] = summary
    return found


def is_of(found: Summaries, cfg: CompareConfig, name: str, seed: int) -> bool:
    """Whether an arm is summarised, with the settings that it has now."""
    return (name, seed) in found and found[name, seed]["identity"] == arm_identity(cfg, cfg.arms[name], seed)


def _processor() -> str:
    """The processor's name, where the system tells."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor() or platform.machine())
