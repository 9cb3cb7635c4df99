"""DeepSeek-V4's released layout: the names its checkpoints and serving engines use, for each weight of transformers' model.

    model.layers.3.self_attn.q_a_proj.weight   ->  layers.3.attn.wq_a.weight
    model.layers.3.mlp.experts.gate_up_proj    ->  layers.3.ffn.experts.E.w1.weight (gate), .w3.weight (up), each with .scale; down_proj: .w2

Written out name by name: transformers reads the released names and cannot write them (its reverse renaming makes attn.norm of attn.kv_norm and keeps a
`model.` prefix), and a rule that fits almost every name would lose the one it does not fit. A name that is not here is an error.

Routed experts are MXFP4 (I8 codes, F8_E8M0 scales, rollout/fp4.py). Attention and shared experts can be FP8 (opd/fp8.py); router, norms, embedding,
head, compressor, the indexer's weights_proj and the hyper-connections are kept (arXiv:2606.19348, 5.2.1). DeepSeek's release has hyper-connections, sinks
and ape in FP32 and the rest of these in BF16; here all of them keep the dtype of training. modules_to_not_convert in the config is for transformers, and
nothing but transformers has read such an export here.

E: experts.
"""

import re
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from opd.fp8 import BLOCK, quantize_blocks
from opd.shards import StoredTensor
from rollout.fp4 import BLOCK as FP4_BLOCK
from rollout.fp4 import PackedFP4, quantize

FAMILY = "deepseek_v4"

FP8_MODULES = {
    "self_attn.q_a_proj": "attn.wq_a",
    "self_attn.q_b_proj": "attn.wq_b",
    "self_attn.kv_proj": "attn.wkv",
    "self_attn.o_a_proj": "attn.wo_a",
    "self_attn.o_b_proj": "attn.wo_b",
    "self_attn.compressor.indexer.q_b_proj": "attn.indexer.wq_b",
    "mlp.shared_experts.gate_proj": "ffn.shared_experts.w1",
    "mlp.shared_experts.down_proj": "ffn.shared_experts.w2",
    "mlp.shared_experts.up_proj": "ffn.shared_experts.w3",
}
"""Matrices of a layer that DeepSeek releases in FP8."""

KEPT_MODULES = {
    "self_attn.compressor.kv_proj": "attn.compressor.wkv",
    "self_attn.compressor.gate_proj": "attn.compressor.wgate",
    "self_attn.compressor.indexer.kv_proj": "attn.indexer.compressor.wkv",
    "self_attn.compressor.indexer.gate_proj": "attn.indexer.compressor.wgate",
    "self_attn.compressor.indexer.scorer.weights_proj": "attn.indexer.weights_proj",
    "mlp.gate": "ffn.gate",
}
"""Matrices of a layer that stay as they are."""

VECTORS = {
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.q_a_norm.weight": "attn.q_norm.weight",
    "self_attn.kv_norm.weight": "attn.kv_norm.weight",
    "self_attn.compressor.position_bias": "attn.compressor.ape",
    "self_attn.compressor.kv_norm.weight": "attn.compressor.norm.weight",
    "self_attn.compressor.indexer.position_bias": "attn.indexer.compressor.ape",
    "self_attn.compressor.indexer.kv_norm.weight": "attn.indexer.compressor.norm.weight",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.gate.tid2eid": "ffn.gate.tid2eid",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "attn_hc.fn": "hc_attn_fn",
    "attn_hc.base": "hc_attn_base",
    "attn_hc.scale": "hc_attn_scale",
    "ffn_hc.fn": "hc_ffn_fn",
    "ffn_hc.base": "hc_ffn_base",
    "ffn_hc.scale": "hc_ffn_scale",
}
"""Everything else of a layer but the routed experts."""

OUTSIDE_LAYERS = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "norm.weight",
    "model.hc_head.hc_fn": "hc_head_fn",
    "model.hc_head.hc_base": "hc_head_base",
    "model.hc_head.hc_scale": "hc_head_scale",
    "lm_head.weight": "head.weight",
}

IN_A_LAYER = {f"{name}.weight": f"{released}.weight" for name, released in (FP8_MODULES | KEPT_MODULES).items()} | VECTORS

OWN_ROPE_SETTINGS = ("type", "rope_type", "rope_theta", "partial_rotary_factor", "attention_factor")
"""Settings of the compressed layers' RoPE that DeepSeek's rope_scaling does not repeat."""

EXPERTS = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
"""Released projections that a weight of the experts' module holds, one above the other."""


def released_name(name: str) -> str:
    """Released name of a weight that is not of a routed expert. Raises ValueError for a name that DeepSeek-V4 does not have."""
    if name in OUTSIDE_LAYERS:
        return OUTSIDE_LAYERS[name]
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if found is None or found[2] not in IN_A_LAYER:
        raise ValueError(f"{name} has no place in DeepSeek-V4's layout, which opd/deepseek_layout.py writes out name by name")
    return f"layers.{found[1]}.{IN_A_LAYER[found[2]]}"


def expert_projections(name: str, weight: torch.Tensor) -> dict[str, slice]:
    """Released projections of a weight of routed experts, as layers.L.ffn.experts.*.w1, with their rows; empty for any other weight."""
    found = re.fullmatch(rf"model\.layers\.(\d+)\.mlp\.experts\.({'|'.join(EXPERTS)})", name)
    if found is None:
        return {}
    projections = EXPERTS[found[2]]
    rows = weight.shape[1] // len(projections)
    return {f"layers.{found[1]}.ffn.experts.*.{projection}": slice(i * rows, (i + 1) * rows) for i, projection in enumerate(projections)}


def may_be_fp8(name: str, weight: torch.Tensor, config: PretrainedConfig) -> bool:
    """Whether DeepSeek releases this weight in FP8 and its sizes are multiples of a block: of o_a_proj, those of each of its groups."""
    module = re.sub(r"model\.layers\.\d+\.", "", name).removesuffix(".weight")
    groups = config.o_groups if module == "self_attn.o_a_proj" else 1
    return module in FP8_MODULES and weight.shape[0] % (BLOCK * groups) == 0 and weight.shape[1] % BLOCK == 0


def released_tensors(model: PreTrainedModel, fp8: set[str]) -> list[StoredTensor]:
    """Every tensor of the released checkpoint; `fp8`: names in the model of the weights that become FP8.

    Weights whose values are not on their grid are rounded to it. Raises as `released_name`.
    """
    weights = {name: weight.detach() for name, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    # one packed weight is held, and is packed once: its tensors stand one after the other, and are written so, but for one that fills a file by itself
    pack_experts = lru_cache(maxsize=1)(lambda name: quantize(weights[name]))
    pack_matrix = lru_cache(maxsize=1)(lambda name: quantize_blocks(weights[name]))
    tensors = []
    for name, weight in weights.items():
        projections = expert_projections(name, weight)
        if projections:
            tensors += _expert_tensors(projections, weight.shape, partial(pack_experts, name))
        elif name in fp8:
            tensors += _fp8_tensors(released_name(name).removesuffix(".weight"), weight.shape, partial(pack_matrix, name))
        else:
            form = torch.empty_like(weight, device="meta")
            tensors.append(StoredTensor(name=released_name(name), kind="kept", form=form, make=lambda weight=weight: weight))
    return tensors


def _fp8_tensors(module: str, shape: torch.Size, pack: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> list[StoredTensor]:
    """Values and scale of a matrix."""
    rows, columns = shape
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device="meta")
    scale = torch.empty(rows // BLOCK, columns // BLOCK, dtype=torch.float8_e8m0fnu, device="meta")
    return [
        StoredTensor(name=f"{module}.weight", kind="fp8", form=values, make=lambda: pack()[0]),
        StoredTensor(name=f"{module}.scale", kind="fp8", form=scale, make=lambda: pack()[1].view(torch.float8_e8m0fnu)),
    ]


def _expert_tensors(projections: dict[str, slice], shape: torch.Size, pack: Callable[[], PackedFP4]) -> list[StoredTensor]:
    """Codes and scale of each expert's projections."""
    num_experts, _, columns = shape
    tensors = []
    for expert in range(num_experts):
        for pattern, rows in projections.items():
            module, count = pattern.replace("*", str(expert)), rows.stop - rows.start

            def codes(expert: int = expert, rows: slice = rows) -> torch.Tensor:
                return pack().codes[expert, rows]

            def scale(expert: int = expert, rows: slice = rows) -> torch.Tensor:
                return pack().scale[expert, rows].contiguous().view(torch.float8_e8m0fnu)

            form = torch.empty(count, columns // 2, dtype=torch.int8, device="meta")
            tensors.append(StoredTensor(name=f"{module}.weight", kind="fp4", form=form, make=codes))
            form = torch.empty(count, columns // FP4_BLOCK, dtype=torch.float8_e8m0fnu, device="meta")
            tensors.append(StoredTensor(name=f"{module}.scale", kind="fp4", form=form, make=scale))
    return tensors


def kept_modules(tensors: list[StoredTensor]) -> list[str]:
    """Released names of the modules with a matrix that is neither FP4 nor FP8."""
    return [tensor.name.removesuffix(".weight") for tensor in tensors if tensor.kind == "kept" and tensor.form.ndim == 2 and tensor.name.endswith(".weight")]


def released_config(config: PretrainedConfig, kept: list[str]) -> dict[str, Any]:
    """The config.json of a checkpoint whose experts are FP4; `kept`: as `kept_modules`.

    It has transformers' settings and, beside them, those that DeepSeek's release says the same with and that serving engines read.
    """
    quantization = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [BLOCK, BLOCK]}
    released = {
        "expert_dtype": "fp4",
        "quantization_config": quantization | {"modules_to_not_convert": kept},
        "compress_ratios": [config.compress_rates.get(kind, 0) for kind in config.layer_types],  # 0: sliding attention alone
        "topk_method": "noaux_tc",  # experts are chosen with the balance bias, which transformers always does
        "num_nextn_predict_layers": 0,  # transformers' model has no multi-token-prediction layers, so none are written
    }
    num_hash = config.mlp_layer_types.count("hash_moe")
    if config.mlp_layer_types[:num_hash].count("hash_moe") == num_hash:
        released["num_hash_layers"] = num_hash
    rope = config.rope_parameters["compress"]
    if rope["rope_type"] != "default":
        released["rope_scaling"] = {"type": rope["rope_type"]} | {name: value for name, value in rope.items() if name not in OWN_ROPE_SETTINGS}
    return config.to_diff_dict() | released
