"""What an alarm does beyond its line in the log: W&B's alert, the user's command, the end of the run.

Both tell of an episode once, and not again where a resume does its step again: what has been told stands in RUN/alarms.jsonl, a line each (schema version 1),
written before anybody is told.

    {"schema": 1, "step", "alarm": name of the rule, "metric", "value", "action", "line": the line of the log}

Offline W&B is told again at a resume, since the folder that knew of it is replaced (opd/wandb_log.py). The command runs beside the training, which waits
for neither its start nor its end; it has COMMAND_SECONDS, and what goes wrong with it is one line in the log. It is the user's own program, so it gets
the environment that the run was started in (a token of a chat, perhaps), and what has happened:

    OPD_ALARM   name of the rule         OPD_STEP   step            OPD_RUN    run folder
    OPD_METRIC  name of the metric       OPD_VALUE  its mean        OPD_LINE   the line of the log
"""

import logging
import os
import shlex
import subprocess
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from opd.alarm_config import AlarmAction
from opd.alarms import Episode
from opd.stopping import ask_to_stop
from opd.wandb_log import WandbLog
from rollout.errors import first_sentence
from rollout.files import append_lines, read_lines

SCHEMA = 1
FILE = "alarms.jsonl"
COMMAND_SECONDS = 60
LOG = logging.getLogger(__name__)


def act(run_dir: Path, step: int, episodes: Iterable[Episode], command: str | None, wandb: WandbLog | None) -> None:
    """Do what the episodes that begin at a step ask for; the main rank calls it."""
    for episode in episodes:
        if episode.action is AlarmAction.log:
            continue
        is_told = (step, episode.alarm, episode.metric) in {(told["step"], told["alarm"], told["metric"]) for told in read_told(run_dir)}
        if not is_told and (command is not None or wandb is not None):
            _record(run_dir, step, episode)
        if wandb is not None and (wandb.is_offline or not is_told):
            wandb.alert(title_of(run_dir, step, episode.alarm), episode.line)
        if command is not None and not is_told:
            environment = {
                "OPD_ALARM": episode.alarm, "OPD_METRIC": episode.metric, "OPD_VALUE": f"{episode.value:g}", "OPD_STEP": str(step), "OPD_RUN": str(run_dir),
                "OPD_LINE": episode.line,
            }  # fmt: skip
            threading.Thread(target=_run, args=(command, environment)).start()
        if episode.action is AlarmAction.stop:
            ask_to_stop(f"alarm {episode.alarm}: {episode.line.partition(': ')[0]}", f"with alarms.rules.{episode.alarm}.action=log the alarm does not stop it")


def title_of(run_dir: Path, step: int, alarm: str) -> str:
    """What an alert is called."""
    return f"{run_dir.name}: {alarm} at step {step}"


def read_told(run_dir: Path) -> list[dict[str, Any]]:
    """The episodes of which somebody has been told, oldest first; a line that a kill has cut is left out."""
    return read_lines(run_dir / FILE)


def _record(run_dir: Path, step: int, episode: Episode) -> None:
    facts = {"alarm": episode.alarm, "metric": episode.metric, "value": episode.value, "action": episode.action.value, "line": episode.line}
    append_lines(run_dir / FILE, [{"schema": SCHEMA, "step": step, **facts}])


def _run(command: str, environment: dict[str, str]) -> None:
    try:
        done = subprocess.run(
            shlex.split(command), env=os.environ | environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=COMMAND_SECONDS, check=False,
            start_new_session=True,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        LOG.warning("alarms.command has failed: %s", first_sentence(error))
        return
    if done.returncode:
        LOG.warning("alarms.command has ended with exit code %d: %s", done.returncode, done.stderr.decode(errors="replace").strip()[-200:])
