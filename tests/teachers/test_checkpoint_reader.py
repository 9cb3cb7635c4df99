"""Reading checkpoints without transformers' loader: the same weights bit for bit, in whole or in rows, and everything else left to transformers or refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import ConversionOps, Transpose, WeightConverter

from rollout.config import Dtype, ModelConfig
from rollout.model import load_model, torch_dtype
from rollout.quantized_models import read_config
from teachers.checkpoint_reader import CheckpointMap, Reading, Rows, empty_model, map_checkpoint, unique_weights
from teachers.sources import open_source

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES |= {"head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LATENT |= {"num_key_value_heads": 2, "first_k_dense_replace": 1}
FAMILIES = {
    "llama": {},
    "gemma3_text": {"sliding_window": 16, "tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 3},
    "gpt_oss": {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 16},
    "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    "deepseek_v3": LATENT | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
}
"""Small models of each family; those with experts store them one by one, but gpt_oss, which stores them as they are multiplied."""
NAMES = ["deepseek_v4", *FAMILIES]

each_family = pytest.mark.parametrize("family", NAMES)


@pytest.fixture(scope="session")
def checkpoint(new_student, tmp_path_factory) -> Callable[..., ModelConfig]:
    """checkpoint("llama", stored=torch.bfloat16, dtype=Dtype.float32, shard="4KB"): a folder of random weights and how it is to be loaded."""
    made: dict[tuple, Path] = {}

    def save(family: str, stored: torch.dtype = torch.float32, dtype: Dtype = Dtype.float32, shard: str = "1GB") -> ModelConfig:
        if (family, stored, shard) not in made:
            torch.manual_seed(0)
            if family == "deepseek_v4":
                model = new_student("deepseek_v4_tiny", num_hidden_layers=2)
            else:
                model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SIZES | FAMILIES[family])))
            for tensor in unique_weights(model).values():
                if tensor.is_floating_point():
                    tensor.data = torch.randn(tensor.shape).to(stored)
            made[family, stored, shard] = tmp_path_factory.mktemp("checkpoints") / family
            model.save_pretrained(made[family, stored, shard], max_shard_size=shard)
        return ModelConfig(model=str(made[family, stored, shard]), dtype=dtype)

    return save


def opened(cfg: ModelConfig) -> tuple[PreTrainedModel, CheckpointMap | None]:
    model = empty_model(read_config(cfg, "teacher"), cfg)
    return model, map_checkpoint(model, cfg, "teacher")


def memory_for(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: torch.full(tensor.shape, 77, dtype=tensor.dtype) for name, tensor in unique_weights(model).items()}


def read(cfg: ModelConfig) -> tuple[dict[str, torch.Tensor], Reading]:
    model, mapped = opened(cfg)
    weights = memory_for(model)
    return weights, mapped.read({name: Rows(tensor) for name, tensor in weights.items()})


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def stored_bytes(cfg: ModelConfig) -> int:
    return sum(tensor.nbytes for file in Path(cfg.model).glob("*.safetensors") for tensor in load_file(file).values())


@each_family
@pytest.mark.parametrize(("stored", "dtype"), [(torch.float32, Dtype.float32), (torch.bfloat16, Dtype.float32), (torch.float32, Dtype.bfloat16)])
def test_every_weight_is_the_one_that_transformers_loads_bit_for_bit(family, stored, dtype, checkpoint):
    cfg = checkpoint(family, stored, dtype)
    weights, reading = read(cfg)
    assert_same(weights, unique_weights(load_model(cfg, "teacher")))
    assert weights["model.norm.weight"].dtype == torch_dtype(dtype)
    assert reading.num_bytes == stored_bytes(cfg)


@each_family
def test_uneven_rows_put_together_are_the_weights_and_read_each_byte_once(family, checkpoint):
    cfg = checkpoint(family)
    whole, once = read(cfg)
    model, mapped = opened(cfg)
    parts, num_bytes = {name: [] for name in whole}, 0
    for part in range(3):
        rows = {}
        for name, tensor in unique_weights(model).items():
            length = len(tensor) if tensor.ndim else 1
            cuts = [0, length // 4, length - length // 3, length]
            if tensor.ndim:
                rows[name] = Rows(torch.full((cuts[part + 1] - cuts[part], *tensor.shape[1:]), 77, dtype=tensor.dtype), cuts[part])
            elif part == 1:
                rows[name] = Rows(torch.full((), 77, dtype=tensor.dtype))
        num_bytes += mapped.read(rows).num_bytes
        for name, own in rows.items():
            parts[name].append(own.tensor)
    assert_same({name: torch.cat(tensors) if whole[name].ndim else tensors[0] for name, tensors in parts.items()}, whole)
    assert num_bytes == once.num_bytes


def test_more_ranks_than_rows_leave_some_without_any(checkpoint):
    model, mapped = opened(checkpoint("qwen3_moe"))
    name, tensor = next((name, tensor) for name, tensor in unique_weights(model).items() if name.endswith("experts.gate_up_proj"))
    empty = torch.empty((0, *tensor.shape[1:]))
    reading = mapped.read({name: Rows(empty, len(tensor))})
    assert (reading.num_bytes, reading.checksums) == (0, {})


@each_family
def test_weights_in_several_files_are_read_as_from_one(family, checkpoint):
    cfg = checkpoint(family, shard="4KB")
    assert len(list(Path(cfg.model).glob("*.safetensors"))) > 2
    assert_same(read(cfg)[0], read(checkpoint(family))[0])


def test_some_weights_are_read_without_the_others(checkpoint):
    cfg = checkpoint("mixtral")
    model, mapped = opened(cfg)
    name = "model.layers.1.mlp.experts.down_proj"
    weights = memory_for(model)
    reading = mapped.read({name: Rows(weights[name])})
    assert torch.equal(weights[name], read(cfg)[0][name])
    assert reading.num_bytes == weights[name].nbytes
    assert len(reading.checksums) == 3  # one stored tensor per expert


def test_rows_of_a_view_into_a_larger_memory_are_filled_in_place(checkpoint):
    """What residency gives are views of one buffer."""
    cfg = checkpoint("llama")
    model, mapped = opened(cfg)
    shape = unique_weights(model)["lm_head.weight"].shape
    buffer = torch.zeros(2 * shape.numel())
    mapped.read({"lm_head.weight": Rows(buffer[5 : 5 + 20 * shape[1]].view(20, shape[1]), 7)})
    expected = torch.zeros_like(buffer)
    expected[5 : 5 + 20 * shape[1]] = read(cfg)[0]["lm_head.weight"][7:27].flatten()
    assert torch.equal(buffer, expected)


def test_a_weight_that_is_one_number_is_read(checkpoint, tmp_path):
    """DeepSeek-V4 has none; this is what rows of such a weight mean."""
    save_file({"scale": torch.tensor(3.5), "norm": torch.arange(4.0)}, tmp_path / "model.safetensors")
    _, mapped = opened(checkpoint("llama"))
    place = {"file": tmp_path / "model.safetensors", "offset": 0, "first_row": 0, "num_rows": 1}
    kind = type(mapped.pieces[0])
    scalar = CheckpointMap((kind(stored="scale", weight="a", size=(), stride=(), **place),))
    found = torch.zeros(())
    assert scalar.read({"a": Rows(found)}).num_bytes == 4
    assert found == 3.5


@pytest.fixture
def edited(checkpoint, tmp_path):
    """edited("llama", edit): a copy of a checkpoint with its tensors edited in place."""

    def edit_weights(family: str, edit: Callable[[dict], None]) -> ModelConfig:
        folder = tmp_path / "edited"
        shutil.copytree(checkpoint(family).model, folder)
        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
        return ModelConfig(model=str(folder))

    return edit_weights


def test_a_checkpoint_that_lacks_an_expert_is_refused_by_the_experts_name(edited):
    cfg = edited("mixtral", lambda weights: weights.pop("model.layers.1.block_sparse_moe.experts.2.w3.weight"))
    with pytest.raises(ValueError, match=r"the teacher lacks 1 of the model's weights, model\.layers\.1\.block_sparse_moe\.experts\.2\.w3\.weight first"):
        opened(cfg)


def test_a_weight_of_another_shape_is_refused_by_its_name(edited):
    def narrow(weights: dict) -> None:
        weights["model.layers.0.self_attn.q_proj.weight"] = weights["model.layers.0.self_attn.q_proj.weight"][:, :-1]

    with pytest.raises(ValueError, match=r"lacks 1 of the model's weights, model\.layers\.0\.self_attn\.q_proj\.weight \(its shape differs\) first"):
        opened(edited("llama", narrow))


def test_tensors_that_are_no_weights_of_the_model_leave_the_checkpoint_to_transformers(edited):
    cfg = edited("llama", lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert opened(cfg)[1] is None
    _, source = open_source("teacher", cfg, "teacher")
    found = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in source.layout.items()}
    source.read(found)
    assert_same(found, unique_weights(load_model(cfg, "teacher")))


def test_integers_in_place_of_floating_point_numbers_leave_the_checkpoint_to_transformers(edited):
    cfg = edited("llama", lambda weights: weights.update({"model.norm.weight": torch.ones(SIZES["hidden_size"], dtype=torch.int32)}))
    assert opened(cfg)[1] is None


class Halve(ConversionOps):
    """A conversion that computes, as that of a family which stores its weights at another scale."""

    def convert(self, input_dict: dict, source_patterns: list[str], target_patterns: list[str], **kwargs) -> dict:
        [(_, tensors)] = input_dict.items()
        return {target_patterns[0]: (tensors[0] if isinstance(tensors, list) else tensors) / 2}

    @property
    def reverse_op(self) -> ConversionOps:
        return Halve()


@pytest.mark.parametrize("operation", [Halve(), Transpose()], ids=["computes", "lies across rows"])
def test_weights_that_are_not_runs_of_stored_rows_leave_the_checkpoint_to_transformers(operation, checkpoint):
    cfg = checkpoint("llama")
    model = empty_model(read_config(cfg, "teacher"), cfg)
    model._weight_conversions = [WeightConverter("self_attn.o_proj.weight", "self_attn.o_proj.weight", [operation])]
    assert map_checkpoint(model, cfg, "teacher") is None


@pytest.mark.parametrize("is_equal", [True, False])
def test_a_head_that_the_file_holds_though_the_config_ties_it_is_the_head(is_equal, edited):
    """transformers ties the two where they are equal, and where they differ it does not."""

    def untie(weights: dict) -> None:
        head = weights["model.embed_tokens.weight"].clone()
        weights["lm_head.weight"] = head if is_equal else head + 1

    cfg = edited("gemma3_text", untie)
    loaded = load_model(cfg, "teacher")
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == is_equal
    _, source = open_source("teacher", cfg, "teacher")
    assert source.mapped is not None
    found = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in source.layout.items()}
    source.read(found)
    expected = loaded.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_file_that_is_cut_off_is_refused_when_it_is_opened(edited):
    cfg = edited("llama", lambda weights: None)
    _, mapped = opened(cfg)
    file = Path(cfg.model) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="the teacher cannot be loaded from"):
        opened(cfg)
    with pytest.raises(SafetensorError):
        mapped.read({"lm_head.weight": Rows(torch.empty(SIZES["vocab_size"], SIZES["hidden_size"]))})


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_one_byte_that_changes_between_two_readings_is_found_by_name(name, edited):
    cfg = edited("llama", lambda weights: None)
    _, source = open_source("teacher", cfg, "teacher")
    found = {weight: torch.empty(shape, dtype=dtype) for weight, (shape, dtype) in source.layout.items()}
    source.read(found)
    flip_byte(Path(cfg.model) / "model.safetensors", name)
    with pytest.raises(ValueError, match=f"{name} at .* is not what it was when it was first read"):
        source.read(found)


def test_a_head_that_changes_after_the_whole_teacher_was_read_is_found(edited):
    cfg = edited("llama", lambda weights: None)
    _, source = open_source("teacher", cfg, "teacher")
    source.read({weight: torch.empty(shape, dtype=dtype) for weight, (shape, dtype) in source.layout.items()})
    flip_byte(Path(cfg.model) / "model.safetensors", "lm_head.weight")
    with pytest.raises(ValueError, match="is not what it was when it was first read"):
        source.only("lm_head.weight").read({"lm_head.weight": torch.empty(SIZES["vocab_size"], SIZES["hidden_size"])})


def flip_byte(file: Path, name: str) -> None:
    """Change the lowest bit of the middle byte of a tensor in a safetensors file."""
    with safe_open(file, framework="pt") as tensors:
        content = tensors.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes()
    data = bytearray(file.read_bytes())
    data[data.index(content) + len(content) // 2] ^= 1
    file.write_bytes(data)
