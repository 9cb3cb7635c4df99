"""`opd export`: the trained student as a folder to serve, verified before it gets its name.

    RUN/config.yaml      resolved configuration
    RUN/student/         Hugging Face folder: weights, config, generation config, tokenizer, model card (opd/model_card.py)
    RUN/export.json      what was written and what was verified (below)

DeepSeek-V4 is written in DeepSeek's released layout (opd/deepseek_layout.py) with its routed experts packed in MXFP4, 4.25 bits a weight; a run with
quant=mxfp4_experts left their decoded values in its student folder, so packing them changes no weight. Everything else keeps the dtype of training unless
rest=fp8. Families without such a layout are written as transformers writes them, their experts holding FP4 values in that dtype.

export.json (schema version 1):

    {"schema": 1, "source", "family", "format": "fp4" | "plain", "dtype", "rest": "keep" | "fp8",
     "tensors": {"fp4", "fp8", "kept"}, "bytes": {"fp4", "fp8", "kept"},
     "experts": {"weights", "share_off_grid", "bits_per_weight", "zero_scale_blocks", "spread": [n, ...]} | null,
     "verified": {"tensors", "probe_tokens"},
     "kl": {DOMAIN: {"per_token": {"value", "low", "high"}, "per_sequence": {...}}} | null,
     "kept": [MODULE, ...], "sha256": {FILE: hash}}

share_off_grid is that of experts' weights that were no FP4 values, 0 for a student trained under FP4; they were rounded if config.yaml has round_experts.
spread counts 128 x 128 blocks by the spread of their scales, from 0. What only packing has is null in format plain; experts is null where FP4 fits none.
verified says how many tensors, and logits of how many tokens, were found equal when the folder was loaded again. kl is KL(exported || given) on the
exported model's own completions, null without domains. sha256 has every file but the card, which a later evaluation changes. A folder that is there has
passed: what fails stays as RUN/student.partial.
"""

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from opd.config import EvaluateConfig, EvaluationConfig
from opd.console import print_table
from opd.deepseek_layout import FAMILY, kept_modules, released_config, released_tensors
from opd.distributed import Group, num_ranks, start_processes
from opd.evaluator import Evaluator
from opd.export_check import require_equal
from opd.export_config import ExportConfig, ExportFormat, RestFormat, shard_bytes
from opd.export_rounding import ExpertFigures, round_experts, round_matrices
from opd.model_card import write_card
from opd.model_card_facts import checkpoint_results
from opd.run import begin_folder, require_own_folder
from opd.run_lock import lock
from opd.shards import StoredTensor, write_shards
from rollout.config import Dtype
from rollout.experts import require_quantizable
from rollout.files import replace_text
from rollout.model import end_tokens, load_model, load_tokenizer, replace_folder, require_folder, write_model
from rollout.quantized_models import read_config
from rollout.sampler import LocalSampler
from teachers.config import DomainConfig, TeacherConfig, TeachersConfig
from teachers.pool import TeacherPool

SCHEMA = 1
KINDS = ("fp4", "fp8", "kept")
"""How a tensor can be stored."""


def export(cfg: ExportConfig) -> None:
    """Write RUN/student, verify it, and report. Raises ValueError, before anything is written, for a model that cannot be exported as asked."""
    device = start_processes()
    run_dir = _own_folder(cfg)
    source, kind = _source(cfg)
    tokenizer = load_tokenizer(source.model, source.revision, source.trust_remote_code)
    model = load_model(source, "student")
    _require_finite(model)
    evaluator = _evaluator(model, tokenizer, source, cfg, device)
    experts = _experts(model, kind, cfg)
    figures = None if experts is None else round_experts(experts, kind is ExportFormat.fp4, cfg.round_experts)
    fp8 = round_matrices(model) if cfg.rest is RestFormat.fp8 else set()
    tensors = _tensors(model, fp8) if kind is ExportFormat.fp4 else None

    run_dir.mkdir(parents=True, exist_ok=True)
    problem = lock(run_dir)
    if problem is not None:
        raise ValueError(problem)
    begin_folder(run_dir, cfg, "export")  # first of all, so that an export that is cut off can be run again
    partial = run_dir / "student.partial"
    shutil.rmtree(partial, ignore_errors=True)
    if tensors is None:
        write_model(partial, model, tokenizer, model.state_dict(), shard_bytes(cfg))
        written = {"kept": sum(path.stat().st_size for path in partial.glob("*.safetensors"))}
    else:
        written = write_released(partial, model, tokenizer, tensors, shard_bytes(cfg))
    verified = require_equal(partial, model, source)
    record = {"schema": SCHEMA, "source": source.model, "family": model.config.model_type, "format": kind.value, "dtype": source.dtype.value}
    record |= {"rest": cfg.rest.value} | _sizes(tensors, written) | {"experts": None if figures is None else _expert_record(figures, written)}
    record |= {"verified": verified, "kl": _divergence(evaluator, model.to(device), cfg.seed)}
    record["kept"] = [] if tensors is None else kept_modules(tensors)
    record["sha256"] = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
    is_changed = cfg.rest is RestFormat.fp8 or (cfg.round_experts and figures is not None and figures.share_off_grid > 0)
    write_card(partial, record, None if is_changed else checkpoint_results(source.model))  # what was found of other weights is not said of these
    (run_dir / "export.json").unlink(missing_ok=True)
    replace_folder(partial, run_dir / "student")
    replace_text(run_dir / "export.json", json.dumps(record, indent=2) + "\n")
    print_export(record, run_dir, cfg.round_experts)


def chosen_format(cfg: ExportConfig, config: PretrainedConfig) -> ExportFormat:
    """The format of a family. Raises ValueError where its own layout, or what belongs to that, is asked for and the family has none."""
    if config.model_type == FAMILY:
        return ExportFormat.fp4 if cfg.format is ExportFormat.auto else cfg.format
    if cfg.format is ExportFormat.fp4:
        raise ValueError(f"{config.model_type} has no FP4 layout of its own (only {FAMILY} has): set format=plain")
    if cfg.rest is RestFormat.fp8:
        raise ValueError(f"rest=fp8 belongs to {FAMILY}'s layout and {config.model_type} is exported as plain: set rest=keep")
    return ExportFormat.plain


def write_released(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tensors: list[StoredTensor], max_shard_size: int
) -> dict[str, int]:
    """A folder in DeepSeek's layout; returns the bytes of weights written of each kind."""
    folder.mkdir()
    written = write_shards(folder, tensors, max_shard_size)
    config = released_config(model.config, kept_modules(tensors)) | {"architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return written


def _own_folder(cfg: ExportConfig) -> Path:
    """The run folder, if it is ours to write and holds nothing of the model that is read."""
    run_dir = Path(cfg.run_dir)
    if cfg.student.model is None:
        raise ValueError("there is nothing to export: set student.model to a folder or hub id")
    if num_ranks(Group.data) > 1:
        raise ValueError("opd export runs in one process: start it without torchrun")
    require_own_folder(run_dir, "export")
    source = Path(cfg.student.model).resolve()
    replaced = [(run_dir / name).resolve() for name in ("student", "student.partial", "student.old")]
    if any(folder in (source, *source.parents) for folder in replaced):
        raise ValueError(f"the export would take the place of {cfg.student.model}, which it reads: choose another run_dir")
    if source in run_dir.resolve().parents:
        raise ValueError(f"run_dir={run_dir} is inside of the model that is exported: choose another run_dir")
    return run_dir


def _require_finite(model: PreTrainedModel) -> None:
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} of the student holds NaN or infinity: its training has diverged, or its file is damaged")


def _source(cfg: ExportConfig) -> tuple[TeacherConfig, ExportFormat]:
    """The model to read, in its own dtype, and the format it is to have. Raises ValueError for all that settings and the model's config rule out."""
    if cfg.domains and cfg.rest is RestFormat.keep and not cfg.round_experts:
        raise ValueError("nothing is rounded with rest=keep and round_experts=false, so domains would be ignored: remove them")
    source = TeacherConfig(model=cfg.student.model, revision=cfg.student.revision, trust_remote_code=cfg.student.trust_remote_code)
    require_folder(source.model, "student")
    config = read_config(source, "student")
    dtype = str(config.get_text_config().dtype).removeprefix("torch.")
    known = [member.value for member in Dtype]
    if dtype not in known:
        raise ValueError(f"the config.json of the student says dtype {dtype}, and only {' and '.join(known)} can be exported: convert it first")
    source.dtype = Dtype(dtype)
    return source, chosen_format(cfg, config)


def _experts(model: PreTrainedModel, kind: ExportFormat, cfg: ExportConfig) -> dict[str, nn.Module] | None:
    """The modules of routed experts; None where FP4 fits none and none is asked for."""
    try:
        return require_quantizable(model, "student")
    except ValueError as error:
        asked = ["format=plain"] * (kind is ExportFormat.fp4) + ["round_experts=false"] * cfg.round_experts
        if asked:
            raise ValueError(f"{error}: set {' and '.join(asked)}") from error
        return None


def _tensors(model: PreTrainedModel, fp8: set[str]) -> list[StoredTensor]:
    try:
        return released_tensors(model, fp8)
    except ValueError as error:
        raise ValueError(f"{error}: set format=plain") from error


def _evaluator(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: TeacherConfig, cfg: ExportConfig, device: torch.device) -> Evaluator | None:
    """What measures the KL, with the given model as every domain's teacher; None where no domain is selected."""
    if not cfg.domains:
        return None
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


def _sizes(tensors: list[StoredTensor] | None, written: dict[str, int]) -> dict[str, dict[str, int | None]]:
    """Tensors and bytes by kind; a plain folder's tensors are not counted."""
    counts = Counter(tensor.kind for tensor in tensors or ())
    return {"tensors": {kind: None if tensors is None else counts[kind] for kind in KINDS}, "bytes": {kind: written.get(kind, 0) for kind in KINDS}}


def _expert_record(figures: ExpertFigures, written: dict[str, int]) -> dict[str, Any]:
    record = {"weights": figures.weights, "share_off_grid": figures.share_off_grid}
    if "fp4" not in written:
        return record | dict.fromkeys(("bits_per_weight", "zero_scale_blocks", "spread"))
    return record | {"bits_per_weight": 8 * written["fp4"] / figures.weights, "zero_scale_blocks": figures.zero_scale_blocks, "spread": figures.spread}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def print_export(record: dict[str, Any], run_dir: Path, is_rounded: bool) -> None:
    """The table of an export: what is stored how, and what was verified."""
    names = {"fp4": "routed experts, MXFP4", "fp8": "attention and shared experts, FP8", "kept": f"kept in {record['dtype']}"}
    rows = []
    for kind, what in names.items():
        if record["bytes"][kind]:
            count = record["tensors"][kind]
            rows.append([what, "" if count is None else str(count), f"{record['bytes'][kind]:,}"])
    print_table("", ["stored", "tensors", "bytes"], rows)
    verified = f"every weight ({record['verified']['tensors']} tensors) and the logits of {record['verified']['probe_tokens']} tokens are equal"
    print(f"{record['family']} as format {record['format']}: loaded again, {verified}")
    experts = record["experts"]
    if experts is not None:
        spread = max((spread for spread, count in enumerate(experts["spread"] or []) if count), default=0)
        packed = "" if experts["bits_per_weight"] is None else f"{experts['bits_per_weight']:.2f} bits each, largest scale spread {spread}, "
        print(f"expert weights: {packed}{experts['share_off_grid']:.1%} were no FP4 values{' and were rounded' if is_rounded else ''}")
    for name, kl in (record["kl"] or {}).items():
        value = kl["per_token"]
        print(f"{name}: KL(exported || given) {value['value']:.2e} [{value['low']:.2e}, {value['high']:.2e}] nats per token")
    print(f"written to {run_dir / 'student'}")
