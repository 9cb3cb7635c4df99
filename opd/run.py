"""The run folder: where a command writes, and the configuration that belongs to it.

    RUN/config.yaml          resolved configuration of the run
    RUN/metrics.jsonl        opd/metrics.py
    RUN/checkpoints/         opd/checkpoint.py
    RUN/rollouts/            rollout/replay.py, with rollout.save=true
    RUN/student/             Hugging Face folder of the trained model, when the run is finished
    RUN/evaluation.json      opd/evaluate.py, from the last evaluation

Nothing is written before every part of the run has been built and checked. A folder that holds a run with another
configuration is refused rather than mixed.
"""

import json
import shutil
from pathlib import Path

from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerBase

from opd.config import RunConfig
from opd.distributed import barrier, broadcast_object, is_main
from opd.engine import Engine
from rollout.model import save_model

MAY_DIFFER = ("fresh", "threads", "logger", "checkpoint", "run_dir")
"""Fields that may change when a run is resumed."""


def open_run(cfg: RunConfig) -> Path:
    """Make or take up the run folder; every rank calls it. Raises ValueError where it holds another configuration."""
    folder = Path(cfg.run_dir)
    problem = _prepare(folder, cfg) if is_main() else None
    problem = broadcast_object(problem)
    if problem is not None:
        raise ValueError(problem)
    barrier()
    return folder


def _prepare(folder: Path, cfg: RunConfig) -> str | None:
    resolved = OmegaConf.to_yaml(OmegaConf.structured(cfg))
    stored = folder / "config.yaml"
    if cfg.fresh and folder.exists():
        if not stored.is_file() and any(folder.iterdir()):
            return f"{folder} is not a run folder (it has no config.yaml), so fresh=true does not delete it: choose another run_dir"
        shutil.rmtree(folder)
    if stored.is_file():
        changed = _first_difference(OmegaConf.to_container(OmegaConf.load(stored)), OmegaConf.to_container(OmegaConf.create(resolved)))
        if changed is not None:
            return f"{folder} holds a run with another configuration ({changed}): choose another run_dir, or begin anew with fresh=true"
        return None
    folder.mkdir(parents=True, exist_ok=True)
    stored.write_text(resolved)
    return None


def _first_difference(old: dict, new: dict, path: str = "") -> str | None:
    for key in sorted(set(old) | set(new)):
        name = f"{path}{key}"
        if name in MAY_DIFFER or old.get(key) == new.get(key):
            continue
        if isinstance(old.get(key), dict) and isinstance(new.get(key), dict):
            inner = _first_difference(old[key], new[key], name + ".")
            if inner is not None:
                return inner
            continue
        return f"{name} was {json.dumps(old.get(key))} and is {json.dumps(new.get(key))}"
    return None


def config_dict(cfg: RunConfig) -> dict:
    """The config as plain values, for W&B."""
    return OmegaConf.to_container(OmegaConf.structured(cfg), enum_to_str=True)


def finish_run(run_dir: Path, engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the trained model to RUN/student; every rank calls it."""
    weights = engine.full_weights()
    if is_main():
        save_model(run_dir / "student", engine.model, tokenizer, weights)
    barrier()
