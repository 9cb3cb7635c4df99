"""VllmSampler: what is drawn has the published weights' distribution or is refused, whatever becomes of the servers."""

import copy
import threading

import pytest
import torch

from rollout.cohort import Completion
from rollout.config import ModelConfig, SamplingConfig, VllmConfig
from rollout.experts import EXPERT_WEIGHTS, copy_with_packed_experts, fake_quantized, find_experts
from rollout.model import load_model
from rollout.sampler import LocalSampler, StepLog, sampling_key
from rollout.types import Rollout
from rollout.vllm_sampler import VllmSampler
from rollout.wal import RolloutLog, SegmentWriter

CFG = SamplingConfig(max_new_tokens=12)
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}


class Weights:
    """The weights of a model, as an engine gives them after `policy_step` steps."""

    def __init__(self, model, policy_step: int = 0):
        self.model, self.policy_step = model, policy_step

    def weights(self):
        return self.model.named_parameters()


@pytest.fixture(scope="module")
def models(new_student):
    """The student before and after training, which sample very different tokens."""
    made = [new_student("qwen3_tiny", seed=seed, **SMALL) for seed in (1, 2)]
    for model in made:
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(3)
    return made


@pytest.fixture
def new_sampler(models, tokenizer, tmp_path):
    """new_sampler(server, ..., retries=0): a sampler over servers, with a copy of the first student."""

    def make(*servers, ranks=None, **settings) -> VllmSampler:
        local = LocalSampler(copy.deepcopy(models[0]), [2], seed=0, vocab_size=len(tokenizer))
        cfg = VllmConfig(**{"servers": [server.url for server in servers], "retries": 1, "timeout_seconds": 10.0, "max_connections": 4} | settings)
        return VllmSampler(local, tokenizer, cfg, tmp_path / "weights", ranks)

    return make


@pytest.fixture
def prompts(make_prompt):
    return [make_prompt("law", list(range(3, 6 + request % 5)), request) for request in range(16)]


def error_of(rollouts: list[Rollout], model) -> float:
    """The largest difference of a recorded log-probability from a full forward's."""
    errors = []
    for rollout in rollouts:
        tokens = torch.tensor([[*rollout.prompt.tokens, *rollout.completion_T.tolist()]])
        with torch.no_grad():
            logprobs = model(tokens).logits[0].log_softmax(-1)
        expected = logprobs[len(rollout.prompt.tokens) - 1 : -1].gather(1, rollout.completion_T[:, None])[:, 0]
        errors.append(float((expected - rollout.logprob_T).abs().max()))
    return max(errors)


def completions(rollouts: list[Rollout]) -> list[list[int]]:
    return [rollout.completion_T.tolist() for rollout in rollouts]


def refused(sampler: VllmSampler, prompts, log: StepLog | None = None) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the tests look at the sentence
        sampler.sample(prompts, CFG, log=log)
    return str(error.value)


# What is drawn


def test_rollouts_are_those_of_the_refreshed_weights_in_order(new_vllm, new_sampler, models, prompts):
    sampler, prompts = new_sampler(new_vllm(models[0])), prompts[:6]
    for step, model in ((3, models[1]), (4, models[0])):
        sampler.refresh(Weights(model, step))
        rollouts = sampler.sample(prompts, CFG, completions_per_prompt=2)
        assert [(rollout.prompt, rollout.sample) for rollout in rollouts] == [(prompt, sample) for prompt in prompts for sample in range(2)]
        assert error_of(rollouts, model) < 1e-5
        assert {rollout.policy_step for rollout in rollouts} == {step}


def test_a_completion_ends_at_its_first_end_token_which_it_keeps_or_at_the_limit(new_vllm, new_sampler, models, prompts):
    sampler = new_sampler(new_vllm(models[0]))
    sampler.refresh(Weights(models[0]))
    ends = set(range(2, 14))
    rollouts = sampler.sample(prompts, SamplingConfig(max_new_tokens=12, stop_tokens=sorted(ends)))
    assert {rollout.finished for rollout in rollouts} == {True, False}
    for rollout in rollouts:
        *body, last = rollout.completion_T.tolist()
        assert not ends & set(body)
        assert rollout.finished == (last in ends)
        assert rollout.finished or len(rollout.completion_T) == 12


def test_every_setting_of_sampling_is_sent(new_vllm, new_sampler, models, prompts):
    server = new_vllm(models[0])
    sampler = new_sampler(server)
    sampler.refresh(Weights(models[0]))
    sampler.sample(prompts[:1], SamplingConfig(temperature=0.7, top_p=0.9, top_k=5, min_p=0.01, max_new_tokens=3, stop_tokens=[9]))
    sent = server.drawn[0]
    assert sent["prompt"] == list(prompts[0].tokens)
    expected = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.01, "max_tokens": 3, "min_tokens": 0, "n": 1}
    expected |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "stop_token_ids": [2, 9], "ignore_eos": True, "stop": []}
    assert {name: sent[name] for name in expected} == expected


def test_each_completion_has_random_numbers_of_its_own_which_the_seed_alone_decides(new_vllm, new_sampler, models, prompts):
    servers = [new_vllm(models[0]) for _ in range(2)]
    for server in servers:
        sampler = new_sampler(server)
        sampler.refresh(Weights(models[0]))
        sampler.sample(prompts[:5], CFG, completions_per_prompt=2)
    first, again = ({(tuple(body["prompt"]), body["seed"]) for body in server.drawn} for server in servers)
    assert len({seed for _, seed in first}) == 2 * 5
    assert first == again


def test_rows_of_the_head_that_are_no_tokens_are_not_drawn(new_vllm, new_sampler, models, tokenizer, prompts):
    model = copy.deepcopy(models[0])
    with torch.no_grad():
        model.get_output_embeddings().weight[40:] *= 3.0
    sampler = new_sampler(new_vllm(model))
    for server in sampler.servers:
        server.never = {str(row): -100.0 for row in range(40, len(tokenizer))}
        server.vocab_size = 40
    sampler.refresh(Weights(model))
    assert max(max(tokens) for tokens in completions(sampler.sample(prompts, CFG))) < 40


# Weights


def test_the_published_folder_is_the_model_and_the_newest_stay(new_vllm, new_sampler, models, tmp_path):
    sampler = new_sampler(new_vllm(models[0]))
    for step in (7, 8, 9):
        sampler.refresh(Weights(models[step % 2], step))
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == ["hf-000008", "hf-000008.json", "hf-000009", "hf-000009.json"]
    loaded = load_model(ModelConfig(model=str(tmp_path / "weights" / "hf-000009")), "student").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in models[1].state_dict().items())


def test_a_run_that_is_taken_up_draws_with_weights_that_are_still_published(new_vllm, new_sampler, models, prompts):
    server = new_vllm(models[0])
    killed = new_sampler(server)
    killed.protect(1)
    for step in range(1, 6):
        killed.refresh(Weights(models[step % 2], step))
    server.restart()
    sampler = new_sampler(server)
    assert not sampler.take_up_weights(2)
    assert sampler.take_up_weights(1)
    rollouts = sampler.sample(prompts, CFG)
    assert error_of(rollouts, models[1]) < 1e-5
    assert {rollout.policy_step for rollout in rollouts} == {1}


def test_experts_are_published_with_the_fp4_values_that_the_trainer_multiplies(new_vllm, new_student, tokenizer, prompts, tmp_path):
    """Where the student trains under FP4, the model in this process holds its experts packed."""
    model = new_student("qwen3_moe_tiny")
    server = new_vllm(model)
    local = LocalSampler(copy_with_packed_experts(model, "student"), [2], seed=0, vocab_size=len(tokenizer))
    with torch.no_grad():
        for module in find_experts(model).values():
            for name in EXPERT_WEIGHTS:
                weight = module.get_parameter(name)
                weight.copy_(fake_quantized(module, weight))
    sampler = VllmSampler(local, tokenizer, VllmConfig(servers=[server.url]), tmp_path / "weights")
    sampler.refresh(Weights(model))
    assert error_of(sampler.sample(prompts[:4], CFG), model) < 1e-5


def test_a_server_that_does_not_load_what_it_is_given_is_refused_by_name(new_vllm, new_sampler, models):
    server = new_vllm(models[0])
    server.is_deaf = True
    with pytest.raises(ValueError, match=rf"{server.url}\) does not hold the weights of step 5 .* a probe differ by"):
        new_sampler(server).refresh(Weights(models[1], 5))


def test_a_server_restarted_while_it_draws_is_given_the_weights_again_and_none_of_its_stale_tokens_count(new_vllm, new_sampler, models, prompts):
    server = new_vllm(models[0])
    sampler = new_sampler(server)
    sampler.refresh(Weights(models[1]))
    server.on_event = lambda count: server.restart() if count == 40 else None
    rollouts = sampler.sample(prompts, CFG)
    assert server.num_loads == 2
    assert error_of(rollouts, models[1]) < 1e-5


def test_a_server_that_loses_the_weights_again_and_again_is_refused_by_name(new_vllm, new_sampler, models, prompts):
    server = new_vllm(models[0])
    sampler = new_sampler(server)
    sampler.refresh(Weights(models[1], 6))
    server.on_event = lambda count: server.restart() if count % 20 == 10 else None
    message = refused(sampler, prompts)  # the second time may fall between the weights and the look at them
    assert f"{server.url}) has lost the weights of step 6 twice" in message or f"{server.url}) does not hold the weights of step 6" in message


def test_weights_given_again_by_another_rank_are_taken_over(new_vllm, new_sampler, models, prompts):
    server = new_vllm(models[0])
    sampler = new_sampler(server)
    sampler.refresh(Weights(models[1]))
    label = server.version.split(".")[0]

    def restored(count: int) -> None:
        if count == 30:
            server.version = f"{label}.another"

    server.on_event = restored
    assert error_of(sampler.sample(prompts, CFG), models[1]) < 1e-5
    assert server.num_loads == 1


def test_weights_exchanged_behind_the_label_are_refused_and_what_was_logged_is_gone(new_vllm, new_sampler, models, prompts, tmp_path):
    server, log = new_vllm(models[0]), RolloutLog(tmp_path / "log")
    sampler = new_sampler(server)
    sampler.refresh(Weights(models[1], 6))

    def exchange(count: int) -> None:
        server.model = models[0]

    server.on_event = exchange
    assert f"{server.url}) does not hold the weights of step 6" in refused(sampler, prompts, StepLog(log, 6, "rank-000"))
    assert not list((tmp_path / "log").rglob("*.wal"))


def test_weights_that_have_diverged_are_not_published_to_be_drawn_from(new_vllm, new_sampler, models):
    diverged = copy.deepcopy(models[0])
    with torch.no_grad():
        diverged.model.norm.weight[3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity after step 4: its weights have diverged"):
        new_sampler(new_vllm(models[0])).refresh(Weights(diverged, 4))


def test_only_the_main_rank_publishes_and_the_others_draw_with_what_it_gave(new_vllm, new_sampler, models, prompts):
    server, meeting = new_vllm(models[0]), threading.Barrier(2)
    said: list = [None, None]

    class Rank:
        def __init__(self, index: int):
            self.index, self.count, self.local_count = index, 2, 2

        def gather(self, value):
            said[self.index] = value
            meeting.wait(30)
            return list(said)

    samplers = [new_sampler(server, ranks=Rank(index)) for index in range(2)]
    threads = [threading.Thread(target=sampler.refresh, args=(Weights(models[1], 3),)) for sampler in samplers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.num_loads == 1
    assert error_of(samplers[1].sample(prompts, CFG), models[1]) < 1e-5


# Servers that die


def test_requests_are_spread_over_all_servers(new_vllm, new_sampler, models, prompts):
    servers = [new_vllm(models[0]) for _ in range(3)]
    sampler = new_sampler(*servers)
    sampler.refresh(Weights(models[1]))
    assert error_of(sampler.sample(prompts, CFG), models[1]) < 1e-5
    assert all(server.drawn for server in servers)
    assert sum(len(server.drawn) for server in servers) == len(prompts)


def test_a_dead_servers_completions_go_on_at_the_others(new_vllm, new_sampler, models, prompts):
    servers = [new_vllm(models[0]) for _ in range(2)]
    sampler = new_sampler(*servers)
    sampler.refresh(Weights(models[1]))

    def die(count: int) -> None:
        servers[0].is_dead = count >= 20

    servers[0].on_event = die
    rollouts = sampler.sample(prompts, CFG)
    assert error_of(rollouts, models[1]) < 1e-5
    assert all(rollout.finished or len(rollout.completion_T) == CFG.max_new_tokens for rollout in rollouts)


def test_a_server_that_was_dead_is_used_again_in_the_next_step(new_vllm, new_sampler, models, prompts):
    servers = [new_vllm(models[0]) for _ in range(2)]
    sampler = new_sampler(*servers, retries=0)
    servers[0].is_dead = True
    sampler.refresh(Weights(models[1], 1))
    sampler.sample(prompts, CFG)
    assert not servers[0].drawn
    servers[0].is_dead = False
    sampler.refresh(Weights(models[0], 2))
    assert error_of(sampler.sample(prompts, CFG), models[0]) < 1e-5
    assert servers[0].drawn


def test_a_run_whose_servers_are_all_dead_stops_and_names_them(new_vllm, new_sampler, models, prompts):
    servers = [new_vllm(models[0]) for _ in range(2)]
    sampler = new_sampler(*servers, retries=0)
    sampler.refresh(Weights(models[1]))

    def die(count: int) -> None:
        for server in servers:
            server.is_dead = True

    for server in servers:
        server.on_event = die
    message = refused(sampler, prompts)
    assert message.startswith("no vLLM server is left")
    assert all(server.url in message for server in servers)
    with pytest.raises(ValueError, match="no vLLM server has taken the weights of step 1"):
        sampler.refresh(Weights(models[0], 1))


def test_a_server_that_breaks_off_every_completion_is_refused_in_the_end(new_vllm, new_sampler, models, prompts):
    server = new_vllm(models[0])
    sampler = new_sampler(server)
    sampler.refresh(Weights(models[0]))
    server.events = lambda body: iter(())
    assert f"{server.url}) breaks off every completion" in refused(sampler, prompts)


# The log


def test_logged_tokens_are_prefilled_and_a_completion_goes_on_after_them(new_vllm, new_sampler, models, prompts, tmp_path):
    server, log = new_vllm(models[0]), StepLog(RolloutLog(tmp_path / "log"), 4, "rank-000")
    sampler = new_sampler(server)
    sampler.refresh(Weights(models[1], 4))
    whole = sampler.sample(prompts, CFG, log=log)
    path = log.log.segment(4, "rank-000")
    key = sampling_key(f"vllm {sampler.weights.weights}", sampler.local.policy, CFG)
    logged = log.log.completions(4, key)
    assert [logged[rollout.prompt.request, 0].tokens for rollout in whole] == completions(whole)
    path.unlink()
    writer = SegmentWriter(log.log.segment(4, "rank-001"))  # as if a run had been killed after five tokens of each
    for rollout in whole:
        pairs = list(zip(rollout.completion_T.tolist(), rollout.logprob_T.tolist(), strict=True))
        writer.append(key, 4, Completion(rollout.prompt, rollout.sample).records(0, pairs[:5]))
    writer.close()
    server.drawn.clear()
    resumed = sampler.sample(prompts, CFG, log=log)
    assert [tokens[:5] for tokens in completions(resumed)] == [tokens[:5] for tokens in completions(whole)]
    assert error_of(resumed, models[1]) < 1e-5
    open_ones = {(*rollout.prompt.tokens, *rollout.completion_T.tolist()[:5]): CFG.max_new_tokens - 5 for rollout in whole if len(rollout.completion_T) > 5}
    assert {tuple(body["prompt"]): body["max_tokens"] for body in server.drawn} == open_ones


def test_tokens_that_other_weights_drew_are_not_taken_up(new_vllm, new_sampler, models, prompts, tmp_path):
    server, log = new_vllm(models[0]), StepLog(RolloutLog(tmp_path / "log"), 4, "rank-000")
    sampler = new_sampler(server)
    sampler.refresh(Weights(models[0], 4))
    sampler.sample(prompts, CFG, log=log)
    sampler.refresh(Weights(models[1], 4))
    assert error_of(sampler.sample(prompts, CFG, log=log), models[1]) < 1e-5


# Answers that cannot be right


def spoiled(**changes):
    def spoil(event: dict) -> dict:
        return {"choices": [event["choices"][0] | changes]}

    return spoil


WRONG = {
    "drew 95, which is no token": spoiled(token_ids=[95]),
    "drew -1, which is no token": spoiled(token_ids=[-1]),
    "drew text, which is no token": spoiled(token_ids=["text"]),
    "gave NaN or infinity": spoiled(logprobs={"token_logprobs": [float("nan")]}),
    "does not give log-probabilities: start it with --logprobs-mode processed_logprobs": spoiled(logprobs={"token_logprobs": [3.5]}),
    "drew a token of probability 0": spoiled(logprobs={"token_logprobs": [-9999.0]}),
    "gives no log-probability for each token": spoiled(logprobs={"token_logprobs": []}),
    "answers in another form": lambda event: {"choices": [{"text": "law"}]},
    "read another prompt": spoiled(prompt_token_ids=[1, 1, 1]),
    "goes on after the end": spoiled(token_ids=[50], finish_reason="length"),
    "goes on after an end token": spoiled(token_ids=[2], finish_reason=None),
    "gave tokens after the end": spoiled(token_ids=[2, 50], logprobs={"token_logprobs": [-1.0, -1.0]}),
    "ends a completion with an error: out of cheese": lambda event: {"error": {"message": "out of cheese", "code": 400}},
    "its model gives NaN or infinity": lambda event: {"error": {"message": "Out of range float values are not JSON compliant", "code": 500}},
}


@pytest.mark.parametrize("said", list(WRONG))
def test_a_wrong_answer_is_refused_by_name(new_vllm, new_sampler, models, prompts, said):
    server = new_vllm(models[0])
    sampler = new_sampler(server)
    sampler.refresh(Weights(models[0]))
    server.spoil = WRONG[said]
    message = refused(sampler, prompts)
    assert message.startswith(f"the vLLM server ({server.url}) ")
    assert said in message


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_completion_that_ended_for_no_right_reason_is_refused(new_vllm, new_sampler, models, prompts, reason):
    """One token that is no end token, of twelve that were asked for."""
    server = new_vllm(models[0])
    sampler = new_sampler(server)
    sampler.refresh(Weights(models[0]))
    choice = {"token_ids": [50], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": reason}
    server.events = lambda body: iter([{"choices": [choice | {"prompt_token_ids": body["prompt"]}]}])
    assert f"ended a completion of 1 tokens with 50 and calls that {reason}" in refused(sampler, prompts)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_model_len": 30}, r"reads 30 positions, and rollouts have up to 60: start it with --max-model-len 60"),
        ({"has_endpoints": False}, r"status 404.*: start it with VLLM_SERVER_DEV_MODE=1"),
        ({"is_processed": False}, r"does not draw from: start it with --logprobs-mode processed_logprobs"),
        ({"is_dead": True}, r"did not answer /v1/models in 2 attempts"),
    ],
)
def test_a_server_that_cannot_draw_is_refused_at_the_start(new_vllm, new_sampler, models, fields, said):
    server = new_vllm(models[0])
    for name, value in fields.items():
        setattr(server, name, value)
    with pytest.raises(ValueError, match=said):
        new_sampler(server).require_fit(60)


def test_a_server_that_can_draw_is_not_refused(new_vllm, new_sampler, models):
    new_sampler(new_vllm(models[0])).require_fit(60)


def test_a_sampler_without_servers_is_refused(new_sampler):
    with pytest.raises(ValueError, match=r"rollout\.vllm\.servers=\[http"):
        new_sampler()
