"""DeepSpeed's configuration from ours.

The `deepspeed` section of the config is DeepSpeed's JSON schema, passed through, without the keys that other settings own.
"""

from typing import Any

import torch

from opd.config import OptimizerKind, Router, RunConfig
from rollout.compiler import has_compiler

OWNED_KEYS = {
    "train_batch_size": "rollout.prompts_per_step",
    "train_micro_batch_size_per_gpu": "batch.max_tokens_per_micro_batch",
    "gradient_accumulation_steps": "batch.max_tokens_per_micro_batch",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "bf16": "student.dtype",
    "fp16": "student.dtype",
}


def zero_stage(cfg: RunConfig) -> int:
    """The ZeRO stage of a run."""
    return cfg.deepspeed.get("zero_optimization", {}).get("stage", 0)


def deepspeed_settings(cfg: RunConfig, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's config from ours. Raises ValueError for a key that another setting owns, and for combinations that degrade silently."""
    owned = [key for key in cfg.deepspeed if key in OWNED_KEYS]
    if owned:
        raise ValueError(f"deepspeed.{owned[0]} is owned by {OWNED_KEYS[owned[0]]}: set that instead")
    zero = cfg.deepspeed.get("zero_optimization", {})
    stage = zero_stage(cfg)
    for name in ("offload_optimizer", "offload_param"):
        if (zero.get(name) or {}).get("device") == "nvme":
            raise ValueError(f"deepspeed.zero_optimization.{name}.device=nvme is not supported, since checkpoints would not hold what is there: use cpu")
    bf16 = dtype is torch.bfloat16
    if cfg.optim.kind is OptimizerKind.muon:
        if cfg.optim.clip_norm is not None:
            raise ValueError("optim.clip_norm must be null with optim.kind=muon: DeepSpeed would clip the orthogonalised update, not the gradient")
        if not has_compiler():
            raise ValueError("optim.kind=muon needs a C++ compiler for torch.compile: install g++ (or set CXX), or use optim=adamw")
        if bf16 and stage < 2:
            raise ValueError("optim.kind=muon in bfloat16 needs ZeRO 2 or 3 (deepspeed=zero2): DeepSpeed does not orthogonalise at lower stages")
    if bf16 and stage == 0:
        raise ValueError("student.dtype=bfloat16 needs ZeRO 1, 2 or 3 (deepspeed=zero1), which keep float32 master weights")
    if cfg.student.router is Router.train and cfg.student.router_balance_loss and cfg.student.gradient_checkpointing:
        raise ValueError("student.router_balance_loss does not work with student.gradient_checkpointing: set one of them off")
    if cfg.student.router_balance_loss and cfg.batch.packing:
        raise ValueError("student.router_balance_loss is per sequence and does not work with batch.packing=true: set one of them off")
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": cfg.optim.clip_norm or 0.0,  # left out, DeepSpeed would clip to 1
        **({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"} if bf16 else {}),
        **cfg.deepspeed,
    }
    if stage == 3 and cfg.optim.kind is OptimizerKind.muon:
        settings["zero_optimization"] = {"reduce_scatter": False, **settings["zero_optimization"]}
    return settings
