"""SamplerService: processes that are killed, stopped or told to end, and a driver that is, change no token."""

import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rollout.cohort import Policy
from rollout.config import SamplingConfig, ServiceConfig
from rollout.experts import copy_with_packed_experts
from rollout.ranks import OneRank
from rollout.sampler import LocalSampler, StepLog
from rollout.service import SamplerService
from rollout.service_process import WorkerSpec
from rollout.wal import RolloutLog

CFG = SamplingConfig(max_new_tokens=40, decode_width=16)


class Weights:
    """A model's weights, as an engine gives them."""

    def __init__(self, model, policy_step: int = 0):
        self.model, self.policy_step = model, policy_step

    def weights(self):
        return self.model.state_dict().items()


@pytest.fixture(scope="module")
def prompts(make_prompt, tokenizer):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 20, (40,), generator=generator).tolist()
    return [make_prompt("law", torch.randint(3, len(tokenizer), (n,), generator=generator).tolist(), request=i) for i, n in enumerate(lengths)]


def new_service(model, run_dir: Path, packed: bool = False, **settings) -> SamplerService:
    spec = WorkerSpec(
        dtype="float32", attention=None, experts=None, packed_experts=packed, quantized_indexer=False, end_tokens=(2,), vocab_size=None, seed=0,
        device="cpu", threads=1,
    )  # fmt: skip
    return SamplerService(run_dir, spec, model.config, Policy(model, 0, (2,)), ServiceConfig(**settings), OneRank())


def require_same(found, expected) -> None:
    """Token for token; recorded log-probabilities to the last bits, which the place of a tensor in a process's memory may change."""
    for one, other in zip(found, expected, strict=True):
        assert one.prompt == other.prompt
        assert one.completion_T.tolist() == other.completion_T.tolist()
        assert torch.allclose(one.logprob_T, other.logprob_T, atol=2e-6, rtol=0)


@pytest.fixture(scope="module")
def expected(session_v4_model, prompts):
    return LocalSampler(session_v4_model, [2], seed=0).sample(prompts, CFG)


def test_processes_draw_what_the_trainer_itself_would(session_v4_model, prompts, expected, tmp_path):
    service = new_service(session_v4_model, tmp_path, processes=2)
    try:
        service.refresh(Weights(session_v4_model, policy_step=3))
        found = service.sample(prompts, CFG, log=StepLog(RolloutLog(tmp_path / "log"), 0, "rank-000"))
    finally:
        service.close()
    require_same(found, expected)
    assert {rollout.policy_step for rollout in found} == {3}


def sample_while(service: SamplerService, prompts, log: StepLog, disturb) -> list:
    """What the service samples while `disturb(service)` is called every few milliseconds from another thread."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            disturb(service)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        return service.sample(prompts, CFG, log=log)
    finally:
        over.set()
        watcher.join()
        service.close()


def once_in_the_middle(kind: signal.Signals, victims: list):
    """Sends a signal, once, to a process that has a cohort's first tokens and not its last."""

    def disturb(service: SamplerService) -> None:
        for process in service.processes:
            if not victims and process.lease is not None and process.lease.known:
                process.process.send_signal(kind)
                victims.append(process)

    return disturb


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in (signal.SIGSTOP, signal.SIGTERM)]


@pytest.mark.multi
@pytest.mark.parametrize("kind", [signal.SIGKILL, *SLOW])
def test_a_process_that_is_killed_stopped_or_told_to_end_is_replaced_and_no_token_changes(kind, session_v4_model, prompts, expected, tmp_path):
    service, victims = new_service(session_v4_model, tmp_path, lease_seconds=5.0), []
    service.refresh(Weights(session_v4_model))
    found = sample_while(service, prompts, StepLog(RolloutLog(tmp_path / "log"), 0, "rank-000"), once_in_the_middle(kind, victims))
    assert len(victims) == 1
    assert service.figures.replaced == 1
    assert victims[0].process.returncode == (0 if kind is signal.SIGTERM else -signal.SIGKILL)
    require_same(found, expected)


@pytest.mark.slow
@pytest.mark.multi
def test_a_cohort_that_takes_far_too_long_is_shared_with_an_idle_process(session_v4_model, prompts, expected, tmp_path):
    """A stopped process stands for a slow one: nobody takes it for hung, and so nobody replaces it."""
    service, victims = new_service(session_v4_model, tmp_path, processes=2, lease_seconds=1000.0), []
    service.refresh(Weights(session_v4_model))
    found = sample_while(service, prompts, StepLog(RolloutLog(tmp_path / "log"), 0, "rank-000"), once_in_the_middle(signal.SIGSTOP, victims))
    assert len(victims) == 1
    assert service.figures.replaced == 0
    require_same(found, expected)


@pytest.mark.slow
@pytest.mark.multi
def test_processes_that_end_one_after_the_other_without_a_token_stop_the_run_by_name(session_v4_model, prompts, tmp_path):
    service = new_service(session_v4_model, tmp_path, max_failures=2)
    service.spec = replace(service.spec, device="nowhere")
    service.refresh(Weights(session_v4_model))
    with pytest.raises(ValueError, match=r"2 sampler processes in a row ended without a token, the last \(.*sampler-0002\) with: status 1, .*nowhere"):
        service.sample(prompts, CFG, log=StepLog(RolloutLog(tmp_path / "log"), 0, "rank-000"))
    service.close()


@pytest.mark.multi
def test_weights_that_are_damaged_on_the_way_are_refused_by_name(session_v4_model, prompts, tmp_path):
    service = new_service(session_v4_model, tmp_path, max_failures=1)
    service.refresh(Weights(session_v4_model))
    (path,) = service.weights.folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with pytest.raises(ValueError, match=r"weights-00000\.safetensors are damaged"):
        service.sample(prompts, CFG, log=StepLog(RolloutLog(tmp_path / "log"), 0, "rank-000"))
    service.close()


@pytest.mark.slow
@pytest.mark.multi
def test_processes_decode_with_packed_experts_what_the_trainer_would(session_v4_model, prompts, tmp_path):
    packed = LocalSampler(copy_with_packed_experts(session_v4_model, "student"), [2], seed=0)
    service = new_service(session_v4_model, tmp_path, packed=True)
    service.refresh(Weights(session_v4_model))
    found = service.sample(prompts, CFG, log=StepLog(RolloutLog(tmp_path / "log"), 0, "rank-000"))
    service.close()
    require_same(found, packed.sample(prompts, CFG))


def test_published_weights_are_kept_as_long_as_a_checkpoint_may_need_them(session_v4_model, tmp_path, monkeypatch):
    service = new_service(session_v4_model, tmp_path)
    monkeypatch.setattr(service, "_start", lambda: None)  # nobody is to sample
    for step in range(6):
        service.refresh(Weights(session_v4_model, policy_step=step))
        if step == 2:
            service.protect(1)
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == ["000001", "000004", "000005"]
    assert service.take_up_weights(1)
    assert service.policy_step == 1
    assert not service.take_up_weights(3)
