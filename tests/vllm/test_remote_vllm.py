"""A real vLLM server as a teacher. Needs OPD_VLLM_PYTHON=PATH, the Python of an environment made from tests/vllm/requirements.txt, and pytest -m vllm."""

import json
import os
import threading
from pathlib import Path

import pytest
import torch

from opd.__main__ import load_config
from opd.distill import distill
from rollout.model import load_model, save_model
from rollout.types import Rollout
from teachers.config import DomainConfig, SignalKind, TeacherConfig, TeachersConfig
from teachers.pool import TeacherPool
from teachers.teacher import Teacher
from teachers.types import TeacherFailure

pytestmark = [pytest.mark.vllm, pytest.mark.skipif("OPD_VLLM_PYTHON" not in os.environ, reason="OPD_VLLM_PYTHON names no Python with vLLM")]

K = 16
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(new_student, tokenizer, tmp_path_factory) -> dict[str, Path]:
    """Two Qwen3-MoE teachers, "law" and "code", alike but for their weights."""
    made = {}
    for seed, name in enumerate(("law", "code"), 1):
        model = new_student("qwen3_moe_tiny", seed=seed)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(3)
        made[name] = tmp_path_factory.mktemp("served") / name
        save_model(made[name], model, tokenizer, model.state_dict())
    return made


@pytest.fixture(scope="module")
def server(start, folders) -> str:
    """Address of a server that holds "law"."""
    return start(folders["law"], None, "--served-model-name", "law")[1]


@pytest.fixture
def new_pool(tokenizer):
    def make(url: str, **settings) -> TeacherPool:
        domains = {"law": DomainConfig(teacher=TeacherConfig(server=url, model="law"))}
        return TeacherPool(domains, TeachersConfig(**{"signal": SignalKind.top_k, "top_k": K, "retries": 1} | settings), tokenizer, CPU)

    return make


@pytest.mark.parametrize("kind", [SignalKind.top_k, SignalKind.sampled_token])
def test_the_signal_is_that_of_the_same_folder_held_here(server, new_pool, folders, random_rollouts, tokenizer, kind):
    rollouts = random_rollouts([("law", 3 + i % 9, 1 + 5 * i % 37) for i in range(24)])
    local = Teacher("law", load_model(TeacherConfig(model=str(folders["law"])), "teacher"))
    for item in new_pool(server, signal=kind).score(rollouts):
        expected = local.signal(item.rollout, local.hidden([item.rollout], 1000)[0], kind, K, len(tokenizer))
        assert torch.allclose(item.signal.logprob_TK, expected.logprob_TK, atol=2e-5)
        assert (item.signal.token_TK == expected.token_TK).float().mean() > 0.99, "two tokens as likely as each other may change places"


def test_the_context_is_the_servers(server, new_pool, random_rollouts):
    pool = new_pool(server)
    assert pool.context[pool.teacher_of["law"]] == 127
    assert len(pool.score(random_rollouts([("law", 100, 27)]))[0].signal.token_TK) == 27


def test_a_run_has_the_losses_of_the_run_on_the_same_teacher_held_here(device, server, folders, saved_v4, tmp_path):
    settings = ["domain=[tools]", "domains.tools.prompts.rows=16", "domains.tools.held_out.rows=8", "rollout.prompts_per_step=8", "logger=none"]
    settings += ["rollout.max_new_tokens=8", "rollout.decode_width=8", "num_steps=4", "optim.warmup_steps=0", "optim.lr=1e-3"]
    settings += ["teachers.signal=top_k", f"teachers.top_k={K}", f"student.model={saved_v4}"]
    losses = {}
    for name, teacher in {"local": [f"model={folders['law']}"], "remote": ["model=law", f"server={server}"]}.items():
        distill(load_config("distill", [*settings, *(f"domains.tools.teacher.{setting}" for setting in teacher), f"run_dir={tmp_path / name}"]))
        records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [record["step/loss"] for record in records[1:]]
    assert len(losses["remote"]) == 4
    assert losses["remote"] == pytest.approx(losses["local"], rel=1e-4)


def test_logits_and_too_few_log_probabilities_are_refused_with_the_option(start, end, folders, new_pool):
    process, url = start(folders["law"], None, "--served-model-name", "law", "--logprobs-mode", "raw_logits", "--max-logprobs", "8")
    with pytest.raises(TeacherFailure, match=r"max allowed: 8.*: start it with --max-logprobs 16 or more, or lower teachers\.top_k"):
        new_pool(url)
    with pytest.raises(TeacherFailure, match="does not give log-probabilities over its vocabulary: start it with --logprobs-mode raw_logprobs"):
        new_pool(url, top_k=8)
    end(process)


def test_a_server_killed_mid_step_fails_by_name_and_one_restarted_with_other_weights_is_refused(start, end, folders, new_pool, random_rollouts, tmp_path):
    folder = tmp_path / "served"
    folder.symlink_to(folders["law"])
    process, url = start(folder, None, "--served-model-name", "law")
    pool, rollouts = new_pool(url), random_rollouts([("law", 20, 80)] * 200)
    pool.score(rollouts[:4])
    killer = threading.Timer(1.0, end, [process])
    killer.start()
    with pytest.raises(TeacherFailure, match=r"the teacher of law .* did not answer /v1/\w+ in 2 attempts"):
        score_for_ever(pool, rollouts)
    killer.join()
    folder.unlink()
    folder.symlink_to(folders["code"])
    process, _ = start(folder, int(url.rpartition(":")[2]), "--served-model-name", "law")
    with pytest.raises(TeacherFailure, match="has other weights than at start-up: the log-probabilities of a probe differ by"):
        pool.score(rollouts[:3])
    end(process)


def score_for_ever(pool: TeacherPool, rollouts: list[Rollout]) -> None:
    while True:
        pool.score(rollouts)
