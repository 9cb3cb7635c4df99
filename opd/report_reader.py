"""What a run folder holds, for `opd report`: read as it stands, a running job's too, and nothing in it is touched.

A folder of `opd distill`, `specialize` or `evaluate` is one run. A folder of a pipeline has its curves in the last of its stages that distils (else
trains), and its table in summary.json or the evaluation stage. A stage's own folder finds the table of the pipeline around it where that has one
distillation alone, since only then is it known whose table it is. What `opd evaluate RUN` found of the chosen checkpoint comes before all of these, and of
the newest that it was asked of where there is nothing else.

How the run stands is what `opd runs` says (opd/runs.py).
"""

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from opd.checkpoint_record import record_file, shown_record, shown_records
from opd.choice import read_choice
from opd.run_folder import command_of, read_records
from opd.runs import describe
from opd.samples import FOLDER as SAMPLES
from opd.samples import SCHEMA as SAMPLES_SCHEMA
from rollout.files import read_json

COMMANDS = ("distill", "specialize", "evaluate", "pipeline")
NO_TEXT = "(left out: logger.upload_text=false)"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """A run as it is on disk.

    folder: as it was named. command: that wrote it. config: its resolved settings. train_folder, train_command, train_config: the same of the folder
        with the curves, which is another one in a pipeline only.
    records: lines of metrics.jsonl, in order of steps. evaluation: what opd/comparison.py writes, with where it is from in `evaluation_file`, and `of_step`
        where it is of a checkpoint; None where there is none. checkpoints: what `opd evaluate RUN` found, step -> evaluation. choice: choice.json, or None.
    teachers: the last span of teachers.json, or None. samples: contents of RUN/samples, in order of steps.
    stages: of a pipeline, name -> (state, seconds). state: of opd/runs.py, and why where it ended early. begun, changed: local times. versions: of packages,
        empty where not recorded.
    """

    folder: Path
    command: str
    config: dict[str, Any]
    train_folder: Path
    train_command: str
    train_config: dict[str, Any]
    records: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    evaluation_file: Path | None
    of_step: int | None
    checkpoints: dict[int, dict[str, Any]]
    choice: dict[str, Any] | None
    teachers: dict[str, Any] | None
    samples: list[dict[str, Any]]
    stages: dict[str, tuple[str, float]]
    state: str
    begun: str
    changed: str
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def domains(self) -> list[str]:
        """In the order of the configuration, then of the table."""
        evaluated = [] if self.evaluation is None else list(self.evaluation["domains"])
        return list(dict.fromkeys([*self.train_config.get("domains", {}), *evaluated]))

    @property
    def steps(self) -> int:
        """Updates done, as far as is recorded."""
        return max((record["step"] for record in self.records), default=0)

    @property
    def num_steps(self) -> int | None:
        """Updates asked for; None of a command that does none."""
        if "num_steps" not in self.train_config:
            return None
        grpo = self.train_config.get("grpo", {}).get("num_steps", 0) if self.train_command == "specialize" else 0
        return self.train_config["num_steps"] + grpo


def read_run(folder: Path) -> RunFacts:
    """Read a folder. Raises ValueError where it is not one that can be reported on, or is damaged."""
    command, config = _config_of(folder)
    stages = _stages(folder) if command == "pipeline" else {}
    train_folder = _train_folder(folder, config) if command == "pipeline" else folder
    train_command, train_config = _config_of(train_folder)
    checkpoints = {step: record["evaluation"] for step, record in shown_records(train_folder).items()}
    choice = read_choice(train_folder)
    stands = describe(folder)
    evaluation_file = _evaluation_file(folder, command, config)
    summary = read_json(evaluation_file) if evaluation_file is not None else None
    shown, of_step = shown_record(folder), None
    if shown is not None and (evaluation_file is None or (choice is not None and choice["chosen"] is not None)):
        evaluation_file, summary, of_step = record_file(folder, shown["step"], shown["settings"]), shown["evaluation"], shown["step"]
    teachers = train_folder / "teachers.json"
    records = read_records(train_folder)
    times = [path.stat().st_mtime for path in (folder / "config.yaml", train_folder / "config.yaml", train_folder / "metrics.jsonl") if path.is_file()]
    return RunFacts(
        folder=folder,
        command=command,
        config=config,
        train_folder=train_folder,
        train_command=train_command,
        train_config=train_config,
        records=records,
        evaluation=summary,
        evaluation_file=evaluation_file,
        of_step=of_step,
        checkpoints=checkpoints,
        choice=choice,
        teachers=read_json(teachers)["spans"][-1] if teachers.is_file() else None,
        samples=_samples(train_folder),
        stages=stages,
        state=stands.state + (f": {stands.why}" if stands.why else ""),
        begun=_local_time(min(times)),
        changed=_local_time(max(times)),
        versions={} if summary is None else summary.get("versions", {}),
    )


def train_folder_of(folder: Path) -> Path:
    """The folder with a run's curves: its own, or of a pipeline that of a stage. Raises ValueError where there is none, or it cannot be reported on."""
    command, config = _config_of(folder)
    return _train_folder(folder, config) if command == "pipeline" else folder


def without_text(value: Any, key: str = "") -> Any:
    """Settings without the text of system prompts, also where it stands in the overrides of a pipeline's stage."""
    if isinstance(value, dict):
        return {name: without_text(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_text(inner, key) for inner in value]
    is_text = value is not None and (key == "system_prompt" or (isinstance(value, str) and "system_prompt=" in value))
    return NO_TEXT if is_text else value


def _config_of(folder: Path) -> tuple[str, dict[str, Any]]:
    stored = folder / "config.yaml"
    if not stored.is_file():
        raise ValueError(f"{folder} is not a folder of a run, for it has no config.yaml: name one of `opd distill`, `specialize`, `evaluate` or `pipeline`")
    command = command_of(folder)
    if command not in COMMANDS:
        raise ValueError(f"{folder} is of `opd {command}`, of which there is no report: name a folder of {', '.join(COMMANDS)}")
    return command, OmegaConf.to_container(OmegaConf.load(stored))


def _stages(folder: Path) -> dict[str, tuple[str, float]]:
    records = {path.stem: read_json(path) for path in sorted((folder / "stages").glob("*.json"))}
    return {name: (record["state"], record["seconds"]) for name, record in records.items()}


def _train_folder(folder: Path, config: dict[str, Any]) -> Path:
    """The last stage that distils and has begun, else the last that trains, else the pipeline's own folder."""
    for command in ("distill", "specialize"):
        begun = [name for name, stage in config["stages"].items() if stage["command"] == command and (folder / name / "config.yaml").is_file()]
        if begun:
            return folder / begun[-1]
    raise ValueError(f"no stage of the pipeline in {folder} has begun to train: there is nothing to report yet")


def _evaluation_file(folder: Path, command: str, config: dict[str, Any]) -> Path | None:
    """The table's file: the folder's own, its summary, that of its last evaluation, or that of the one pipeline that has this folder for its student."""
    if command == "pipeline":
        stages = [name for name, stage in config["stages"].items() if stage["command"] == "evaluate"]
        candidates = [folder / "summary.json", *(folder / name / "evaluation.json" for name in reversed(stages))]
    else:
        judged = folder.resolve()
        candidates = [folder / "evaluation.json", judged.with_name(f"{judged.name}-evaluation") / "evaluation.json"]  # an arm's of `opd compare`
        around = folder.resolve().parent
        if command == "distill" and command_of(around) == "pipeline":
            _, pipeline = _config_of(around)
            distilled = [name for name, stage in pipeline["stages"].items() if stage["command"] == "distill"]
            candidates += [around / "summary.json"] if distilled == [folder.resolve().name] else []
    return next((path for path in candidates if path.is_file()), None)


def _samples(folder: Path) -> list[dict[str, Any]]:
    found = [read_json(path) for path in sorted((folder / SAMPLES).glob("*.json"))]
    other = [content.get("schema") for content in found if content.get("schema") != SAMPLES_SCHEMA]
    if other:
        raise ValueError(f"{folder / SAMPLES} has files of schema {other[0]}; this version reads schema {SAMPLES_SCHEMA}")
    return found


def _local_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M %Z")
