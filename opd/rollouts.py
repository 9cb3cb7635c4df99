"""The rollout stream of a training run: rollout/stream.py joined to the run's ranks, student and domains."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.config import DistillConfig
from opd.distributed import Group, gather_objects, num_local_processes, num_ranks, rank
from opd.student import copy_for_sampling
from rollout.model import context_length, end_tokens
from rollout.prompts import PromptMixture, load_prompts, require_answers, require_no_overlap
from rollout.replay import load_rollouts, replay_file
from rollout.sampler import LocalSampler
from rollout.stream import RolloutStream


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
    cfg: DistillConfig, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device, excluded: Collection[str] = ()
) -> RolloutStream:
    """Prompts of all domains, a sampler with a copy of the student, and the replay files of the run.

    excluded: domains that are asked for no prompts (any more), as those whose teachers are dropped.

    Raises ValueError for what `load_prompts` refuses, training rows that overlap with held-out prompts, an impossible length, answers that a grader
    would miss, and replay files that are not there.
    """
    context = context_length(student.config, "student")
    longest = context - cfg.rollout.max_new_tokens
    if longest < 1:
        raise ValueError(f"rollout.max_new_tokens={cfg.rollout.max_new_tokens} leaves no room for a prompt in the student's {context} positions")
    held_out = {name: domain.held_out for name, domain in cfg.domains.items()}
    prompts = load_prompts({name: domain.prompts for name, domain in cfg.domains.items()}, tokenizer, longest, held_out)
    require_no_overlap(prompts)
    require_answers(prompts, [name for name, domain in cfg.domains.items() if domain.grader is not None], "grade against")
    for run in (cfg.rollout.replay, cfg.rollout.compare):
        if run is not None:
            load_rollouts(replay_file(run, max(0, cfg.num_steps - 1)))
    mixture = PromptMixture(prompts, cfg.rollout.prompts_per_step, cfg.seed, excluded)
    sampler = LocalSampler(copy_for_sampling(student, device, cfg.quant), end_tokens(student, tokenizer), cfg.seed, len(tokenizer))
    return RolloutStream(mixture, sampler, cfg.rollout, cfg.run_dir, data_ranks())
