"""Answers that teachers sample, and how long they are: what the length of the student's answers is held against.

A student that outgrows its teacher, or stops short of it, shows in its length before it shows in its accuracy. The teacher's is known where it has answered:
for the check of its signal (check.teacher_answers), or for the warm-up. Both stand in the record of step 0, from which a run that is taken up reads
them again. The data's reference answers are no substitute, since they are often the result alone; their length is logged beside it. Teachers
that a server holds or that are sharded over the ranks are not sampled from; their domains have no ratio. After a change of teachers
(teachers.allow_change) the lengths are still those of the ones the run began with.
"""

from dataclasses import replace

from opd.config import DistillConfig
from opd.distributed import Group, num_ranks, rank
from opd.evaluator import Evaluator
from opd.rollouts import FirstRequest
from opd.start_config import CheckConfig
from rollout.model import end_tokens
from rollout.prompts import PromptMixture
from rollout.sampler import LocalSampler
from rollout.types import Prompt, Rollout

LENGTHS = ("check/{}/teacher_length", "warmup/{}/teacher_length")
"""Where the length stands; the last that is there counts."""


def sample_teacher(name: str, prompts: list[Prompt], cfg: DistillConfig, evaluator: Evaluator) -> list[Rollout]:
    """This rank's share of the answers of a domain's teacher, sampled as rollouts are.

    Raises ValueError for a teacher that is sharded over the ranks.
    """
    teachers, tokenizer = evaluator.teachers, evaluator.tokenizer
    model = teachers.get(teachers.teacher_of[name]).model
    sampler = LocalSampler(model, end_tokens(model, tokenizer), cfg.seed, len(tokenizer))
    sampling = replace(cfg.rollout, record_routes=False)  # a teacher's are never replayed, and it may have none
    return sampler.sample(prompts[rank(Group.data) :: num_ranks(Group.data)], sampling)


def checked_answers(cfg: DistillConfig, mixture: PromptMixture, evaluator: Evaluator) -> list[Rollout]:
    """This rank's share of check.teacher_answers answers to training prompts of each domain; none of one whose warm-up samples them anyway."""
    teachers, check, found = evaluator.teachers, cfg.check, []
    names = [name for name in cfg.domains if check.teacher_answers and not cfg.warmup.covers(name) and not teachers.is_remote(name)]
    for name in sorted(names, key=lambda name: teachers.teacher_of[name]):
        if not teachers.library.is_sharded(teachers.teacher_of[name]):
            found += sample_teacher(name, _prompts(name, check, list(cfg.domains), mixture), cfg, evaluator)
    return found


def length_ratios(metrics: dict[str, float], first: dict[str, float]) -> dict[str, float]:
    """domain/D/length_ratio of a step, from its metrics and the run's record of step 0, for each domain that answered and whose teacher's length is known."""
    result = {}
    for domain in [name.split("/")[1] for name in metrics if name.startswith("domain/") and name.endswith("/completion_length")]:
        known = [first[name.format(domain)] for name in LENGTHS if name.format(domain) in first]
        if known:
            result[f"domain/{domain}/length_ratio"] = metrics[f"domain/{domain}/completion_length"] / known[-1]
    return result


def _prompts(name: str, check: CheckConfig, domains: list[str], mixture: PromptMixture) -> list[Prompt]:
    return mixture.choose(name, check.teacher_answers, "check/teacher", FirstRequest.teacher_answers + domains.index(name) * check.teacher_answers)
