"""SamplerService: rollouts from processes of their own, which may be killed, hang, or be slow, without changing a token.

A step's completions form cohorts, as in the LocalSampler. A cohort is leased to a process (rollout/service_worker.py), which logs each token before it
uses it (rollout/wal.py); the driver reads the log as it grows and believes nothing else. A process that has died, or given no sign of life for
lease_seconds, is killed and replaced, and its cohort is leased again as a whole, the tokens logged so far included: they are fed, not drawn, and as the
cohort is the same, so are the bits of all that follows. A process far slower than the others shares its cohort with an idle one; both draw the same tokens,
and whoever is first is read. An interrupted completion is never begun anew, which would make answers shorter (arXiv:2606.19348, section 5.2.3).

Late output cannot do harm: the segment of a process that has lost its lease is read no more, and no token of it is ever put together with another's. The
driver itself may be killed: its processes end when they see that, the next driver kills those that do not, and takes up what they logged
under the same weights, seed and settings.

    RUN/service/rank-000/               config.json of the student, and sampler-0001/ and so on, of one process each, in the order of their starts
    RUN/weights/000012/                 rollout/weights.py
"""

import shutil
import time
import weakref
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from rollout.cohort import Completion, DecodingFigures, Policy, end_tokens_of, form_cohorts
from rollout.config import SamplingConfig, ServiceConfig
from rollout.ranks import Ranks
from rollout.sampler import StepLog, WeightSource, rollout_of, sampling_key, take_up
from rollout.service_process import Lease, SamplerProcess, WorkerSpec, end_processes, kill_left_over
from rollout.types import Prompt, Rollout
from rollout.wal import SegmentReader, add_frames
from rollout.weights import PublishedWeights, publish, weights_folder

POLL_SECONDS = 0.01
"""Between two looks at the processes."""

SLOW = 4.0
"""A lease that takes so many times as long as the median of those done is shared with an idle process."""

FIGURES_SECONDS = 1.0
"""To wait for what processes say of a step that they have done."""


class SamplerService:
    """Draws rollouts with the processes of one rank; a Sampler."""

    def __init__(self, run_dir: Path, spec: WorkerSpec, config: PretrainedConfig, policy: Policy, cfg: ServiceConfig, ranks: Ranks):
        """config, policy: the student's; the policy's model is not used here."""
        self.run_dir, self.spec, self.config, self.policy, self.cfg, self.ranks = run_dir, spec, config, policy, cfg, ranks
        self.folder = run_dir / "service" / f"rank-{ranks.index:03d}"
        self.weights: PublishedWeights | None = None
        self.protected: int | None = None
        self.processes: list[SamplerProcess] = []
        self.figures = DecodingFigures()
        self.num_started = self.num_failures = 0
        weakref.finalize(self, end_processes, self.processes)

    @property
    def policy_step(self) -> int:
        return 0 if self.weights is None else self.weights.policy_step

    def refresh(self, source: WeightSource) -> None:
        """Publish a source's weights; every rank calls it, and none goes on before they are there."""
        self._start()
        folder = self.run_dir / "weights"
        if self.ranks.index == 0:
            publish(folder, source.policy_step, source.weights())
            self._forget_weights(folder)
        else:
            for _ in source.weights():
                pass
        self.ranks.gather([])
        self.weights = PublishedWeights(weights_folder(folder, source.policy_step))

    def take_up_weights(self, policy_step: int) -> bool:
        """Sample with weights that are still published, as after a restart; False where they are not there. Every rank calls it."""
        self._start()
        try:
            self.weights = PublishedWeights(weights_folder(self.run_dir / "weights", policy_step))
        except ValueError:
            return False
        return True

    def sample(self, prompts: list[Prompt], cfg: SamplingConfig, completions_per_prompt: int = 1, log: StepLog | None = None) -> list[Rollout]:
        """As the protocol says. Raises ValueError where processes end one after the other without a token."""
        assert log is not None, "the log is what the service reads"
        completions = [Completion(prompt, sample) for prompt in prompts for sample in range(completions_per_prompt)]
        key, ends = sampling_key(self.weights.hash, self.policy, cfg), end_tokens_of(self.policy, cfg)
        take_up(completions, log.log.completions(log.step, key))
        call = _Call(log, cfg, key, ends, str(self.weights.folder))
        call.waiting.extend(form_cohorts(completions, cfg.decode_width, completions_per_prompt))
        while not all(completion.is_done(ends, cfg) for completion in completions):
            for place, process in enumerate(self.processes):
                self._follow(process, call)
                if process.has_ended() or process.seconds_silent() > self.cfg.lease_seconds:
                    self.processes[place] = self._replace(process, call)
            self._lease_waiting(call)
            time.sleep(POLL_SECONDS)
        self.figures = self._collect_figures()
        self.figures.replaced = call.num_replaced
        return [rollout_of(completion, ends, self.policy_step) for completion in completions]

    def protect(self, policy_step: int) -> None:
        """Keep the published weights of a step until another is named: a checkpoint may need them."""
        self.protected = policy_step

    def close(self) -> None:
        """End all processes: by SIGTERM, after a while by SIGKILL. It also happens when nobody needs this service any more."""
        end_processes(self.processes)

    def _start(self) -> None:
        """Start the processes, once; those of an earlier driver are killed first."""
        if self.processes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(self.folder)
        kill_left_over(self.folder)
        numbers = [int(path.name.removeprefix("sampler-")) for path in self.folder.glob("sampler-*")]
        self.num_started = max(numbers, default=0)  # a name is never used again, so that nobody else writes to its segments
        self.processes.extend(self._start_process() for _ in range(self.cfg.processes))

    def _start_process(self) -> SamplerProcess:
        self.num_started += 1
        return SamplerProcess(self.folder / f"sampler-{self.num_started:04d}", self.spec, self.folder)

    def _follow(self, process: SamplerProcess, call: "_Call") -> None:
        """Read what a process has logged, and take its lease back when the cohort is done."""
        lease = process.lease
        if lease is None:
            return
        add_frames(lease.known, lease.reader.new_frames(), call.key)
        for completion in lease.cohort:
            found = lease.known.get((completion.prompt.request, completion.sample))
            if found is not None and len(found.tokens) > len(completion.tokens):
                completion.tokens, completion.logprobs = list(found.tokens), list(found.logprobs)
                self.num_failures = 0
        if not call.is_done(lease.cohort):
            return
        call.seconds.append(time.monotonic() - lease.begun)
        process.lease = None
        for other in self.processes:
            if other.lease is not None and other.lease.cohort is lease.cohort:
                other.give({"rows": []}, None)

    def _replace(self, process: SamplerProcess, call: "_Call") -> SamplerProcess:
        """Kill what is left of a process, read its last tokens, lease its cohort again, and start another."""
        process.kill()
        self.num_failures += 1
        self._follow(process, call)
        if process.lease is not None:
            call.waiting.appendleft(process.lease.cohort)
        if self.num_failures >= self.cfg.max_failures:
            raise ValueError(
                f"{self.num_failures} sampler processes in a row ended without a token, the last ({process.folder}) with: {process.last_words()}"
            )
        call.num_replaced += 1
        return self._start_process()

    def _lease_waiting(self, call: "_Call") -> None:
        """Give idle processes what waits, and where nothing does, a share in a lease that takes far too long."""
        for process in self.processes:
            if process.lease is not None:
                continue
            while call.waiting and call.is_done(call.waiting[0]):
                call.waiting.popleft()
            cohort = call.waiting.popleft() if call.waiting else self._slow_cohort(call)
            if cohort is None:
                return
            path = call.log.log.segment(call.log.step, f"{call.log.name}-{process.name}")
            reader = SegmentReader(path)
            reader.new_frames()  # of an earlier lease
            process.give(call.record(cohort, path), Lease(cohort, reader, process.num_leases + 1, time.monotonic()))

    def _slow_cohort(self, call: "_Call") -> list[Completion] | None:
        busy = [process.lease for process in self.processes if process.lease is not None]
        if not call.seconds:
            return None
        usual = sorted(call.seconds)[len(call.seconds) // 2]
        counts = {id(lease.cohort): sum(other.cohort is lease.cohort for other in busy) for lease in busy}
        late = [lease for lease in busy if counts[id(lease.cohort)] == 1 and time.monotonic() - lease.begun > SLOW * usual]
        return min(late, key=lambda lease: lease.begun).cohort if late else None

    def _collect_figures(self) -> DecodingFigures:
        """What the processes did since the last call. They say it a moment after the tokens; one that was killed never does."""
        figures, deadline = DecodingFigures(), time.monotonic() + FIGURES_SECONDS
        for process in self.processes:
            while process.figures_number() < process.num_leases and process.lease is None and not process.has_ended() and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            figures.add(process.new_figures())
        return figures

    def _forget_weights(self, folder: Path) -> None:
        steps = sorted(int(path.name) for path in folder.glob("[0-9]*") if path.is_dir() and path.suffix == "")
        for step in steps[:-2]:
            if step != self.protected:
                shutil.rmtree(weights_folder(folder, step), ignore_errors=True)


@dataclass(slots=True)
class _Call:
    """One call of `sample`: what waits, and what all its leases have in common."""

    log: StepLog
    cfg: SamplingConfig
    key: int
    ends: tuple[int, ...]
    weights: str
    waiting: deque[list[Completion]] = field(default_factory=deque)
    seconds: list[float] = field(default_factory=list)
    num_replaced: int = 0

    def is_done(self, cohort: list[Completion]) -> bool:
        return all(completion.is_done(self.ends, self.cfg) for completion in cohort)

    def record(self, cohort: list[Completion], segment: Path) -> dict[str, Any]:
        rows = [
            {
                "domain": completion.prompt.domain,
                "request": completion.prompt.request,
                "sample": completion.sample,
                "prompt": list(completion.prompt.tokens),
                "tokens": completion.tokens,
                "logprobs": completion.logprobs,
            }
            for completion in cohort
        ]
        sampling = {name: getattr(self.cfg, name) for name in SamplingConfig.__slots__}
        return {"step": self.log.step, "weights": self.weights, "key": self.key, "segment": str(segment), "sampling": sampling, "rows": rows}
