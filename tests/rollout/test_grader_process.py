"""The graders' process: what a function of the user's may do, what it cannot do to the trainer, and what is said of it."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from rollout.config import PromptsConfig
from rollout.grader_config import read_grader
from rollout.grader_process import ENVIRONMENT, GraderProcess, end_processes
from rollout.grading import grade, require_gradable
from rollout.prompts import DomainPrompts

SOURCE = '''
import os, subprocess, sys, threading, time


def score(completion, answer):
    """Does what the completion says, then compares."""
    exec(completion)
    return 1.0 if answer == "right" else 0.5


def one(completion): ...
def three(completion, answer, other): ...
def more(completion, answer, other=1, *, last=2): return True
async def later(completion, answer): ...
no_function = 7


class Speechless(Exception):
    def __str__(self): raise RuntimeError


def raises(completion, answer): raise Speechless
def returned(completion, answer): return eval(completion)
'''
PATIENCE_SECONDS = 60

Start = Callable[..., GraderProcess]


@pytest.fixture
def module(tmp_path, monkeypatch) -> Path:
    """The user's module, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SOURCE)
    return tmp_path / "mine.py"


@pytest.fixture
def start(module) -> Iterator[Start]:
    """start("returned", seconds=2): a process with a function of the user's module."""
    begun = []

    def begin(function: str = "score", **settings) -> GraderProcess:
        begun.append(GraderProcess(read_grader({"kind": "python", "function": f"mine:{function}"} | settings, "grader")))
        return begun[-1]

    yield begin
    for process in begun:
        process.end()


def failure(process: GraderProcess, completion: str) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the tests look at the sentence
        process.score(completion, "right")
    assert "\n" not in str(error.value)
    return str(error.value)


def is_gone(pid: int) -> bool:
    """Within PATIENCE_SECONDS."""
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.02)
                continue
        return True
    return False


def test_the_function_gets_completion_and_answer_and_one_process_serves_all(start):
    process = start("returned")
    assert [process.score(text, "b") for text in ("completion == answer", "answer == 'b'", "0.25", "1", "0", "True")] == [0, 1, 0.25, 1, 0, 1]
    pid = process.process.pid
    process.score("1", "b")
    assert process.process.pid == pid


def test_texts_arrive_as_they_are(start):
    """Longer than a pipe holds, with characters of all planes, and with one that no encoding has."""
    text = "7 # \u00e9 \u2212 \U0001f600 \x00 \ud800 " + "x" * 300_000
    process = start("more")
    assert process.score(text, text) == 1
    assert start("returned").score("len(answer) == 300_000 and ord(answer[0]) == 0x1f600", "\U0001f600" + "x" * 299_999) == 1


# Failures


@pytest.mark.parametrize(("completion", "reason"), [
    ("1/0", "ZeroDivisionError: division by zero"),
    ("raise KeyError", "KeyError"),
    ("raise ValueError('one\\ntwo')", "ValueError: one"),
    ("raise ValueError('x' * 10**6)", "ValueError: " + "x" * 300),
    ("sys.exit(3)", "SystemExit: 3"),
    ("f = lambda: f()\nglobals()['f'] = f\nf()", "RecursionError: maximum recursion depth exceeded"),
    ("os.fork()", "PermissionError: it may start no processes (subprocesses=true lets it)"),
    ("subprocess.run(['true'])", "PermissionError: it may start no processes (subprocesses=true lets it)"),
    ("os.system('true')", "PermissionError: it may start no processes (subprocesses=true lets it)"),
    ("bytearray(10**11)", "it needs more memory than memory_mib"),
    ("open('large', 'wb').write(bytes(65 << 20))", "OSError: [Errno 27] File too large"),
])  # fmt: skip
def test_an_exception_is_an_error_with_its_words_and_the_process_goes_on(completion, reason, start):
    process = start()
    process.start()
    pid = process.process.pid
    assert failure(process, completion) == reason
    assert process.score("", "wrong") == 0.5
    assert process.process.pid == pid


@pytest.mark.parametrize(("completion", "reason"), [
    ("os._exit(7)", "its process ended (exit status 7)"),
    ("os._exit(0)", "its process ended (exit status 0)"),
    ("os.kill(os.getpid(), 9)", "its process ended (killed by SIGKILL, as when a machine's memory is used up)"),
    ("import ctypes; ctypes.string_at(0)", "its process ended (killed by SIGSEGV)"),
    ("while True: pass", "it took longer than seconds=2"),
    ("time.sleep(1000)", "it took longer than seconds=2"),
    ("os.kill(os.getpid(), 19)", "it took longer than seconds=2"),
])  # fmt: skip
def test_a_process_that_hangs_or_ends_is_an_error_and_the_next_completion_finds_a_new_one(completion, reason, start):
    process = start(seconds=2)
    process.start()
    first = process.process.pid
    assert failure(process, completion) == reason
    assert is_gone(first)
    assert process.score("", "wrong") == 0.5
    assert process.process.pid != first


def test_a_process_that_ends_between_two_completions_is_replaced(start):
    process = start()
    assert process.score("threading.Timer(0.1, lambda: os._exit(5)).start()", "right") == 1
    assert is_gone(process.process.pid)
    assert process.score("", "right") == 1


def test_memory_is_limited_though_it_comes_in_small_pieces(start):
    process = start(memory_mib=128)
    assert failure(process, "kept = [bytes(100_000) for _ in range(10_000)]") == "it needs more memory than memory_mib"
    assert process.score("kept = [bytes(100_000) for _ in range(100)]", "right") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_by_which_a_job_ends_does_not_end_the_grading_of_its_last_step(number, start):
    assert start().score(f"os.kill(os.getpid(), {int(number)})", "right") == 1


@pytest.mark.parametrize(("value", "reason"), [
    ("1.5", "its score 1.5 is not from 0 to 1"), ("-0.001", "its score -0.001 is not from 0 to 1"), ("float('nan')", "its score nan is not from 0 to 1"),
    ("10**400", "OverflowError: int too large to convert to float"), ("'1'", "its score is no number but str"), ("None", "its score is no number but NoneType"),
    ("1j", "its score is no number but complex"),
])  # fmt: skip
def test_a_score_that_is_no_number_from_0_to_1_is_an_error(value, reason, start):
    assert failure(start("returned"), value) == reason


def test_an_exception_that_cannot_be_shown_is_named(start):
    assert failure(start("raises"), "") == "Speechless"


def test_the_error_of_a_grader_names_the_row_and_is_no_zero(module):
    grader = {"kind": "python", "function": "mine:score"}
    with pytest.raises(ValueError, match=r"^the grader \(mine:score\) failed on a completion of row law/prompts:7: ZeroDivisionError: division by zero$"):
        grade(grader, "1/0", "right", "law/prompts:7")
    end_processes()


# What the function has, and what it does not


def test_the_trainers_environment_is_not_the_functions(start, monkeypatch):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPD_ANYTHING", "RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "geheim")
    allowed = {*ENVIRONMENT, "OMP_NUM_THREADS"}
    process = start("returned")
    assert process.score("'geheim' not in os.environ.values() and b'geheim' not in open('/proc/self/environ', 'rb').read()", "") == 1
    assert process.score(f"set(os.environ) <= {allowed}", "") == 1
    assert not {name for name in allowed if "KEY" in name or "TOKEN" in name or "SECRET" in name}


def test_the_functions_process_holds_no_file_of_the_trainers(start, tmp_path):
    (tmp_path / "held").write_text("x")
    with (tmp_path / "held").open() as held:
        os.set_inheritable(held.fileno(), True)
        assert start("returned").score("not [n for n in os.listdir('/proc/self/fd') if os.path.realpath('/proc/self/fd/' + n).endswith('/held')]", "") == 1


def test_what_the_function_prints_is_nowhere(start, capfd):
    printing = "for _ in range(100): print('x' * 10**6); sys.stderr.write('x' * 10**4); os.write(1, b'x')"
    assert start().score(printing, "right") == 1
    assert capfd.readouterr() == ("", "")


def test_a_function_that_may_start_processes_does_and_they_end_with_it(start, tmp_path):
    process = start(subprocesses=True)
    assert process.score("open('pid', 'w').write(str(subprocess.Popen(['sleep', '600']).pid))", "right") == 1
    child = int((tmp_path / "pid").read_text())
    assert psutil.Process(child).name() == "sleep"
    process.end()
    assert is_gone(child)


def test_a_function_that_multiplies_is_ended_as_a_whole(start, tmp_path):
    """Two generations, which outlive the time; each writes its number."""
    bomb = "for _ in range(3):\n    os.fork(); open(f'pid-{os.getpid()}', 'w').close()\ntime.sleep(600)"
    assert failure(start(subprocesses=True, seconds=4), bomb) == "it took longer than seconds=4"
    pids = [int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*")]
    assert len(pids) == 8
    assert all(is_gone(pid) for pid in pids)


PARENT = """
import sys, time
from rollout.grader_config import read_grader
from rollout.grader_process import GraderProcess
process = GraderProcess(read_grader({"kind": "python", "function": "mine:score", "seconds": 600}, "grader"))
process.start()
print(process.process.pid, flush=True)
process.score("while True: pass", "right")
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_process_ends_with_the_trainer_while_it_grades(number, module):
    trainer = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    pid = int(trainer.stdout.readline())
    assert psutil.pid_exists(pid)
    trainer.send_signal(number)
    trainer.wait(PATIENCE_SECONDS)
    assert is_gone(pid)


# The start


@pytest.mark.parametrize(("function", "reason"), [
    ("nowhere:score", "nowhere:score cannot grade: ModuleNotFoundError: No module named 'nowhere'"),
    ("mine:nothing", "mine:nothing cannot grade: mine has no function nothing"),
    ("mine:no_function", "mine:no_function cannot grade: no_function of mine is no function"),
    ("mine:one", "mine:one cannot grade: one(completion) of mine cannot be called with two arguments, completion and answer"),
    ("mine:three", "mine:three cannot grade: three(completion, answer, other) of mine cannot be called with two arguments"),
    ("mine:later", "mine:later cannot grade: later of mine is a coroutine function"),
    ("broken:score", "broken:score cannot grade: ZeroDivisionError: division by zero"),
    ("leaving:score", "leaving:score cannot grade: its process ended (exit status 4)"),
])  # fmt: skip
def test_a_function_that_cannot_grade_is_refused_at_the_start_by_its_domain(function, reason, module):
    (module.parent / "broken.py").write_text("1 / 0\n")
    (module.parent / "leaving.py").write_text("import os\nos._exit(4)\n")
    prompts = {"law": DomainPrompts(name="law", cfg=PromptsConfig(), sources={"prompts": [{"index": 0, "tokens": [1], "answer": "1", "slip": None}]})}
    with pytest.raises(ValueError, match=r"^domains\.law\.grader: ") as refusal:
        require_gradable(prompts, {"law": {"kind": "python", "function": function}})
    assert reason in str(refusal.value)


def test_the_trainer_does_not_import_the_users_module(start):
    assert start("returned").score("1", "") == 1
    assert "mine" not in sys.modules


def test_the_hash_is_of_the_file_that_defines_the_function(start, module):
    process = start()
    process.start()
    assert process.source_hash == hashlib.sha256(SOURCE.encode()).hexdigest()
    (module.parent / "front.py").write_text("from mine import score\n")
    other = GraderProcess(read_grader({"kind": "python", "function": "front:score"}, "grader"))
    other.start()
    assert other.source_hash == process.source_hash
    other.end()


# regex


@pytest.fixture
def finds() -> Iterator[Callable[[str, str, str], float]]:
    """finds(pattern, completion, answer): the score."""
    yield lambda pattern, completion, answer: grade({"kind": "regex", "pattern": pattern, "seconds": 2}, completion, answer, "law/prompts:7")
    end_processes()


def test_the_last_match_is_compared_by_its_group_or_as_a_whole(finds):
    assert finds(r"answer: (.*)$", "I think so.\nanswer:  42 ", "42") == 1
    assert finds(r"answer: (\d+)", "answer: 41, no, answer: 42", "42") == 1
    assert finds(r"answer: (\d+)", "answer: 42, no, answer: 41", "42") == 0
    assert finds(r"\d+", "between 41 and 42", "42") == 1
    assert finds(r"(?i)ANSWER (a)?", "answer b", "b") == 0
    assert finds(r"answer: (\d+)", "42", "42") == 0


def test_a_pattern_that_backtracks_for_ever_is_an_error_in_time_and_the_next_completion_is_graded(finds):
    with pytest.raises(ValueError, match=r"the grader \(regex\) failed on a completion of row law/prompts:7: it took longer than seconds=2"):
        finds(r"(a+)+$", "a" * 60 + "b", "a")
    assert finds(r"(a+)+$", "a" * 60, "a" * 60) == 1
