"""The distillation loop, and nothing else. Every feature lives in the part that owns it."""

from opd.checkpoint import dropped_domains, is_due, resume, save
from opd.config import DistillConfig
from opd.distributed import start_processes
from opd.engine import Engine
from opd.evaluator import Evaluator, evaluation_metrics
from opd.metrics import data_metrics, grades, rollout_metrics
from opd.rollouts import build_stream, data_ranks
from opd.run import finish_run, open_run
from opd.samples import Samples
from opd.signal_check import check_new_run
from opd.stopping import StopRequest
from opd.student import build_student, load_student_tokenizer, seed_everything
from opd.tracker import Tracker
from opd.update import update
from opd.warmup import warm_up
from teachers.pool import TeacherPool


def distill(cfg: DistillConfig) -> None:
    """Distil every domain's teacher into one student, on the student's own rollouts."""
    device = start_processes(cfg.launch.timeout_minutes)
    seed_everything(cfg.seed)
    tokenizer = load_student_tokenizer(cfg.student)
    student = build_student(cfg.student, tokenizer, cfg.quant)           # MoE; what must not train is frozen
    teachers = TeacherPool(cfg.domains, cfg.teachers, tokenizer, device, data_ranks(), dropped_domains(cfg))  # frozen; few in memory at a time
    stream = build_stream(cfg, student, tokenizer, device, teachers.dropped)  # prompts, sampler, replay: its own answers
    teachers.require_context(stream.longest_rollouts)
    evaluator = Evaluator(cfg, student, tokenizer, teachers)
    engine = Engine(student, len(tokenizer), cfg, device)                # the only code that touches DeepSpeed
    report = check_new_run(cfg, stream, evaluator)                       # a signal that cannot teach is refused before anything is written
    run_dir = open_run(cfg, "distill")
    samples = Samples(run_dir, cfg, tokenizer)                           # a few rollouts, to be read
    with Tracker(run_dir, "distill", cfg) as tracker, StopRequest(cfg) as stop:
        first = resume(run_dir, engine, stream, tracker, teachers)
        if first == 0:
            metrics = warm_up(run_dir, cfg, engine, stream, evaluator, report.metrics())
            tracker.log(0, metrics | data_metrics(stream.prompts) | evaluation_metrics(evaluator.evaluate(stream.sampler, engine)))
        for step in range(first, cfg.num_steps):
            with tracker.timer("rollout"):
                rollouts = stream.next(step, engine)
            with tracker.timer("score"):
                scored, scores = teachers.score(rollouts), grades(rollouts, cfg.domains, tokenizer)  # by the teacher, and grader, of its domain
            with tracker.timer("update"):
                metrics = update(engine, teachers, scored, cfg, samples, scores)
            metrics |= rollout_metrics(rollouts, stream, cfg, tokenizer, scores)
            if is_due(step + 1, cfg.evaluation.every):
                metrics |= evaluation_metrics(evaluator.evaluate(stream.sampler, engine))
            tracker.log(step + 1, metrics)
            if stop.is_due(step + 1) or is_due(step + 1, cfg.checkpoint.every, cfg.num_steps):
                save(run_dir, step + 1, engine, stream, cfg.checkpoint, teachers)
                stop.leave(step + 1)                                     # asked to end: on all ranks together, after the checkpoint
    finish_run(run_dir, engine, tokenizer)
