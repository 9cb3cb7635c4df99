"""Fixtures that the tests of all packages share: the two tiny families, a saved model, and factories of prompts and rollouts.

A model fixture without a scope in its name is a fresh copy for each test, so that a test may change it.

Files are dealt out whole to two processes, in whatever order these come to them: no test may count on one of another file.
"""

import copy
import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers and datasets are imported: no test may reach the network

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported, by whomever: its kernels run on the CPU, and are tested there

from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from wandb.proto.wandb_internal_pb2 import Record

from opd.config import StudentConfig
from opd.distributed import start_processes, stop_processes
from opd.student import build_student, seed_everything
from rollout.experts import EXPERT_WEIGHTS, fake_quantized, find_experts
from rollout.model import save_model
from rollout.synthetic import character_tokenizer
from rollout.types import Prompt, Rollout

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"

torch.set_num_threads(1)  # the models are too small to gain from more, and the tests share their machine

LONG = [
    "test_ranks", "test_pipeline", "test_qat", "test_resume", "test_cli", "test_warmup", "test_signal_check", "test_engine", "test_loss_settings",
    "test_config", "test_service", "test_service_run", "test_sharding", "test_sampler", "test_teacher_change", "test_vllm_sampler",
    "test_batch_script", "test_security", "test_checkpoint_evaluation", "test_sweep", "test_same_step", "test_resharding",
]  # fmt: skip
"""Files that take longest, and so are begun first: one that is begun last would leave the other process idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(scope="session")
def conf_dir() -> Path:
    return CONF


@pytest.fixture(scope="session")
def shape() -> Callable[[Any], Any]:
    """shape(value): a JSON value with each leaf replaced by the name of its type."""

    def of(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: of(inner) for name, inner in value.items()}
        if isinstance(value, bool):
            return "bool"
        return [of(inner) for inner in value] if isinstance(value, list) else "number" if isinstance(value, int | float) else type(value).__name__

    return of


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def device() -> Iterator[torch.device]:
    """This process as a process group of its own, until the session ends; what trains in the tests' own process asks for it."""
    gc.freeze()  # DeepSpeed collects garbage whenever it makes an engine: half a second over everything that was imported
    yield start_processes()
    stop_processes()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return character_tokenizer()


@pytest.fixture(scope="session")
def architecture() -> Callable[..., dict]:
    """architecture("deepseek_v4_tiny", num_hidden_layers=2): the mapping of conf/student/NAME.yaml, with changes."""

    def read(name: str, **changes) -> dict:
        return OmegaConf.to_container(OmegaConf.load(CONF / "student" / f"{name}.yaml").architecture) | changes

    return read


@pytest.fixture(scope="session")
def new_student(architecture, tokenizer) -> Callable[..., PreTrainedModel]:
    """new_student("qwen3_moe_tiny", seed=1, hidden_size=32): a student as `opd` builds it, in evaluation mode."""

    def build(name: str, seed: int = 0, **changes) -> PreTrainedModel:
        seed_everything(seed)
        return build_student(StudentConfig(architecture=architecture(name, **changes)), tokenizer).eval()

    return build


def unchanged(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Lend a model to the tests of all files; a weight, a frozen parameter or a mode that is another at the end fails the last of them."""
    before, frozen, training = copy.deepcopy(model.state_dict()), frozen_of(model), model.training
    yield model
    assert (frozen_of(model), model.training) == (frozen, training), "a test froze a model that is not its own"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "a test changed a model that is not its own"


def frozen_of(model: PreTrainedModel) -> list[str]:
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


@pytest.fixture(scope="session")
def session_v4_model(new_student) -> Iterator[PreTrainedModel]:
    """The DeepSeek-V4 student, built once; for tests that do not change it."""
    yield from unchanged(new_student("deepseek_v4_tiny"))


@pytest.fixture(scope="session")
def session_qwen3_moe_model(new_student) -> Iterator[PreTrainedModel]:
    """The Qwen3-MoE student, built once; for tests that do not change it."""
    yield from unchanged(new_student("qwen3_moe_tiny"))


@pytest.fixture
def v4_model(session_v4_model) -> PreTrainedModel:
    return copy.deepcopy(session_v4_model)


@pytest.fixture
def qwen3_moe_model(session_qwen3_moe_model) -> PreTrainedModel:
    return copy.deepcopy(session_qwen3_moe_model)


@pytest.fixture(scope="session")
def saved_v4(session_v4_model, tokenizer, tmp_path_factory) -> Path:
    """Folder of the DeepSeek-V4 student and its tokenizer; a test that changes files copies it first."""
    folder = tmp_path_factory.mktemp("saved") / "v4"
    save_model(folder, session_v4_model, tokenizer, session_v4_model.state_dict())
    return folder


@pytest.fixture(scope="session")
def saved_qwen3_moe(session_qwen3_moe_model, tokenizer, tmp_path_factory) -> Path:
    """Folder of the Qwen3-MoE student and its tokenizer; a test that changes files copies it first."""
    folder = tmp_path_factory.mktemp("saved") / "qwen3_moe"
    save_model(folder, session_qwen3_moe_model, tokenizer, session_qwen3_moe_model.state_dict())
    return folder


@pytest.fixture(scope="session")
def fp4_student(new_student, tokenizer, tmp_path_factory) -> Callable[..., Path]:
    """fp4_student("bfloat16", hidden_size=128): folder of a DeepSeek-V4 student as a run with quant=mxfp4_experts leaves it, its experts holding FP4 values."""
    made: dict[str, Path] = {}

    def save(dtype: str = "float32", **changes) -> Path:
        key = f"{dtype} {changes}"
        if key not in made:
            model = new_student("deepseek_v4_tiny", seed=3, **changes).to(getattr(torch, dtype))
            for name, buffer in model.named_buffers():
                if buffer.is_floating_point():
                    buffer.data = torch.randn(buffer.shape) / 8 if name.endswith("e_score_correction_bias") else buffer.float()
            for module in find_experts(model).values():
                for weight in EXPERT_WEIGHTS:
                    getattr(module, weight).data = fake_quantized(module, getattr(module, weight).data)
            made[key] = tmp_path_factory.mktemp("fp4") / "student"
            save_model(made[key], model, tokenizer, model.state_dict())
        return made[key]

    return save


@pytest.fixture
def changed_checkpoint(tmp_path) -> Callable[..., Path]:
    """changed_checkpoint(folder, edit_weights=..., config={"vocab_size": 8}): a copy with edited weights (in place) and config."""

    def change(folder: Path, edit_weights: Callable[[dict], None] | None = None, config: dict | None = None) -> Path:
        changed = tmp_path / f"changed_{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folder, changed)
        if edit_weights is not None:
            weights = load_file(changed / "model.safetensors")
            edit_weights(weights)
            save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
        if config is not None:
            path = changed / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return changed

    return change


@pytest.fixture(scope="session")
def numbers() -> Callable[[Path], list[dict]]:
    """numbers(run_dir): the records of its metrics.jsonl, without the figures that a clock gives or that say what a process drew and loaded itself."""
    own = ("seconds/", "throughput/", "system/", "balance/", "memory/", "rollout/", "work/rollout_")
    of_loading = ("/seconds", "/loads", "/bytes_loaded", "/load_seconds", "/load_hidden")

    def read(run_dir: Path) -> list[dict]:
        records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in record.items() if not (name.startswith(own) or name.endswith(of_loading))} for record in records]

    return read


@pytest.fixture(scope="session")
def make_prompt() -> Callable[..., Prompt]:
    def make(domain: str, tokens: list[int], request: int = 0, answer: str | None = None) -> Prompt:
        return Prompt(domain=domain, request=request, row=f"prompts:{request}", tokens=tuple(tokens), answer=answer)

    return make


@pytest.fixture(scope="session")
def make_rollout(make_prompt) -> Callable[..., Rollout]:
    """A rollout of given tokens; every completion token enters the loss, and its log-probability is -1, unless told otherwise."""

    def make(domain: str, prompt_tokens: list[int], completion_tokens: list[int], *, mask=None, logprob=None, request=0, answer=None, **fields) -> Rollout:
        length = len(completion_tokens)
        others = {"sample": 0, "finished": True, "policy_step": 0} | fields
        return Rollout(
            prompt=make_prompt(domain, prompt_tokens, request, answer),
            completion_T=torch.tensor(completion_tokens, dtype=torch.int64),
            completion_mask_T=torch.tensor([True] * length if mask is None else mask, dtype=torch.bool),
            logprob_T=torch.tensor([-1.0] * length if logprob is None else logprob, dtype=torch.float32),
            **others,
        )

    return make


@pytest.fixture(scope="session")
def random_rollouts(make_rollout, tokenizer) -> Callable[..., list[Rollout]]:
    """random_rollouts([("law", 5, 7), ...], seed): rollouts of random tokens with the given prompt and completion lengths."""

    def make(shapes: list[tuple[str, int, int]], seed: int = 0) -> list[Rollout]:
        generator = torch.Generator().manual_seed(seed)

        def tokens(count: int) -> list[int]:
            return torch.randint(3, len(tokenizer), (count,), generator=generator).tolist()

        return [make_rollout(domain, tokens(before), tokens(after), request=request) for request, (domain, before, after) in enumerate(shapes)]

    return make


def records_of_wandb(log: Path) -> list[Record]:
    """What stands in a log of W&B's: blocks of 32 KiB, in which each piece of a record stands behind its checksum, length and place (LevelDB's format)."""
    content, position, found, data = log.read_bytes(), 7, [], b""
    while position + 7 < len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, place = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        data += content[position + 7 : position + 7 + length]
        position += 7 + length
        if place in (1, 4):  # whole, or the last piece
            found.append(Record.FromString(data))
            data = b""
    return found


@pytest.fixture(scope="session")
def wandb_records() -> Callable[[Path], list[Record]]:
    """wandb_records(log): what stands in a log of W&B's, run-ID.wandb."""
    return records_of_wandb


@pytest.fixture(scope="session")
def wandb_rows() -> Callable[[Path], list[dict]]:
    """wandb_rows(run_dir): the rows of history in W&B's logs of a run, in all its folders."""

    def read(run_dir: Path) -> list[dict]:
        logs = sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
        histories = [record.history for log in logs for record in records_of_wandb(log) if record.WhichOneof("record_type") == "history"]
        return [{item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json) for item in history.item} for history in histories]

    return read
