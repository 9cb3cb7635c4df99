"""Typed settings of models, prompts, domains' data and sampling. Each dataclass is the schema and the home of its defaults.

A schedule is a number, or a mapping from step to number that holds from that step on: `0.5` or `{0: 1.0, 200: 0.25}`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Dtype(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Attention(Enum):
    eager = "eager"
    sdpa = "sdpa"
    flash_attention_2 = "flash_attention_2"


class Experts(Enum):
    """How transformers multiplies the routed experts: one by one, or grouped in one kernel."""

    eager = "eager"
    grouped_mm = "grouped_mm"


class TooLong(Enum):
    """What happens to a prompt that leaves no room for a completion: refuse the run, or drop the row and count it."""

    error = "error"
    drop = "drop"


@dataclass(slots=True)
class ModelConfig:
    """A causal language model of transformers: a local folder or a hub id.

    model: path or hub id.
    revision: commit, tag or branch on the hub.
    dtype: of the weights in memory.
    attention: implementation; null takes the family's default.
    experts: implementation of the routed experts; null takes the family's default.
    trust_remote_code: allow code that ships with the model to run.
    """

    model: str | None = None
    revision: str | None = None
    dtype: Dtype = Dtype.float32
    attention: Attention | None = None
    experts: Experts | None = None
    trust_remote_code: bool = False


@dataclass(slots=True)
class SourceConfig:
    """One data set of prompts.

    path: `synthetic:NAME`, a .jsonl/.json/.parquet file, a folder of them, or a hub id.
    name, revision, split: as in `datasets.load_dataset`.
    columns: our name -> the data set's column; ours are prompt | messages, answer, slip.
    rows: take the first so many rows only.
    weight: share of the domain's prompts that come from this source.
    difficulty: of a synthetic source, 1 to 3: how long its questions are (table in rollout/synthetic_rules.py).
    """

    path: str | None = None
    name: str | None = None
    revision: str | None = None
    split: str = "train"
    columns: dict[str, str] = field(default_factory=dict)
    rows: int | None = None
    weight: float = 1.0
    difficulty: int = 1


@dataclass(slots=True)
class PromptsConfig(SourceConfig):
    """The prompts of one domain: one source written here, or several under `sources`.

    share: fraction of a step's prompts (number or schedule); shares are divided by their sum over the domains.
    sources: several sources, each with a name and a weight.
    system_prompt: put before every conversation that does not bring its own.
    template_kwargs: passed to the chat template.
    raw: the prompt string is used as it is, without the chat template.
    too_long: a prompt with no room for a completion refuses the run (error), or is dropped and counted (drop).
    exclude_held_out: rows that overlap with a held-out prompt of any domain (rollout/overlap.py) are dropped and counted; without it they refuse
        the run.
    """

    share: Any = 1.0
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    system_prompt: str | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    raw: bool = False
    too_long: TooLong = TooLong.error
    exclude_held_out: bool = False


@dataclass(slots=True)
class HeldOutConfig(SourceConfig):
    """Held-out prompts of one domain, for evaluation only; no path means that the domain is not evaluated.

    Training reads them too, whatever evaluation.every is: rows of any domain that overlap with them are refused (prompts.exclude_held_out).
    """

    split: str = "test"


@dataclass(slots=True)
class SamplingConfig:
    """How completions are drawn.

    temperature: 0 is greedy.
    top_p, top_k, min_p: leave out unlikely tokens: all but the likeliest that have top_p of the probability together; all but the top_k likeliest; those
        less likely than min_p times the likeliest. Recorded log-probabilities are those of the distribution that is left. 1, null and 0 leave out none.
    max_new_tokens: completion tokens at most, the end-of-sequence token included.
    stop_tokens: ids that end a completion, besides the model's own end-of-sequence tokens.
    decode_width: rows decoded together; dummy rows fill the last cohort, since the number of rows changes the last bits.
    record_routes: keep the experts that were chosen for each token (rollout/routes.py). Of rollouts only, and with rollout.sampler=local only.
    fixed_width: keep that width until the last row of a cohort ends, which takes longer; else rows that have ended leave, by halves of the width.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    max_new_tokens: int = 64
    stop_tokens: list[int] = field(default_factory=list)
    decode_width: int = 64
    record_routes: bool = False
    fixed_width: bool = False

    @property
    def truncates(self) -> bool:
        """Whether some tokens are never drawn."""
        return self.top_p < 1 or self.top_k is not None or self.min_p > 0

    @property
    def comparable_temperature(self) -> float | None:
        """The temperature at which another computation of a token's log-probability can be held against the recorded one.

        None where it cannot: greedy tokens are no samples, and which tokens top_p, top_k and min_p leave depends on the computation itself, so that a token
        at the edge would have probability 0 in the other.
        """
        return None if self.truncates or self.temperature == 0 else self.temperature


@dataclass(slots=True)
class PerturbationConfig:
    """What an environment does to sampled tokens, in an evaluation (rollout/perturbation.py).

    rate: chance of each token of the alphabet to be replaced by another of it; 0 replaces none, and nothing is measured.
    alphabet: texts of one token each, two at least, such as the digits.
    """

    rate: float = 0.0
    alphabet: list[str] = field(default_factory=list)


class SamplerKind(Enum):
    """Who draws the rollouts: the trainer's own process, processes beside it that may die and are replaced, or running vLLM servers."""

    local = "local"
    service = "service"
    vllm = "vllm"


@dataclass(slots=True)
class ServiceConfig:
    """Sampler processes beside each rank (rollout/service.py).

    processes: for each rank.
    threads: CPU threads of each; null shares the machine's cores.
    device: where they decode, such as cuda:4; null is the rank's own device.
    lease_seconds: without a sign of life for so long, a process is taken for hung and replaced. Longer than a decode step, a prefill and the loading
        of weights.
    max_failures: so many processes in a row that end without a single token stop the run, with what the last one said.
    """

    processes: int = 1
    threads: int | None = None
    device: str | None = None
    lease_seconds: float = 120.0
    max_failures: int = 3


@dataclass(slots=True)
class ServerConfig:
    """How a server is asked (rollout/server.py).

    timeout_seconds: of one request, from connecting to the last byte of the answer; of an answer that comes in events, between two of them.
    retries: further attempts of a request that failed, with growing pauses.
    max_connections: requests of one rank to a server at a time.
    """

    timeout_seconds: float = 120.0
    retries: int = 2
    max_connections: int = 8


@dataclass(slots=True)
class VllmConfig(ServerConfig):
    """Running vLLM servers that draw the rollouts (rollout/vllm_sampler.py); their endpoints for new weights know no password, so they belong on a
    private network.

    servers: addresses (http://host:port), each of a server that holds this student; requests are spread over them.
    retries: further attempts before a server counts as gone; pauses double from half a second, so that 6 outlast a restart of half a minute.
    max_connections: requests of one rank to a server at a time; those of all ranks together are best at most its --max-num-seqs.
    weights_folder: folder that all servers see under the same name, for the student's weights; null takes RUN/weights.
    keep: publications of weights that stay there.
    tolerance: mean difference, in nats, between the log-probabilities that a server and the published weights give a fixed probe, above which the
        server counts as holding other weights; null takes 0.001 for a student in float32 and 0.05 in bfloat16.
    """

    servers: list[str] = field(default_factory=list)
    retries: int = 6
    max_connections: int = 64
    weights_folder: str | None = None
    keep: int = 2
    tolerance: float | None = None


@dataclass(slots=True)
class RolloutConfig(SamplingConfig):
    """Sampling during training, the log of sampled tokens, and the replay files of `rollout/replay.py`.

    prompts_per_step: prompts of one optimizer step, over all ranks.
    completions_per_prompt: completions of each prompt.
    mask_loops: the tokens of a completion after it is recognised as a loop (rollout/repetition.py) leave the loss; those before stay.
    sampler: who draws the rollouts.
    staleness: 0 samples a step's rollouts with the weights that the step begins with. 1 samples them while the step before trains, with the weights
        before that update, which is faster where samplers have devices of their own; the states visited are then one update old. Not with sampler=local.
    log: write every token to RUN/log before it is used, so that a killed run or sampler goes on in the middle of a completion (rollout/wal.py).
    service: settings of sampler=service.
    max_mismatch: rollouts whose mean mismatch per token between sampler and trainer (domain/D/mismatch_kl) exceeds this are left out of the loss, at the
        price of a forward; null leaves out none and makes none.
    vllm: settings of sampler=vllm.
    save: write each step's rollouts to RUN/rollouts/.
    replay: a run folder whose saved rollouts are trained on instead of sampling.
    compare: a run folder whose saved rollouts are compared with the ones sampled here; the first differing token is
        reported in the metrics.
    """

    prompts_per_step: int = 128
    completions_per_prompt: int = 1
    mask_loops: bool = False
    sampler: SamplerKind = SamplerKind.local
    staleness: int = 0
    log: bool = True
    service: ServiceConfig = field(default_factory=ServiceConfig)
    max_mismatch: float | None = None
    vllm: VllmConfig = field(default_factory=VllmConfig)
    save: bool = False
    replay: str | None = None
    compare: str | None = None


def schedule_value(schedule: Any, step: int, name: str) -> float:
    """The value of a schedule at a step.

    Raises ValueError, naming `name`, for anything but finite numbers >= 0 and for a mapping that does not begin at step 0.
    """
    if not isinstance(schedule, Mapping):
        return _number(schedule, name)
    steps = {int(start): _number(value, name) for start, value in schedule.items()}
    if 0 not in steps or min(steps) < 0:
        raise ValueError(f"the schedule {name} must begin at step 0, as in {{0: 1.0, 200: 0.5}}")
    return steps[max(start for start in steps if start <= step)]


def schedule_values(schedule: Any) -> list[Any]:
    """All values of a schedule, in the order of their steps; of a number, itself."""
    return [schedule[start] for start in sorted(schedule, key=int)] if isinstance(schedule, Mapping) else [schedule]


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be a number >= 0 or a schedule such as {{0: 1.0, 200: 0.5}}, not {value!r}")
    return float(value)
