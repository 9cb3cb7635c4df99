"""VllmSampler: rollouts from running vLLM servers, which get the student's weights before each step and must show that they have them.

    refresh   every rank walks the trainer's weights; the main rank writes them as a Hugging Face folder on a path that the servers share
              (weights/hf-000012, renamed when complete, the newest few kept; beside it hf-000012.json, the fields of ServedWeights, for a run that is
              taken up with rollout.staleness=1), has every server load it, and tells the ranks which did
    sample    each rank spreads its completions over these servers (rollout/dispatch.py)
    probe     after it, every server once more gives the probe's log-probabilities of these weights, or nothing that it drew is used

A server that does not answer is left out of the step, and tried again in the next; the run stops, by name, where none is left or one answers what cannot
be right. Completions are distributed as LocalSampler's and differ from these token by token, since the random numbers are the server's
own; interrupted ones go on from their logged tokens, which the server prefills.

P: tokens of the probe but the first.
"""

import json
import logging
import random
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from rollout.cohort import Completion, end_tokens_of
from rollout.config import SamplingConfig, VllmConfig
from rollout.dispatch import Dispatch
from rollout.files import read_json, replace_text
from rollout.model import context_length, head_of, save_model
from rollout.ranks import OneRank, Ranks
from rollout.sampler import LocalSampler, StepLog, WeightSource, rollout_of, sampling_key
from rollout.server import ServerGone
from rollout.types import Prompt, Rollout
from rollout.vllm_server import ServedWeights, VllmServer
from rollout.weights import hash_tensors

PROBE_TOKENS = 32
"""Tokens of the probe at most."""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Nats of a probe's token: rounding, by the student's dtype."""

LOG = logging.getLogger(__name__)


class VllmSampler:
    """Draw with vLLM servers."""

    def __init__(self, local: LocalSampler, tokenizer: PreTrainedTokenizerBase, cfg: VllmConfig, weights_folder: Path, ranks: Ranks | None = None):
        """local: a model of the student's architecture in this process; it takes over the weights at each refresh on the main rank, and gives the probe.

        Raises ValueError where no servers are named.
        """
        if not cfg.servers or len(set(cfg.servers)) < len(cfg.servers):
            raise ValueError("rollout.sampler=vllm needs servers, each named once: write rollout.vllm.servers=[http://host:8000]")
        self.local, self.tokenizer, self.cfg, self.ranks = local, tokenizer, cfg, ranks or OneRank()
        self.folder = Path(cfg.weights_folder).resolve() if cfg.weights_folder is not None else weights_folder.resolve()
        rows = head_of(local.model).weight.shape[0]
        vocab_size = local.policy.vocab_size or rows
        self.servers = [VllmServer(url, cfg, vocab_size, rows) for url in cfg.servers]
        self.run, self.weights, self.policy_step = uuid.uuid4().hex[:12], None, 0
        self.gone: set[str] = set()
        self.protected, self.figures = -1, None  # the servers keep how they decode to themselves
        length = min(PROBE_TOKENS, context_length(local.model.config, "student") - 1)
        self.probe = tuple(random.Random("probe").choices(range(vocab_size), k=length))

    def require_fit(self, longest: int) -> None:
        """Ask every server whether it can draw rollouts of so many tokens. Raises ServerFailure where one cannot, or does not answer."""
        for server in self.servers:
            server.require_fit(longest, self.probe)

    def refresh(self, source: WeightSource) -> None:
        """Publish a source's weights and have the servers load them; every rank calls it, and none goes on before all servers are ready.

        Raises ValueError where no server is left, or one has not the weights that it was given.
        """
        kept = _Kept(source)
        if self.ranks.index == 0:
            self.local.refresh(kept)
        else:
            for _ in source.weights():
                pass
        self._share(lambda: self._publish(kept))

    def take_up_weights(self, policy_step: int) -> bool:
        record = self.folder / f"hf-{policy_step:06d}.json"

        def find() -> ServedWeights | None:
            if not record.is_file() or not record.with_suffix("").is_dir():
                return None
            found = read_json(record)
            found |= {"probe": tuple(found["probe"]), "logprob_P": tuple(found["logprob_P"])}
            return replace(ServedWeights(**found), label=self._label(policy_step), folder=str(record.with_suffix("")))

        return self._share(find)

    def protect(self, policy_step: int) -> None:
        self.protected = policy_step

    def close(self) -> None:
        """Nothing is held between two calls."""

    def _share(self, find: Callable[[], ServedWeights | None]) -> bool:
        """Have the servers load the weights that the main rank finds, and every rank draw with them; False where it finds none."""
        given = problem = None
        if self.ranks.index == 0:
            try:
                weights = find()
                given = None if weights is None else self._give(weights)
            except (ValueError, OSError) as error:
                problem = str(error)
        given, problem = self.ranks.gather((given, problem))[0]
        if problem is not None:
            raise ValueError(problem)
        if given is None:
            return False
        self.weights, versions = given
        self.policy_step = self.weights.policy_step
        for server, version in zip(self.servers, versions, strict=True):
            server.version = version
        return True

    def sample(self, prompts: list[Prompt], cfg: SamplingConfig, completions_per_prompt: int = 1, log: StepLog | None = None) -> list[Rollout]:
        """As the protocol says. Raises ValueError also where no server is left, one does not hold the weights, or the log cannot be written."""
        assert self.weights is not None, "refresh comes first"
        completions = [Completion(prompt, sample) for prompt in prompts for sample in range(completions_per_prompt)]
        end_tokens, key = end_tokens_of(self.local.policy, cfg), sampling_key(f"vllm {self.weights.weights}", self.local.policy, cfg)
        servers = [server for server in self.servers if server.version is not None]
        dispatch = Dispatch(servers, self.weights, cfg, self.local.policy.seed, end_tokens)
        with nullcontext() if log is None else log.opened(completions, key, self.policy_step) as append:
            dispatch.run(completions, append)
            for place in dispatch.places:
                if place.gone is None:
                    self._require_probe(place.server, log)
        return [rollout_of(completion, end_tokens, self.policy_step) for completion in completions]

    def _require_probe(self, server: VllmServer, log: StepLog | None) -> None:
        """Raises StaleWeights where a server's weights were exchanged behind its label; what is logged is then no use either."""
        try:
            server.require_probe(self.weights)
        except ServerGone as failure:
            LOG.warning("%s, after all was drawn", failure)
        except ValueError:
            if log is not None:
                log.log.segment(log.step, log.name).unlink()
            raise

    def _publish(self, kept: "_Kept") -> ServedWeights:
        """Write the folder, and say what a server must show that has loaded it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        folder = self.folder / f"hf-{kept.policy_step:06d}"
        weights = hash_tensors(kept.tensors.items())
        save_model(folder, self.local.model, self.tokenizer, kept.tensors)  # which leaves the dictionary empty
        self._forget_older(folder)
        model = self.local.model
        with torch.inference_mode():
            logprob_PV = model(torch.tensor([self.probe], device=model.device)).logits[0, :-1].float().log_softmax(-1)
        logprob_P = logprob_PV.gather(1, torch.tensor(self.probe[1:], device=model.device)[:, None])[:, 0]
        if not logprob_P.isfinite().all():
            raise ValueError(f"the student gives NaN or infinity after step {kept.policy_step}: its weights have diverged")
        served = ServedWeights(
            folder=str(folder),
            label=self._label(kept.policy_step),
            weights=weights,
            policy_step=kept.policy_step,
            probe=self.probe,
            logprob_P=tuple(logprob_P.tolist()),
            tolerance=self.cfg.tolerance or TOLERANCE.get(model.dtype, max(TOLERANCE.values())),
        )
        replace_text(folder.with_suffix(".json"), json.dumps(asdict(served)))
        return served

    def _forget_older(self, folder: Path) -> None:
        """Delete all publications before one but the newest, and the one that a checkpoint may need."""
        older = sorted(path for path in self.folder.glob("hf-*") if path.suffix == "" and path.name < folder.name)
        for old in older[: max(0, len(older) - (self.cfg.keep - 1))]:
            if old.name != f"hf-{self.protected:06d}":
                shutil.rmtree(old)
                old.with_suffix(".json").unlink(missing_ok=True)

    def _label(self, policy_step: int) -> str:
        return f"{self.run}-{policy_step:06d}"

    def _give(self, weights: ServedWeights) -> tuple[ServedWeights, list[str | None]]:
        """Have all servers load weights, side by side; returns also their versions, None of one that does not answer."""

        def give(server: VllmServer) -> str | None:
            server.version = None
            try:
                server.find_version(retries=0 if server.role in self.gone else None)  # no step waits again for one that is gone
                server.give(weights)
            except ServerGone as failure:
                LOG.warning("%s: going on without it in this step", failure)
                self.gone.add(server.role)
                return str(failure)
            self.gone.discard(server.role)
            return None

        with ThreadPoolExecutor(len(self.servers)) as executor:
            failures = list(executor.map(give, self.servers))
        if None not in failures:
            raise ServerGone(f"no vLLM server has taken the weights of step {weights.policy_step}: {'; '.join(failures)}")
        return weights, [server.version for server in self.servers]


class _Kept:
    """A source of weights that keeps a copy of what it gives, on the CPU."""

    def __init__(self, source: WeightSource):
        self.source, self.policy_step = source, source.policy_step
        self.tensors: dict[str, torch.Tensor] = {}

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.source.weights():
            self.tensors[name] = tensor.detach().to("cpu", copy=True)
            yield name, tensor
