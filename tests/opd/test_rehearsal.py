"""A rehearsal: it leaves nothing behind, also when it fails; its rollouts are as long as they can be; the plan stands beside what was measured."""

import signal
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest

from opd.__main__ import load_config
from opd.rehearsal import PREFIX, _make_folder, run_rehearsal


@pytest.fixture
def settings(short_settings, tmp_path) -> list[str]:
    return [*short_settings, f"run_dir={tmp_path / 'run'}", "rehearse=true"]


def test_a_rehearsal_leaves_nothing_behind_and_its_completions_are_as_long_as_they_can_be(device, settings, tmp_path):
    found = run_rehearsal(load_config("distill", settings))
    assert list(tmp_path.iterdir()) == []
    assert found.completion_tokens == 8 * 8  # prompts_per_step, max_new_tokens
    assert found.checkpoint > 0
    assert set(found.memory) == {"student", "sampler", "engine", "rollout", "score", "update", "peak"}
    assert set(found.seconds) == {"rollout", "score", "update", "evaluation", "save", "load"}


def test_a_rehearsal_that_fails_leaves_nothing_behind(device, settings, tmp_path):
    with pytest.raises(ValueError, match="is owned by"):
        run_rehearsal(load_config("distill", [*settings, "+deepspeed.fp16={}"]))
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_killed_rehearsal_is_removed_by_the_next(tmp_path):
    left = tmp_path / f"{PREFIX}run-dead"
    left.mkdir()
    with ExitStack() as held:
        made = _make_folder(tmp_path / "run", held)
    assert not left.exists()
    assert made.parent == tmp_path


def test_the_folder_of_a_rehearsal_that_goes_on_stays(tmp_path):
    with ExitStack() as held:
        first, second = (_make_folder(tmp_path / "run", held) for _ in range(2))
        assert {first, second} == set(tmp_path.iterdir())


@pytest.mark.slow
def test_an_interrupted_rehearsal_leaves_nothing_behind(settings, tmp_path):
    process = subprocess.Popen([sys.executable, "-m", "opd", "distill", *settings], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob(f"{PREFIX}*")) and process.poll() is None:
        time.sleep(0.02)
    assert process.poll() is None, "it ended before it had a folder"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert list(tmp_path.iterdir()) == []
