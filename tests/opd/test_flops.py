"""Counted FLOPs against forwards with real weights at other lengths, and against a formula written out by hand."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from opd.flops import measured_matmul_rate, model_flops
from rollout.experts import copy_with_packed_experts, find_experts
from rollout.model import backbone_of

QWEN3 = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 256, "vocab_size": 50, "use_sliding_window": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(session_v4_model, session_qwen3_moe_model) -> dict[str, PreTrainedModel]:
    """Three families, set to plain products, which are the ones that torch's counter knows on a CPU."""
    qwen3 = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **QWEN3)).eval()
    made = {"deepseek_v4": copy.deepcopy(session_v4_model), "qwen3_moe": copy.deepcopy(session_qwen3_moe_model), "qwen3": qwen3}
    for model in made.values():
        model.requires_grad_(False).set_attn_implementation("eager")
        if find_experts(model):
            model.set_experts_implementation("eager")
    return made


def tokens(length: int) -> torch.Tensor:
    return torch.randint(3, 40, (1, length), generator=torch.Generator().manual_seed(length))


def counted(model: PreTrainedModel, **inputs) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone_of(model)(**inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("length", [33, 90, 250])
@pytest.mark.parametrize("name", ["deepseek_v4", "qwen3_moe", "qwen3"])
def test_a_sequences_flops_are_those_of_its_forward(name, length, models):
    found = model_flops(models[name]).sequence(length)
    assert found == pytest.approx(counted(models[name], input_ids=tokens(length), use_cache=False), rel=0.02)


@pytest.mark.parametrize("name", ["deepseek_v4", "qwen3_moe", "qwen3"])
def test_a_completions_flops_are_those_of_decoding_it_token_by_token_and_of_its_logits(name, models):
    model, prompt, length = models[name], 40, 12
    cache, ids = DynamicCache(config=model.config), tokens(prompt + length)
    counted(model, input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True)
    expected = sum(counted(model, input_ids=ids[:, [place]], past_key_values=cache, use_cache=True) for place in range(prompt, prompt + length - 1))
    head = model.get_output_embeddings()
    expected += length * 2 * head.in_features * head.out_features
    assert model_flops(model).completion(prompt, length) == pytest.approx(expected, rel=0.01)


def test_qwen3s_flops_are_the_textbook_formula(models):
    width, heads, groups, size, inner, layers = 64, 4, 2, 32, 96, 3
    weights = width * heads * size * 2 + width * groups * size * 2 + 3 * width * inner  # of a layer: q and o, k and v, the feed-forward block
    length = 77
    expected = layers * (2 * weights * length + 4 * heads * size * length**2)
    assert model_flops(models["qwen3"]).sequence(length) == pytest.approx(expected, rel=1e-9)


def test_only_the_experts_that_a_token_is_sent_to_count(new_student):
    """Twice as many experts cost a wider router, and nothing else."""
    few, many = (model_flops(new_student("qwen3_moe_tiny", num_experts=number)) for number in (8, 16))
    assert many.sequence(100) - few.sequence(100) == pytest.approx(3 * 100 * 2 * 64 * 8)


def test_a_sampler_with_packed_experts_multiplies_as_much_as_the_student(v4_model):
    assert model_flops(copy_with_packed_experts(v4_model, "student")) == model_flops(v4_model)


def test_counting_needs_no_weights(v4_model):
    assert model_flops(copy.deepcopy(v4_model).to("meta")) == model_flops(v4_model)


def test_a_family_that_looks_at_values_has_no_figure_and_a_warning(session_qwen3_moe_model, caplog):
    class Looking(type(session_qwen3_moe_model)):
        def __init__(self, config):
            super().__init__(config)
            self.base_model.register_forward_pre_hook(lambda module, args, inputs: bool(inputs["input_ids"].any()) and None, with_kwargs=True)

    assert model_flops(Looking(copy.deepcopy(session_qwen3_moe_model.config))) is None
    assert "qwen3_moe, which cannot run without data" in caplog.text


def test_the_matrix_rate_is_measured_once_for_a_dtype_and_device():
    rate = measured_matmul_rate(torch.float32, torch.device("cpu"))
    assert rate > 1e8
    assert measured_matmul_rate(torch.float32, torch.device("cpu")) == rate
