"""`opd export`: the trained student as a folder to serve, verified before it gets its name.

    RUN/config.yaml      resolved configuration
    RUN/student/         Hugging Face folder: weights, config, generation config, tokenizer
    RUN/export.json      what was written and what was verified (below)

DeepSeek-V4 is written in DeepSeek's released layout (opd/deepseek_layout.py) with its routed experts packed in MXFP4, 4.25 bits a weight; a run with
quant=mxfp4_experts left their decoded values in its student folder, so packing them changes no weight. Everything else keeps the dtype of training unless
rest=fp8. Families without such a layout are written as transformers writes them, their experts holding FP4 values in that dtype.

export.json (schema version 1):

    {"schema": 1, "source", "family", "format": "fp4" | "plain", "dtype", "rest": "keep" | "fp8",
     "tensors": {"fp4", "fp8", "kept"}, "bytes": {"fp4", "fp8", "kept"},
     "experts": {"weights", "share_off_grid", "share_changed", "bits_per_weight", "zero_scale_blocks", "largest_spread", "spread": [n, ...]} | null,
     "weights_equal": true, "logits_equal": true,
     "kl": {DOMAIN: {"per_token": {"value", "low", "high"}, "per_sequence": {...}}} | null,
     "kept": [MODULE, ...], "sha256": {FILE: hash}}

share_off_grid is that of experts' weights that were no FP4 values, 0 for a student trained under FP4; share_changed that of those rounded. spread counts
128 x 128 blocks by the spread of their scales, from 0. What only packing has is null in format plain; experts is null where FP4 fits none. kl is
KL(exported || given) on the exported model's own completions, null without domains. A folder that is there has passed: what fails stays as
RUN/student.partial.
"""

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from opd.config import EvaluateConfig, EvaluationConfig
from opd.console import print_table
from opd.deepseek_layout import FAMILY, kept_modules, released_config, released_tensors
from opd.distributed import Group, num_ranks, start_processes
from opd.evaluate import Evaluator
from opd.export_check import require_equal
from opd.export_config import ExportConfig, ExportFormat, RestFormat
from opd.export_rounding import ExpertFigures, round_experts, round_matrices
from opd.run import belongs_to, lock, write_config
from opd.shards import StoredTensor, write_shards
from rollout.config import Dtype, ModelConfig
from rollout.experts import require_quantizable
from rollout.files import replace_text
from rollout.model import end_tokens, load_model, load_tokenizer, replace_folder, require_folder, write_model
from rollout.quantized_models import read_config
from rollout.sampler import LocalSampler
from teachers.config import DomainConfig, TeachersConfig
from teachers.pool import TeacherPool

SCHEMA = 1


def export(cfg: ExportConfig) -> None:
    """Write RUN/student, verify it, and report. Raises ValueError, before anything is written, for a model that cannot be exported as asked."""
    device = start_processes()
    run_dir = _own_folder(cfg)
    source = _source(cfg)
    tokenizer = load_tokenizer(source.model, source.revision, source.trust_remote_code)
    model = load_model(source, "student")
    evaluator = _evaluator(model, tokenizer, source, cfg, device)
    kind = chosen_format(cfg.format, model.config)
    figures, fp8 = _round(model, kind, cfg)
    tensors = released_tensors(model, fp8) if kind is ExportFormat.fp4 else None

    run_dir.mkdir(parents=True, exist_ok=True)
    problem = lock(run_dir)
    if problem is not None:
        raise ValueError(problem)
    partial = run_dir / "student.partial"
    shutil.rmtree(partial, ignore_errors=True)
    if tensors is None:
        write_model(partial, model, tokenizer, model.state_dict(), _shard_size(cfg))
    else:
        write_released(partial, model, tokenizer, tensors, _shard_size(cfg))
    require_equal(partial, model, source.dtype)
    record = {"schema": SCHEMA, "source": source.model, "family": model.config.model_type, "format": kind.value, "dtype": source.dtype.value}
    record |= {"rest": cfg.rest.value} | _sizes(tensors, partial) | {"experts": _expert_record(figures, tensors, cfg.round_experts)}
    record |= {"weights_equal": True, "logits_equal": True, "kl": _divergence(evaluator, model.to(device), cfg.seed)}
    record["kept"] = [] if tensors is None else kept_modules(tensors)
    record["sha256"] = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
    (run_dir / "export.json").unlink(missing_ok=True)
    replace_folder(partial, run_dir / "student")
    write_config(run_dir, cfg, "export")
    replace_text(run_dir / "export.json", json.dumps(record, indent=2) + "\n")
    print_export(record, run_dir)


def chosen_format(asked: ExportFormat, config: PretrainedConfig) -> ExportFormat:
    """The format of a family. Raises ValueError where fp4 is asked for and the family has no such layout."""
    if asked is ExportFormat.auto:
        return ExportFormat.fp4 if config.model_type == FAMILY else ExportFormat.plain
    if asked is ExportFormat.fp4 and config.model_type != FAMILY:
        raise ValueError(f"{config.model_type} has no FP4 layout of its own (only {FAMILY} has): set format=plain")
    return asked


def write_released(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tensors: list[StoredTensor], max_shard_size: int | str) -> None:
    """A folder in DeepSeek's layout."""
    folder.mkdir()
    write_shards(folder, tensors, max_shard_size)
    config = released_config(model.config, kept_modules(tensors)) | {"architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _own_folder(cfg: ExportConfig) -> Path:
    """The run folder, if it is ours to write and not where the model is."""
    run_dir = Path(cfg.run_dir)
    if cfg.student.model is None:
        raise ValueError("there is nothing to export: set student.model to a folder or hub id")
    if num_ranks(Group.data) > 1:
        raise ValueError("opd export runs in one process: start it without torchrun")
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())) and not belongs_to(run_dir, "export"):
        raise ValueError(f"{run_dir} is not a folder of `opd export`: choose another run_dir")
    if Path(cfg.student.model).resolve() == (run_dir / "student").resolve():
        raise ValueError(f"the export would take the place of {cfg.student.model}, which it reads: choose another run_dir")
    return run_dir


def _source(cfg: ExportConfig) -> ModelConfig:
    """The model to read, in its own dtype."""
    source = ModelConfig(model=cfg.student.model, revision=cfg.student.revision, trust_remote_code=cfg.student.trust_remote_code)
    require_folder(source.model, "student")
    dtype = str(read_config(source, "student").get_text_config().dtype).removeprefix("torch.")
    known = [member.value for member in Dtype]
    if dtype not in known:
        raise ValueError(f"the config.json of the student says dtype {dtype}, and only {' and '.join(known)} can be exported: convert it first")
    source.dtype = Dtype(dtype)
    return source


def _round(model: PreTrainedModel, kind: ExportFormat, cfg: ExportConfig) -> tuple[ExpertFigures | None, set[str]]:
    """Figures of the experts (None where there are none that FP4 fits), and the weights that become FP8."""
    is_packed = kind is ExportFormat.fp4
    if cfg.rest is RestFormat.fp8 and not is_packed:
        raise ValueError(f"rest=fp8 belongs to {FAMILY}'s layout and {model.config.model_type} is exported as plain: set rest=keep")
    try:
        experts = require_quantizable(model, "student")
    except ValueError as error:
        if is_packed or cfg.round_experts:
            raise ValueError(str(error).replace("set quant=none", "set format=plain and round_experts=false")) from error
        return None, set()
    figures = round_experts(experts, is_packed, cfg.round_experts)
    return figures, round_matrices(model) if cfg.rest is RestFormat.fp8 else set()


def _evaluator(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: ModelConfig, cfg: ExportConfig, device: torch.device) -> Evaluator | None:
    """What measures the KL, with the given model as every domain's teacher; None where no domain is selected."""
    if not cfg.domains:
        return None
    if cfg.rest is RestFormat.keep and not cfg.round_experts:
        raise ValueError("nothing is rounded with rest=keep and round_experts=false, so domains would be ignored: remove them")
    domains = {name: DomainConfig(teacher=source, prompts=domain.prompts, held_out=domain.held_out) for name, domain in cfg.domains.items()}
    evaluation = EvaluationConfig(prompts=cfg.kl_prompts, max_new_tokens=cfg.max_new_tokens, decode_width=cfg.decode_width)
    teachers = TeacherPool(domains, TeachersConfig(), tokenizer, device)
    evaluator = Evaluator(EvaluateConfig(seed=cfg.seed, domains=domains, evaluation=evaluation), model, tokenizer, teachers)
    if not evaluator.prompts:
        raise ValueError("no domain has held-out prompts, on which the KL of rounding is measured: set domains.NAME.held_out.path")
    return evaluator


def _divergence(evaluator: Evaluator | None, model: PreTrainedModel, seed: int) -> dict[str, Any] | None:
    """KL(exported || given) per domain, on the exported model's own completions."""
    if evaluator is None:
        return None
    results = evaluator.evaluate(LocalSampler(model, end_tokens(model, evaluator.tokenizer), seed, len(evaluator.tokenizer)))
    return {name: {"per_token": asdict(found.kl_per_token), "per_sequence": asdict(found.kl_per_sequence)} for name, found in results.items()}


def _shard_size(cfg: ExportConfig) -> int | str:
    return int(cfg.max_shard_size) if cfg.max_shard_size.isdigit() else cfg.max_shard_size


def _sizes(tensors: list[StoredTensor] | None, folder: Path) -> dict[str, dict[str, int]]:
    """Tensors and bytes by kind; a plain folder's tensors are not counted, its files are all kept."""
    kinds = ("fp4", "fp8", "kept")
    if tensors is None:
        return {"tensors": dict.fromkeys(kinds), "bytes": {"fp4": 0, "fp8": 0, "kept": sum(path.stat().st_size for path in folder.glob("*.safetensors"))}}
    counts, sizes = Counter(tensor.kind for tensor in tensors), Counter()
    for tensor in tensors:
        sizes[tensor.kind] += tensor.form.nbytes
    return {"tensors": {kind: counts[kind] for kind in kinds}, "bytes": {kind: sizes[kind] for kind in kinds}}


def _expert_record(figures: ExpertFigures | None, tensors: list[StoredTensor] | None, is_rounded: bool) -> dict[str, Any] | None:
    if figures is None:
        return None
    record = {"weights": figures.weights, "share_off_grid": figures.share_off_grid, "share_changed": figures.share_off_grid if is_rounded else 0.0}
    if tensors is None:
        return record | dict.fromkeys(("bits_per_weight", "zero_scale_blocks", "largest_spread", "spread"))
    packed_bytes = sum(tensor.form.nbytes for tensor in tensors if tensor.kind == "fp4")
    scales = {"zero_scale_blocks": figures.zero_scale_blocks, "largest_spread": figures.largest_spread, "spread": figures.spread}
    return record | {"bits_per_weight": 8 * packed_bytes / figures.weights} | scales


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def print_export(record: dict[str, Any], run_dir: Path) -> None:
    """The table of an export: what is stored how, and what was verified."""
    names = {"fp4": "routed experts, MXFP4", "fp8": "attention and shared experts, FP8", "kept": f"kept in {record['dtype']}"}
    rows = []
    for kind, what in names.items():
        if record["bytes"][kind]:
            count = record["tensors"][kind]
            rows.append([what, "" if count is None else str(count), f"{record['bytes'][kind]:,}"])
    print_table("", ["stored", "tensors", "bytes"], rows)
    print(f"{record['family']} as format {record['format']}: loaded again, every weight and the logits are equal")
    experts = record["experts"]
    if experts is not None:
        packed = "" if experts["bits_per_weight"] is None else f"{experts['bits_per_weight']:.2f} bits each, largest scale spread {experts['largest_spread']}, "
        print(f"expert weights: {packed}{experts['share_off_grid']:.1%} were no FP4 values, {experts['share_changed']:.1%} changed")
    for name, kl in (record["kl"] or {}).items():
        value = kl["per_token"]
        print(f"{name}: KL(exported || given) {value['value']:.2e} [{value['low']:.2e}, {value['high']:.2e}] nats per token")
    print(f"written to {run_dir / 'student'}")
