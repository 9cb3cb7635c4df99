"""A checkpoint's weights as a model: RUN@STEP, or RUN@chosen (opd/choice.py), wherever a setting names one (student.model, a teacher's model, base.model).

What the run would have written to RUN/student, had it ended after that step, is made once, in RUN/students/step-SSSSSS, a Hugging Face folder: float32
masters rounded to the dtype of training, and to FP4 values where the run quantised its experts. Optimizer, step and prompt stream stay behind (with
those, it is branch_from). `checkpoint.json` there, schema version 1, says what it was made from: {"schema": 1, "manifest": sha256 of the checkpoint's
manifest.json}; a folder of another one is made again. Processes that want it at the same time wait for the first.

A checkpoint holds pickled files, and reading them runs what they say: name runs of people you trust.
"""

import fcntl
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from opd import checkpoint_files as files
from opd.checkpoint_record import chosen_step
from opd.config import StudentConfig
from opd.quant_config import ExpertFormat, QuantConfig
from opd.student import build_student, load_student_tokenizer
from rollout.child import run_child
from rollout.experts import EXPERT_WEIGHTS, fake_quantized, require_quantizable
from rollout.files import read_json, replace_text
from rollout.model import replace_folder, write_model

SCHEMA = 1
NAME = re.compile(r"(.+)@(\d+|chosen)")


def resolve_models(cfg: Any) -> None:
    """Put the folder in place of every model of a config that is named RUN@STEP. Raises ValueError where one cannot be had."""
    named = getattr(cfg, "model", None) if is_dataclass(cfg) else None
    if named is not None and NAME.fullmatch(named):
        cfg.model = str(model_folder(named))
    parts = [getattr(cfg, field.name) for field in fields(cfg)] if is_dataclass(cfg) else []
    for part in cfg.values() if isinstance(cfg, dict) else parts:
        resolve_models(part)


def model_folder(name: str, parent: Path | None = None) -> Path:
    """The folder of RUN@STEP, made in `parent` (RUN/students) where it is not there. Raises ValueError where the run or its checkpoint is not there or is
    damaged.
    """
    run, step = NAME.fullmatch(name).groups()
    step = str(chosen_step(Path(run))) if step == "chosen" else step
    source = Path(run) / "checkpoints" / files.tag_of(int(step))
    if not (Path(run) / "config.yaml").is_file():
        raise ValueError(f"{name}: {run} is not a folder of a run")
    folder = (parent or Path(run) / "students") / source.name
    if not source.is_dir() and (folder / "checkpoint.json").is_file():
        return folder  # made while the checkpoint was there
    if not source.is_dir():
        steps = [str(files.step_of(tag)) for tag in files.saved_tags(source.parent)]
        raise ValueError(f"{name}: there is no checkpoint of step {step}; there are {', '.join(steps) or 'none'}")
    try:
        with _alone_in(folder.parent):
            manifest = files.digest_of(source)
            if not (folder / "checkpoint.json").is_file() or read_json(folder / "checkpoint.json")["manifest"] != manifest:
                problem = files.problem_of(source)
                if problem is not None:
                    raise ValueError(f"{name} cannot be read: {problem}")
                _write(Path(run), source, folder, manifest)
    except OSError as error:
        raise ValueError(f"{name} cannot be written to {folder}: {error.strerror}") from error
    return folder


def _write(run: Path, source: Path, folder: Path, manifest: str | None) -> None:
    stored = OmegaConf.load(run / "config.yaml")
    cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(StudentConfig), stored.student))
    quant = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(QuantConfig), stored.quant))
    tokenizer = load_student_tokenizer(cfg)
    model = build_student(cfg, tokenizer, quant)
    with torch.no_grad():
        weights = _masters(source, folder.parent)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.copy_(weights[name])
        for module in require_quantizable(model, "student").values() if quant.experts is ExpertFormat.mxfp4 else ():
            for name in EXPERT_WEIGHTS:
                parameter = module.get_parameter(name)
                parameter.copy_(fake_quantized(module, parameter))
    partial = folder.with_name(folder.name + ".partial")
    write_model(partial, model, tokenizer, model.state_dict())
    replace_text(partial / "checkpoint.json", json.dumps({"schema": SCHEMA, "manifest": manifest}))
    replace_folder(partial, folder)


def _masters(source: Path, parent: Path) -> dict[str, torch.Tensor]:
    """Parameters and buffers of the student by name, the trained ones as the optimizer has them. parent: a folder with room for them."""
    state = torch.load(min(source.glob("*model_states.pt")), map_location="cpu", mmap=True, weights_only=False)
    found = dict(state["module"])  # at ZeRO-3 names alone
    if any(source.glob("*optim_states.pt")):
        with tempfile.TemporaryDirectory(dir=parent) as target:
            reason = run_child("deepspeed.utils.zero_to_fp32", str(source.parent), target, "--tag", source.name, "--safe_serialization")
            if reason is not None:
                raise ValueError(f"the weights cannot be read from {source} ({reason})")
            for path in Path(target).glob("*.safetensors"):
                found |= load_file(path)
    return {name.removeprefix("model."): tensor for name, tensor in found.items()} | state["opd"]["buffers"]


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
