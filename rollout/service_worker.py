"""One sampler process of the rollout service: `python -m rollout.service_worker FOLDER`. Started, watched and replaced by rollout/service.py.

It takes a lease (a cohort of completions, the weights to sample with, the segment to log to), decodes, logs every token before it uses it, and looks for
the next. What passes between driver and process lies in FOLDER, whole files replaced by renaming:

    spec.json     driver: model, device, threads, the driver's pid
    lease.json    driver: {"number", "step", "weights", "key", "segment", "sampling", "rows"}; a higher number replaces the lease under way
    alive         touched between decode steps; its age tells a hung process
    figures.json  process: {"number", "figures"} after a lease, the figures of all its leases so far
    error.txt     process: why it ended

The tokens themselves are in the segment (rollout/wal.py), which is all that the driver believes. SIGTERM ends the process after the decode step under way,
with everything logged and durable. A process whose driver has died ends by itself.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rollout.cohort import Cohort, Completion, DecodingFigures
from rollout.config import Attention, Dtype, Experts, ModelConfig, SamplingConfig
from rollout.experts import copy_with_packed_experts
from rollout.files import read_json, replace_text
from rollout.indexer import quantize_indexer
from rollout.model import apply_settings, torch_dtype
from rollout.sampler import LocalSampler
from rollout.types import Prompt
from rollout.wal import SegmentWriter
from rollout.weights import PublishedWeights

POLL_SECONDS = 0.01
"""Between two looks for a lease."""

TOUCH_SECONDS = 0.1
"""Between two signs of life, at least."""

FAILED = 3
"""Exit code of a process that has written error.txt."""


class Worker:
    """The process's state: its model, the lease it is at, and whether it has been told to end."""

    def __init__(self, folder: Path):
        self.folder, self.spec = folder, read_json(folder / "spec.json")
        self.lease_file, self.signature = folder / "lease.json", None
        self.is_ending, self.touched, self.number = False, 0.0, 0
        self.weights: str | None = None
        self.figures = DecodingFigures()
        signal.signal(signal.SIGTERM, self._end)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; the driver ends its processes
        self.touch()
        torch.set_num_threads(self.spec["threads"])
        self.sampler = build_sampler(self.spec)

    def run(self) -> None:
        """Serve leases until told to end, or until the driver is gone."""
        while not self.is_over():
            lease = self.newer_lease()
            if lease is None:
                time.sleep(POLL_SECONDS)
            else:
                self.serve(lease)

    def serve(self, lease: dict[str, Any]) -> None:
        self.number = lease["number"]
        if not lease["rows"]:
            self.tell()
            return
        if lease["weights"] != self.weights:
            self.sampler.refresh(_Watched(PublishedWeights(Path(lease["weights"])), self.touch))
            self.weights = lease["weights"]
        writer = SegmentWriter(Path(lease["segment"]))
        cohort = Cohort(self.sampler.policy, [_completion(row) for row in lease["rows"]], SamplingConfig(**lease["sampling"]))
        for num_live in cohort.decode(partial(writer.append, lease["key"], self.sampler.policy_step)):
            if self.is_over() or (num_live and self.is_superseded()):
                break
        writer.close()
        self.figures.add(cohort.figures)
        self.tell()

    def tell(self) -> None:
        """That the lease is over, and what all leases took."""
        replace_text(self.folder / "figures.json", json.dumps({"number": self.number, "figures": asdict(self.figures)}))

    def is_over(self) -> bool:
        self.touch()
        return self.is_ending or os.getppid() != self.spec["driver"]

    def is_superseded(self) -> bool:
        """A look at the file's name alone, since it is done between any two decode steps."""
        return _signature(self.lease_file) != self.signature

    def newer_lease(self) -> dict[str, Any] | None:
        signature = _signature(self.lease_file)
        if signature == self.signature:
            return None
        lease = read_json(self.lease_file)
        if _signature(self.lease_file) != signature:  # replaced in between: what was read may be either, and this would pass for the one it is not
            return None
        self.signature = signature
        return lease if lease["number"] > self.number else None

    def touch(self) -> None:
        if time.monotonic() - self.touched > TOUCH_SECONDS:
            (self.folder / "alive").touch()
            self.touched = time.monotonic()

    def _end(self, *_: Any) -> None:
        self.is_ending = True


class _Watched:
    """Published weights, the reading of which is a sign of life."""

    def __init__(self, published: PublishedWeights, touch: Callable[[], None]):
        self.published, self.touch, self.policy_step = published, touch, published.policy_step

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for named in self.published.weights():
            self.touch()
            yield named


def build_sampler(spec: dict[str, Any]) -> LocalSampler:
    """A sampler whose model is that of the driver (rollout/service_process.py's WorkerSpec), with all weights 0 until the first lease brings some."""
    cfg = ModelConfig(
        model=spec["model"],
        dtype=Dtype(spec["dtype"]),
        attention=None if spec["attention"] is None else Attention(spec["attention"]),
        experts=None if spec["experts"] is None else Experts(spec["experts"]),
    )
    attention = {} if cfg.attention is None else {"attn_implementation": cfg.attention.value}
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(spec["model"]), dtype=torch_dtype(cfg.dtype), **attention)
    zeros = {parameter: nn.Parameter(torch.zeros_like(parameter, device="cpu"), requires_grad=False) for parameter in model.parameters()}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, zeros[parameter])
    apply_settings(model, cfg, "student")
    if spec["quantized_indexer"]:
        quantize_indexer(model, "student")
    if spec["packed_experts"]:
        model = copy_with_packed_experts(model, "student")
    return LocalSampler(model.to(spec["device"]), spec["end_tokens"], spec["seed"], spec["vocab_size"])


def _completion(row: dict[str, Any]) -> Completion:
    prompt = Prompt(domain=row["domain"], request=row["request"], row="", tokens=tuple(row["prompt"]))
    return Completion(prompt, row["sample"], row["tokens"], row["logprobs"])


def _signature(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def main() -> int:
    """Serve the folder that the command line names; returns the exit code."""
    folder = Path(sys.argv[1])
    try:
        Worker(folder).run()
    except ValueError as error:
        replace_text(folder / "error.txt", str(error))
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
