"""Typed settings of every command. A dataclass is the schema and the one home of its defaults; YAML in conf/ holds what differs.

`parse` turns a composed Hydra config into the dataclass of its command. Units: seconds, tokens, optimizer steps.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd.alarm_config import AlarmsConfig, check_alarms
from opd.bench_config import DivergenceBenchConfig, QatBenchConfig, RolloutBenchConfig, StepBenchConfig, TeachersBenchConfig
from opd.compare_config import CompareConfig, check_compare
from opd.evaluate_config import EvaluateConfig, EvaluationConfig, check_evaluate, check_evaluation
from opd.export_config import ExportConfig, check_export
from opd.grpo_config import GrpoConfig, check_grpo, group_rollouts
from opd.harness_config import check_harness
from opd.job_config import CheckpointConfig, LaunchConfig, LoggerConfig, ProfileConfig, ReportConfig, SamplesConfig
from opd.loss_config import LossConfig
from opd.merge_config import MergeConfig, check_merge
from opd.pipeline_config import PipelineConfig
from opd.plan_config import PlanConfig
from opd.quant_config import QuantConfig
from opd.ranges import check_loss, check_profile, check_ranges, check_rollout, check_routes, check_schedules, check_start
from opd.runs_config import InspectConfig, RunsConfig
from opd.start_config import CheckConfig, WarmupConfig
from rollout.config import ModelConfig, RolloutConfig
from rollout.errors import first_sentence
from teachers.config import DomainConfig, TeachersConfig


class Router(Enum):
    """frozen: gates, hash tables and balance bias do not change. train: gates learn, with explicit balancing."""

    frozen = "frozen"
    train = "train"


class OptimizerKind(Enum):
    adamw = "adamw"
    muon = "muon"


class Schedule(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


@dataclass(slots=True)
class StudentConfig(ModelConfig):
    """The model being trained: `model` to start from a folder or hub id, or `architecture` to build a new one.

    architecture: transformers settings with their model_type.
    tokenizer: folder or hub id; null takes the model's own, or the character tokenizer for a new model.
    gradient_checkpointing: recompute activations in the backward.
    router: whether routing may change.
    router_bias_speed: change of the balance bias per step (DeepSeek-V3's rule; router=train only).
    router_balance_loss: weight of the sequence-wise balance loss (router=train only).
    replay_routes: route the states that predict sampled tokens, in training, to the experts that the sampler chose (opd/route_replay.py), which
        rollout.record_routes, or a replayed run, has to have recorded.
    router_probe_every: steps between two comparisons of the routing with that of step 0.
    """

    architecture: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    gradient_checkpointing: bool = False
    router: Router = Router.frozen
    router_bias_speed: float = 0.0
    router_balance_loss: float = 0.0
    replay_routes: bool = False
    router_probe_every: int = 20


@dataclass(slots=True)
class BatchConfig:
    """max_tokens_per_micro_batch: padded tokens of one forward and backward on one rank (one rollout at least).

    packing: several rollouts in one row; refused for families whose attention would mix them (DeepSeek-V4).
    """

    max_tokens_per_micro_batch: int = 4096
    packing: bool = False


@dataclass(slots=True)
class OptimConfig:
    """Optimizer and its schedule.

    kind: adamw, or muon for the matrices between hidden states with adamw for the rest.
    lr: peak rate of AdamW (with muon: of the parameters that AdamW keeps).
    betas, eps, weight_decay: of AdamW; norms, biases and gating vectors are never decayed.
    muon_lr, momentum: of Muon, which takes the matrices except embedding, head and router.
    warmup_steps: linear rise from 0.
    schedule, final_lr_fraction: decay after the warm-up, to this fraction of the peak at the last step.
    clip_norm: global gradient norm at most; null does not clip. Must be null with muon.
    update_ratio_every: steps between two measurements of the update-to-weight ratio, each of which holds a copy of the
        rank's float32 weights for the length of the update; 0 never.
    max_skipped_steps: steps in a row whose update is left out, because a loss or the gradient is not finite, before the run stops; 0 stops at the first.
    """

    kind: OptimizerKind = OptimizerKind.adamw
    lr: float = 1e-5
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.0
    muon_lr: float = 0.02
    momentum: float = 0.95
    warmup_steps: int = 10
    schedule: Schedule = Schedule.constant
    final_lr_fraction: float = 0.1
    clip_norm: float | None = 1.0
    update_ratio_every: int = 10
    max_skipped_steps: int = 0


@dataclass(slots=True)
class RunConfig:
    """What every training command has.

    run_dir: folder of the run; everything it writes is in there.
    num_steps: optimizer steps.
    seed: key of every random choice.
    fresh: delete what the run folder holds and begin anew, instead of resuming.
    branch_from: RUN@STEP, or RUN for its newest: begin with that checkpoint's weights, optimizer, step and prompt stream, and the settings given here.
    threads: CPU threads of this process; null chooses.
    student: the model being trained.
    domains: by name, what is learnt.
    alarms: what the metrics are watched for.
    quant: what of the student trains under quantisation.
    batch, optim, evaluation, checkpoint, launch, logger, profile: settings of these parts.
    deepspeed: DeepSpeed's own JSON schema, passed through, without the keys that other settings own.
    """

    run_dir: str = "runs/run"
    num_steps: int = 100
    seed: int = 0
    fresh: bool = False
    branch_from: str | None = None
    threads: int | None = None
    student: StudentConfig = field(default_factory=StudentConfig)
    domains: dict[str, DomainConfig] = field(default_factory=dict)
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages of the run."""
        return self.num_steps


@dataclass(slots=True)
class DistillConfig(RunConfig):
    """`opd distill`: all domains' teachers into one student, on the student's own rollouts.

    rollout: how the student is sampled, and how much per step.
    teachers: how the teachers are held, and what they give.
    loss: how the student's distance from a teacher is measured.
    check: what the teachers' signal is asked before the first step.
    samples: rollouts that are kept for reading.
    warmup: supervised training on the teachers' own answers before the first step, where distillation from scratch would fail.
    rehearse: do one step at the largest lengths in a temporary folder, show what it took, and leave nothing behind (opd/rehearsal.py).
    """

    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    teachers: TeachersConfig = field(default_factory=TeachersConfig)
    check: CheckConfig = field(default_factory=CheckConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    rehearse: bool = False


@dataclass(slots=True)
class CheckCommandConfig(DistillConfig):
    """`opd check`: everything that a distillation with the same settings would refuse at its start; nothing is trained or written.

    show: rows of each domain to print as student and teacher will see them.
    """

    show: int = 0


@dataclass(slots=True)
class PlanCommandConfig(DistillConfig):
    """`opd plan`: the memory that a distillation with the same settings takes on each rank; nothing is loaded, trained or written.

    plan: the job.
    """

    plan: PlanConfig = field(default_factory=PlanConfig)


@dataclass(slots=True)
class SpecializeConfig(RunConfig):
    """`opd specialize`: num_steps of supervised fine-tuning on reference answers, then grpo.num_steps of GRPO; one domain makes a teacher, several a base
    model. Steps are counted on from one to the other, and settings that follow a schedule go by that count.

    examples_per_step: examples of one optimizer step, over all ranks.
    slip_rate: fraction of examples (number or schedule) trained on the row's `slip`, a wrong answer, in place of its answer.
    repair_rate: fraction (number or schedule) trained on the row's `repaired`, its answer with errors that are taken back, which are left out of the loss
        (rollout/self_repair.py). An example is a slip, or repaired, or neither, so that both rates together are 1 at most.
    max_tokens: prompt and answer together at most, in the fine-tuning.
    rollout: how the student is sampled for GRPO, how much per step, and in groups of how many completions.
    grpo: training on the grades of the student's own answers.
    """

    examples_per_step: int = 128
    slip_rate: Any = 0.0
    repair_rate: Any = 0.0
    max_tokens: int = 1024
    rollout: RolloutConfig = field(default_factory=group_rollouts)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)

    @property
    def total_steps(self) -> int:
        return self.num_steps + self.grpo.num_steps


SCHEMAS: dict[str, type] = {
    "distill": DistillConfig,
    "check": CheckCommandConfig,
    "plan": PlanCommandConfig,
    "specialize": SpecializeConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "merge": MergeConfig,
    "report": ReportConfig,
    "runs": RunsConfig,
    "inspect": InspectConfig,
    "pipeline": PipelineConfig,
    "compare": CompareConfig,
    "bench_divergence": DivergenceBenchConfig,
    "bench_qat": QatBenchConfig,
    "bench_teachers": TeachersBenchConfig,
    "bench_rollout": RolloutBenchConfig,
    "bench_step": StepBenchConfig,
}


def rollout_settings(cfg: Any) -> RolloutConfig | None:
    """How a command samples the student to train on; None where it does not."""
    samples = isinstance(cfg, DistillConfig) or (isinstance(cfg, SpecializeConfig) and cfg.grpo.num_steps > 0)
    return cfg.rollout if samples else None


def parse(config: DictConfig, schema: type) -> Any:
    """The typed config of a command. Raises ValueError, naming the key, for an unknown key or a value of the wrong type."""
    try:
        parsed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), config))
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {first_sentence(error)}") from error
    check_ranges(parsed)
    check_schedules(parsed)
    if isinstance(parsed, RunConfig):
        check_alarms(parsed.alarms)
        check_profile(parsed.profile.steps, parsed.profile.all_ranks, parsed.total_steps)
    if isinstance(parsed, DistillConfig):
        check_loss(parsed.loss, parsed.teachers, parsed.rollout)
        check_rollout(parsed.rollout)
        check_routes(parsed.student.replay_routes, parsed.rollout)
        check_start(parsed.check, parsed.warmup, parsed.domains)
    if isinstance(parsed, SpecializeConfig):
        check_grpo(parsed.grpo, parsed.rollout, parsed.domains, parsed.student.replay_routes)
        if parsed.grpo.num_steps:
            check_rollout(parsed.rollout)
            check_routes(parsed.student.replay_routes, parsed.rollout)
    if isinstance(parsed, ExportConfig):
        check_export(parsed)
    if isinstance(parsed, MergeConfig):
        check_merge(parsed)
    if isinstance(parsed, CompareConfig):
        check_compare(parsed)
    if isinstance(parsed, RunConfig | EvaluateConfig):
        check_evaluation(parsed.evaluation)
    if isinstance(parsed, EvaluateConfig):
        check_evaluate(parsed)
        check_harness(parsed.lm_eval, parsed.base, bool(parsed.domains))
    return parsed
