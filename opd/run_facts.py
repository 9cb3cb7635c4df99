"""What a run, or the folder of another command, was made with, at each of its starts: RUN/starts.jsonl, one line per start, schema version 1.

    {"schema": 1, "time": ISO 8601 with zone, "step": updates done before, "command": as it can be typed again,
     "host", "pid", "ranks", "code": sha256 of the sources of opd, teachers and rollout,
     "git": {"commit", "branch", "diff": "starts/DIGEST.patch" | null, "untracked": [names]} | null, of the repository that the sources are in,
     "versions": {"python", "opd", "torch", ...}, "hardware": {"system", "cpu", "cores", "memory_gib", "devices": [names]},
     "student": {"model", "revision", "hash" | null} | null, "data": {D: {SOURCE: {"path", "revision", "rows", "sha256"}}},
     "held_out": {D: {"path", "revision", "rows", "sha256"}}}

data: sha256 of the rows in use, as tokens with their answers: the same file under another tokenizer or template is other data. held_out: of all held-out rows
as they were read, of the domains that have some; an addition to schema 1, which earlier starts lack. Teachers are in teachers.json, the settings in
config.yaml. Of a command that does not train, step is 0, student null, and data and held_out are empty: its config.yaml names the models. Passwords in
addresses (http://user:word@host) are taken out; nothing of the environment is written.
"""

import hashlib
import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from opd.config import RunConfig
from opd.distributed import Group, num_ranks
from rollout.config import HeldOutConfig, ModelConfig, PromptsConfig, SourceConfig
from rollout.files import append_lines, read_lines, replace_text
from rollout.prompts import DomainPrompts
from teachers.fingerprint import weights_fingerprint

SCHEMA = 1
FILE, FOLDER = "starts.jsonl", "starts"
PACKAGES = ("opd", "torch", "transformers", "deepspeed", "accelerate", "datasets", "wandb", "hydra-core", "safetensors", "triton", "vllm", "peft")
MOST_UNTRACKED = 100
GIT_SECONDS = 20


def record_start(run_dir: Path, step: int, cfg: RunConfig, prompts: dict[str, DomainPrompts]) -> dict[str, Any]:
    """Add a line for this start of a run, after `step` updates; the main rank calls it. Returns what it wrote."""
    held_out = {name: held_out_facts(cfg.domains[name].held_out, *domain.held_out) for name, domain in prompts.items() if domain.held_out is not None}
    data = {name: data_facts(domain) for name, domain in prompts.items()}
    return _add_line(run_dir, step, {"student": model_facts(cfg.student), "data": data, "held_out": held_out})


def record_command(folder: Path) -> None:
    """Add a line for a command that does not train, such as `opd export`, to the folder that it writes; the main rank calls it."""
    _add_line(folder, 0, {"student": None, "data": {}, "held_out": {}})


def _add_line(run_dir: Path, step: int, own: dict[str, Any]) -> dict[str, Any]:
    root = Path(__file__).resolve().parents[1]
    facts = {
        "schema": SCHEMA,
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "step": step,
        "command": command_line(sys.argv),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "ranks": num_ranks(Group.data),
        "code": code_digest(root),
        "git": git_facts(root, run_dir),
        "versions": {"python": platform.python_version()} | package_versions(),
        "hardware": hardware(),
    } | own
    append_lines(run_dir / FILE, [facts])
    return facts


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """What was recorded of a run's starts, oldest first; a line that a kill has cut is left out."""
    return read_lines(run_dir / FILE)


def command_line(arguments: list[str]) -> str:
    """The command as it can be typed again, without the passwords of addresses."""
    is_ours = Path(arguments[0]).name in ("opd", "__main__.py")
    return without_passwords(shlex.join(["opd", *arguments[1:]] if is_ours else arguments))


def without_passwords(text: str) -> str:
    """Text in which http://user:word@host has become http://***@host."""
    return re.sub(r"://[^/@\s'\"]+@", "://***@", text)


def code_digest(root: Path) -> str:
    """sha256 over the names and contents of our packages' Python files."""
    digest = hashlib.sha256()
    for path in sorted(path for package in ("opd", "teachers", "rollout") for path in (root / package).rglob("*.py")):
        digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def git_facts(root: Path, run_dir: Path) -> dict[str, Any] | None:
    """Commit, branch, changes since (written to RUN/starts) and untracked files of the repository at a folder; None where there is none, or no git."""
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None or not (root / ".git").exists():
        return None
    diff, name = _git(root, "diff", "HEAD", "--no-ext-diff") or "", None
    if diff.strip():
        name = f"{FOLDER}/{hashlib.sha256(diff.encode()).hexdigest()[:12]}.patch"
        (run_dir / FOLDER).mkdir(exist_ok=True)
        replace_text(run_dir / name, without_passwords(diff))
    untracked = (_git(root, "ls-files", "--others", "--exclude-standard") or "").splitlines()
    branch = (_git(root, "rev-parse", "--abbrev-ref", "HEAD") or "").strip()
    return {"commit": commit.strip(), "branch": branch, "diff": name, "untracked": untracked[:MOST_UNTRACKED]}


def package_versions() -> dict[str, str]:
    """Of those packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """What the main rank runs on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    memory = round(psutil.virtual_memory().total / 2**30, 1)
    return {"system": platform.platform(), "cpu": cpu, "cores": len(os.sched_getaffinity(0)), "memory_gib": memory, "devices": devices}


def model_facts(cfg: ModelConfig) -> dict[str, Any] | None:
    """The model that a run begins with, or a base; None where there is none. Its hash is null where it is not there any more, as it may be at a resume."""
    if cfg.model is None:
        return None
    try:
        digest = weights_fingerprint(cfg, "student")
    except (ValueError, OSError):
        digest = None
    return {"model": cfg.model, "revision": cfg.revision, "hash": digest}


def data_facts(domain: DomainPrompts) -> dict[str, Any]:
    """Where each source of a domain comes from, and the hash of its rows."""
    cfgs: dict[str, SourceConfig | PromptsConfig | HeldOutConfig] = domain.cfg.sources or {"prompts": domain.cfg}
    return {
        source: {"path": cfgs[source].path, "revision": cfgs[source].revision, "rows": len(rows), "sha256": rows_digest(rows)}
        for source, rows in domain.sources.items()
    }


def held_out_facts(cfg: HeldOutConfig, rows: int, digest: str) -> dict[str, Any]:
    """Where the held-out prompts of a domain come from, their number and their hash."""
    return {"path": cfg.path, "revision": cfg.revision, "rows": rows, "sha256": digest}


def rows_digest(rows: list[dict[str, Any]]) -> str:
    """sha256 over the rows' places, tokens, answers and slips."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row["index"], list(row["tokens"]), row["answer"], row["slip"]]).encode())
    return digest.hexdigest()


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, errors="replace", timeout=GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
