"""A rank's place from SLURM's environment, as srun sets it (man srun, "OUTPUT ENVIRONMENT VARIABLES")."""

import os
import subprocess
import sys

import pytest

from opd.slurm import first_host, slurm_ranks, tasks_per_node

BATCH_SHELL = {"SLURM_JOB_ID": "812", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "5", "SLURM_JOB_NODELIST": "gpu[07-09]"}
STEP = BATCH_SHELL | {
    "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_NODELIST": "gpu[07-09]", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2",
}  # fmt: skip


def test_a_task_of_a_step_is_the_rank_that_torchrun_would_make_of_it():
    place = {"RANK": "4", "WORLD_SIZE": "5", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "2"}
    assert slurm_ranks(STEP) == place | {"MASTER_ADDR": "gpu07", "MASTER_PORT": "20813"}


def test_tasks_of_one_host_meet_at_its_loopback():
    assert slurm_ranks(STEP | {"SLURM_STEP_NODELIST": "gpu07", "SLURM_STEP_TASKS_PER_NODE": "5", "SLURM_NODEID": "0"})["MASTER_ADDR"] == "127.0.0.1"


def test_where_the_user_says_that_ranks_meet_they_meet():
    found = slurm_ranks(STEP | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "6000"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.7", "6000")


@pytest.mark.parametrize("environment", [{}, BATCH_SHELL, STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}])
def test_outside_of_a_step_of_several_tasks_a_command_is_one_process(environment):
    assert slurm_ranks(environment) == {}


OTHERS = [{"RANK": "4", "WORLD_SIZE": "5"}, {"RANK": "0", "WORLD_SIZE": "40"}, {"RANK": "0", "WORLD_SIZE": "5", "TORCHELASTIC_RUN_ID": "x"}]


@pytest.mark.parametrize("launcher", OTHERS)
def test_another_launchers_word_holds(launcher):
    assert slurm_ranks(STEP | launcher) == {}


CONTRADICTIONS = {
    "RANK=0 is set, and srun started this process as task 4 of 5": {"RANK": "0", "WORLD_SIZE": "5"},
    "this is task 7 of 5": {"SLURM_PROCID": "7"},
    "are not 5 tasks": {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"},
    "cannot be read": {"SLURM_STEP_TASKS_PER_NODE": "two"},
}


@pytest.mark.parametrize(("sentence", "change"), CONTRADICTIONS.items())
def test_a_step_that_contradicts_itself_is_refused(sentence, change):
    with pytest.raises(ValueError, match=sentence):
        slurm_ranks(STEP | change)


def test_an_environment_that_is_not_whole_is_refused():
    with pytest.raises(ValueError, match="srun started 5 tasks, and SLURM_NODEID is not set"):
        slurm_ranks({name: value for name, value in STEP.items() if name != "SLURM_NODEID"})


HOSTS = {
    "gpu7": "gpu7", "gpu7,gpu9": "gpu7", "gpu[007-010,12]": "gpu007", "a[3,5-6],b1": "a3", "gpu[3-4]-ib,x": "gpu3-ib", "r[1-2]n[05-06]": "r1n05",
}  # fmt: skip


@pytest.mark.parametrize(("nodes", "host"), HOSTS.items())
def test_the_first_host_of_a_list(nodes, host):
    assert first_host(nodes) == host


def test_tasks_per_node():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]


def test_a_command_for_one_process_is_refused_as_a_task_of_several():
    """It would run once for each."""
    command = [sys.executable, "-m", "opd", "export", "student.model=x"]
    ended = subprocess.run(command, env=os.environ | STEP, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert ended.stderr == "[rank 4] opd: opd export is for one process, and this is rank 4 of 5: start it alone, as with srun --ntasks=1\n"
