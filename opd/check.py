"""`opd check`: what a distillation with the same settings would refuse at its start, found without training or writing anything.

Every part of the run is built as `opd distill` builds it, but for DeepSpeed's engine, whose settings alone are looked at; then the teachers' signal is
measured on the initial student (opd/signal_check.py). One table has a row per domain for its data, one for its teacher. The run folder is
not read or touched, so that the settings of a run that exists can be checked beside it.
"""

import hashlib

from transformers import PreTrainedTokenizerBase

from opd.config import CheckCommandConfig
from opd.console import print_table
from opd.deepspeed_settings import deepspeed_settings
from opd.distributed import is_main, start_processes
from opd.evaluator import Evaluator
from opd.rollouts import build_stream, data_ranks
from opd.signal_check import CheckReport, run_checks
from opd.signal_figures import SignalFigures
from opd.student import build_student, load_student_tokenizer, seed_everything
from rollout.data_report import data_report, report_table, show_prompts
from teachers.compatibility import ModelFacts, model_facts, tokenizer_fingerprint
from teachers.pool import TeacherPool

HASH_DIGITS = 8


def check(cfg: CheckCommandConfig) -> None:
    """Check what `opd distill` would begin with. Raises ValueError as it would."""
    device = start_processes(cfg.launch.timeout_minutes)
    seed_everything(cfg.seed)
    tokenizer = load_student_tokenizer(cfg.student)
    student = build_student(cfg.student, tokenizer, cfg.quant)
    deepspeed_settings(cfg, next(student.parameters()).dtype)
    teachers = TeacherPool(cfg.domains, cfg.teachers, tokenizer, device, data_ranks())
    stream = build_stream(cfg, student, tokenizer, device)
    teachers.require_context(stream.longest_rollouts)
    evaluator = Evaluator(cfg, student, tokenizer, teachers)
    if is_main():
        print_table("", *report_table(data_report(stream.prompts.domains)))
        print(show_prompts(stream.prompts.domains, tokenizer, cfg.show), end="")
    report = run_checks(cfg, stream, evaluator)
    if is_main():
        _print_report(cfg, {name: _facts(name, teachers, tokenizer) for name in cfg.domains}, teachers.plan.description, report)
    report.raise_if_refused()  # the table has the rest


def _facts(domain: str, teachers: TeacherPool, tokenizer: PreTrainedTokenizerBase) -> ModelFacts:
    """Of a domain's teacher; of one behind a server, what it was held to when the pool was made."""
    cfg = teachers.domains[domain].teacher
    if not teachers.is_remote(domain):
        return model_facts(cfg, f"teacher of {domain}")
    own = teachers.remote[teachers.teacher_of[domain]]
    fingerprint = hashlib.sha256(str(own.identity()["fingerprint"]).encode()).hexdigest()
    same = {"tokenizer": tokenizer_fingerprint(tokenizer), "template": None, "vocab_rows": len(tokenizer)}
    return ModelFacts(**same, context=own.context, stored_dtype="of the server", weights=fingerprint)


def _print_report(cfg: CheckCommandConfig, facts: dict[str, ModelFacts], placement: str, report: CheckReport) -> None:
    """One row per domain: its teacher's checkpoint, its teacher's signal; below, what was found."""
    header = ["domain", "tokenizer", "template", "vocabulary", "context", "dtype", "weights"]
    signal = ["KL", "overlap", "accuracy", "log p: tokens", "answers", "by student"]
    rows = []
    for name, own in facts.items():
        checkpoint = [own.tokenizer[:HASH_DIGITS], (own.template or "none")[:HASH_DIGITS], str(own.vocab_rows), str(own.context)]
        dtype = f"{own.stored_dtype} as {cfg.domains[name].teacher.dtype.value}"
        rows.append([name, *checkpoint, dtype, own.weights[:HASH_DIGITS], *(_signal_cells(report.figures[name]) if report.figures else ())])
    captions = [placement, "tokenizer, special tokens and end of sequence are the student's; hashes are the first digits of sha256"]
    if report.figures:
        captions += ["KL and log p in nats per token: the teacher's log p of the student's tokens and of right answers, beside the student's of these"]
    for kind, sentences in (("refused", report.refusals), ("warning", report.warnings), ("note", report.notes)):
        captions += [f"{kind}: {sentence}" for sentence in sentences]
    print_table("", header + (signal if report.figures else []), rows, "\n".join(captions))


def _signal_cells(own: SignalFigures) -> list[str]:
    """The figures of a domain's signal for its row."""
    values = (own.kl_per_token, own.overlap, own.accuracy, own.teacher_logprob, own.answer_logprob, own.answer_logprob_student)
    return ["" if value is None else f"{value:.3f}" for value in values]
