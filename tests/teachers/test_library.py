"""Where the pool's weights come from and what that cost: every kind of checkpoint scores as transformers' own loading of it, and figures are what was read."""

import json
import os
import shutil

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from opd.deepseek_layout import kept_modules, may_be_fp8, released_config, released_tensors
from opd.shards import write_shards
from rollout.config import Dtype, ModelConfig
from rollout.indexer import quantize_indexer
from rollout.model import end_tokens, load_model, save_model
from teachers.config import DomainConfig, TeacherConfig, TeachersConfig
from teachers.pool import TeacherPool
from teachers.teacher import Teacher

CPU = torch.device("cpu")
THREE = {"law": "v4", "code": "qwen", "math": "wide"}
WIDE = {"hidden_size": 128, "moe_intermediate_size": 128, "q_lora_rank": 128, "o_groups": 1, "o_lora_rank": 128}
"""Sizes at which most matrices are made of FP8 blocks."""


def of(rollouts: list, *domains: str) -> list:
    return [rollout for rollout in rollouts if rollout.prompt.domain in domains]


def hidden_of(pool: TeacherPool, rollouts: list) -> list[torch.Tensor]:
    return [pool.hidden(item.signal, item.rollout) for item in pool.score(rollouts)]


@pytest.fixture(scope="module")
def tied(tokenizer, tmp_path_factory) -> str:
    """A Gemma 3, whose head is its embedding and whose logits have a soft cap."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = AutoConfig.for_model("gemma3_text", vocab_size=len(tokenizer), max_position_embeddings=128, final_logit_softcapping=5.0, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    folder = tmp_path_factory.mktemp("tied") / "gemma"
    save_model(folder, model, tokenizer, model.state_dict())
    return str(folder)


@pytest.fixture(scope="module")
def released(fp4_student, tmp_path_factory) -> str:
    """A teacher in DeepSeek's own layout: experts FP4, attention and shared experts FP8; transformers has to decode it."""
    source, folder = fp4_student(**WIDE), tmp_path_factory.mktemp("released") / "model"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    model = load_model(ModelConfig(model=str(source)), "teacher")
    tensors = released_tensors(model, {name for name, weight in model.state_dict().items() if may_be_fp8(name, weight, model.config)})
    write_shards(folder, tensors, 1 << 30)
    (folder / "config.json").write_text(json.dumps(released_config(model.config, kept_modules(tensors))))
    return str(folder)


@pytest.fixture(scope="module")
def fp4_indexer(new_student, tokenizer, tmp_path_factory) -> str:
    """A DeepSeek-V4 that chooses its compressed entries by FP4 queries and keys."""
    model = new_student("deepseek_v4_tiny", seed=4, index_head_dim=32)
    quantize_indexer(model, "teacher")
    folder = tmp_path_factory.mktemp("indexer") / "model"
    save_model(folder, model, tokenizer, model.state_dict())
    return str(folder)


@pytest.mark.parametrize("kind", ["tied", "released", "fp4_indexer", "v4"])
def test_a_teacher_that_comes_and_goes_scores_as_transformers_loads_it(kind, request, folders, new_pool, rollouts):
    folder = folders.get(kind) or request.getfixturevalue(kind)
    pool = new_pool({"law": folder, "code": "wide"}, max_resident=1)
    model = load_model(ModelConfig(model=folder), "oracle")
    oracle = Teacher("oracle", model)
    chosen = of(rollouts, "law", "code")
    for _ in range(3):
        for item in pool.score(chosen):
            hidden_TD = pool.hidden(item.signal, item.rollout)
            if item.rollout.prompt.domain == "law":
                assert torch.allclose(hidden_TD, oracle.hidden([item.rollout], 1000)[0], atol=1e-5)
                head = pool.head(item.signal.teacher)
                assert torch.equal(head.weight_VD, oracle.head.weight_VD)
                assert head.transform == oracle.transform


def test_a_decoded_teachers_head_is_there_without_decoding_it_again(released, new_pool, rollouts):
    pool = new_pool({"law": released, "code": "wide"}, max_resident=1)
    scored = pool.score(of(rollouts, "law", "code"))
    loads = pool.num_loads
    for item in scored:
        pool.head(item.signal.teacher)
    assert pool.num_loads == loads == 2


def test_two_spellings_of_one_folder_are_one_teacher(folders, new_pool, tmp_path):
    (tmp_path / "link").symlink_to(folders["qwen"])
    spellings = [folders["qwen"], folders["qwen"] + "/", str(tmp_path / "link"), os.path.relpath(folders["qwen"])]
    pool = new_pool({f"domain {number}": spelling for number, spelling in enumerate(spellings)})
    assert len(set(pool.teacher_of.values())) == len(pool.library.bases) == 1


def test_a_teachers_own_end_tokens_are_kept(folders, new_pool, tokenizer, tmp_path):
    folder = shutil.copytree(folders["qwen"], tmp_path / "other")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    pool = new_pool({"law": str(folder), "code": "qwen"})
    assert end_tokens(pool.get(pool.teacher_of["law"]).model, tokenizer) == {7, 9, tokenizer.eos_token_id}
    assert end_tokens(pool.get(pool.teacher_of["code"]).model, tokenizer) == end_tokens(load_model(ModelConfig(model=folders["qwen"]), "oracle"), tokenizer)


@pytest.mark.parametrize("max_resident", [1, 2])
def test_prefetching_changes_no_number_and_no_count_of_readings(max_resident, new_pool, rollouts):
    found = []
    for prefetch in (True, False):
        pool = new_pool(THREE, max_resident=max_resident, prefetch=prefetch)
        states = [state for _ in range(3) for state in hidden_of(pool, rollouts)]
        found.append((states, pool.num_loads))
    (with_it, loads), (without, other_loads) = found
    assert all(torch.equal(one, other) for one, other in zip(with_it, without, strict=True))
    assert loads <= other_loads  # memory for one more keeps one more


def test_without_prefetching_nothing_is_read_that_was_not_asked_for(new_pool, rollouts):
    pool = new_pool(THREE, max_resident=2, prefetch=False)
    for _ in range(3):
        scored = pool.score(rollouts)
        for item in scored:
            pool.head(item.signal.teacher, upcoming=scored[-1].signal.teacher)
        for residency in (pool.library.weights, pool.library.heads):
            assert all(resident.thread is None for resident in residency.residents.values())


def bytes_of(folder: str) -> int:
    return sum(tensor.nbytes for tensor in load_model(ModelConfig(model=folder), "oracle").state_dict().values())


def test_readings_and_bytes_are_those_of_the_files_and_are_told_once(new_pool, rollouts, folders):
    pool = new_pool(THREE, max_resident=1)
    scored = pool.score(rollouts)
    metrics = pool.metrics()
    for domain, name in THREE.items():
        assert metrics[f"teacher/{domain}/loads"] == 1
        assert metrics[f"teacher/{domain}/bytes_loaded"] == bytes_of(folders[name])
        assert metrics[f"teacher/{domain}/load_hidden"] < 0.5, "nothing was prefetched"
        assert metrics[f"teacher/{domain}/seconds"] > 0
    assert metrics["system/teacher_loads"] == 3
    for item in scored:
        pool.head(item.signal.teacher)
    resident = pool.library.weights.names()
    metrics = pool.metrics()
    for domain, name in THREE.items():
        head = load_model(ModelConfig(model=folders[name]), "oracle").lm_head.weight
        assert metrics[f"teacher/{domain}/bytes_loaded"] == (0 if pool.teacher_of[domain] in resident else head.nbytes)
    assert pool.metrics() == {"system/teacher_loads": 0} | {f"teacher/{domain}/{name}": 0 for domain in THREE for name in ("loads", "bytes_loaded")}


def test_readings_of_a_base_count_for_the_first_teacher_that_uses_it(folders, tokenizer, rollouts, tmp_path):
    get_peft_model(load_model(ModelConfig(model=folders["qwen"]), "base"), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    adapted = TeacherConfig(model=folders["qwen"], adapter=str(tmp_path / "adapter"))
    pool = TeacherPool({"law": DomainConfig(teacher=adapted)}, TeachersConfig(), tokenizer, CPU)
    pool.score(of(rollouts, "law"))
    metrics = pool.metrics()
    assert metrics["system/teacher_loads"] == metrics["teacher/law/loads"] == 1
    assert metrics["teacher/law/bytes_loaded"] == bytes_of(folders["qwen"])


def test_hidden_states_in_bfloat16_take_half_the_bytes_and_tell_the_divergence_that_rounding_makes(new_pool, rollouts, folders, tokenizer):
    law = of(rollouts, "law")
    exact, rounded = new_pool({"law": "v4"}), new_pool({"law": "v4"}, hidden_dtype=Dtype.bfloat16)
    one, other = exact.score(law), rounded.score(law)
    assert sum(item.signal.stored.num_bytes for item in one) == 2 * sum(item.signal.stored.num_bytes for item in other)
    for left, right in zip(one, other, strict=True):
        assert torch.equal(exact.hidden(left.signal, left.rollout).bfloat16(), rounded.hidden(right.signal, right.rollout))
    model = load_model(ModelConfig(model=folders["v4"]), "oracle")
    hidden_TD = Teacher("oracle", model).hidden([law[0]], 1000)[0]
    head_VD = model.lm_head.weight[: len(tokenizer)].double()
    exact_TV, rounded_TV = [(states.double() @ head_VD.T).log_softmax(-1) for states in (hidden_TD, hidden_TD.bfloat16())]
    expected = float((exact_TV.exp() * (exact_TV - rounded_TV)).sum(-1).mean())
    assert rounded.metrics()["teacher/law/rounding_kl"] == pytest.approx(expected, rel=2e-2, abs=1e-9)
    assert "teacher/law/rounding_kl" not in exact.metrics()


def test_memory_does_not_grow_with_the_number_of_scorings(new_pool, random_rollouts, folders, tmp_path):
    """Two hundred, of five teachers with memory for one and the one on its way."""
    names = {f"domain {number}": str(shutil.copytree(folders["qwen"], tmp_path / f"teacher {number}")) for number in range(5)}
    pool, process = new_pool(names, max_resident=1, prefetch=True), psutil.Process()
    rollouts, sizes = random_rollouts([(name, 6, 8) for name in names]), []
    for _ in range(40):
        for item in pool.score(rollouts):
            pool.hidden(item.signal, item.rollout)
            pool.head(item.signal.teacher)
        pool.metrics()
        sizes.append(process.memory_full_info().uss)
    assert len(pool.library.weights.residents) + len(pool.library.weights.free) == 2
    assert sizes[-1] - sizes[9] < bytes_of(folders["qwen"])
