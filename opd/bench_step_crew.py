"""The processes of `opd bench step`: one, or two gloo ranks under torchrun, for each contender; they stay alive, and step when they are told.

Ranks connect to a socket in the problem's folder and get one line for each step, which all ranks of a contender answer; both ends of a connection end
with either process. What a contender prints is in the folder, NAME.log, and the last line of it in the error where one ends unasked.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import IO

from opd.bench_step_problem import Outcome

START_SECONDS = 600.0
"""For all processes to begin: on a busy machine each takes a minute to import what it needs."""

END_SECONDS = 30.0

ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error", "PYTHONUNBUFFERED": "1",
}  # fmt: skip
"""All measure on the CPU, and ask nobody on the network."""


@dataclass(slots=True)
class _Worker:
    process: subprocess.Popen
    log: Path
    ranks: dict[int, IO[str]] = field(default_factory=dict)


class Crew:
    """Contenders by name; a context, at whose end all processes have ended."""

    def __init__(self, processes: dict[str, int], folder: Path, threads: int):
        """processes: how many each contender has. folder: of the problem. threads: of each process."""
        self.processes, self.folder, self.threads = processes, folder, threads
        self.workers: dict[str, _Worker] = {}

    def __enter__(self) -> "Crew":
        """Raises ValueError for a contender that does not begin."""
        address = Path(mkdtemp(prefix="opd-")) / "socket"  # a socket's path may have about 100 characters
        try:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(address))
                listener.listen(sum(self.processes.values()))
                listener.settimeout(1.0)
                for name in self.processes:
                    self._start(name, address)
                self._accept(listener)
            for name in self.workers:
                self._answers(name)
        except BaseException:
            self.__exit__()
            raise
        finally:
            address.unlink(missing_ok=True)
            address.parent.rmdir()
        return self

    def __exit__(self, *_exception) -> None:
        for worker in self.workers.values():
            for lines in worker.ranks.values():
                lines.close()
            if not worker.ranks:
                worker.process.terminate()
        for worker in self.workers.values():
            try:
                worker.process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                worker.process.terminate()
                worker.process.wait()

    def step(self, name: str) -> list[Outcome]:
        """One step of a contender; what came of it, by rank."""
        for lines in self.workers[name].ranks.values():
            lines.write("\n")
            lines.flush()
        return [Outcome(**answer) for answer in self._answers(name)]

    def _start(self, name: str, address: Path) -> None:
        count, log = self.processes[name], self.folder / f"{name}.log"
        launcher = [sys.executable, "-m"]
        if count > 1:
            launcher += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "--monitor-interval", "5", "-m"]
        command = [*launcher, "opd.bench_step_worker", str(self.folder), name, str(address)]
        environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(self.threads)}
        with log.open("w") as output:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment)
        self.workers[name] = _Worker(process, log)

    def _accept(self, listener: socket.socket) -> None:
        begun = time.monotonic()
        for _ in range(sum(self.processes.values())):
            connection = None
            while connection is None:
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    self._require_alive(time.monotonic() - begun)
            connection.settimeout(None)
            lines = connection.makefile("rw")
            greeting = json.loads(lines.readline())
            self.workers[greeting["contender"]].ranks[greeting["rank"]] = lines

    def _require_alive(self, waited: float) -> None:
        for name, worker in self.workers.items():
            if worker.process.poll() is not None:
                raise self._ended(name)
            if waited > START_SECONDS and len(worker.ranks) < self.processes[name]:
                raise ValueError(f"{name} has not begun within {START_SECONDS:.0f} s; its log ends: {_last_line(worker.log)}")

    def _answers(self, name: str) -> list[dict]:
        """A line of each rank."""
        ranks = self.workers[name].ranks
        texts = [ranks[number].readline() for number in sorted(ranks)]
        if not all(texts):
            raise self._ended(name)
        return [json.loads(text) for text in texts]

    def _ended(self, name: str) -> ValueError:
        return ValueError(f"{name} has ended: {_last_line(self.workers[name].log)}; leave it out with contenders=[...], or mend it")


def _last_line(log: Path) -> str:
    """The last exception in a log, else its last line."""
    lines = [re.sub(r"^\[rank\d+\]: ", "", line).strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    exceptions = [line for line in lines if "Error" in line.partition(":")[0]]
    return (exceptions[-1:] or lines[-1:] or ["it printed nothing"])[0]
