"""Typed settings of a domain and of how teachers are held. A domain is prompts, a teacher, a weight and perhaps a grader."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from rollout.config import Dtype, HeldOutConfig, ModelConfig, PerturbationConfig, PromptsConfig
from rollout.grader_config import GraderConfig


class SignalKind(Enum):
    """What a teacher gives for each completion token.

    hidden_states: its whole distribution, as the states that its head turns into logits.
    top_k: its likeliest tokens with their log-probabilities; all others count as one outcome, the tail.
    sampled_token: the log-probability of the token that was sampled.
    """

    hidden_states = "hidden_states"
    top_k = "top_k"
    sampled_token = "sampled_token"


@dataclass(slots=True)
class TeacherConfig(ModelConfig):
    """A frozen specialist: a model that is loaded here, alone or with an adapter, or one that a running server holds.

    server: address of a vLLM server (http://host:port) that scores in place of a model loaded here; it gives no hidden states, so
        teachers.signal must be top_k or sampled_token. `model` is then the name (or the folder) that the server must report,
        and may be left out where it serves one model; a local folder also gives the tokenizer that is compared with the student's.
    adapter: PEFT LoRA adapter on top of `model`: a local folder or hub id.
    adapter_revision: commit, tag or branch of the adapter on the hub.
    """

    server: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None


@dataclass(slots=True)
class DomainConfig:
    """One domain; its name is its key under `domains`.

    teacher: the frozen specialist that scores this domain's rollouts.
    prompts: what the student answers.
    held_out: prompts for evaluation.
    grader: how a completion is compared with the reference answer: a kind, such as exact, or a mapping of a kind and its settings
        (rollout/grader_config.py); null where it cannot be.
    perturbation: what an environment does to the sampled tokens in a further measurement of accuracy, of all evaluations.
    loss_weight: w_d of the objective (number or schedule); the weights of the domains present in a step are divided by their sum.
    """

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)
    grader: Any = field(default=None, metadata={"settings": GraderConfig})
    perturbation: PerturbationConfig = field(default_factory=PerturbationConfig)
    loss_weight: Any = 1.0


class Placement(Enum):
    """Where a teacher's weights are while it scores: whole on every rank, or some rows of each weight on each (torch's FSDP2, which gathers
    one layer at a time for a forward, in memory beside that of TeachersConfig.memory_gb).

    auto: whole where two of that size fit into the memory for teachers, else in shards.
    """

    auto = "auto"
    replicated = "replicated"
    sharded = "sharded"


class OnFailure(Enum):
    """What happens to a run whose teacher fails twice: it stops, or goes on without the teacher's domains until it is resumed."""

    stop = "stop"
    drop = "drop"


@dataclass(slots=True)
class TeachersConfig:
    """How the pool holds teachers, and what they give.

    placement: whether teachers are whole on every rank or sharded over the ranks.
    memory_gb: memory of a rank's device for teachers' weights, in 10**9 bytes; null takes half of what is free at the start.
    max_resident: teachers that stay in memory, of which the least recently used one makes room; null takes as many as fit into memory_gb.
    prefetch: read the next teacher while one scores, into memory for one more.
    load_timeout_seconds: of reading one teacher's weights.
    hidden_dtype: of the hidden states that are kept for the update; null takes the teacher's own.
    hidden_memory_gb: hidden states kept in shared memory; what is more goes to files. Null takes half of what is free there.
    hidden_folder: folder of those files, on a disk of the node; null takes the system's for temporary files.
    on_failure: what happens when a teacher fails twice.
    gradient_share_every: steps between two measurements of each teacher's share of the gradient and of how any two agree, which take a forward and
        backward of each teacher's rollouts; 0 never, as under ZeRO-3.
    max_tokens_per_forward: padded tokens of one scoring forward.
    signal: what a teacher gives for each token; what is less than hidden_states is for comparison with systems whose teachers have no more.
    top_k: number of tokens of signal=top_k.
    timeout_seconds: of one request to a teacher's server, from connecting to the last byte of the answer.
    retries: further attempts of a request that failed, with growing pauses.
    max_connections: requests of one rank to a server at a time.
    probe_tolerance: mean difference of a probe's log-probabilities, in nats, above which a server counts as holding another model.
    allow_change: a resume may change what is under `domains`: add, drop or replace a teacher, or change its prompts, share or weight; the step at which
        it did stands in RUN/teachers.json (teachers/manifest.py). Where nothing has changed it does nothing.
    allow_other_template: accept teachers whose chat template is not the student's, which renders the prompts of both.
    """

    placement: Placement = Placement.auto
    memory_gb: float | None = None
    max_resident: int | None = None
    prefetch: bool = True
    load_timeout_seconds: float = 600.0
    hidden_dtype: Dtype | None = None
    hidden_memory_gb: float | None = None
    hidden_folder: str | None = None
    on_failure: OnFailure = OnFailure.stop
    gradient_share_every: int = 20
    max_tokens_per_forward: int = 16384
    signal: SignalKind = SignalKind.hidden_states
    top_k: int = 64
    timeout_seconds: float = 120.0
    retries: int = 2
    max_connections: int = 8
    probe_tolerance: float = 0.02
    allow_change: bool = False
    allow_other_template: bool = False


RUNNING_SETTINGS = (
    "placement", "memory_gb", "max_resident", "prefetch", "load_timeout_seconds", "hidden_memory_gb", "hidden_folder", "on_failure", "gradient_share_every",
    "timeout_seconds", "retries", "max_connections", "probe_tolerance", "allow_change",
)  # fmt: skip
"""Fields of TeachersConfig that say how teachers are held and asked, and change nothing of what they say."""
