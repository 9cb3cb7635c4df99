"""`opd evaluate`: base, teachers and student on every domain's held-out prompts, and on tasks of lm_eval where these are named.

`opd evaluate RUN` is opd/checkpoint_evaluation.py.
"""

import importlib
import json
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.checkpoint_evaluation import evaluate_checkpoints
from opd.comparison import comparison, print_comparison, require_certificates
from opd.config import EvaluateConfig
from opd.distributed import is_main, on_main, start_processes
from opd.evaluator import Evaluator, sampling_of
from opd.harness_config import HarnessRole
from opd.held_out import build_evaluator, results_of, teacher_results
from opd.model_card import refresh_card
from opd.run import begin_folder, require_own_folder
from opd.run_facts import model_facts
from rollout.files import replace_text
from rollout.model import end_tokens, load_model, load_tokenizer
from rollout.sampler import LocalSampler
from teachers.compatibility import check_compatible

if TYPE_CHECKING:
    from opd.harness_tasks import HarnessTasks


def evaluate(cfg: EvaluateConfig) -> None:
    """`opd evaluate`: base, teachers and student on every domain's held-out prompts, and on tasks of lm_eval where these are named; writes
    RUN/evaluation.json and prints the tables.
    """
    device = start_processes(cfg.launch.timeout_minutes)
    if cfg.run is not None:
        evaluate_checkpoints(cfg, device)
        return
    folder = Path(cfg.run_dir)
    require_own_folder(folder, "evaluate")
    if cfg.student.model is None:
        raise ValueError("there is nothing to evaluate: set student.model to a folder or hub id, or write a run behind the command")
    if not (cfg.domains or cfg.lm_eval.tasks):
        raise ValueError("there is nothing to evaluate the student on: add domains, as in domain=[law], or lm_eval.tasks=[gsm8k]")
    tasks = _harness_tasks(cfg)
    tokenizer = load_tokenizer(cfg.student.model, cfg.student.revision, cfg.student.trust_remote_code)
    if cfg.base.model is not None:
        check_compatible("base", cfg.base, tokenizer)
    student = load_model(cfg.student, "student", device)
    evaluator = build_evaluator(cfg, student, tokenizer, device) if cfg.domains else None
    models = {"student": student} | ({"base": load_model(cfg.base, "base", device)} if cfg.base.model is not None else {})
    on_main(lambda: _begin(folder, cfg))
    record = comparison({}, {}, {}, {}) if evaluator is None else _compared(cfg, evaluator, models)
    record["base"] = on_main(lambda: model_facts(cfg.base))
    if tasks is not None:
        record["lm_eval"] = _harness_record(cfg, tasks, tokenizer, _harness_models(cfg, models, evaluator))
    if is_main():
        replace_text(folder / "evaluation.json", json.dumps(record, indent=2) + "\n")
        if evaluator is not None:
            print_comparison(record)
            card = refresh_card(cfg.student.model, record)
            if card is not None:
                print(f"results written into the model card {card}")
        if tasks is not None:
            _harness_module().print_tasks(record["lm_eval"])
    require_certificates(record)


def _begin(folder: Path, cfg: EvaluateConfig) -> None:
    begin_folder(folder, cfg, "evaluate")
    (folder / "evaluation.json").unlink(missing_ok=True)  # what was found under the settings of before


def _compared(cfg: EvaluateConfig, evaluator: Evaluator, models: dict[str, PreTrainedModel]) -> dict:
    """The models and the teachers on every domain's held-out prompts."""
    results = {role: results_of(cfg, evaluator, model, list(evaluator.prompts)) for role, model in models.items()}
    return comparison(results.get("base", {}), teacher_results(cfg, evaluator), results["student"], evaluator.dropped, cfg.pass_k)


def _harness_module() -> ModuleType:
    """opd/harness_tasks.py, which imports lm_eval: an extra. Raises ValueError where that is not installed."""
    if find_spec("lm_eval") is None:
        raise ValueError("lm_eval.tasks are run by EleutherAI's harness: pip install -e '.[eval]'")
    return importlib.import_module("opd.harness_tasks")


def _harness_tasks(cfg: EvaluateConfig) -> "HarnessTasks | None":
    return _harness_module().HarnessTasks(cfg.lm_eval, cfg.seed) if cfg.lm_eval.tasks else None


def _harness_models(cfg: EvaluateConfig, models: dict[str, PreTrainedModel], evaluator: Evaluator | None) -> Iterator[tuple[str, PreTrainedModel]]:
    """Whom lm_eval scores, one at a time: teachers take turns in memory."""
    for role, model in models.items():
        if HarnessRole(role) in cfg.lm_eval.models:
            yield role, model
    teachers = evaluator.teachers if HarnessRole.teachers in cfg.lm_eval.models else None
    for teacher, (name, _) in teachers.configs.items() if teachers is not None else ():
        yield f"teacher of {name}", teachers.get(teacher).model


def _harness_record(
    cfg: EvaluateConfig, tasks: "HarnessTasks", tokenizer: PreTrainedTokenizerBase, models: Iterable[tuple[str, PreTrainedModel]]
) -> dict[str, Any]:
    from opd.harness import HarnessLimits, HarnessModel

    sampling = sampling_of(cfg)
    limits = HarnessLimits(
        max_new_tokens=sampling.max_new_tokens, decode_width=sampling.decode_width, tokens_per_forward=cfg.teachers.max_tokens_per_forward
    )
    found = {}
    for role, model in models:
        sampler = LocalSampler(model, end_tokens(model, tokenizer), cfg.seed, len(tokenizer))
        found[role] = tasks.score(HarnessModel(sampler, tokenizer, limits, cfg.lm_eval.apply_chat_template))
    return tasks.record(found)
