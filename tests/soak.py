"""Random faults for a while: `python tests/soak.py FOLDER [MINUTES=30] [SEED=0]`. Prints one JSON line, and ends with 1 where anything was not as it should be.

Runs of two supervised ranks, one after another, are disturbed at random moments until the time is up, when the last may finish: a rank is killed or stopped,
the supervisor is killed or asked to end, or everything is killed and a byte of the newest checkpoint flipped. What ended is started again with the same
command. Each run must end, and equal the undisturbed one: its metrics but for what clocks and loading say, and its weights byte for byte; and nothing
may hang: BOUND seconds without a step or an end are a hang.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

BOUND = 240.0
MEAN_PAUSE = 15.0
FAULTS = ("kill a rank", "kill a rank", "stop a rank", "kill the supervisor", "end the supervisor", "flip a byte")
OF_CLOCKS = ("seconds/", "throughput/", "system/", "balance/", "memory/", "rollout/", "work/rollout_")
OF_LOADING = ("/seconds", "/loads", "/bytes_loaded", "/load_seconds", "/load_hidden")
SETTINGS = ["domain=[arithmetic]", "domains.arithmetic.prompts.rows=64", "logger=none", "threads=1", "checkpoint.every=1"]


def opd(*arguments: str, log: Path) -> subprocess.Popen:
    with log.open("a") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-m", "opd", *arguments], stdout=file, stderr=subprocess.STDOUT, env=environment)


def require(process: subprocess.Popen, log: Path) -> None:
    if process.wait() != 0:
        sys.exit(f"{log} ends: {log.read_text()[-2000:]}")


def distill(folder: Path, run_dir: Path) -> list[str]:
    """The command of a run."""
    models = [f"student.model={folder / 'base/student'}", f"domains.arithmetic.teacher.model={folder / 'teacher/student'}"]
    steps = ["num_steps=40", "rollout.prompts_per_step=16", "rollout.max_new_tokens=8", "rollout.decode_width=8", "quant=mxfp4_experts", "check.signal=off"]
    ranks = ["launch.processes=2", "launch.max_restarts=1000", "launch.heartbeat_seconds=20", "launch.grace_seconds=60"]
    return ["distill", *SETTINGS, *models, *steps, *ranks, "evaluation.every=10", "evaluation.prompts=8", f"run_dir={run_dir}"]


def outcome(run_dir: Path) -> tuple[list[dict], bytes]:
    """What a disturbed run must have in common with an undisturbed one."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]

    def is_kept(name: str) -> bool:
        return not (name.startswith(OF_CLOCKS) or name.endswith(OF_LOADING))

    kept = [{name: value for name, value in record.items() if is_kept(name)} for record in records]
    return kept, (run_dir / "student/model.safetensors").read_bytes()


def disturb(fault: str, process: subprocess.Popen, run_dir: Path, draws: random.Random) -> bool:
    """Do it; whether there was something to do it to."""
    ranks = [child for child in psutil.Process(process.pid).children() if "RANK" in child.environ()]
    checkpoints = sorted(run_dir.glob("checkpoints/step-*"))
    if fault in ("kill a rank", "stop a rank"):
        if not ranks:
            return False
        draws.choice(ranks).send_signal(signal.SIGKILL if fault == "kill a rank" else signal.SIGSTOP)
    elif fault == "flip a byte":
        if len(checkpoints) < 2:
            return False
        process.kill()
        psutil.wait_procs(ranks, timeout=BOUND)
        checkpoints = sorted(run_dir.glob("checkpoints/step-*"))
        path = draws.choice([path for path in checkpoints[-1].iterdir() if path.stat().st_size])
        with path.open("r+b") as file:
            file.seek(draws.randrange(path.stat().st_size))
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
    else:
        process.send_signal(signal.SIGKILL if fault == "kill the supervisor" else signal.SIGTERM)
    return True


def disturbed_run(folder: Path, run_dir: Path, draws: random.Random, deadline: float, counts: Counter) -> bool:
    """Make a run through faults, which there are until the deadline, to its end; False where the command is refused, or does not get there."""
    log = run_dir.with_suffix(".log")
    while time.monotonic() < deadline + 2 * BOUND:
        process = opd(*distill(folder, run_dir), log=log)
        counts["starts"] += 1
        alive, seen = time.monotonic(), -1
        next_fault = time.monotonic() + draws.expovariate(1 / MEAN_PAUSE)
        while process.poll() is None:
            time.sleep(0.05)
            now, size = time.monotonic(), sum(path.stat().st_size for path in run_dir.glob("metrics.jsonl"))
            alive, seen = (now, size) if size != seen else (alive, seen)
            if now - alive > BOUND:
                counts["hangs"] += 1
                for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                    each.kill()
            elif next_fault < now < deadline:
                fault = draws.choice(FAULTS)
                with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):  # it ended by itself meanwhile
                    counts[fault] += disturb(fault, process, run_dir, draws)
                next_fault = now + draws.expovariate(1 / MEAN_PAUSE)
        if process.returncode == 0:
            return True
        if process.returncode not in (75, -signal.SIGKILL, -signal.SIGTERM):  # the last: before it heeds signals
            counts[f"exit code {process.returncode}"] += 1
            if process.returncode == 2:
                return False
    counts["hangs"] += 1
    return False


def main(folder: Path, minutes: float = 30.0, seed: int = 0) -> int:
    folder.mkdir(parents=True)
    for name, number in (("base", 0), ("teacher", 1)):
        steps = ["num_steps=2", "examples_per_step=8", "evaluation.prompts=8", f"seed={number}", f"run_dir={folder / name}"]
        require(opd("specialize", "student=deepseek_v4_tiny", *SETTINGS, *steps, log=folder / f"{name}.log"), folder / f"{name}.log")
    require(opd(*distill(folder, folder / "whole"), log=folder / "whole.log"), folder / "whole.log")
    expected, counts, draws = outcome(folder / "whole"), Counter(), random.Random(seed)
    begun = time.monotonic()
    while time.monotonic() - begun < 60 * minutes:
        run_dir = folder / f"run-{counts['runs finished']:03d}"
        if not disturbed_run(folder, run_dir, draws, begun + 60 * minutes, counts):
            break
        counts["runs finished"] += 1
        counts["runs that differ"] += outcome(run_dir) != expected
    bad = counts["hangs"] + counts["runs that differ"] + sum(count for name, count in counts.items() if name.startswith("exit code"))
    print(json.dumps({"seconds": round(time.monotonic() - begun), "seed": seed, "bad": bad} | dict(sorted(counts.items()))))
    return int(bad > 0 or counts["runs finished"] == 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), *(kind(value) for kind, value in zip((float, int), sys.argv[2:], strict=False))))
