"""What families do to the product of head and hidden state: read from their settings, measured on the model, refused where unknown."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, LlamaForCausalLM

from rollout.config import Attention, Dtype, ModelConfig
from rollout.model import backbone_of, build_model, head_of, load_model, logit_transform, prepare_model
from rollout.types import LogitTransform

VOCAB_SIZE = 100
TOKENS = torch.arange(3, 33)[None]
DENSE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
HEADS = {**DENSE, "num_key_value_heads": 2, "head_dim": 16}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MLA = {**DENSE, "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}

PLAIN = {
    "llama": (DENSE, LogitTransform()),
    "opt": ({"hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "word_embed_proj_dim": 16}, LogitTransform()),
    "mpt": ({"d_model": 32, "n_heads": 2, "n_layers": 1, "expansion_ratio": 1, "logit_scale": 0.5}, LogitTransform()),  # ignores it
    "gemma2": ({**HEADS, "final_logit_softcapping": None}, LogitTransform()),
    "granite": ({**DENSE, "logits_scaling": 1}, LogitTransform()),
}

TRANSFORMED = {
    "gemma2": ({**HEADS, "final_logit_softcapping": 20.0}, LogitTransform(1.0, 20.0)),
    "gemma3_text": ({**HEADS, "final_logit_softcapping": 30.0}, LogitTransform(1.0, 30.0)),
    "recurrent_gemma": ({**DENSE, "num_hidden_layers": 2, "lru_width": 32, "attention_window_size": 8}, LogitTransform(1.0, 30.0)),
    "xlstm": ({"hidden_size": 64, "num_hidden_layers": 1, "num_blocks": 1, "num_heads": 2, "output_logit_soft_cap": 10.0}, LogitTransform(1.0, 10.0)),
    "cohere": ({**DENSE, **SPECIAL}, LogitTransform(0.0625)),
    "cohere2": ({**DENSE, **SPECIAL, "logit_scale": 0.25}, LogitTransform(0.25)),
    "granite": ({**DENSE, "logits_scaling": 8}, LogitTransform(0.125)),
    "granitemoe": ({**DENSE, "num_local_experts": 4, "logits_scaling": 4.0}, LogitTransform(0.25)),
    "hyperclovax": ({**DENSE, "logits_scaling": 4.0}, LogitTransform(4.0)),
    "falcon_h1": ({**DENSE, "lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}, LogitTransform(0.5)),
    "minicpm3": ({**MLA, "dim_model_base": 8}, LogitTransform(0.25)),
}


def build(family: str, settings: dict, dtype: Dtype = Dtype.float32):
    torch.manual_seed(0)
    return build_model({"model_type": family, **settings}, VOCAB_SIZE, ModelConfig(dtype=dtype), "student")


@torch.no_grad()
def products_and_logits(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Head times hidden state, and the model's own logits, of a model whose head was made so large that the products reach 60."""
    hidden_BLD, head_VD = backbone_of(model)(input_ids=TOKENS, use_cache=False)[0], head_of(model).weight
    head_of(model).weight = nn.Parameter(head_VD * 60 / (hidden_BLD @ head_VD.T).abs().max())  # a new one: the embedding keeps the old
    return hidden_BLD @ head_of(model).weight.T, model(input_ids=TOKENS, use_cache=False).logits


# Read from the settings


@pytest.mark.parametrize(("family", "case"), [*PLAIN.items(), *TRANSFORMED.items()])
def test_logits_are_the_transform_of_head_times_hidden_state(family, case):
    settings, expected = case
    model = build(family, settings)
    transform = logit_transform(model.config, "student")
    assert transform == expected
    product, logits = products_and_logits(model)
    oracle = transform.scale * product
    if transform.softcap is not None:
        oracle = transform.softcap * torch.tanh(oracle / transform.softcap)
    assert torch.allclose(logits, oracle, atol=1e-4)
    assert torch.allclose(logits, product, atol=1e-4) == (expected == LogitTransform())


@pytest.mark.parametrize("student", ["session_v4_model", "session_qwen3_moe_model"])
def test_the_students_families_have_no_transform(request, student):
    assert logit_transform(request.getfixturevalue(student).config, "student") == LogitTransform()


def test_a_soft_cap_that_the_model_with_images_ignores_is_not_taken_for_one():
    text = {**HEADS, "final_logit_softcapping": 20.0, "vocab_size": VOCAB_SIZE}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    model = build("gemma3", {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 1})
    product, logits = products_and_logits(model)
    assert logit_transform(model.config, "student") == LogitTransform()
    assert torch.allclose(logits, product, atol=1e-4)


def test_cropped_logits_are_refused_by_name():
    config = AutoConfig.for_model("inkling_text", vocab_size=VOCAB_SIZE, unpadded_vocab_size=90)
    with pytest.raises(ValueError, match=r"teacher of law \(inkling_text\) crops its logits to unpadded_vocab_size"):
        logit_transform(config, "teacher of law")
    whole = AutoConfig.for_model("inkling_text", vocab_size=VOCAB_SIZE, unpadded_vocab_size=VOCAB_SIZE, logits_mup_width_multiplier=8.0)
    assert logit_transform(whole, "teacher of law") == LogitTransform(0.125)


# Measured on the model

UNKNOWN = r"student \({}\) computes its logits in a way the full-vocabulary divergence does not know"

CHANGES = {
    "scaled": lambda logits: logits * 1.1,
    "soft-capped": lambda logits: 50 * torch.tanh(logits / 50),
    "with a term added": lambda logits: logits + 0.1 * logits.abs().max() * torch.arange(VOCAB_SIZE) / VOCAB_SIZE,
    "with a small constant of each token added": lambda logits: logits + 0.02 * torch.arange(VOCAB_SIZE) / VOCAB_SIZE,
    "sharpened": lambda logits: logits * logits.abs(),
    "cropped": lambda logits: logits[..., : VOCAB_SIZE - 1],
    "in another order": lambda logits: logits.roll(1, -1),
}


@pytest.mark.parametrize("dtype", Dtype)
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changes_its_logits_otherwise_is_refused(monkeypatch, change, dtype):
    forward = LlamaForCausalLM.forward

    def changed(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = CHANGES[change](output.logits)
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", changed)
    with pytest.raises(ValueError, match=UNKNOWN.format("llama")):
        build("llama", DENSE, dtype)


@pytest.mark.parametrize("dtype", Dtype)
@pytest.mark.parametrize("family", TRANSFORMED)
def test_every_family_is_accepted_by_its_transform_and_refused_without(monkeypatch, family, dtype):
    settings, _ = TRANSFORMED[family]
    build(family, settings, dtype)
    monkeypatch.setattr("rollout.model.logit_transform", lambda config, role: LogitTransform())
    with pytest.raises(ValueError, match=UNKNOWN.format(family)):
        build(family, settings, dtype)


def test_a_loaded_model_is_measured(saved_qwen3_moe, monkeypatch):
    monkeypatch.setattr("rollout.model.logit_transform", lambda config, role: LogitTransform(0.5))
    with pytest.raises(ValueError, match=r"teacher of law \(qwen3_moe\) computes its logits"):
        load_model(ModelConfig(model=str(saved_qwen3_moe)), "teacher of law")


def test_a_family_whose_backbone_is_not_found_is_refused():
    with pytest.raises(ValueError, match=UNKNOWN.format("llama4_text")):
        build("llama4_text", {**HEADS, "num_local_experts": 2, "intermediate_size_mlp": 32})


def test_a_head_that_is_no_matrix_is_refused():
    model = build("llama", DENSE)
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match=r"student \(llama\) has no single linear head"):
        prepare_model(model, ModelConfig(), "student")


@pytest.mark.parametrize(("name", "changes"), [("deepseek_v4_tiny", {}), ("qwen3_moe_tiny", {"attention_dropout": 0.5})])
def test_measuring_a_model_leaves_it_and_the_generator_as_they_were(new_student, name, changes):
    model = new_student(name, **changes).train()
    before = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    generator = torch.get_rng_state()
    prepare_model(model, ModelConfig(), "student")
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(tensor, before[name]) for name, tensor in [*model.named_parameters(), *model.named_buffers()])
    assert not any(module.training or module._forward_hooks for module in model.modules())


def test_a_model_for_flash_attention_is_measured_without_it(monkeypatch):
    """A student is on the CPU when it is measured, where flash attention does not run; nor is it installed for these tests."""
    model, chosen = build("llama", DENSE), []
    monkeypatch.setattr(LlamaForCausalLM, "set_attn_implementation", lambda self, attention: chosen.append(attention))
    head_of(model).register_forward_hook(lambda *_: chosen.append("measured"))
    prepare_model(model, ModelConfig(attention=Attention.flash_attention_2), "student")
    assert chosen[0] == "eager"
    assert chosen[-1] == "flash_attention_2"
    assert set(chosen[1:-1]) == {"measured"}
