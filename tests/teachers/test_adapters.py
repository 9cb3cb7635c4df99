"""Adapters: one base in memory scores as each of its merged models would, whichever adapter was in it before."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from rollout.config import ModelConfig
from rollout.model import load_model, save_model
from teachers.config import DomainConfig, TeacherConfig, TeachersConfig
from teachers.pool import TeacherPool
from teachers.teacher import Teacher

CPU = torch.device("cpu")
TARGETS = {"v4": ["q_b_proj", "kv_proj"], "qwen": ["q_proj", "v_proj"]}


@pytest.fixture(scope="session")
def make_adapter(saved_v4, saved_qwen3_moe, tokenizer, tmp_path_factory):
    """make_adapter("qwen", seed=1, **LoraConfig): (base, adapter, the folder of the model with both merged)."""

    def make(base: str, seed: int, **settings) -> tuple[str, str, str]:
        folder = tmp_path_factory.mktemp("adapter")
        saved = {"v4": saved_v4, "qwen": saved_qwen3_moe}[base]
        model = load_model(ModelConfig(model=str(saved)), "base")
        wrapped = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": TARGETS[base]} | settings))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        wrapped.save_pretrained(folder / "adapter")
        merged = wrapped.merge_and_unload()
        save_model(folder / "merged", merged, tokenizer, merged.state_dict())
        return str(saved), str(folder / "adapter"), str(folder / "merged")

    return make


@pytest.fixture
def new_pool(tokenizer):
    def make(teachers: dict[str, TeacherConfig], **settings) -> TeacherPool:
        return TeacherPool({name: DomainConfig(teacher=teacher) for name, teacher in teachers.items()}, TeachersConfig(**settings), tokenizer, CPU)

    return make


def merged_hidden(folder: str, rollout) -> torch.Tensor:
    return Teacher("merged", load_model(ModelConfig(model=folder), "merged")).hidden([rollout], 1000)[0]


@pytest.mark.parametrize("family", ["v4", "qwen"])
def test_an_adapter_on_its_base_gives_the_hidden_states_of_the_merged_model(family, make_adapter, new_pool, rollouts):
    base, adapter, merged = make_adapter(family, seed=1)
    pool = new_pool({name: TeacherConfig(model=base, adapter=adapter) for name in ("law", "code", "math")})
    plain = Teacher("base", load_model(ModelConfig(model=base), "base"))
    for item in pool.score(rollouts):
        hidden_TD = pool.hidden(item.signal, item.rollout)
        assert torch.allclose(hidden_TD, merged_hidden(merged, item.rollout), atol=1e-5)
        assert not torch.allclose(hidden_TD, plain.hidden([item.rollout], 1000)[0], atol=1e-2)


def test_logits_of_an_adapter_are_those_of_the_merged_model(make_adapter, new_pool, rollouts):
    base, adapter, merged = make_adapter("qwen", seed=1)
    pool = new_pool({"law": TeacherConfig(model=base, adapter=adapter)})
    oracle = load_model(ModelConfig(model=merged), "merged")
    for item in pool.score([rollout for rollout in rollouts if rollout.prompt.domain == "law"]):
        logits_TV = pool.hidden(item.signal, item.rollout) @ pool.head(item.signal.teacher).weight_VD.T
        tokens = torch.tensor([[*item.rollout.prompt.tokens, *item.rollout.completion_T.tolist()]])
        expected_TV = oracle(input_ids=tokens).logits[0, len(item.rollout.prompt.tokens) - 1 : -1]
        assert torch.allclose(logits_TV, expected_TV, atol=1e-5)


def test_teachers_of_one_base_share_it_and_differ_in_their_adapters(make_adapter, new_pool, rollouts):
    base, first, merged_first = make_adapter("qwen", seed=1)
    _, second, merged_second = make_adapter("qwen", seed=2, r=2, target_modules=["k_proj", "o_proj"])
    teachers = {"law": TeacherConfig(model=base, adapter=first), "code": TeacherConfig(model=base), "math": TeacherConfig(model=base, adapter=second)}
    pool = new_pool(teachers, max_resident=1)
    expected = {"law": merged_first, "code": base, "math": merged_second}
    for _ in range(2):
        for item in pool.score(rollouts):
            assert torch.allclose(pool.hidden(item.signal, item.rollout), merged_hidden(expected[item.rollout.prompt.domain], item.rollout), atol=1e-5)
    assert pool.num_loads == 1


def test_an_adapter_survives_that_its_base_makes_room(make_adapter, new_pool, rollouts, saved_v4):
    base, adapter, merged = make_adapter("qwen", seed=1)
    pool = new_pool({"law": TeacherConfig(model=base, adapter=adapter), "code": TeacherConfig(model=str(saved_v4))}, max_resident=1, prefetch=False)
    chosen = [rollout for rollout in rollouts if rollout.prompt.domain != "math"]
    for _ in range(2):
        for item in pool.score(chosen):
            expected = merged if item.rollout.prompt.domain == "law" else str(saved_v4)
            assert torch.allclose(pool.hidden(item.signal, item.rollout), merged_hidden(expected, item.rollout), atol=1e-5)


def test_adapters_on_fused_experts_are_scored_too(make_adapter, new_pool, rollouts):
    base, adapter, merged = make_adapter("qwen", seed=1, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    pool = new_pool({"law": TeacherConfig(model=base, adapter=adapter)})
    for item in pool.score([rollout for rollout in rollouts if rollout.prompt.domain == "law"]):
        assert torch.allclose(pool.hidden(item.signal, item.rollout), merged_hidden(merged, item.rollout), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [({"target_modules": ["q_proj", "lm_head"]}, "changes the head"), ({"modules_to_save": ["embed_tokens"]}, "replaces whole modules")],
)
def test_an_adapter_that_changes_more_than_layers_is_refused(settings, problem, make_adapter, new_pool, rollouts):
    base, adapter, _ = make_adapter("qwen", seed=1, **settings)
    with pytest.raises(ValueError, match=f"of the teacher of law {problem}"):
        new_pool({"law": TeacherConfig(model=base, adapter=adapter)}).score([rollout for rollout in rollouts if rollout.prompt.domain == "law"])


def test_an_adapter_of_another_base_is_refused(make_adapter, new_pool, rollouts):
    _, adapter, _ = make_adapter("qwen", seed=1)
    base, *_ = make_adapter("v4", seed=1)
    with pytest.raises(ValueError, match="does not fit the base of the teacher of law"):
        new_pool({"law": TeacherConfig(model=base, adapter=adapter)}).score([rollout for rollout in rollouts if rollout.prompt.domain == "law"])


def test_an_adapter_that_lacks_a_matrix_is_refused(make_adapter, new_pool, rollouts, tmp_path):
    base, adapter, _ = make_adapter("qwen", seed=1)
    shutil.copytree(adapter, tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    del weights[sorted(weights)[0]]
    save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="is not in both"):
        new_pool({"law": TeacherConfig(model=base, adapter=str(tmp_path / "adapter"))}).score([r for r in rollouts if r.prompt.domain == "law"])


def test_a_folder_without_an_adapter_is_refused_at_start_up(make_adapter, new_pool, tmp_path):
    base, *_ = make_adapter("qwen", seed=1)
    with pytest.raises(ValueError, match=r"the adapter of the teacher of law is not at .*: there is no adapter_config\.json"):
        new_pool({"law": TeacherConfig(model=base, adapter=str(tmp_path))})


def test_the_identity_has_the_hashes_of_base_and_adapter(make_adapter, new_pool, tmp_path):
    base, first, _ = make_adapter("qwen", seed=1)
    _, second, _ = make_adapter("qwen", seed=2)
    copied = shutil.copytree(first, tmp_path / "copied")
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 8}))
    pool = new_pool({name: TeacherConfig(model=base, adapter=str(path)) for name, path in {"law": first, "code": second, "math": copied}.items()})
    found = pool.identities()
    assert len({identity["hash"] for identity in found.values()}) == 1
    assert found["law"]["adapter_hash"] == found["math"]["adapter_hash"] != found["code"]["adapter_hash"]
    assert found["law"]["adapter_config_hash"] != found["math"]["adapter_config_hash"]
