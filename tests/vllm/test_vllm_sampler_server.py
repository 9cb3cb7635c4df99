"""A real vLLM server as sampler. Needs OPD_VLLM_PYTHON=PATH, the Python of an environment made from tests/vllm/requirements.txt, and pytest -m vllm."""

import copy
import os
import signal
from pathlib import Path

import pytest
import torch

from rollout.cohort import Completion
from rollout.config import SamplingConfig, VllmConfig
from rollout.model import save_model
from rollout.sampler import LocalSampler, StepLog, sampling_key
from rollout.types import Rollout
from rollout.vllm_sampler import VllmSampler
from rollout.wal import RolloutLog, SegmentWriter

pytestmark = [pytest.mark.vllm, pytest.mark.skipif("OPD_VLLM_PYTHON" not in os.environ, reason="OPD_VLLM_PYTHON names no Python with vLLM")]

CFG = SamplingConfig(max_new_tokens=24)
PROCESSED = ("--logprobs-mode", "processed_logprobs", "--max-num-seqs", "64")


class Weights:
    """The weights of a model, as an engine gives them after `policy_step` steps."""

    def __init__(self, model, policy_step: int = 0):
        self.model, self.policy_step = model, policy_step

    def weights(self):
        return self.model.named_parameters()


@pytest.fixture(scope="module")
def models(new_student):
    """The student of the server's command line, and after training."""
    made = [new_student("qwen3_tiny", seed=seed) for seed in (1, 2)]
    for model in made:
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(3)
    return made


@pytest.fixture(scope="module")
def folder(models, tokenizer, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("served") / "student"
    save_model(made, models[0], tokenizer, models[0].state_dict())
    return made


@pytest.fixture(scope="module")
def server(start, folder) -> str:
    return start(folder, None, *PROCESSED)[1]


@pytest.fixture
def new_sampler(models, tokenizer, tmp_path):
    """new_sampler(url, ..., model=...): a sampler over servers, with a copy of a student."""

    def make(*urls: str, model=None) -> VllmSampler:
        local = LocalSampler(copy.deepcopy(models[0] if model is None else model), [2], seed=0, vocab_size=len(tokenizer))
        sampler = VllmSampler(local, tokenizer, VllmConfig(servers=list(urls), retries=3), tmp_path / "weights")
        sampler.require_fit(64)
        return sampler

    return make


@pytest.fixture
def prompts(make_prompt):
    return [make_prompt("law", list(range(3, 6 + request % 5)), request) for request in range(96)]


def error_of(rollouts: list[Rollout], model) -> float:
    """The largest difference of a recorded log-probability, drawn at temperature 1, from a full forward's."""
    errors = []
    for rollout in rollouts:
        tokens = torch.tensor([[*rollout.prompt.tokens, *rollout.completion_T.tolist()]])
        with torch.no_grad():
            logprobs = model(tokens).logits[0].log_softmax(-1)
        expected = logprobs[len(rollout.prompt.tokens) - 1 : -1].gather(1, rollout.completion_T[:, None])[:, 0]
        errors.append(float((expected - rollout.logprob_T).abs().max()))
    return max(errors)


def test_recorded_log_probabilities_are_the_refreshed_weights_step_after_step(server, new_sampler, models, prompts):
    sampler = new_sampler(server)
    for step, model in enumerate((models[1], models[0], models[1])):
        sampler.refresh(Weights(model, step))
        rollouts = sampler.sample(prompts, CFG)
        assert error_of(rollouts, model) < 1e-4
        assert error_of(rollouts, models[step % 2]) > 0.1, "the two students are as good as one"


@pytest.mark.parametrize("truncation", [{}, {"top_k": 12, "min_p": 0.02}, {"top_p": 0.8}])
def test_tokens_have_the_policys_distribution_and_its_log_probabilities(server, new_sampler, models, make_prompt, truncation):
    """Chi-square of 4096 first tokens against the softmax at the temperature, cut down naively; tokens expected less than five times are one class."""
    count, cfg = 4096, SamplingConfig(temperature=0.7, max_new_tokens=1, **truncation)
    sampler = new_sampler(server)
    sampler.refresh(Weights(models[1]))
    rollouts = sampler.sample([make_prompt("law", [9, 4, 30, 7], request) for request in range(count)], cfg)
    with torch.no_grad():
        probability_V = (models[1](torch.tensor([[9, 4, 30, 7]])).logits[0, -1].double() / 0.7).softmax(-1)
    order = probability_V.argsort(descending=True).tolist()
    kept = [token for token in order if probability_V[token] >= cfg.min_p * probability_V[order[0]]][: cfg.top_k]
    mass, total = 0.0, sum(float(probability_V[token]) for token in kept)
    chosen = []
    for token in kept:
        if mass / total < cfg.top_p:
            chosen.append(token)
        mass += float(probability_V[token])
    expected_V = torch.zeros_like(probability_V)
    expected_V[chosen] = probability_V[chosen] / probability_V[chosen].sum()
    tokens_N = torch.cat([rollout.completion_T for rollout in rollouts])
    logprob_N = torch.cat([rollout.logprob_T for rollout in rollouts])
    assert torch.allclose(logprob_N, expected_V[tokens_N].log().float(), atol=1e-4)
    observed_V = torch.bincount(tokens_N, minlength=len(expected_V)).double()
    rare_V = expected_V * count < 5
    observed = torch.cat([observed_V[~rare_V], observed_V[rare_V].sum()[None]])
    expected = torch.cat([expected_V[~rare_V], expected_V[rare_V].sum()[None]]) * count
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2) > 1e-3


def test_an_interrupted_completion_goes_on_after_its_logged_tokens(server, new_sampler, models, prompts, tmp_path):
    log = StepLog(RolloutLog(tmp_path / "log"), 4, "rank-000")
    sampler = new_sampler(server)
    sampler.refresh(Weights(models[1], 4))
    whole = sampler.sample(prompts, CFG, log=log)
    log.log.segment(4, "rank-000").unlink()
    writer = SegmentWriter(log.log.segment(4, "rank-001"))
    for rollout in whole:
        pairs = list(zip(rollout.completion_T.tolist(), rollout.logprob_T.tolist(), strict=True))
        records = Completion(rollout.prompt, rollout.sample).records(0, pairs[:7])
        writer.append(sampling_key(f"vllm {sampler.weights.weights}", sampler.local.policy, CFG), 4, records)
    writer.close()
    resumed = sampler.sample(prompts, CFG, log=log)
    assert [rollout.completion_T.tolist()[:7] for rollout in resumed] == [rollout.completion_T.tolist()[:7] for rollout in whole]
    assert all(rollout.finished or len(rollout.completion_T) == CFG.max_new_tokens for rollout in resumed)
    assert error_of(resumed, models[1]) < 1e-4


def test_weights_exchanged_behind_the_label_are_refused(server, new_sampler, models, prompts, folder):
    sampler = new_sampler(server)
    sampler.refresh(Weights(models[1], 6))
    sampler.servers[0].server.ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
    with pytest.raises(ValueError, match=r"does not hold the weights of step 6 .* a probe differ by"):
        sampler.sample(prompts, CFG)


def test_a_killed_server_leaves_its_work_to_another_and_is_given_the_weights_when_it_is_back(start, end, server, new_sampler, models, prompts, folder):
    process, url = start(folder, None, *PROCESSED)
    sampler = new_sampler(url, server)
    sampler.refresh(Weights(models[1], 1))
    arrived = iter(range(10**9))
    draw = sampler.servers[0].draw

    def draw_and_die(request):
        for pairs in draw(request):
            yield pairs
            if next(arrived) == 200 and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

    sampler.servers[0].draw = draw_and_die
    rollouts = sampler.sample(prompts, CFG)
    assert process.wait() == -signal.SIGKILL
    assert error_of(rollouts, models[1]) < 1e-4
    sampler.servers[0].draw = draw
    process, _ = start(folder, int(url.rpartition(":")[2]), *PROCESSED)  # with the weights of its command line
    rollouts = sampler.sample(prompts, CFG)
    assert error_of(rollouts, models[1]) < 1e-4
    sampler.refresh(Weights(models[0], 2))
    assert error_of(sampler.sample(prompts, CFG), models[0]) < 1e-4
    end(process)


def test_experts_that_a_server_does_not_take_over_are_refused(start, end, new_student, tokenizer, new_sampler, models, prompts, tmp_path):
    """vLLM 0.32 on a CPU reloads routed experts without bringing them into its kernel's layout; the label alone would not show it."""
    model = new_student("qwen3_moe_tiny", seed=5)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3)
    save_model(tmp_path / "moe", model, tokenizer, model.state_dict())
    process, url = start(tmp_path / "moe", None, *PROCESSED)
    sampler = new_sampler(url, model=model)
    with pytest.raises(ValueError, match=r"does not hold the weights of step 3 .* a probe differ by"):
        sampler.refresh(Weights(model, 3))
    end(process)
