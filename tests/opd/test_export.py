"""`opd export`: DeepSeek's layout byte by byte, an export that loads as the very model it was made from, and refusals before anything is written."""

import hashlib
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import AutoHfQuantizer

from opd.__main__ import load_config
from opd.deepseek_layout import released_config, released_name, released_tensors
from opd.evaluator import Evaluator
from opd.export import export
from opd.export_check import probe_tokens, require_equal
from opd.export_config import shard_bytes
from opd.shards import write_shards
from opd.specialize import specialize
from rollout.config import Dtype, ModelConfig, SamplingConfig
from rollout.fp4 import fake_quantize, quantize
from rollout.model import load_model, save_model
from rollout.sampler import LocalSampler

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
E4M3 = np.array([m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for m in (0, 2, 4, 6, 1, 3, 5, 7) for e in range(16) if (e, m) != (15, 7)])
"""Magnitudes of FP8: of two at the same distance the one with the even code is found first."""
WIDE = {"hidden_size": 128, "moe_intermediate_size": 128, "q_lora_rank": 128, "o_groups": 1, "o_lora_rank": 128}
"""Sizes at which most matrices are made of FP8 blocks."""
KL = ["domain=[tools]", "domains.tools.held_out.rows=6", "max_new_tokens=6", "decode_width=6"]

ATTENTION = ["attn_sink", "kv_norm.weight", "q_norm.weight", "wkv.weight", "wo_a.weight", "wo_b.weight", "wq_a.weight", "wq_b.weight"]
COMPRESSOR = ["compressor.ape", "compressor.norm.weight", "compressor.wgate.weight", "compressor.wkv.weight"]
INDEXER = [f"indexer.{name}" for name in (*COMPRESSOR, "weights_proj.weight", "wq_b.weight")]
LAYER = ["attn_norm.weight", "ffn_norm.weight", *(f"hc_{part}_{kind}" for part in ("attn", "ffn") for kind in ("base", "fn", "scale"))]
FFN = ["gate.weight", *(f"shared_experts.{part}.weight" for part in ("w1", "w2", "w3"))]
EXPERTS = [f"experts.{expert}.{part}.{kind}" for expert in range(8) for part in ("w1", "w2", "w3") for kind in ("scale", "weight")]
NAMES = {
    *("embed.weight", "head.weight", "norm.weight", "hc_head_base", "hc_head_fn", "hc_head_scale"),
    *(f"layers.{number}.{name}" for number in range(3) for name in LAYER),
    *(f"layers.{number}.ffn.{name}" for number in range(3) for name in FFN + EXPERTS),
    *(f"layers.{number}.attn.{name}" for number in range(3) for name in ATTENTION),
    *(f"layers.{number}.attn.{name}" for number in (1, 2) for name in COMPRESSOR),
    *(f"layers.1.attn.{name}" for name in INDEXER),
    *("layers.0.ffn.gate.tid2eid", "layers.1.ffn.gate.bias", "layers.2.ffn.gate.bias"),
}
"""What DeepSeek-V4's release calls the tensors of a model with a sliding, a sparse and a heavily compressed layer, the first of them hash-routed."""


def run(source: Path, run_dir: Path, *settings: str) -> dict:
    """Export a folder and return its record."""
    export(load_config("export", [f"student.model={source}", f"run_dir={run_dir}", "threads=1", *settings]))
    return json.loads((run_dir / "export.json").read_text())


@pytest.fixture(scope="module")
def exported(device, fp4_student, tmp_path_factory) -> Path:
    """Run folder of the export of a bfloat16 student that trained under FP4."""
    folder = tmp_path_factory.mktemp("runs") / "export"
    run(fp4_student("bfloat16"), folder)
    return folder


@pytest.fixture(scope="module")
def record(exported) -> dict:
    return json.loads((exported / "export.json").read_text())


@pytest.fixture(scope="module")
def stored(exported) -> dict[str, torch.Tensor]:
    return load_file(exported / "student" / "model.safetensors")


@pytest.fixture(scope="module")
def exported_fp8(device, fp4_student, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "export"
    run(fp4_student("float32", **WIDE), folder, "rest=fp8", *KL)
    return folder


def loaded(folder: Path, dtype: Dtype = Dtype.bfloat16):
    return load_model(ModelConfig(model=str(folder), dtype=dtype), "student")


def bits(values: torch.Tensor) -> torch.Tensor:
    """For comparisons that see the sign of zero."""
    return values.contiguous().view(torch.uint8)


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(bits(ours[name]), bits(theirs[name])) for name in ours)


def naive_fp8(weight: torch.Tensor) -> torch.Tensor:
    """Each block of 128 x 128 over the smallest power of two that needs no value above 448, to the nearest value of E4M3, ties to the even code."""
    rounded = weight.double().numpy().copy()
    for row in range(0, weight.shape[0], 128):
        for column in range(0, weight.shape[1], 128):
            block = rounded[row : row + 128, column : column + 128]
            power = 2.0 ** math.ceil(math.log2(np.abs(block).max() / 448))
            for values in block:
                values[:] = np.copysign(E4M3[np.abs((np.abs(values) / power)[:, None] - E4M3).argmin(-1)] * power, values)
    return torch.from_numpy(rounded).to(weight.dtype)


# The layout


def test_every_tensor_has_deepseeks_name(stored):
    assert set(stored) == NAMES


def test_experts_are_packed_and_everything_else_keeps_its_dtype(stored):
    assert stored["layers.1.ffn.experts.5.w1.weight"].dtype == torch.int8
    assert stored["layers.1.ffn.experts.5.w1.weight"].shape == stored["layers.1.ffn.experts.5.w2.weight"].shape == (64, 32)
    assert stored["layers.1.ffn.experts.5.w2.scale"].dtype == torch.float8_e8m0fnu
    assert stored["layers.1.ffn.experts.5.w2.scale"].shape == (64, 2)
    others = {name: tensor.dtype for name, tensor in stored.items() if ".experts." not in name}
    assert {name for name, dtype in others.items() if dtype != torch.bfloat16} == {*(f"layers.{n}.ffn.gate.bias" for n in (1, 2)), "layers.0.ffn.gate.tid2eid"}
    assert others["layers.1.ffn.gate.bias"] == torch.float32
    assert others["layers.0.ffn.gate.tid2eid"] == torch.int64


def test_each_experts_bytes_decode_to_the_students_weights(stored, fp4_student):
    """By hand: the low half of a byte first, a power of two for 32 columns; gate over up in the model."""
    student = loaded(fp4_student("bfloat16")).state_dict()
    for layer in range(3):
        for expert in range(8):
            matrices = {}
            for part in ("w1", "w2", "w3"):
                codes = stored[f"layers.{layer}.ffn.experts.{expert}.{part}.weight"].view(torch.uint8).int()
                scale = stored[f"layers.{layer}.ffn.experts.{expert}.{part}.scale"].view(torch.uint8).double()
                matrices[part] = torch.stack([E2M1[codes & 15], E2M1[codes >> 4]], dim=-1).flatten(1).double() * (2 ** (scale - 127)).repeat_interleave(32, 1)
            gate_up = student[f"model.layers.{layer}.mlp.experts.gate_up_proj"][expert]
            assert torch.equal(bits(gate_up), bits(torch.cat([matrices["w1"], matrices["w3"]]).bfloat16()))
            assert torch.equal(bits(student[f"model.layers.{layer}.mlp.experts.down_proj"][expert]), bits(matrices["w2"].bfloat16()))


def test_the_config_says_what_deepseeks_says(exported, record):
    config = json.loads((exported / "student" / "config.json").read_text())
    quantization = config["quantization_config"]
    assert config["expert_dtype"] == "fp4"
    assert config["architectures"] == ["DeepseekV4ForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert quantization.pop("modules_to_not_convert") == record["kept"]
    expected = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    assert quantization == expected
    assert config["compress_ratios"] == [0, 4, 8]
    assert config["num_hash_layers"] == 1
    assert config["topk_method"] == "noaux_tc"
    assert config["num_nextn_predict_layers"] == 0


def test_transformers_reads_the_same_settings_from_the_released_config(architecture, tmp_path):
    """DeepSeek's own names of some of them, YaRN among them, stand beside transformers'."""
    yarn = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}
    settings = architecture("deepseek_v4_tiny", rope_parameters=yarn)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    released = released_config(config, ["head"])
    assert released["rope_scaling"] == {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}
    (tmp_path / "config.json").write_text(json.dumps(released))
    read, own = AutoConfig.from_pretrained(tmp_path).to_dict(), config.to_dict()
    assert read["rope_parameters"]["compress"].pop("type") == "yarn"
    different = {name for name in read | own if read.get(name) != own.get(name)}
    assert different == {"expert_dtype", "quantization_config", "num_nextn_predict_layers", "topk_method", "_name_or_path"}


@pytest.mark.parametrize("rest", ["keep", "fp8"])
def test_on_a_gpu_transformers_would_hold_as_quantised_what_is_stored_so_and_nothing_else(request, rest):
    """Its quantiser chooses the modules from the config; the choice itself needs no GPU."""
    folder = request.getfixturevalue("exported" if rest == "keep" else "exported_fp8") / "student"
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True).preprocess_model(model)
    chosen = {name for name, module in model.named_modules() if type(module).__name__.startswith("FP8")}
    quantised = {name.removesuffix(".weight") for name, tensor in load_file(folder / "model.safetensors").items() if tensor.dtype == torch.float8_e4m3fn}
    assert {name for name in chosen if name.endswith(".experts")} == {f"model.layers.{number}.mlp.experts" for number in range(3)}
    assert {released_name(f"{name}.weight").removesuffix(".weight") for name in chosen if not name.endswith(".experts")} == quantised


def test_a_large_export_is_split_into_files_with_an_index_and_says_what_it_did(stored, fp4_student, tmp_path, capsys):
    run(fp4_student("bfloat16"), tmp_path / "run", "max_shard_size=100KB")
    folder = tmp_path / "run" / "student"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert len(shards) >= 3
    assert {name: file for file, tensors in shards.items() for name in tensors} == index["weight_map"]
    assert all(sum(tensor.nbytes for tensor in tensors.values()) <= 100_000 for tensors in shards.values())
    assert same({name: tensor for tensors in shards.values() for name, tensor in tensors.items()}, stored)
    printed = capsys.readouterr().out
    assert "routed experts, MXFP4" in printed
    assert "deepseek_v4 as format fp4: loaded again, every weight (" in printed
    assert "tensors) and the logits of 256 tokens are equal" in printed
    assert "4.25 bits each" in printed


def test_tied_embeddings_stay_tied(new_student, tokenizer, device, tmp_path):
    model = new_student("deepseek_v4_tiny", tie_word_embeddings=True)
    save_model(tmp_path / "student", model, tokenizer, model.state_dict())
    run(tmp_path / "student", tmp_path / "run", "round_experts=true")
    assert "head.weight" not in load_file(tmp_path / "run" / "student" / "model.safetensors")
    again = loaded(tmp_path / "run" / "student", Dtype.float32)
    assert again.config.tie_word_embeddings
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_a_weight_without_a_place_in_the_layout_is_refused_by_name(fp4_student, tmp_path, monkeypatch):
    def load_with_another(*arguments):
        model = load_model(*arguments)
        model.model.layers[1].self_attn.register_parameter("extra", torch.nn.Parameter(torch.zeros(2)))
        return model

    monkeypatch.setattr("opd.export.load_model", load_with_another)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.extra has no place in DeepSeek-V4's layout, .* name by name: set format=plain$"):
        run(fp4_student("bfloat16"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_each_weight_is_packed_once_though_each_tensor_has_a_file_of_its_own(session_v4_model, tmp_path, monkeypatch):
    packed = []
    monkeypatch.setattr("opd.deepseek_layout.quantize", lambda weight: packed.append(weight) or quantize(weight))
    tensors = released_tensors(session_v4_model, set())
    written = write_shards(tmp_path, tensors, 1)
    assert len(packed) == 3 * 2
    assert len(list(tmp_path.glob("*.safetensors"))) == len(tensors)
    assert written["fp4"] == sum(tensor.form.nbytes for tensor in tensors if tensor.kind == "fp4")


# Verified


@pytest.mark.parametrize("dtype", list(Dtype))
def test_an_export_loads_as_the_student_bit_for_bit_with_its_logits(dtype, exported, fp4_student, tmp_path):
    folder = exported if dtype is Dtype.bfloat16 else tmp_path / "run"
    if dtype is Dtype.float32:
        run(fp4_student("float32"), folder)
    student, export_ = loaded(fp4_student(dtype.value), dtype), loaded(folder / "student", dtype)
    assert same(student.state_dict(), export_.state_dict())
    tokens = probe_tokens(student)
    assert tokens.shape == (1, 256)
    with torch.no_grad():
        assert torch.equal(student(tokens).logits, export_(tokens).logits)


def test_an_export_can_be_exported_again_to_the_same_bytes(exported, stored, tmp_path):
    run(exported / "student", tmp_path / "run")
    assert same(load_file(tmp_path / "run" / "student" / "model.safetensors"), stored)


@pytest.mark.parametrize(
    ("released", "named"),
    [
        ("layers.0.ffn.experts.3.w2.scale", r"model\.layers\.0\.mlp\.experts\.down_proj"),
        ("layers.2.attn.wkv.weight", r"model\.layers\.2\.self_attn\.kv_proj\.weight"),
        ("layers.1.ffn.gate.bias", r"model\.layers\.1\.mlp\.gate\.e_score_correction_bias"),
    ],
)
def test_one_changed_bit_is_found_and_named(released, named, exported, fp4_student, tmp_path):
    folder = shutil.copytree(exported / "student", tmp_path / "student")
    weights = load_file(folder / "model.safetensors")
    weights[released].view(torch.uint8).flatten()[5] ^= 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"does not load as the model it was made from: {named} is another one"):
        require_equal(folder, loaded(fp4_student("bfloat16")), ModelConfig(dtype=Dtype.bfloat16))


def test_a_failed_verification_leaves_no_folder_under_the_final_name(fp4_student, device, tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("does not load as the model it was made from")

    monkeypatch.setattr("opd.export.require_equal", fail)
    with pytest.raises(ValueError, match="does not load as the model"):
        run(fp4_student("bfloat16"), tmp_path / "run")
    assert not (tmp_path / "run" / "student").exists()
    assert not (tmp_path / "run" / "export.json").exists()


def test_the_record_has_the_format_on_file_and_its_figures_are_those_of_the_files(exported, record, stored, golden_dir, shape):
    assert shape(record | {"kept": record["kept"][:1]}) == json.loads((golden_dir / "export.json").read_text())
    assert record["bytes"] == {
        "fp4": sum(tensor.nbytes for name, tensor in stored.items() if ".experts." in name),
        "fp8": 0,
        "kept": sum(tensor.nbytes for name, tensor in stored.items() if ".experts." not in name),
    }
    assert record["experts"]["bits_per_weight"] == 4 + 8 / 32
    assert record["experts"]["weights"] == 3 * 8 * 3 * 64 * 64
    assert record["experts"]["share_off_grid"] == 0
    assert record["tensors"] == {"fp4": 3 * len(EXPERTS), "fp8": 0, "kept": len(NAMES) - 3 * len(EXPERTS)}
    assert record["verified"] == {"tensors": len(loaded(exported / "student").state_dict()), "probe_tokens": 256}
    assert sum(record["experts"]["spread"]) == 3 * 8 * 3
    assert record["sha256"]["model.safetensors"] == hashlib.sha256((exported / "student" / "model.safetensors").read_bytes()).hexdigest()
    assert set(record["sha256"]) == {path.name for path in (exported / "student").iterdir()} - {"README.md"}, "the card may change"


# Experts that were not trained under FP4


def test_experts_off_the_grid_are_refused_with_their_share(saved_v4, device, tmp_path):
    with pytest.raises(ValueError, match=r"packing would change 100\.0% of their weights; train the student with quant=mxfp4_experts, or set round_"):
        run(saved_v4, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_experts_are_rounded_where_that_is_asked_for_and_its_kl_is_measured(saved_v4, session_v4_model, tokenizer, tmp_path):
    record = run(saved_v4, tmp_path / "run", "round_experts=true", *KL)
    weights = session_v4_model.state_dict()
    exported = loaded(tmp_path / "run" / "student", Dtype.float32).state_dict()
    for name, weight in weights.items():
        assert torch.equal(exported[name], fake_quantize(weight) if name.endswith(("gate_up_proj", "down_proj")) else weight)
    assert record["experts"]["share_off_grid"] > 0.99
    assert record["kl"]["tools"]["per_token"]["low"] > 0


# FP8


def test_attention_and_shared_experts_are_stored_in_fp8_and_nothing_else(exported_fp8):
    stored = load_file(exported_fp8 / "student" / "model.safetensors")
    fp8 = {name.split(".", 2)[2].removesuffix(".weight") for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn}
    shared = {f"ffn.shared_experts.{part}" for part in ("w1", "w2", "w3")}
    assert fp8 == {"attn.wq_a", "attn.wq_b", "attn.wo_a", "attn.wo_b", "attn.indexer.wq_b"} | shared
    assert stored["layers.0.attn.wkv.weight"].dtype == torch.float32, "32 rows are no whole block"
    assert stored["layers.0.attn.wq_b.scale"].dtype == torch.float8_e8m0fnu
    record = json.loads((exported_fp8 / "export.json").read_text())
    assert record["tensors"]["fp8"] == 2 * (3 * 7 + 1)
    assert "layers.0.attn.wkv" in record["kept"]
    assert "layers.0.attn.wq_a" not in record["kept"]


def test_an_fp8_export_loads_as_the_rounded_student(exported_fp8, fp4_student):
    student, exported = loaded(fp4_student("float32", **WIDE), Dtype.float32).state_dict(), loaded(exported_fp8 / "student", Dtype.float32).state_dict()
    stored = load_file(exported_fp8 / "student" / "model.safetensors")
    for name, weight in student.items():
        if "experts." in name and "shared" not in name:
            assert torch.equal(exported[name], weight)
        elif stored[released_name(name)].dtype == torch.float8_e4m3fn:
            assert torch.equal(exported[name], naive_fp8(weight))
            assert 0 < (exported[name] - weight).norm() / weight.norm() < 0.04
        else:
            assert torch.equal(exported[name], weight)


def test_the_kl_of_fp8_is_that_of_the_exported_from_the_given_model_on_its_own_completions(exported_fp8, fp4_student, tokenizer):
    """Against whole logits of both."""
    given, exported = loaded(fp4_student("float32", **WIDE), Dtype.float32), loaded(exported_fp8 / "student", Dtype.float32)
    prompts = Evaluator(load_config("evaluate", [*KL[:2], "evaluation.max_new_tokens=6"]), exported, tokenizer, None).prompts["tools"]
    rollouts = LocalSampler(exported, [tokenizer.eos_token_id], 0, len(tokenizer)).sample(prompts, SamplingConfig(max_new_tokens=6, decode_width=6))
    total = tokens = 0.0
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt.tokens, *rollout.completion_T.tolist()]])
        with torch.no_grad():
            log_p, log_q = (model(ids).logits[0, len(rollout.prompt.tokens) - 1 : -1].double().log_softmax(-1) for model in (exported, given))
        total += float((log_p.exp() * (log_p - log_q)).sum())
        tokens += len(log_p)
    found = json.loads((exported_fp8 / "export.json").read_text())["kl"]["tools"]
    assert found["per_token"]["value"] == pytest.approx(total / tokens, rel=1e-3)
    assert found["per_sequence"]["value"] == pytest.approx(total / 6, rel=1e-3)
    assert total > 0


# Plain


def test_another_family_is_written_plain_and_loads_again(saved_qwen3_moe, device, tmp_path, capsys):
    record = run(saved_qwen3_moe, tmp_path / "run", "max_shard_size=200000")
    assert record["format"] == "plain"
    assert "qwen3_moe as format plain" in capsys.readouterr().out
    assert record["experts"]["share_off_grid"] > 0.99
    assert record["experts"]["spread"] is None
    assert record["tensors"] == {"fp4": None, "fp8": None, "kept": None}
    assert record["bytes"] == {"fp4": 0, "fp8": 0, "kept": sum(path.stat().st_size for path in (tmp_path / "run" / "student").glob("*.safetensors"))}
    assert len(list((tmp_path / "run" / "student").glob("*.safetensors"))) > 2
    assert same(loaded(tmp_path / "run" / "student", Dtype.float32).state_dict(), loaded(saved_qwen3_moe, Dtype.float32).state_dict())


def test_plain_experts_are_rounded_where_that_is_asked_for(saved_qwen3_moe, tmp_path):
    run(saved_qwen3_moe, tmp_path / "run", "round_experts=true")
    before, after = (loaded(folder, Dtype.float32).state_dict() for folder in (saved_qwen3_moe, tmp_path / "run" / "student"))
    for name, weight in before.items():
        assert torch.equal(after[name], fake_quantize(weight) if name.endswith(("gate_up_proj", "down_proj")) else weight)


OWN_CODE = """from transformers import LlamaConfig, LlamaForCausalLM


class OurConfig(LlamaConfig):
    model_type = "our_own"


class OurModel(LlamaForCausalLM):
    config_class = OurConfig
"""


def test_a_model_that_brings_its_own_code_is_exported_with_it(tokenizer, device, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    model, folder = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=len(tokenizer), **sizes)), tmp_path / "student"
    save_model(folder, model, tokenizer, model.state_dict())
    (folder / "our_model.py").write_text(OWN_CODE)
    code = {"model_type": "our_own", "auto_map": {"AutoConfig": "our_model.OurConfig", "AutoModelForCausalLM": "our_model.OurModel"}}
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | code))
    record = run(folder, tmp_path / "run", "student.trust_remote_code=true")
    assert record["family"] == "our_own"
    assert record["verified"]["tensors"] == len(model.state_dict())


# Refused


def edited(folder: Path, target: Path, edit) -> Path:
    """A copy of a plain folder with one expert's matrix edited."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    edit(weights[next(name for name in weights if name.endswith("layers.1.ffn.experts.2.w1.weight"))])
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_scales_too_far_apart_for_fp8_are_refused_by_name(fp4_student, tmp_path):
    def spread(weight: torch.Tensor) -> None:
        weight[7] *= 2.0**-13

    source = edited(fp4_student("float32"), tmp_path / "student", spread)
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.experts\.gate_up_proj: .* differ by 2\^1[2-5], more than the 2\^11 .* set format=plain"):
        run(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_that_fp4_would_lose_are_refused_by_name_even_where_rounding_is_asked_for(fp4_student, tmp_path):
    def shrink(weight: torch.Tensor) -> None:
        weight[7] = 2.0**-127

    source = edited(fp4_student("float32"), tmp_path / "student", shrink)
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.experts\.gate_up_proj: a block of weights is so small"):
        run(source, tmp_path / "run", "round_experts=true")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.gate_up_proj", "lm_head.weight"])
@pytest.mark.parametrize("settings", [[], ["format=plain"], ["round_experts=true"]])
def test_a_weight_that_is_nan_is_refused_by_name(settings, name, fp4_student, tmp_path, monkeypatch):
    def load_damaged(*arguments):
        model = load_model(*arguments)
        with torch.no_grad():
            model.get_parameter(name)[0, 5] = math.nan
        return model

    monkeypatch.setattr("opd.export.load_model", load_damaged)
    with pytest.raises(ValueError, match=rf"^{re.escape(name)} of the student holds NaN or infinity"):
        run(fp4_student("float32"), tmp_path / "run", *settings)
    assert not (tmp_path / "run").exists()


def test_an_export_that_was_cut_off_can_be_run_again(fp4_student, tmp_path, monkeypatch):
    def cut_off(*_arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("opd.export.require_equal", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run(fp4_student("float32"), tmp_path / "run")
    assert not (tmp_path / "run" / "student").exists()
    assert (tmp_path / "run" / "student.partial").exists()
    assert run(fp4_student("float32"), tmp_path / "run")["verified"]["tensors"] > 0
    assert not (tmp_path / "run" / "student.partial").exists()


@pytest.mark.parametrize("inside", ["student", "student/mine", "student.partial"])
def test_an_export_does_not_replace_what_it_reads(inside, fp4_student, tmp_path):
    run(fp4_student("float32"), tmp_path / "run")
    source = tmp_path / "run" / inside
    if inside != "student":
        shutil.copytree(fp4_student("float32"), source)
    with pytest.raises(ValueError, match=r"would take the place of .*, which it reads"):
        run(source, tmp_path / "run")
    assert (source / "config.json").is_file()


def test_an_export_is_not_written_into_the_model_it_reads(fp4_student, tmp_path):
    source = shutil.copytree(fp4_student("float32"), tmp_path / "student")
    with pytest.raises(ValueError, match="is inside of the model that is exported"):
        run(source, source / "export")


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ([], "format=plain"),
        (["round_experts=true"], "format=plain and round_experts=false"),
        (["format=plain", "round_experts=true"], "round_experts=false"),
    ],
)
def test_experts_that_fp4_does_not_fit_are_refused_with_what_to_set(settings, fix, new_student, tokenizer, tmp_path):
    model = new_student("deepseek_v4_tiny", moe_intermediate_size=48)
    save_model(tmp_path / "student", model, tokenizer, model.state_dict())
    with pytest.raises(ValueError, match=rf"down_proj of the student has 48 inputs, no multiple of FP4's block of 32: set {fix}$"):
        run(tmp_path / "student", tmp_path / "run", *settings)


def test_experts_that_fp4_does_not_fit_are_written_plain(new_student, tokenizer, device, tmp_path):
    model = new_student("deepseek_v4_tiny", moe_intermediate_size=48)
    save_model(tmp_path / "student", model, tokenizer, model.state_dict())
    assert run(tmp_path / "student", tmp_path / "run", "format=plain")["experts"] is None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["format=fp4"], r"qwen3_moe has no FP4 layout of its own \(only deepseek_v4 has\): set format=plain"),
        (["rest=fp8", *KL], "rest=fp8 belongs to deepseek_v4's layout and qwen3_moe is exported as plain"),
    ],
)
def test_what_a_family_does_not_have_is_refused_before_anything_is_loaded(settings, sentence, saved_qwen3_moe, tmp_path, monkeypatch):
    for name in ("load_model", "load_tokenizer", "TeacherPool", "Evaluator"):
        monkeypatch.setattr(f"opd.export.{name}", None)
    with pytest.raises(ValueError, match=sentence):
        run(saved_qwen3_moe, tmp_path / "run", *settings)
    assert not (tmp_path / "run").exists()


def test_fp8_that_would_convert_nothing_is_refused(fp4_student, tmp_path):
    with pytest.raises(ValueError, match=r"is made of whole 128 x 128 blocks in this model, so rest=fp8 would convert nothing"):
        run(fp4_student("float32"), tmp_path / "run", "rest=fp8", *KL)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["rest=fp8"], r"its KL is measured on held-out prompts: select some with 'domain=\[a,b\]'"),
        (["rest=fp8", "format=plain"], "rest=fp8 belongs to DeepSeek-V4's layout and would be ignored with format=plain"),
        (["max_shard_size=5 bytes"], "max_shard_size must be bytes or a number with KB, MB, GB or TB, as in 5GB, and not zero; it is '5 bytes'"),
        *(([f"max_shard_size={size}"], f"max_shard_size must be .* and not zero; it is '{size}'") for size in ("0", "0GB", "0.0MB", "0.0001KB")),
        (["student.dtype=bfloat16"], r"export has no setting 'student\.dtype'"),
        (["kl_prompts=0"], "kl_prompts must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_config("export", ["student.model=somewhere", *settings])


@pytest.mark.parametrize(("size", "num_bytes"), [("1", 1), ("5GB", 5 * 10**9), ("2.3 MB", 2_300_000), ("0.5KB", 500)])
def test_a_shard_size_is_read_in_decimal_units(size, num_bytes):
    assert shard_bytes(load_config("export", [f"max_shard_size={size}"])) == num_bytes


def test_nothing_to_export_domains_without_use_and_folders_of_others_are_refused(exported, fp4_student, tmp_path):
    with pytest.raises(ValueError, match=r"there is nothing to export: set student\.model"):
        export(load_config("export", [f"run_dir={tmp_path / 'run'}"]))
    with pytest.raises(ValueError, match="nothing is rounded with rest=keep and round_experts=false, so domains would be ignored"):
        run(fp4_student("bfloat16"), tmp_path / "run", "domain=[tools]")
    with pytest.raises(ValueError, match="which it reads: choose another run_dir"):
        run(exported / "student", exported)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not a folder of `opd export`"):
        run(fp4_student("bfloat16"), tmp_path)


def test_a_dtype_that_is_not_trained_in_is_refused(changed_checkpoint, fp4_student, tmp_path):
    folder = changed_checkpoint(fp4_student("bfloat16"), config={"dtype": "float16"})
    with pytest.raises(ValueError, match="says dtype float16, and only float32 and bfloat16 can be exported"):
        run(folder, tmp_path / "run")


# Read by the other commands


@pytest.mark.slow
def test_an_export_can_be_trained_on(exported, device, tmp_path):
    settings = ["domain=[tools]", "domains.tools.prompts.rows=8", "num_steps=1", "logger=none", "examples_per_step=4", "student.dtype=bfloat16"]
    specialize(load_config("specialize", [*settings, f"student.model={exported / 'student'}", f"run_dir={tmp_path / 'run'}"]))
    config = json.loads((tmp_path / "run" / "student" / "config.json").read_text())
    assert not {"expert_dtype", "quantization_config"} & set(config)
