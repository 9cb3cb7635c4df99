"""Fixtures of the tests of `opd`: engines around a model, teachers on disk, and one short run."""

import copy
import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from opd.__main__ import load_config
from opd.config import BatchConfig, DistillConfig, OptimConfig, StudentConfig
from opd.distill import distill
from opd.engine import Engine
from opd.job_config import LoggerConfig, LoggerKind
from opd.run_state import end_state
from rollout.model import save_model
from teachers.config import DomainConfig


@pytest.fixture(scope="session")
def make_config() -> Callable[..., DistillConfig]:
    """make_config({"law": DomainConfig()}, stage=2, optim={"lr": 1e-3}, max_tokens=100): a typed config without files behind it."""

    def make(domains: dict[str, DomainConfig] | None = None, *, stage: int = 1, optim: dict = {}, student: dict = {}, max_tokens: int = 4096, **fields):  # noqa: B006
        return DistillConfig(
            domains=domains or {"law": DomainConfig()},
            deepspeed={"zero_optimization": {"stage": stage}},
            optim=OptimConfig(**({"warmup_steps": 0, "lr": 1e-3} | optim)),
            student=StudentConfig(**student),
            batch=BatchConfig(max_tokens_per_micro_batch=max_tokens),
            logger=LoggerConfig(kind=LoggerKind.none),
            **fields,
        )

    return make


@pytest.fixture
def make_engine(device, tokenizer) -> Callable[..., Engine]:
    """make_engine(model, cfg): an engine around a copy of the model, which stays as it is."""

    def make(model: PreTrainedModel, cfg: DistillConfig) -> Engine:
        return Engine(copy.deepcopy(model), len(tokenizer), cfg, device)

    return make


@pytest.fixture(scope="session")
def teacher_folders(new_student, tokenizer, tmp_path_factory) -> dict[str, Path]:
    """Two teachers far from the student and from each other: "v4", and "qwen3_moe", whose hidden size is half the student's."""
    models = {"v4": new_student("deepseek_v4_tiny", seed=1), "qwen3_moe": new_student("qwen3_moe_tiny", seed=2, hidden_size=32)}
    folders = {}
    for name, model in models.items():
        folders[name] = tmp_path_factory.mktemp("teachers") / name
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(3)
        save_model(folders[name], model, tokenizer, model.state_dict())
    return folders


@pytest.fixture(scope="session")
def short_settings(saved_v4, teacher_folders) -> list[str]:
    """Settings of the short run, without its folder."""
    settings = ["rollout.prompts_per_step=8", "rollout.max_new_tokens=8", "rollout.decode_width=8", "num_steps=2", "optim.warmup_steps=0"]
    settings += ["evaluation.every=1", "evaluation.prompts=4", "evaluation.max_new_tokens=4", "evaluation.decode_width=4"]
    settings += ["quant=mxfp4_experts", "quant.measure_every=1"]
    settings += ["check.signal=warn", "check.prompts=2"]  # random weights have nothing to teach
    settings += ["checkpoint.every=1", "logger=offline", "domain=[arithmetic,tools]", "domains.tools.grader=null"]
    settings += [f"domains.{name}.{part}.rows=16" for name in ("arithmetic", "tools") for part in ("prompts", "held_out")]
    settings += [f"domains.{name}.prompts.share=1.0" for name in ("arithmetic", "tools")]
    settings += [f"domains.arithmetic.teacher.model={teacher_folders['v4']}", f"domains.tools.teacher.model={teacher_folders['qwen3_moe']}"]
    return [*settings, f"student.model={saved_v4}"]


@pytest.fixture(scope="session")
def short_run(device, short_settings, tmp_path_factory) -> Path:
    """Folder of an `opd distill` of two steps on two domains, evaluated and saved after each, with W&B offline."""
    run_dir = tmp_path_factory.mktemp("runs") / "short"
    distill(load_config("distill", [*short_settings, f"run_dir={run_dir}"]))
    end_state(0, None)  # as the process does that runs the command
    return run_dir


@pytest.fixture
def kill_at(monkeypatch) -> Callable[[str, int], None]:
    """kill_at("opd.update.train", call=2): interrupt the process, as a key does, when a function is called for the so-manieth time."""

    def arrange(name: str, call: int) -> None:
        module, _, function = name.rpartition(".")
        original, calls = getattr(importlib.import_module(module), function), []

        def interrupted(*arguments):
            calls.append(1)
            if len(calls) == call:
                raise KeyboardInterrupt
            return original(*arguments)

        monkeypatch.setattr(name, interrupted)

    return arrange
