"""Routes are those of the states that predict the sampled tokens, however these were decoded."""

import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from rollout.config import SamplingConfig
from rollout.experts import copy_with_packed_experts
from rollout.routes import RouteListener, find_routers, require_routers
from rollout.sampler import LocalSampler, StepLog
from rollout.types import Prompt, Rollout
from rollout.wal import RolloutLog

FAMILIES = ("session_v4_model", "session_qwen3_moe_model")


@pytest.fixture(params=FAMILIES, scope="module")
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def prompts(make_prompt, tokenizer) -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    lengths = (14, 9, 21, 9, 30, 1)
    return [make_prompt("law", torch.randint(3, len(tokenizer), (n,), generator=generator).tolist(), request=i) for i, n in enumerate(lengths)]


def recording(**settings) -> SamplingConfig:
    return SamplingConfig(**({"record_routes": True, "max_new_tokens": 16, "decode_width": 4} | settings))


@torch.no_grad()
def naive_routes(model, rollout: Rollout) -> list[list[set[int]]]:
    """[token][layer]: experts of the position before each completion token, from one forward over the whole sequence without a cache."""
    found: dict[str, torch.Tensor] = {}
    handles = [router.register_forward_hook(lambda _m, _i, output, name=name: found.update({name: output[2]})) for name, router in find_routers(model).items()]
    model(torch.tensor([[*rollout.prompt.tokens, *rollout.completion_T.tolist()]]))
    for handle in handles:
        handle.remove()
    first = len(rollout.prompt.tokens) - 1
    return [[set(indices[first + token].tolist()) for indices in found.values()] for token in range(len(rollout.completion_T))]


def as_sets(rollout: Rollout) -> list[list[set[int]]]:
    return [[set(layer) for layer in token] for token in rollout.routes_TMK.tolist()]


@pytest.mark.parametrize(("width", "copies"), [(4, 1), (32, 1), (32, 2), (3, 4)], ids=str)
def test_routes_are_those_of_a_whole_forward_at_the_position_before_each_token(model, prompts, width, copies):
    """Prompts that are fed, fan-out, rows that leave, and prompts whose completions are divided among cohorts."""
    rollouts = LocalSampler(model, [2, *range(7, 12)], seed=0).sample(prompts, recording(decode_width=width), copies)
    assert len({len(rollout.completion_T) for rollout in rollouts}) > 1, "rows have to leave at different times"
    for rollout in rollouts:
        assert rollout.routes_TMK.shape == (len(rollout.completion_T), 3, 2)
        assert rollout.routes_TMK.dtype == torch.uint8
        assert as_sets(rollout) == naive_routes(model, rollout)


def test_recording_changes_no_token_and_no_log_probability(model, prompts):
    with_routes, without = (LocalSampler(model, [2], seed=0).sample(prompts, recording(record_routes=on), 2) for on in (True, False))
    for one, other in zip(with_routes, without, strict=True):
        assert torch.equal(one.completion_T, other.completion_T)
        assert torch.equal(one.logprob_T, other.logprob_T)
        assert other.routes_TMK is None


@pytest.mark.parametrize("kept", [0.5, 1.0])
def test_tokens_taken_up_from_the_log_have_their_routes(model, prompts, tmp_path, kept):
    """A part of the log, and all of it: then nothing is sampled, but for the routes the tokens are fed again."""
    whole = LocalSampler(model, [2, 7], seed=0).sample(prompts, recording(), log=StepLog(RolloutLog(tmp_path), 0, "first"))
    path = RolloutLog(tmp_path).segment(0, "first")
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    again = LocalSampler(model, [2, 7], seed=0).sample(prompts, recording(), log=StepLog(RolloutLog(tmp_path), 0, "second"))
    for one, other in zip(whole, again, strict=True):
        assert torch.equal(one.completion_T, other.completion_T)
        assert as_sets(one) == as_sets(other)


def test_the_routers_of_packed_experts_are_found_and_recorded(session_v4_model, prompts):
    packed = copy_with_packed_experts(session_v4_model, "student")
    assert list(find_routers(packed)) == list(find_routers(session_v4_model))
    for rollout in LocalSampler(packed, [2], seed=0).sample(prompts[:2], recording()):
        assert as_sets(rollout) == naive_routes(packed, rollout)


class Router(nn.Module):
    """Sends every token to its first two experts in order of their logits, as the routers of transformers say it."""

    def forward(self, logits_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        values_NK, indices_NK = logits_NE.topk(2)
        return logits_NE, values_NK, indices_NK


@pytest.mark.parametrize(("num_experts", "dtype"), [(256, torch.uint8), (257, torch.int16)])
def test_the_highest_expert_fits_into_the_dtype(num_experts, dtype):
    model, block = nn.Module(), nn.Module()
    block.experts, block.gate, model.block = nn.Module(), Router(), block
    block.experts.gate_up_proj, block.experts.down_proj = (nn.Parameter(torch.zeros(1, 1, 1)) for _ in range(2))
    listener = RouteListener(model)
    with listener.listening(1):
        block.gate(torch.arange(num_experts).float()[None])
    assert listener.last_WMK.dtype == dtype
    assert listener.last_WMK.tolist() == [[[num_experts - 1, num_experts - 2]]]


def test_no_hook_stays_on_the_model(model, prompts):
    LocalSampler(model, [2], seed=0).sample(prompts[:1], recording())
    assert not [name for name, router in find_routers(model).items() if router._forward_hooks]


def test_a_model_without_routed_experts_is_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    dense = Qwen3ForCausalLM(Qwen3Config(vocab_size=32, **sizes))
    with pytest.raises(ValueError, match=r"the student \(qwen3\) has no routed experts .* leave out rollout\.record_routes and student\.replay_routes"):
        require_routers(dense, "student")
