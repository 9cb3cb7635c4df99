"""A pipeline of commands (opd/stages.py), and the summary of what came out.

    RUN/summary.json          {"schema": 1, "domains": {NAME: {"base": {"accuracy", "low", "high", ...}, "teacher": {...},
                              "student": {...}, "recovery", "difference": {"value", "low", "high"}}}, "difference",
                              "min_recovery", "not_graded", "seconds": {STAGE: s}, "peak_memory_bytes", "seed", "versions"}
"""

import importlib.metadata
import json
import platform
from pathlib import Path

from opd.comparison import print_comparison
from opd.pipeline_config import PipelineConfig
from opd.stages import Stage, run_stages
from rollout.files import replace_text


def run_pipeline(cfg: PipelineConfig) -> None:
    """Run what is not done yet, then write the summary and print its table. Raises ValueError where a stage fails, Preempted where one ends early."""
    stages, peak_memory_bytes = run_stages(cfg, "pipeline", cfg)
    write_summary(cfg, stages, peak_memory_bytes)


def write_summary(cfg: PipelineConfig, stages: dict[str, Stage], peak_memory_bytes: int) -> None:
    """RUN/summary.json and the table, from the pipeline's evaluation stage."""
    evaluations = [stage for stage in stages.values() if stage.cfg.command == "evaluate"]
    if not evaluations:
        return
    path = Path(cfg.run_dir) / "summary.json"
    old_peak = json.loads(path.read_text())["peak_memory_bytes"] if path.is_file() else 0
    comparison = json.loads((evaluations[-1].folder / "evaluation.json").read_text())
    summary = comparison | {
        "seconds": {name: round(stage.record["seconds"], 1) for name, stage in stages.items()},
        "peak_memory_bytes": max(peak_memory_bytes, old_peak),
        "seed": cfg.seed,
        "versions": versions(),
    }
    replace_text(path, json.dumps(summary, indent=2) + "\n")
    print_comparison(comparison)
    total = sum(summary["seconds"].values())
    lowest = "undefined" if summary["min_recovery"] is None else f"{summary['min_recovery']:.3f}"
    print(f"lowest recovery {lowest}; {total:.0f} s of stages; written to {path}")


def versions() -> dict[str, str]:
    """Of Python and of the libraries that figures may depend on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in ("opd", "torch", "transformers", "deepspeed")}
