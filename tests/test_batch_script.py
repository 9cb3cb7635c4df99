"""conf/slurm/opd.sbatch in a SLURM of a few lines: jobs that reach their time limit queue themselves again, and the run ends as if they had not.

The commands here do what their manual pages say, as far as the script can see: sbatch runs a copy of the script, anew while it is queued again, and heeds
its #SBATCH lines; srun starts its tasks as processes, signals them when "time" is up, and ends with the highest of their exit codes; scontrol
requeue ends the job that asks for it.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from opd.__main__ import load_config
from opd.distill import distill

SCRIPT = Path(__file__).parents[1] / "conf" / "slurm" / "opd.sbatch"

SBATCH = """
import os, re, shutil, subprocess, sys
text = open(sys.argv[1]).read()
options = {name: value for name, value in re.findall(r"^#SBATCH --([\\w-]+)=?(\\S*)$", text, re.M)}
job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "1", "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
os.environ |= job | {"FAKE_SIGNAL": options["signal"], "FAKE_MAY_REQUEUE": str("requeue" in options)}
shutil.copy(sys.argv[1], "slurm_script")
code, restart = None, 0
while code is None or os.path.exists("queued"):
    if code is not None:
        os.remove("queued")
        os.environ["SLURM_RESTART_COUNT"] = str(restart := restart + 1)
    with open(options["output"].replace("%j", job["SLURM_JOB_ID"]), "a" if options["open-mode"] == "append" else "w") as log:
        code = subprocess.call(["bash", "slurm_script", *sys.argv[2:]], stdout=log, stderr=log)
sys.exit(code)
"""

SRUN = """
import itertools, os, signal, subprocess, sys, time
options = dict(argument.partition("=")[::2] for argument in itertools.takewhile(lambda argument: argument.startswith("--"), sys.argv[1:]))
command, count = sys.argv[1 + len(options):], int(options.get("--ntasks", os.environ["SLURM_NTASKS"]))
step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(count), "SLURM_STEP_NODELIST": "node7", "SLURM_STEP_TASKS_PER_NODE": str(count)}
places = [{"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number), "SLURM_NODEID": "0"} for number in range(count)]
tasks = [subprocess.Popen(command, env=os.environ | step | place, process_group=0) for place in places]
limits = [int(records) for records in os.environ["FAKE_LIMITS"].split(",") if records]
restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
is_signalled = restart >= len(limits)
to, _, name = os.environ["FAKE_SIGNAL"].partition("@")[0].rpartition(":")
while any(task.poll() is None for task in tasks):
    metrics = os.environ["FAKE_METRICS"]
    if not is_signalled and os.path.exists(metrics) and open(metrics).read().count("\\n") >= limits[restart]:
        for process in [os.getppid()] if "B" in to else [task.pid for task in tasks]:
            os.kill(process, signal.Signals["SIG" + name])
        is_signalled = True
    if options.get("--kill-on-bad-exit") == "1" and any(task.returncode for task in tasks):
        for task in tasks:
            task.kill()
    time.sleep(0.01)
sys.exit(max(code if code >= 0 else 128 - code for code in (task.returncode for task in tasks)))
"""

SCONTROL = """
import os, signal, sys
assert sys.argv[1:] == ["requeue", os.environ["SLURM_JOB_ID"]] and os.environ["FAKE_MAY_REQUEUE"] == "True", sys.argv
open("queued", "w").close()
os.kill(os.getppid(), signal.SIGTERM)
"""

SETTINGS = [
    "distill", "domain=[arithmetic]", "domains.arithmetic.prompts.rows=50", "num_steps=8", "rollout.prompts_per_step=8", "rollout.max_new_tokens=4",
    "rollout.decode_width=8", "checkpoint.every=3", "optim.lr=1e-3", "threads=1", "check.signal=off",
]  # fmt: skip


@pytest.fixture
def cluster(tmp_path) -> Path:
    """A folder to submit from, with the commands in bin/."""
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL}.items():
        add_program(tmp_path, name, f"#!{sys.executable}\n{text}")
    add_program(tmp_path, "opd", f'#!/bin/sh\nexec {sys.executable} -m opd "$@"\n')
    return tmp_path


def add_program(cluster: Path, name: str, text: str) -> None:
    file = cluster / "bin" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


def submit(cluster: Path, *arguments: str, tasks: int = 1, limits: str = "", script: Path = SCRIPT) -> subprocess.Popen:
    """Start a job, which has reached its time limit for the nth time when run/metrics.jsonl has the nth number of records."""
    fake = {"FAKE_LIMITS": limits, "FAKE_METRICS": str(cluster / "run" / "metrics.jsonl"), "SLURM_NTASKS": str(tasks)}
    environment = os.environ | fake | {"PATH": f"{cluster / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([cluster / "bin" / "sbatch", script, *arguments], cwd=cluster, env=environment, process_group=0)


def log(cluster: Path) -> str:
    [file] = cluster.glob("opd-*.log")
    return file.read_text()


def preempted(cluster: Path, settings: list[str], tasks: int, limits: str) -> Path:
    """Folder of a run that took several jobs, all of one submission."""
    times = len(limits.split(","))
    run_dir = cluster / "run"
    code = submit(cluster, *settings, "run_dir=run", "logger=offline", tasks=tasks, limits=limits).wait(600)
    assert code == 0, log(cluster)
    assert log(cluster).count("exit code 75: queued again") == times
    assert log(cluster).count("with a checkpoint: the same command goes on from there") == times * tasks
    identity = (run_dir / "wandb_id").read_text()
    assert [folder.name.rpartition("-")[2] for folder in (run_dir / "wandb").glob("offline-run-*")] == [identity] * (times + 1)
    assert not (run_dir / "changes.jsonl").exists(), "no setting was another"
    return run_dir


def assert_equal(run_dir: Path, whole: Path, numbers) -> None:
    assert numbers(run_dir) == numbers(whole)
    assert (run_dir / "student" / "model.safetensors").read_bytes() == (whole / "student" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def settings(saved_v4, saved_qwen3_moe) -> list[str]:
    return [*SETTINGS, f"student.model={saved_v4}", f"domains.arithmetic.teacher.model={saved_qwen3_moe}"]


@pytest.mark.slow
def test_a_time_limit_leaves_no_trace_in_a_run(cluster, settings, numbers, device):
    distill(load_config("distill", [*settings[1:], f"run_dir={cluster / 'whole'}", "logger=none"]))
    assert_equal(preempted(cluster, settings, tasks=1, limits="4"), cluster / "whole", numbers)


@pytest.mark.slow
@pytest.mark.multi
def test_three_time_limits_leave_no_trace_in_a_run_of_two_ranks(cluster, settings, numbers):
    command = [sys.executable, "-m", "opd", *settings, f"run_dir={cluster / 'whole'}", "logger=none", "launch.processes=2"]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert_equal(preempted(cluster, settings, tasks=2, limits="2,4,6"), cluster / "whole", numbers)


@pytest.mark.parametrize(("command", "code", "times"), [("exit 75", 75, 2), ("kill -USR1 $$", 138, 2), ("exit 2", 2, 0), ("exit 1", 1, 0), ("exit 0", 0, 0)])
def test_only_a_job_that_ended_early_is_queued_again(command, code, times, cluster, monkeypatch):
    add_program(cluster, "opd", f"#!/bin/sh\n{command}\n")
    monkeypatch.setenv("OPD_MAX_REQUEUES", "2")
    assert submit(cluster, "distill").wait(60) == code
    assert log(cluster).count("queued again") == times


def test_a_rank_that_is_slower_to_end_early_is_not_killed_by_the_others_exit_code(cluster, monkeypatch):
    """As --kill-on-bad-exit=1 would."""
    add_program(cluster, "opd", "#!/bin/sh\nsleep 0.$((SLURM_PROCID * 3))\necho rank $SLURM_PROCID is done\nexit 75\n")
    monkeypatch.setenv("OPD_MAX_REQUEUES", "0")
    assert submit(cluster, "distill", tasks=3).wait(60) == 75
    assert sorted(log(cluster).splitlines()) == ["rank 0 is done", "rank 1 is done", "rank 2 is done"]


def test_a_job_that_is_cancelled_is_not_queued_again_though_its_ranks_save(cluster):
    """scancel signals the batch shell and the tasks."""
    add_program(cluster, "opd", "#!/bin/sh\ntrap 'exit 75' TERM\ntouch started\nwhile :; do sleep 0.05; done\n")
    job = submit(cluster, "distill")
    while not (cluster / "started").exists():
        time.sleep(0.01)
    for pid in shell_and_tasks(job.pid):
        os.kill(pid, signal.SIGTERM)
    assert job.wait(60) == 75
    assert "queued again" not in log(cluster)


def shell_and_tasks(pid: int) -> list[int]:
    """Of the job of an sbatch."""
    [shell] = psutil.Process(pid).children()
    [srun] = shell.children()
    return [shell.pid, *(task.pid for task in srun.children())]


@pytest.mark.parametrize(("saves", "times"), [(True, 2), (False, 0)])
def test_a_job_that_came_no_further_is_not_queued_again(saves, times, cluster, monkeypatch):
    """As where its checkpoints are further apart than its time limit."""
    (cluster / "run/checkpoints").mkdir(parents=True)
    (cluster / "run/checkpoints/latest.json").write_text("of an earlier job")
    save = "echo job $SLURM_RESTART_COUNT >> run/checkpoints/latest.json" if saves else ":"
    add_program(cluster, "opd", f"#!/bin/sh\n{save}\nexit 75\n")
    monkeypatch.setenv("OPD_MAX_REQUEUES", "2")
    assert submit(cluster, "distill", "run_dir=run").wait(60) == 75
    assert log(cluster).count("exit code 75: queued again") == times
    assert ("no checkpoint since this job began" in log(cluster)) is not saves


@pytest.mark.parametrize("word", ["fresh=true", "++fresh=True"])
def test_a_job_that_would_begin_anew_each_time_is_refused(word, cluster):
    assert submit(cluster, "distill", word).wait(60) == 2
    assert "would begin anew each time" in log(cluster)


def test_models_are_read_from_the_nodes_own_disk_where_asked(cluster, monkeypatch):
    add_program(cluster, "rsync", '#!/bin/sh\n[ "$1" = -a ] && cp -a "$2." "$3"\n')
    add_program(cluster, "opd", '#!/bin/sh\ncat "$HF_HUB_CACHE/models--org--teacher/weights"\n')
    (cluster / "shared" / "hub" / "models--org--teacher").mkdir(parents=True)
    (cluster / "shared" / "hub" / "models--org--teacher" / "weights").write_text("of a teacher")
    (cluster / "shared" / "token").write_text("secret")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(cluster / "shared"))
    monkeypatch.setenv("OPD_NODE_CACHE", str(cluster / "node" / "disk"))
    assert submit(cluster, "distill").wait(60) == 0
    assert log(cluster) == "of a teacher"
    assert [path.name for path in (cluster / "node" / "disk").iterdir()] == ["models--org--teacher"], "and no token"
