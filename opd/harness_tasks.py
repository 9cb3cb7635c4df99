"""The tasks of lm_eval that `opd evaluate` was asked for: found before a model is loaded, run on each model, recorded and printed.

    evaluation.json, "lm_eval"
    {"version": of lm_eval, "opd_adapter": true, "limit": number | null, "is_result": limit is null, "chat_template": bool, "seed": of what is drawn,
     "models": {"student" | "base" | "teacher of NAME": {
        "cut_texts": requests that did not fit into the context and lost their beginning,
        "tasks": {TASK: {"version", "num_fewshot", "samples", "available_samples",
                         "metrics": {"METRIC,FILTER": {"value", "stderr": number | null, "higher_is_better": bool | null}}}}}}}

samples: documents that were scored; available_samples: that the task has; null of a group. A group stands beside its tasks, with the means that it defines.
"""

import importlib.metadata
import logging
from pathlib import Path
from typing import Any

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from opd.console import print_table
from opd.distributed import is_main
from opd.errors import nearest
from opd.harness import HarnessModel
from opd.harness_config import HarnessConfig
from rollout.errors import first_sentence


class HarnessTasks:
    """Tasks with their data, ready to be run."""

    def __init__(self, cfg: HarnessConfig, seed: int):
        """Raises ValueError for a task that there is not or whose data cannot be had, and for settings that it would ignore."""
        self.cfg, self.seed = cfg, seed
        self.manager = _manager(cfg)
        try:
            tasks = self.manager.load(list(cfg.tasks))["tasks"]
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ValueError(f"lm_eval cannot load {', '.join(cfg.tasks)}: {first_sentence(error)}") from error
        for name, task in tasks.items():
            if getattr(task, "UNSAFE_CODE", False):
                raise ValueError(f"the task {name} runs what the model writes, which opd never does: remove it from lm_eval.tasks")
            if cfg.num_fewshot and task.get_config("num_fewshot") == 0:
                raise ValueError(f"the task {name} has no few-shot examples, so lm_eval.num_fewshot={cfg.num_fewshot} would be ignored: remove it")
            if getattr(task, "MULTIMODAL", False):
                raise ValueError(f"the task {name} shows pictures or sounds, and the models here read text: remove it from lm_eval.tasks")

    def score(self, model: HarnessModel) -> dict[str, Any]:
        """What a model's part of the record holds; every rank calls it, and the main one gets it, the others an empty one."""
        found = simple_evaluate(
            model=model,
            tasks=list(self.cfg.tasks),
            num_fewshot=self.cfg.num_fewshot,
            limit=self.cfg.limit,
            apply_chat_template=self.cfg.apply_chat_template,
            log_samples=False,
            task_manager=self.manager,
        )
        return {"cut_texts": model.cut, "tasks": {} if found is None else _tasks_record(found)}

    def record(self, models: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The record of several models' parts (module docstring)."""
        own = {"limit": self.cfg.limit, "is_result": self.cfg.limit is None, "chat_template": self.cfg.apply_chat_template, "seed": self.seed}
        return {"version": importlib.metadata.version("lm_eval"), "opd_adapter": True, **own, "models": models}


def print_tasks(record: dict[str, Any]) -> None:
    """The table of a record: a row for each task and metric, a column for each model."""
    roles, rows = list(record["models"]), {}
    for role, part in record["models"].items():
        for name, task in part["tasks"].items():
            shots = "" if task["num_fewshot"] is None else str(task["num_fewshot"])
            for metric, found in task["metrics"].items():
                row = rows.setdefault((name, metric), [name, metric.removesuffix(",none"), shots, str(task["samples"]), *[""] * len(roles)])
                row[4 + roles.index(role)] = _cell(found)
    caption = f"lm_eval {record['version']} with opd's own adapter{', chat template' if record['chat_template'] else ''}; standard error after ±"
    print_table("", ["task", "metric", "few-shot", "samples", *roles], list(rows.values()), caption)
    if not record["is_result"]:
        print(f"no result: lm_eval.limit={record['limit']} took the first {record['limit']} documents of each task only")
    for role, part in record["models"].items():
        if part["cut_texts"]:
            print(f"{part['cut_texts']} texts did not fit into the context of the {role} and lost their beginning, as the harness has it")


def _manager(cfg: HarnessConfig) -> TaskManager:
    """One that knows all named tasks. Raises ValueError where there are none of a name.

    The user's folder is looked through alone at first: those that come with lm_eval are fourteen thousand files.
    """
    if cfg.include_path is not None:
        if not Path(cfg.include_path).is_dir():
            raise ValueError(f"lm_eval.include_path={cfg.include_path} is not a folder")
        manager = TaskManager(include_path=cfg.include_path, include_defaults=False)
        if all(name in manager.all_tasks for name in cfg.tasks):
            return manager
    if is_main():
        logging.getLogger(__name__).info("looking through the tasks that come with lm_eval, which takes a while")
    manager = TaskManager(include_path=cfg.include_path)
    known = set(manager.all_tasks)
    for name in cfg.tasks:
        if name not in known:
            where = "" if cfg.include_path is None else f" or in {cfg.include_path}"
            raise ValueError(f"lm_eval has no task {name!r}{where}{nearest(name, sorted(known))}: lm_eval.tasks names tasks, groups or tags")
    return manager


def _tasks_record(found: dict[str, Any]) -> dict[str, Any]:
    tasks = {}
    for name, figures in found["results"].items():
        values = {key: value for key, value in figures.items() if "," in key and "_stderr," not in key}
        if not values:
            continue  # a group that only lists its tasks
        better = found["higher_is_better"].get(name, {})
        metrics = {}
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            stderr = figures.get(f"{metric}_stderr,{kind}")
            is_number = isinstance(stderr, float) and stderr == stderr
            metrics[key] = {"value": float(value), "stderr": stderr if is_number else None, "higher_is_better": better.get(metric)}
        counts = found["n-samples"].get(name)
        tasks[name] = {
            "version": found["versions"].get(name),
            "num_fewshot": found["n-shot"].get(name),
            "samples": figures["sample_len"] if counts is None else counts["effective"],
            "available_samples": None if counts is None else counts["original"],
            "metrics": metrics,
        }
    return tasks


def _cell(found: dict[str, Any]) -> str:
    return f"{found['value']:.4g}" if found["stderr"] is None else f"{found['value']:.4g} ± {found['stderr']:.2g}"
