"""Merging: the teachers of all domains as one model by arithmetic on their weights, which costs no training. What distillation is held against.

    average            mean of the teachers' weights
    task_arithmetic    base + scale * sum_d (teacher_d - base)
    ties               base + scale * mean over the teachers that keep their sign in a place of (teacher_d - base), each trimmed to its largest places

The arithmetic is PEFT's (peft.utils.merge_utils). Scale and density have no best value known in advance, and one that was chosen badly would make
a straw man of the baseline: so each is judged by its accuracy on training prompts, as an engineer would who merges, and never on held-out ones. Where
every teacher is the same in a weight (frozen routers, hash tables), it stays as it is.

    RUN/student/      Hugging Face folder of the chosen model, in the base's dtype
    RUN/merge.json    {"schema": 1, "kind", "base", "teachers": {DOMAIN: model}, "chosen": {"scale", "density"},
                      "candidates": [{"scale", "density", "accuracy": {DOMAIN: share} | null, "mean"}], "seconds"}

A mixture of experts is merged expert by expert, which is meaningful for teachers of one base alone: their experts have the same roles.
"""

import json
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.console import print_table
from opd.distributed import Group, num_ranks, start_processes
from opd.merge_config import MergeConfig, MergeKind
from opd.run import begin_folder, require_own_folder
from opd.run_lock import lock
from rollout.files import replace_text
from rollout.grading import grade_rollout, require_gradable
from rollout.model import context_length, end_tokens, load_model, load_tokenizer, save_model
from rollout.prompts import PromptMixture, load_prompts, require_no_overlap
from rollout.sampler import LocalSampler
from rollout.types import Prompt
from teachers.compatibility import check_compatible

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way to merge. density: None but for ties."""

    scale: float
    density: float | None = None


def merge(cfg: MergeConfig) -> None:
    """Write RUN/student and RUN/merge.json. Raises ValueError for teachers that are not of the base's family and shape, and for what cannot be graded."""
    begun = time.monotonic()
    device = start_processes()
    run_dir = Path(cfg.run_dir)
    require_own_folder(run_dir, "merge")
    if num_ranks(Group.data) > 1:
        raise ValueError("opd merge runs in one process: start it without torchrun")
    if cfg.base.model is None or not cfg.domains:
        raise ValueError("there is nothing to merge: set base.model, and domains with their teachers")
    tokenizer = load_tokenizer(cfg.base.model, cfg.base.revision, cfg.base.trust_remote_code)
    base = load_model(cfg.base, "base", device)
    differences = _differences(cfg, base, tokenizer)
    settings = candidates(cfg, len(cfg.domains))
    judge = _Judge(cfg, tokenizer, base) if len(settings) > 1 else None

    run_dir.mkdir(parents=True, exist_ok=True)
    problem = lock(run_dir)
    if problem is not None:
        raise ValueError(problem)
    begin_folder(run_dir, cfg, "merge")
    original = {name: weight.detach().clone() for name, weight in base.state_dict().items()}
    records = []
    for setting in settings:
        base.load_state_dict(merged_weights(original, differences, setting))
        accuracy = None if judge is None else judge.accuracy(base)
        mean = None if accuracy is None else sum(accuracy.values()) / len(accuracy)
        records.append({"scale": setting.scale, "density": setting.density, "accuracy": accuracy, "mean": mean})
    best = max(range(len(settings)), key=lambda number: records[number]["mean"] or 0.0)
    base.load_state_dict(merged_weights(original, differences, settings[best]))
    save_model(run_dir / "student", base, tokenizer, base.state_dict())
    chosen = {"scale": settings[best].scale, "density": settings[best].density}
    teachers = {name: domain.teacher.model for name, domain in cfg.domains.items()}
    record = {"schema": SCHEMA, "kind": cfg.kind.value, "base": cfg.base.model, "teachers": teachers, "chosen": chosen, "candidates": records}
    record["seconds"] = time.monotonic() - begun
    replace_text(run_dir / "merge.json", json.dumps(record, indent=2) + "\n")
    _print(record, run_dir)


def candidates(cfg: MergeConfig, num_teachers: int) -> list[Setting]:
    """The settings that are tried. The mean of the teachers is task arithmetic whose scale is one over their number."""
    if cfg.kind is MergeKind.average:
        return [Setting(scale=1 / num_teachers)]
    densities = cfg.densities if cfg.kind is MergeKind.ties else [None]
    return [Setting(scale=scale, density=density) for density, scale in product(densities, cfg.scales)]


def merged_weights(base: dict[str, torch.Tensor], differences: list[dict[str, torch.Tensor]], setting: Setting) -> dict[str, torch.Tensor]:
    """The base's weights with the teachers' differences from it added. differences: per teacher, of the weights in which any teacher differs, float32."""
    from peft.utils.merge_utils import task_arithmetic, ties

    scale = torch.full((len(differences),), setting.scale)
    merged = dict(base)
    for name in differences[0]:
        parts = [difference[name] for difference in differences]
        weights = scale.to(parts[0].device)
        change = task_arithmetic(parts, weights) if setting.density is None else ties(parts, weights, setting.density)
        merged[name] = (base[name].float() + change).to(base[name].dtype)
    return merged


def _differences(cfg: MergeConfig, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, torch.Tensor]]:
    """Teacher less base, of each teacher, in the weights that any of them changed. Raises ValueError for a teacher that is no fine-tuning of the base."""
    try:
        import peft.utils.merge_utils  # noqa: F401
    except ImportError as error:
        raise ValueError("opd merge computes with PEFT: pip install -e '.[peft]'") from error
    own = base.state_dict()
    differences = []
    for name, domain in cfg.domains.items():
        if domain.teacher.server is not None or domain.teacher.adapter is not None:
            raise ValueError(f"the teacher of {name} is a server or an adapter, and opd merge needs whole weights: give its model alone")
        role = f"teacher of {name}"
        check_compatible(role, domain.teacher, tokenizer)
        weights = load_model(domain.teacher, role, base.device).state_dict()
        if {key: weight.shape for key, weight in weights.items()} != {key: weight.shape for key, weight in own.items()}:
            raise ValueError(f"the {role} at {domain.teacher.model} has other weights than the base at {cfg.base.model}: only models of one base can be merged")
        differences.append({key: weight.float() - own[key].float() for key, weight in weights.items() if weight.is_floating_point()})
        fixed = [key for key, weight in weights.items() if not weight.is_floating_point() and not torch.equal(weight, own[key])]
        if fixed:
            raise ValueError(f"the {role} differs from the base in {fixed[0]}, which holds no real numbers: it is no fine-tuning of {cfg.base.model}")
    changed = [key for key in differences[0] if any(difference[key].any() for difference in differences)]
    if not changed:
        raise ValueError("every teacher equals the base, so there is nothing to merge: name the teachers that were made from it")
    return [{key: difference[key] for key in changed} for difference in differences]


class _Judge:
    """Accuracy of a model on training prompts of each domain, the same ones for every model."""

    def __init__(self, cfg: MergeConfig, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel):
        self.cfg, self.tokenizer = cfg, tokenizer
        longest = context_length(model.config, "base") - cfg.rollout.max_new_tokens
        held_out = {name: domain.held_out for name, domain in cfg.domains.items()}
        prompts = load_prompts({name: domain.prompts for name, domain in cfg.domains.items()}, tokenizer, longest, held_out)
        require_no_overlap(prompts)
        ungraded = [name for name, domain in cfg.domains.items() if domain.grader is None]
        if ungraded:
            raise ValueError(f"several settings are compared by their accuracy, and {ungraded[0]} has no grader: give one scale (and density), or a grader")
        require_gradable(prompts, {name: domain.grader for name, domain in cfg.domains.items()})
        mixture = PromptMixture(prompts, 1, cfg.seed)
        self.prompts: dict[str, list[Prompt]] = {}
        for number, name in enumerate(cfg.domains):
            self.prompts[name] = mixture.choose(name, cfg.prompts, "merge", number * cfg.prompts)

    def accuracy(self, model: PreTrainedModel) -> dict[str, float]:
        """Per domain, at temperature 1."""
        sampler = LocalSampler(model, end_tokens(model, self.tokenizer), self.cfg.seed, len(self.tokenizer))
        found = {}
        for name, prompts in self.prompts.items():
            grader = self.cfg.domains[name].grader
            scores = [grade_rollout(grader, rollout, self.tokenizer) for rollout in sampler.sample(prompts, self.cfg.rollout)]
            found[name] = sum(scores) / len(scores)
        return found


def _print(record: dict, run_dir: Path) -> None:
    rows = []
    for candidate in record["candidates"]:
        accuracy = candidate["accuracy"] or {}
        is_chosen = {name: candidate[name] for name in record["chosen"]} == record["chosen"]
        cells = [f"{candidate['scale']:.4g}", "" if candidate["density"] is None else f"{candidate['density']:.4g}"]
        lowest = "" if not accuracy else f"{min(accuracy.values()):.3f} ({min(accuracy, key=accuracy.get)})"
        rows.append([*cells, "" if candidate["mean"] is None else f"{candidate['mean']:.3f}", lowest, "chosen" if is_chosen else ""])
    print_table(f"{record['kind']} of {len(record['teachers'])} teachers", ["scale", "density", "mean accuracy", "lowest", ""], rows)
    print(f"written to {run_dir / 'student'}; accuracy is that of training prompts at temperature 1: judge the model with opd evaluate")
