"""Models: saved and loaded bit for bit, seen as backbone and head, and refused where that view would be wrong."""

import shutil

import pytest
import torch

from rollout.config import Attention, Dtype, Experts, ModelConfig
from rollout.experts import find_experts
from rollout.model import backbone_of, build_model, context_length, head_of, load_model, load_tokenizer, save_model

DENSE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
TOKENS = torch.arange(3, 33)[None]


@pytest.fixture(params=["v4", "qwen3_moe"])
def family(request) -> str:
    return request.param


@pytest.fixture
def model(family, request):
    return request.getfixturevalue(f"session_{family}_model")


@pytest.fixture
def folder(family, request):
    return request.getfixturevalue(f"saved_{family}")


@pytest.fixture(scope="session")
def saved_dense(tokenizer, tmp_path_factory):
    """Folder of a Llama, which has no experts."""
    model = build_model({"model_type": "llama", **DENSE}, len(tokenizer), ModelConfig(), "student")
    folder = tmp_path_factory.mktemp("saved") / "dense"
    save_model(folder, model, tokenizer, model.state_dict())
    return folder


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(TOKENS).logits


def head_name(weights: dict) -> str:
    """The head's name in a file; DeepSeek-V4's differs from the one in memory."""
    return next(name for name in ("lm_head.weight", "head.weight") if name in weights)


def build(model_type: str, tokenizer, cfg: ModelConfig | None = None, **settings):
    return build_model({"model_type": model_type, **settings}, len(tokenizer), cfg or ModelConfig(), "student")


# Saved and loaded


def test_a_saved_model_loads_bit_equal(model, folder):
    loaded = load_model(ModelConfig(model=str(folder)), "student")
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(logits_of(model), logits_of(loaded))


def test_the_weights_given_are_saved_and_not_the_models_own(qwen3_moe_model, tokenizer, tmp_path):
    given = {name: tensor * 2 for name, tensor in qwen3_moe_model.state_dict().items()}
    save_model(tmp_path / "model", qwen3_moe_model, tokenizer, given)
    loaded = load_model(ModelConfig(model=str(tmp_path / "model")), "student").state_dict()
    assert all(torch.equal(loaded[name], given[name]) for name in given)


def test_saving_replaces_what_stood_there_and_leaves_nothing_beside_it(qwen3_moe_model, tokenizer, tmp_path):
    for _ in range(2):
        save_model(tmp_path / "model", qwen3_moe_model, tokenizer, qwen3_moe_model.state_dict())
        (tmp_path / "model" / "stale").touch()
    save_model(tmp_path / "model", qwen3_moe_model, tokenizer, qwen3_moe_model.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / "stale").exists()


def test_the_tokenizer_is_saved_beside_the_model(folder, tokenizer):
    assert load_tokenizer(str(folder)).get_vocab() == tokenizer.get_vocab()


def test_a_model_is_loaded_in_the_dtype_asked_for(folder):
    assert head_of(load_model(ModelConfig(model=str(folder), dtype=Dtype.bfloat16), "student")).weight.dtype == torch.bfloat16


def test_a_model_is_loaded_for_evaluation(folder):
    assert not any(module.training for module in load_model(ModelConfig(model=str(folder)), "student").modules())


# Backbone, head, experts


def test_the_logits_are_the_head_times_the_backbones_hidden_states(model):
    with torch.no_grad():
        hidden = backbone_of(model)(TOKENS)[0]
    assert torch.allclose(logits_of(model), hidden @ head_of(model).weight.T, atol=1e-6)


def test_experts_are_found_in_every_layer_with_one_matrix_each(model):
    experts = find_experts(model)
    assert [name.split(".")[2] for name in experts] == ["0", "1", "2"]
    assert all(module.gate_up_proj.shape == (8, 128, 64) and module.down_proj.shape == (8, 64, 64) for module in experts.values())


def test_a_dense_model_has_no_experts(tokenizer):
    assert find_experts(build("llama", tokenizer, **DENSE)) == {}


def test_the_context_length_is_that_of_the_config(model):
    assert context_length(model.config, "student") == 256


@pytest.mark.parametrize("experts", Experts)
def test_the_experts_setting_takes_effect(folder, experts):
    assert load_model(ModelConfig(model=str(folder), experts=experts), "student").config._experts_implementation == experts.value


@pytest.mark.parametrize("experts", Experts)
def test_the_experts_setting_changes_logits_by_rounding_alone(model, folder, experts):
    assert torch.allclose(logits_of(load_model(ModelConfig(model=str(folder), experts=experts), "student")), logits_of(model), atol=2e-6)


@pytest.mark.parametrize("attention", [Attention.eager, Attention.sdpa])
def test_the_attention_setting_takes_effect(saved_qwen3_moe, attention):
    assert load_model(ModelConfig(model=str(saved_qwen3_moe), attention=attention), "student").config._attn_implementation == attention.value


# Refused settings


@pytest.mark.parametrize("attention", [Attention.sdpa, Attention.flash_attention_2])
def test_an_attention_that_deepseek_v4_lacks_is_refused(saved_v4, attention, architecture, tokenizer):
    with pytest.raises(ValueError, match=r"teacher of law cannot be loaded from .* does not support"):
        load_model(ModelConfig(model=str(saved_v4), attention=attention), "teacher of law")
    with pytest.raises(ValueError, match=r"student cannot be built from its architecture: .* does not support"):
        build_model(architecture("deepseek_v4_tiny"), len(tokenizer), ModelConfig(attention=attention), "student")


@pytest.mark.parametrize("experts", Experts)
def test_an_experts_setting_on_a_dense_model_is_refused(saved_dense, tokenizer, experts):
    with pytest.raises(ValueError, match=f"teacher of law has no routed experts, so `experts: {experts.value}` would be ignored"):
        load_model(ModelConfig(model=str(saved_dense), experts=experts), "teacher of law")
    with pytest.raises(ValueError, match="student has no routed experts"):
        build("llama", tokenizer, ModelConfig(experts=experts), **DENSE)


# Refused families


def test_a_head_with_a_bias_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"student \(phi\) has a bias in its head"):
        build("phi", tokenizer, **DENSE)


def test_an_architecture_without_family_is_refused(tokenizer):
    with pytest.raises(ValueError, match="student's architecture needs a model_type"):
        build_model(DENSE, len(tokenizer), ModelConfig(), "student")


def test_an_unknown_family_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"student cannot be built from its architecture: .*nonsense"):
        build("nonsense", tokenizer)


# Refused checkpoints


def test_a_config_without_model_is_refused():
    with pytest.raises(ValueError, match="the teacher of law has no model: give a local folder or a hub id"):
        load_model(ModelConfig(), "teacher of law")


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"teacher of law is not at .*nowhere: there is no config\.json"):
        load_model(ModelConfig(model=str(tmp_path / "nowhere")), "teacher of law")


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"teacher of law is not at .*: there is no config\.json in that folder"):
        load_model(ModelConfig(model=str(tmp_path)), "teacher of law")


def test_a_damaged_config_is_refused(saved_qwen3_moe, changed_checkpoint):
    changed = changed_checkpoint(saved_qwen3_moe)
    (changed / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json of the teacher of law at .* is not valid JSON"):
        load_model(ModelConfig(model=str(changed)), "teacher of law")


def test_a_checkpoint_that_lacks_weights_is_refused_by_the_first_one(folder, changed_checkpoint):
    def drop(weights: dict) -> None:
        del weights[head_name(weights)], weights["model.norm.weight"]

    with pytest.raises(ValueError, match=r"checkpoint .* of the teacher of law lacks 2 of the model's weights, lm_head\.weight first"):
        load_model(ModelConfig(model=str(changed_checkpoint(folder, drop))), "teacher of law")


def test_weights_of_another_shape_are_refused_by_name(folder, changed_checkpoint):
    def cut(weights: dict) -> None:
        weights[head_name(weights)] = weights[head_name(weights)][:50].clone()

    with pytest.raises(ValueError, match=r"of the teacher of law lacks 1 of the model's weights, lm_head\.weight \(its shape differs\) first"):
        load_model(ModelConfig(model=str(changed_checkpoint(folder, cut))), "teacher of law")


def test_a_folder_without_weights_is_refused(saved_qwen3_moe, changed_checkpoint):
    changed = changed_checkpoint(saved_qwen3_moe)
    (changed / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="teacher of law cannot be loaded from"):
        load_model(ModelConfig(model=str(changed)), "teacher of law")


def test_a_truncated_weight_file_is_refused(saved_qwen3_moe, changed_checkpoint):
    file = changed_checkpoint(saved_qwen3_moe) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="teacher of law cannot be loaded from"):
        load_model(ModelConfig(model=str(file.parent)), "teacher of law")


def test_a_folder_without_tokenizer_is_refused(saved_qwen3_moe, changed_checkpoint):
    changed = changed_checkpoint(saved_qwen3_moe)
    for file in changed.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="no tokenizer can be loaded from"):
        load_tokenizer(str(changed))


def test_a_tokenizer_without_end_token_is_refused(saved_qwen3_moe, tokenizer, tmp_path):
    shutil.copytree(saved_qwen3_moe, tmp_path / "model")
    endless = load_tokenizer(str(saved_qwen3_moe))
    endless.eos_token = None
    endless.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="has no end-of-sequence token"):
        load_tokenizer(str(tmp_path / "model"))
