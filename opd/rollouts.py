"""The rollout stream of a training run: rollout/stream.py joined to the run's ranks, student and domains; and the numbers of all other requests."""

from collections.abc import Collection
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.config import DistillConfig, SpecializeConfig
from opd.distributed import Group, gather_objects, num_cores, num_local_processes, num_ranks, rank
from opd.quant_config import ExpertFormat
from opd.student import copy_for_sampling
from rollout.config import SamplerKind
from rollout.grading import require_gradable
from rollout.model import context_length, end_tokens
from rollout.prompts import PromptMixture, load_prompts, require_no_overlap
from rollout.replay import load_rollouts, replay_file
from rollout.routes import require_routers
from rollout.sampler import LocalSampler
from rollout.service import SamplerService
from rollout.service_process import WorkerSpec
from rollout.stream import RolloutStream
from rollout.vllm_sampler import VllmSampler


class FirstRequest(IntEnum):
    """From where requests are numbered, by what they are for: no two purposes share random numbers. Training counts from 0."""

    evaluation = 1 << 40
    check = 2 << 40
    teacher_answers = 3 << 40
    warmup = 4 << 40
    harness = 5 << 40


@dataclass(frozen=True, slots=True)
class DataRanks:
    """The data-parallel ranks, as `rollout.ranks.Ranks`."""

    index: int
    count: int
    local_count: int

    def gather(self, value: Any) -> list[Any]:
        return gather_objects(value, Group.data)


def data_ranks() -> DataRanks:
    return DataRanks(rank(Group.data), num_ranks(Group.data), num_local_processes())


def build_stream(
    cfg: DistillConfig | SpecializeConfig, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device, excluded: Collection[str] = ()
) -> RolloutStream:
    """Prompts of all domains, a sampler with a copy of the student, and the replay files of the run.

    excluded: domains that are asked for no prompts (any more), as those whose teachers are dropped.

    Raises ValueError for what `load_prompts` refuses, training rows that overlap with held-out prompts, an impossible length, stop tokens that do not exist,
    answers that a grader would miss or cannot read, a grader that cannot be imported, replay files that are not there, routes of a student that routes
    nothing, and a vLLM server that cannot draw the run's rollouts.
    """
    context = context_length(student.config, "student")
    longest = context - cfg.rollout.max_new_tokens
    if longest < 1:
        raise ValueError(f"rollout.max_new_tokens={cfg.rollout.max_new_tokens} leaves no room for a prompt in the student's {context} positions")
    unknown = [token for token in cfg.rollout.stop_tokens if token >= len(tokenizer)]
    if unknown:
        raise ValueError(f"rollout.stop_tokens={unknown} would never be drawn: the tokenizer's ids go up to {len(tokenizer) - 1}")
    if cfg.rollout.record_routes or cfg.student.replay_routes:
        require_routers(student, "student")
    held_out = {name: domain.held_out for name, domain in cfg.domains.items()}
    prompts = load_prompts({name: domain.prompts for name, domain in cfg.domains.items()}, tokenizer, longest, held_out)
    require_no_overlap(prompts)
    require_gradable(prompts, {name: domain.grader for name, domain in cfg.domains.items()})
    for run in (cfg.rollout.replay, cfg.rollout.compare):
        if run is not None:
            load_rollouts(replay_file(run, max(0, cfg.total_steps - 1)))
    mixture = PromptMixture(prompts, cfg.rollout.prompts_per_step, cfg.seed, excluded)
    sampler = LocalSampler(copy_for_sampling(student, device, cfg.quant), end_tokens(student, tokenizer), cfg.seed, len(tokenizer))
    stream = RolloutStream(mixture, sampler, cfg.rollout, cfg.run_dir, data_ranks())
    if cfg.rollout.sampler is SamplerKind.service:
        stream.draw_with(_service(cfg, student, sampler), cfg.total_steps)
    if cfg.rollout.sampler is SamplerKind.vllm and cfg.rollout.replay is None:
        servers = VllmSampler(sampler, tokenizer, cfg.rollout.vllm, Path(cfg.run_dir) / "weights", stream.ranks)
        servers.require_fit(max(stream.longest_rollouts.values()))
        stream.draw_with(servers, cfg.total_steps)
    return stream


def _service(cfg: DistillConfig | SpecializeConfig, student: PreTrainedModel, sampler: LocalSampler) -> SamplerService:
    """Sampler processes for this rank; they start with the first step."""
    own = cfg.rollout.service
    attention, experts = cfg.student.attention, cfg.student.experts
    spec = WorkerSpec(
        dtype=cfg.student.dtype.value,
        attention=None if attention is None else attention.value,
        experts=None if experts is None else experts.value,
        packed_experts=cfg.quant.experts is ExpertFormat.mxfp4,
        quantized_indexer=cfg.quant.indexer,
        end_tokens=sampler.policy.end_tokens,
        vocab_size=sampler.policy.vocab_size,
        seed=cfg.seed,
        device=own.device or str(sampler.model.device),
        threads=own.threads or max(1, num_cores() // (num_local_processes() * own.processes)),
    )
    return SamplerService(Path(cfg.run_dir), spec, student.config, sampler.policy, own, data_ranks())
