"""Processes and driver of the rollout service killed and stopped at seeded random moments: completions are those of a run that nobody disturbed.

Every test of lengths has its control: a service that begins interrupted completions anew, with new random numbers, has to fail it.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rollout.config import SamplingConfig
from rollout.replay import load_rollouts
from rollout.sampler import LocalSampler
from rollout.service_process import start_time

CFG = SamplingConfig(max_new_tokens=96, decode_width=64, stop_tokens=[10, 20, 30, 40, 50, 60])
NUM_PROMPTS = 448
NUM_FAULTS = 15
PATIENCE_SECONDS = 600

DRIVER = """
import json, sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from rollout.cohort import Policy
from rollout.config import SamplingConfig, ServiceConfig
from rollout.ranks import OneRank
from rollout.replay import save_rollouts
from rollout.sampler import StepLog
from rollout.service import SamplerService
from rollout.service_process import WorkerSpec
from rollout.types import Prompt
from rollout.wal import RolloutLog

torch.set_num_threads(1)
model_folder, run_dir, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(model_folder)


class Weights:
    policy_step = 0

    def weights(self):
        return model.state_dict().items()


class BeginningAnew(SamplerService):
    # the control: what was interrupted begins again, with other random numbers

    def _replace(self, process, call):
        new = super()._replace(process, call)
        for completion in process.lease.cohort if process.lease is not None else ():
            if not completion.is_done(call.ends, call.cfg):
                completion.tokens, completion.logprobs = [], []
        return new

    def _start_process(self):
        self.spec = replace(self.spec, seed=self.spec.seed + 1)
        return super()._start_process()


spec = WorkerSpec(
    dtype="float32", attention=None, experts=None, packed_experts=False, quantized_indexer=False, end_tokens=(2,), vocab_size=None,
    seed=settings["seed"], device="cpu", threads=1,
)
kind = BeginningAnew if settings["begin_anew"] else SamplerService
policy = Policy(model, settings["seed"], (2,))
service = kind(run_dir, spec, model.config, policy, ServiceConfig(processes=2, lease_seconds=8.0, max_failures=50), OneRank())
service.refresh(Weights())
prompts = [Prompt(domain="law", request=i, row="", tokens=tuple(tokens)) for i, tokens in enumerate(settings["prompts"])]
rollouts = service.sample(prompts, SamplingConfig(**settings["sampling"]), log=StepLog(RolloutLog(run_dir / "log"), 0, "rank-000"))
save_rollouts(run_dir / "rollouts.jsonl", 0, rollouts)
service.close()
"""


@pytest.fixture(scope="module")
def prompts(make_prompt, tokenizer):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 12, (NUM_PROMPTS,), generator=generator).tolist()
    return [make_prompt("law", torch.randint(3, len(tokenizer), (n,), generator=generator).tolist(), request=i) for i, n in enumerate(lengths)]


class Run:
    """A driver in a process of its own, started again whenever it was killed, and its sampler processes."""

    def __init__(self, run_dir: Path, model: Path, prompts, seed: int, begin_anew: bool = False):
        self.run_dir, self.tape, self.sizes = run_dir, [], {}
        sampling = {name: getattr(CFG, name) for name in SamplingConfig.__slots__}
        settings = {"seed": seed, "begin_anew": begin_anew, "sampling": sampling, "prompts": [prompt.tokens for prompt in prompts]}
        self.command = [sys.executable, "-c", DRIVER, str(model), str(run_dir), json.dumps(settings)]
        self.start()

    def start(self) -> None:
        self.driver = subprocess.Popen(self.command, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def samplers(self) -> list[int]:
        """Processes that are decoding: what they log has grown since the last look."""
        found = []
        for path in self.run_dir.glob("service/rank-000/sampler-*/pid.json"):
            record = json.loads(path.read_text())
            segment = self.run_dir / "log" / "step-000000" / f"rank-000-{path.parent.name}.wal"
            size = segment.stat().st_size if segment.exists() else 0
            if size > self.sizes.get(path, 0) and start_time(record["pid"]) == record["started"]:
                found.append(record["pid"])
            self.sizes[path] = size
        return found

    def logged(self) -> int:
        return sum(path.stat().st_size for path in self.run_dir.glob("log/*/*.wal"))

    def disturb(self, seed: int, count: int, with_driver: bool) -> list:
        """Let `count` faults happen, each after some tokens more have been logged, then let the run finish; its rollouts."""
        chance, wanted, deadline = random.Random(seed), 0, time.monotonic() + PATIENCE_SECONDS
        while self.driver.poll() is None or self.driver.returncode < 0:
            assert time.monotonic() < deadline, f"not finished in time; faults so far: {self.tape}"
            if self.driver.poll() is not None:
                self.start()
            victims = [("sampler", pid) for pid in self.samplers()] + ([("driver", self.driver.pid)] if with_driver else [])
            if len(self.tape) < count and self.logged() >= wanted and len(victims) > with_driver:
                role, pid = chance.choice(victims)
                kind = signal.SIGKILL if role == "driver" else chance.choice([signal.SIGKILL, signal.SIGSTOP])
                os.kill(pid, kind)
                self.tape.append((role, kind.name))
                wanted = self.logged() + chance.randint(1_000, 15_000)
                if role == "driver":
                    self.driver.wait()
            time.sleep(0.01)
        assert self.driver.returncode == 0
        return load_rollouts(self.run_dir / "rollouts.jsonl")


def smirnov_p(left: list[int], right: list[int]) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test (asymptotic; with ties it is too large, hence cautious)."""
    values = sorted(set(left) | set(right))
    distance = max(abs(sum(x <= value for x in left) / len(left) - sum(x <= value for x in right) / len(right)) for value in values)
    scaled = distance * (len(left) * len(right) / (len(left) + len(right))) ** 0.5
    return min(1.0, 2 * sum((-1) ** (k - 1) * 2.718281828459045 ** (-2 * k * k * scaled * scaled) for k in range(1, 101))) if scaled > 0.2 else 1.0


def lengths(rollouts) -> list[int]:
    return [len(rollout.completion_T) for rollout in rollouts]


@pytest.fixture(scope="module")
def undisturbed(session_v4_model, prompts):
    """Completions under seed 0, and under another seed: the reference of the length tests."""
    return tuple(LocalSampler(session_v4_model, [2], seed=seed).sample(prompts, CFG) for seed in (0, 1000))


@pytest.mark.slow
@pytest.mark.multi
def test_fifteen_faults_in_samplers_and_driver_change_no_token_and_no_length(saved_v4, prompts, undisturbed, tmp_path):
    run = Run(tmp_path, saved_v4, prompts, seed=0)
    found = run.disturb(seed=0, count=NUM_FAULTS, with_driver=True)
    assert len(run.tape) >= NUM_FAULTS
    assert {role for role, _ in run.tape} == {"sampler", "driver"}
    assert [rollout.prompt.request for rollout in found] == list(range(NUM_PROMPTS)), "no gap and no duplicate"
    assert [rollout.completion_T.tolist() for rollout in found] == [rollout.completion_T.tolist() for rollout in undisturbed[0]]
    assert smirnov_p(lengths(found), lengths(undisturbed[1])) > 0.01


@pytest.mark.slow
@pytest.mark.multi
def test_completions_that_begin_anew_fail_the_test_of_lengths(saved_v4, prompts, undisturbed, tmp_path):
    found = Run(tmp_path, saved_v4, prompts, seed=0, begin_anew=True).disturb(seed=0, count=NUM_FAULTS, with_driver=False)
    assert smirnov_p(lengths(found), lengths(undisturbed[1])) < 0.01
