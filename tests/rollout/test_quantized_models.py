"""Quantised checkpoints: decoded bit for bit into plain models, refused where they are damaged."""

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from opd.deepseek_layout import kept_modules, may_be_fp8, released_config, released_tensors
from opd.shards import write_shards
from rollout.config import Dtype, ModelConfig
from rollout.fp4 import quantize
from rollout.model import load_model, save_model
from rollout.quantized_models import decode_on_load, is_fp4, quantization_of, read_config
from teachers.compatibility import check_compatible

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
WIDE = {"hidden_size": 128, "moe_intermediate_size": 128, "q_lora_rank": 128, "o_groups": 1, "o_lora_rank": 128}
"""Sizes at which most matrices are made of FP8 blocks."""
EXPERT = "layers.1.ffn.experts.3"

each_dtype = pytest.mark.parametrize("dtype", list(Dtype))


def config_of(folder: Path, dtype: Dtype = Dtype.float32) -> ModelConfig:
    return ModelConfig(model=str(folder), dtype=dtype)


def bits(values: torch.Tensor) -> torch.Tensor:
    """For comparisons that see the sign of zero."""
    return values.contiguous().view({torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.int64: torch.int64}[values.dtype])


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(bits(ours[name]), bits(theirs[name])) for name in ours)


@pytest.fixture(scope="module")
def released(fp4_student, tmp_path_factory) -> Path:
    """A folder in DeepSeek's layout, in three shards: experts FP4, attention and shared experts FP8."""
    source, folder = fp4_student(**WIDE), tmp_path_factory.mktemp("released") / "model"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    model = load_model(config_of(source), "student")
    tensors = released_tensors(model, {name for name, weight in model.state_dict().items() if may_be_fp8(name, weight, model.config)})
    write_shards(folder, tensors, sum(tensor.form.nbytes for tensor in tensors) // 2)
    (folder / "config.json").write_text(json.dumps(released_config(model.config, kept_modules(tensors))))
    return folder


@pytest.fixture(scope="module")
def stored(released) -> dict[str, torch.Tensor]:
    return {name: tensor for file in released.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture
def changed(released, stored, tmp_path):
    """changed(edit, config={...}): a copy of the folder in one file, with edited weights and config."""

    def change(edit=lambda weights: None, config: dict | None = None) -> Path:
        shutil.copytree(released, tmp_path / "changed", ignore=shutil.ignore_patterns("model*"))
        weights = {name: tensor.clone() for name, tensor in stored.items()}
        edit(weights)
        save_file(weights, tmp_path / "changed" / "model.safetensors", metadata={"format": "pt"})
        file = tmp_path / "changed" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | (config or {})))
        return tmp_path / "changed"

    return change


def power(scale: torch.Tensor) -> torch.Tensor:
    return 2.0 ** (scale.view(torch.uint8).double() - 127)


def decoded_fp4(stored: dict, module: str) -> torch.Tensor:
    """float64 values of a packed matrix, element by element: the low half of a byte first, one scale for 32."""
    codes = stored[f"{module}.weight"].view(torch.uint8).int()
    values = torch.stack([E2M1[codes & 15], E2M1[codes >> 4]], dim=-1).flatten(1).double()
    return values * power(stored[f"{module}.scale"]).repeat_interleave(32, 1)


def decoded_fp8(stored: dict, module: str) -> torch.Tensor:
    return stored[f"{module}.weight"].double() * power(stored[f"{module}.scale"]).repeat_interleave(128, 0).repeat_interleave(128, 1)


@each_dtype
def test_every_quantised_weight_is_decoded_bit_for_bit(released, stored, dtype):
    model = load_model(config_of(released, dtype), "student")
    kind = model.dtype
    for number, layer in enumerate(model.model.layers):
        for expert in range(8):
            gate, up, down = (decoded_fp4(stored, f"layers.{number}.ffn.experts.{expert}.{part}").to(kind) for part in ("w1", "w3", "w2"))
            assert torch.equal(bits(layer.mlp.experts.gate_up_proj[expert]), bits(torch.cat([gate, up])))
            assert torch.equal(bits(layer.mlp.experts.down_proj[expert]), bits(down))
        matrices = {"attn.wq_a": layer.self_attn.q_a_proj, "attn.wq_b": layer.self_attn.q_b_proj, "attn.wo_a": layer.self_attn.o_a_proj}
        matrices |= {"attn.wo_b": layer.self_attn.o_b_proj, "ffn.shared_experts.w2": layer.mlp.shared_experts.down_proj}
        for name, module in matrices.items():
            assert torch.equal(bits(module.weight), bits(decoded_fp8(stored, f"layers.{number}.{name}").to(kind)))
    assert {parameter.dtype for parameter in model.parameters()} == {kind}


def test_the_fixture_has_every_kind_of_tensor(stored):
    kinds = {tensor.dtype for tensor in stored.values()}
    assert kinds == {torch.int8, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float32, torch.int64}
    assert stored[f"{EXPERT}.w1.weight"].shape == (128, 64)
    assert stored[f"{EXPERT}.w1.scale"].shape == (128, 4)


def test_a_decoded_model_has_forgotten_that_it_was_quantised(released):
    config = load_model(config_of(released), "student").config
    assert quantization_of(config) == {}
    assert "expert_dtype" not in config.to_dict()
    assert not is_fp4(config)


@pytest.mark.parametrize("inside", [True, False])
def test_fp4_is_seen_in_the_config_wherever_it_stands(changed, released, inside):
    """V4 has expert_dtype beside the quantisation, V4.1 in it."""
    quantization = json.loads((released / "config.json").read_text())["quantization_config"]
    folder = changed(config={"expert_dtype": None, "quantization_config": quantization | {"expert_dtype": "fp4"}} if inside else {})
    assert is_fp4(read_config(config_of(folder), "student"))


def test_a_plain_model_and_fp8_experts_are_not_fp4(saved_v4, changed, released):
    quantization = json.loads((released / "config.json").read_text())["quantization_config"]
    assert not is_fp4(read_config(config_of(saved_v4), "student"))
    assert not is_fp4(read_config(config_of(changed(config={"expert_dtype": None, "quantization_config": quantization})), "student"))


def test_a_decoded_model_is_saved_as_a_plain_one_with_every_weight(released, tokenizer, tmp_path):
    model = load_model(config_of(released, Dtype.bfloat16), "student")
    save_model(tmp_path / "plain", model, tokenizer, model.state_dict())
    assert not {"quantization_config", "expert_dtype"} & set(json.loads((tmp_path / "plain" / "config.json").read_text()))
    assert same(load_model(config_of(tmp_path / "plain", Dtype.bfloat16), "student").state_dict(), model.state_dict())


def test_a_folder_of_plain_deepseek_v4_loads_with_every_weight(fp4_student, tokenizer, tmp_path):
    model = load_model(config_of(fp4_student("bfloat16"), Dtype.bfloat16), "student")
    save_model(tmp_path / "again", model, tokenizer, model.state_dict())
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (fp4_student("bfloat16"), tmp_path / "again"))
    assert same(ours, theirs)
    assert sum(tensor.numel() for tensor in ours.values()) == sum(tensor.numel() for tensor in model.state_dict().values())


def test_it_may_be_a_teacher(released, tokenizer):
    assert check_compatible("teacher of law", config_of(released), tokenizer) == 256


# Other layouts


def test_fp8_with_scales_in_float32_is_decoded(tokenizer, tmp_path):
    """DeepSeek-V3's kind, in any family: weight_scale_inv beside a weight, for each block."""
    architecture = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=len(tokenizer), **architecture))
    save_model(tmp_path / "model", model, tokenizer, model.state_dict())
    weights, expected = load_file(tmp_path / "model" / "model.safetensors"), {}
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        rows, columns = (size // 128 for size in weights[name].shape)
        weights[name] = torch.randn(weights[name].shape).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = torch.rand(rows, columns)
        expected[name] = weights[name].float() * weights[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}))
    loaded = load_model(config_of(tmp_path / "model"), "student").state_dict()
    assert len(expected) == 7
    assert all(torch.equal(loaded[name], values) for name, values in expected.items())


GPT_OSS = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def gpt_oss(tokenizer, tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """Folder of a gpt-oss whose gate and up projections are MXFP4, and what these decode to."""
    folder = tmp_path_factory.mktemp("gpt_oss") / "model"
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    rest = {"num_local_experts": 4, "layer_types": ["full_attention"], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", vocab_size=len(tokenizer), **sizes, **rest))
    save_model(folder, model, tokenizer, model.state_dict())
    weights = {name: torch.randn(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    packed = quantize(weights.pop(GPT_OSS).transpose(1, 2).contiguous())
    weights |= {f"{GPT_OSS}_blocks": packed.codes.view(torch.uint8).unflatten(-1, (-1, 16)), f"{GPT_OSS}_scales": packed.scale}
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    pairs = zip(packed.codes, packed.scale, strict=True)
    return folder, torch.stack([decoded_fp4({"x.weight": codes, "x.scale": scale}, "x").T.float() for codes, scale in pairs])


def test_gpt_oss_in_mxfp4_is_fp4_and_is_decoded(gpt_oss):
    folder, expected = gpt_oss
    assert is_fp4(read_config(config_of(folder), "student"))
    loaded = load_model(config_of(folder), "student")
    assert expected.shape == (4, 64, 128)
    assert torch.equal(loaded.state_dict()[GPT_OSS], expected)
    assert quantization_of(loaded.config) == {}
    assert not is_fp4(loaded.config)


def zero_a_gpt_oss_scale(weights: dict) -> None:
    weights[f"{GPT_OSS}_scales"][2, 77, 1] = 0


def drop_the_gpt_oss_scales(weights: dict) -> None:
    del weights[f"{GPT_OSS}_scales"]


def nan_gpt_oss_scale(weights: dict) -> None:
    weights[f"{GPT_OSS}_scales"][3, 0, 0] = 255


def turn_the_gpt_oss_scales(weights: dict) -> None:
    weights[f"{GPT_OSS}_scales"] = weights[f"{GPT_OSS}_scales"].transpose(0, 1).contiguous()


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (zero_a_gpt_oss_scale, rf"the scales of {GPT_OSS}_blocks of the student are zero where its weights are not"),
        (drop_the_gpt_oss_scales, rf"{GPT_OSS}_blocks of the student is stored in U8 without its scale"),
        (nan_gpt_oss_scale, rf"the scales of {GPT_OSS}_blocks of the student hold NaN"),
        (turn_the_gpt_oss_scales, rf"{GPT_OSS}_blocks of the student has sizes \[4, 128, 32\] and scales \(128, 4, 2\), which are not blocks"),
    ],
)
def test_a_damaged_gpt_oss_is_refused(gpt_oss, changed_checkpoint, edit, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_model(config_of(changed_checkpoint(gpt_oss[0], edit)), "student")


def test_a_zero_scale_of_gpt_oss_under_zeros_is_no_damage(gpt_oss, changed_checkpoint):
    def zero_block(weights: dict) -> None:
        weights[f"{GPT_OSS}_scales"][2, 77, 1] = 0
        weights[f"{GPT_OSS}_blocks"][2, 77, 1] = 0x08  # -0

    assert not load_model(config_of(changed_checkpoint(gpt_oss[0], zero_block)), "student").state_dict()[GPT_OSS][2, 32:, 77].any()


# Cost


def test_the_scales_of_a_checkpoint_are_read_once_as_long_as_it_stays_as_it_is(changed, monkeypatch):
    folder, read = changed(), []
    monkeypatch.setattr("rollout.quantized_models._require_whole_scale", lambda name, *_: read.append(name))
    load_model(config_of(folder), "student")
    assert f"{EXPERT}.w2.weight" in read
    read.clear()
    load_model(config_of(folder), "student")
    assert not read
    file = folder / "model.safetensors"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    load_model(config_of(folder), "student")
    assert read


def test_a_checkpoint_that_is_damaged_after_it_was_loaded_is_refused_each_time(changed):
    folder = changed()
    load_model(config_of(folder), "student")
    weights = load_file(folder / "model.safetensors")
    zero_one_scale(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"the scales of {EXPERT}\.w2\.weight of the student are zero"):
            load_model(config_of(folder), "student")


def test_the_config_that_is_decoded_is_a_copy(released, saved_v4):
    config = read_config(config_of(released), "student")
    before = copy.deepcopy(config.to_dict())
    decoded = decode_on_load(config, config_of(released), "student")
    assert quantization_of(decoded)["dequantize"] is True
    assert config.to_dict() == before
    plain = read_config(config_of(saved_v4), "student")
    assert decode_on_load(plain, config_of(saved_v4), "student") is plain


# Refused


def zero_all_scales(weights: dict) -> None:
    for name in weights:
        if name.endswith(".scale"):
            weights[name].view(torch.uint8).zero_()


def zero_one_scale(weights: dict) -> None:
    weights[f"{EXPERT}.w2.scale"].view(torch.uint8)[7, 2] = 0


def zero_an_fp8_scale(weights: dict) -> None:
    weights["layers.2.attn.wq_b.scale"].view(torch.uint8).zero_()


def without(*names: str):
    def drop(weights: dict) -> None:
        for name in names:
            del weights[name]

    return drop


def nan_scale(weights: dict) -> None:
    weights[f"{EXPERT}.w3.scale"].view(torch.uint8)[0, 0] = 255


def coarse_scale(weights: dict) -> None:
    weights[f"{EXPERT}.w1.scale"] = weights[f"{EXPERT}.w1.scale"][:64].clone()


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (zero_all_scales, r"the scales of layers\.0\.\S+ of the teacher of law are zero where its weights are not"),
        (zero_one_scale, rf"the scales of {EXPERT}\.w2\.weight of the teacher of law are zero where its weights are not"),
        (zero_an_fp8_scale, r"the scales of layers\.2\.attn\.wq_b\.weight of the teacher of law are zero where its weights are not"),
        (nan_scale, rf"the scales of {EXPERT}\.w3\.weight of the teacher of law hold NaN"),
        (coarse_scale, rf"{EXPERT}\.w1\.weight of the teacher of law has sizes \[128, 64\] and scales \(64, 4\), which are not blocks of 1 x 16"),
        (without(f"{EXPERT}.w1.scale"), rf"{EXPERT}\.w1\.weight of the teacher of law is stored in I8 without its scale"),
        (without("layers.0.attn.wo_b.scale"), r"layers\.0\.attn\.wo_b\.weight of the teacher of law is stored in F8_E4M3 without its scale"),
        (without(f"{EXPERT}.w1.weight", f"{EXPERT}.w1.scale"), "lacks a part of a weight that it stores in parts, as one expert of a layer"),
        (
            without(*(f"{EXPERT}.{part}.{kind}" for part in ("w1", "w2", "w3") for kind in ("weight", "scale"))),
            r"lacks 2 of the model's weights, model\.layers\.1\.mlp\.experts\.down_proj \(its shape differs\) first",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_checkpoint_is_refused_by_the_name_of_what_is_damaged(changed, edit, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_model(config_of(changed(edit)), "teacher of law")


def test_a_zero_scale_under_zeros_is_no_damage(changed):
    def zero_block(weights: dict) -> None:
        weights[f"{EXPERT}.w1.scale"].view(torch.uint8)[5, 1] = 0
        weights[f"{EXPERT}.w1.weight"][5, 16:32] = 0

    assert not load_model(config_of(changed(zero_block)), "student").model.layers[1].mlp.experts.gate_up_proj[3, 5, 32:64].any()


def test_a_matrix_that_is_not_made_of_whole_blocks_is_refused(changed):
    """transformers would decode 192 rows with two scales in blocks of 96."""

    def lengthen(weights: dict) -> None:
        weights["layers.0.attn.wq_b.weight"] = torch.zeros(192, 128).to(torch.float8_e4m3fn)
        weights["layers.0.attn.wq_b.scale"] = torch.full((2, 1), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)

    with pytest.raises(ValueError, match=r"layers\.0\.attn\.wq_b\.weight .* are not blocks of 128 x 128: dequantise it offline"):
        load_model(config_of(changed(lengthen)), "student")


def test_a_cut_shard_is_refused(released, tmp_path):
    shutil.copytree(released, tmp_path / "model")
    shard = max((tmp_path / "model").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"teacher of law cannot be loaded from .*{shard.name}"):
        load_model(config_of(tmp_path / "model"), "teacher of law")


def test_a_missing_shard_is_refused(released, tmp_path):
    shutil.copytree(released, tmp_path / "model")
    shard = max((tmp_path / "model").glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(ValueError, match=f"teacher of law cannot be loaded from .*{shard.name}: No such file"):
        load_model(config_of(tmp_path / "model"), "teacher of law")


def test_another_quantisation_is_refused_with_what_to_do(changed):
    folder = changed(config={"quantization_config": {"quant_method": "awq", "bits": 4}})
    with pytest.raises(ValueError, match=r"the teacher of law at .* is quantised with awq, which is not read here: dequantise it offline"):
        load_model(config_of(folder), "teacher of law")


def test_a_quantisation_without_a_name_is_refused(changed):
    with pytest.raises(ValueError, match="is quantised with a method that its config does not name, which is not read here"):
        load_model(config_of(changed(config={"quantization_config": {"weight_block_size": [128, 128]}})), "student")
