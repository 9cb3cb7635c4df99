"""What of a run goes to Weights & Biases, beside RUN/metrics.jsonl, which is the record. The only module that imports wandb.

Nothing here can hold up or end a run: every call is made by a thread of its own, in order, from a queue; one that fails is said once, and what follows is
left out; the end waits FINISH_SECONDS for it. Where the server cannot be reached at the start the run is logged offline, and says so; only a missing login
refuses, since that is the user's to mend.

A run is one W&B run, whose id stands in RUN/wandb_id (an agent of a sweep gives it). Each step is one row of it, at that step, so that

- online, rows that W&B has already are not sent again when a killed run does steps again, and those that it had not got are: W&B cannot replace a row. They are
  the same numbers but for clocks and rates, unless the steps are done again with other settings, whose figures metrics.jsonl and the report have, W&B not;
- offline, where each start of the process is a folder of its own, a resume writes all rows that count anew, with the alerts and the checkpoints that are still
  there, and removes the folders before it that have not been uploaded: what is left is one folder with every step once.
  `wandb sync RUN/wandb/offline-run-*` uploads it.

Models, data and checkpoints are artifacts by reference: a name, a place and a hash, which W&B also gets as a file, since it tells the versions of an artifact
apart by its files: other weights in the same place are another version. No bytes of them are read. Online the run uses its models and data, which gives the
lineage; offline W&B cannot say that a run uses something, so they are logged with the role "input" in their metadata.
"""

import json
import logging
import os
import queue
import re
import shutil
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import wandb

from opd.checkpoint_files import digest_of, step_of
from opd.job_config import LoggerConfig, LoggerKind
from rollout.errors import first_sentence

LOG = logging.getLogger(__name__)
INIT_SECONDS = 30
FINISH_SECONDS = 60.0
HUB = "https://huggingface.co/"


class WandbLog:
    """One run of W&B's, and the thread that talks to it."""

    def __init__(self, run_dir: Path, cfg: LoggerConfig, config: dict[str, Any] | None):
        """config: of a run that trains; None leaves the run's own. Raises ValueError where there is no login for logger=wandb."""
        self.run_dir = run_dir
        self.run = _start(run_dir, cfg, config)
        self.is_offline = self.run.settings.mode == "offline"
        self.first_step = 0 if self.is_offline else self.run.step  # rows before it are there
        self.has_failed = False
        self.calls: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def take_up(self, records: list[dict[str, Any]], alerts: list[tuple[str, str]], checkpoints: list[Path]) -> None:
        """Have what counts of a run that is taken up, each once: the records of steps 0 to the one that it goes on from, the alerts (title, text) and the
        checkpoints until then.
        """
        for record in records:
            self.log(record["step"], {name: value for name, value in record.items() if name not in ("schema", "step")})
        if self.is_offline:
            for title, text in alerts:
                self.alert(title, text)
            for checkpoint in checkpoints:
                self.made_checkpoint(checkpoint)
            self._call(self._forget_offline)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Write the row of a step."""
        if step >= self.first_step:
            self._call(lambda: self.run.log({"opd/step": step, **metrics}, step=step))

    def configure(self, values: dict[str, Any]) -> None:
        """Put values into the run's configuration, in place of those of that name."""
        self._call(lambda: self.run.config.update(values, allow_val_change=True))

    def alert(self, title: str, text: str) -> None:
        """Send W&B's alert, which its users get by mail or chat as they have set it up."""
        self._call(lambda: self.run.alert(title=title, text=text, wait_duration=0.001))  # of two domains at one step too; 0 would be its minute

    def uses(self, name: str, kind: str, place: str | None, metadata: dict[str, Any]) -> None:
        """Say that the run is made from something: a model or a dataset, by reference."""

        def call() -> None:
            if self.is_offline:
                self.run.log_artifact(_artifact(name, kind, place, metadata | {"role": "input"}))
            else:
                self.run.use_artifact(_artifact(name, kind, place, metadata))

        self._call(call)

    def made_checkpoint(self, folder: Path) -> None:
        """Say that the run has made a checkpoint, by reference, with its step and the hash of its manifest: one of a step that was done again is another."""

        def call() -> None:
            try:
                digest = digest_of(folder)
            except FileNotFoundError:
                digest = None
            if digest is not None:  # an older one may have gone by now
                step = step_of(folder.name)
                artifact = _artifact(f"checkpoint-{self.run.id}", "checkpoint", folder.resolve().as_uri(), {"step": step, "manifest": digest})
                self.run.log_artifact(artifact, aliases=[f"step-{step}"])

        self._call(call)

    def finish(self, exit_code: int, is_preempted: bool) -> None:
        """Send what is left, for FINISH_SECONDS at most."""
        if is_preempted:
            self._call(self.run.mark_preempting)  # the run is to go on, and is shown as such
        self._call(lambda: self.run.finish(exit_code=exit_code))
        self.calls.put(None)
        self.thread.join(FINISH_SECONDS)
        if self.thread.is_alive():
            LOG.warning("W&B has not taken everything within %g s: wandb sync %s uploads the rest", FINISH_SECONDS, self.run_dir / "wandb" / "*run-*")

    def _call(self, call: Callable[[], None]) -> None:
        self.calls.put(call)

    def _work(self) -> None:
        while (call := self.calls.get()) is not None:
            try:
                if not self.has_failed:
                    call()
                self.calls.task_done()
            except Exception as error:  # whatever it is, the run is worth more
                self.has_failed = True
                words = "W&B gets no more of this run (%s: %s); metrics.jsonl has all of it"
                LOG.warning(words, type(error).__name__, first_sentence(error))
                self.calls.task_done()

    def _forget_offline(self) -> None:
        """Remove the folders of earlier starts that have not been uploaded; metrics.jsonl has what was in them."""
        own = Path(self.run.settings.sync_dir).name
        for folder in (self.run_dir / "wandb").glob(f"offline-run-*-{self.run.id}*"):
            if folder.name != own and not any(folder.glob("*.synced")):
                shutil.rmtree(folder, ignore_errors=True)


def upload_file(run_dir: Path, cfg: LoggerConfig, file: Path) -> None:
    """Log a file, as it is, as an artifact of a run's W&B run, online or offline as the run was. Raises ValueError where there is no such run."""
    if not (run_dir / "wandb_id").is_file():
        raise ValueError(f"{run_dir} has no W&B run to upload to: it was run with logger=none, or has not begun")
    run = _start(run_dir, cfg, None)
    run.log_artifact(str(file), name=f"report-{run.id}", type="report")
    run.finish()


def _start(run_dir: Path, cfg: LoggerConfig, config: dict[str, Any] | None):
    id_file = run_dir / "wandb_id"
    if not id_file.exists():
        given = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None  # an agent's; other environments keep theirs to themselves
        id_file.write_text(given or uuid.uuid4().hex[:12])
    mode = "online" if cfg.kind is LoggerKind.wandb else "offline"
    arguments = {
        "project": cfg.project,
        "entity": cfg.entity,
        "group": cfg.group,
        "name": cfg.name or run_dir.name,
        "id": id_file.read_text(),
        "resume": "allow",
        "dir": str(run_dir),
        "config": config if config is None or cfg.upload_text else without_text(config),
        "settings": wandb.Settings(silent=True, console="off", x_disable_stats=True, init_timeout=INIT_SECONDS),
    }
    try:
        run = wandb.init(**arguments, mode=mode)
    except wandb.errors.CommError as error:
        words = "W&B cannot be reached (%s), so this run is logged offline: wandb sync %s uploads it"
        LOG.warning(words, first_sentence(error), run_dir / "wandb" / "offline-run-*")
        wandb.teardown()  # its own process still holds the id
        run = wandb.init(**arguments, mode="offline")
    except wandb.errors.Error as error:
        raise ValueError(f"Weights & Biases cannot be used ({first_sentence(error)}): run `wandb login`, or set logger=offline") from error
    run.define_metric("*", step_metric="opd/step")
    return run


def _artifact(name: str, kind: str, place: str | None, metadata: dict[str, Any]):
    """place: a folder or file or its URI, a hub id, or None where there is none, as of a synthetic data set."""
    artifact = wandb.Artifact(re.sub(r"[^A-Za-z0-9_.-]", "-", name), type=kind, metadata=metadata)
    if place is not None:
        on_hub = f"{HUB}datasets/{place}" if kind == "dataset" else HUB + place
        local = place if place.startswith("file://") else Path(place).resolve().as_uri() if Path(place).exists() else None
        artifact.add_reference(local or on_hub, checksum=False)
    with artifact.new_file("facts.json") as file:
        json.dump(metadata, file, sort_keys=True)
    return artifact


def without_text(config: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration without the text of its system prompts."""
    domains = {name: domain | {"prompts": domain["prompts"] | {"system_prompt": None}} for name, domain in config["domains"].items()}
    return config | {"domains": domains}
