"""Checkpoints taken up by another number of ranks, or at another ZeRO stage.

DeepSpeed's files hold a share for each rank, cut as the stage cuts. They are converted, in a process of its own, into DeepSpeed's universal checkpoint:
a folder for each parameter with its float32 master and AdamW's two moments, whole, which any number of ranks at ZeRO 1, 2 or 3 can read. What its
converter (0.19) leaves as the stage wrote it is put right here: names of files, forms of tensors, and the parameters that do not train. It takes
as much room as the checkpoint, in RUN/checkpoints/partial, until it has been read.

ZeRO 0 keeps everything on every rank, so that any number of ranks can read it as it is; it is not converted to other stages. Nor is what Muon
trained: the universal checkpoint knows no optimizer state but AdamW's.
"""

import importlib.metadata
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from opd import checkpoint_files as files
from opd.config import OptimizerKind
from opd.distributed import barrier, is_main, on_main_at_length
from rollout.child import run_child

STATES = ("fp32", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the files of a checkpoint are cut: among so many ranks; the optimizer's state (ZeRO 1 and 2) and the weights (ZeRO 3), or nothing (ZeRO 0)."""

    ranks: int
    cuts_optimizer: bool
    cuts_weights: bool

    def __str__(self) -> str:
        stage = "3" if self.cuts_weights else "1 or 2" if self.cuts_optimizer else "0"
        return f"ZeRO {stage} on {self.ranks} rank{'s' * (self.ranks > 1)}"


def layout_of(folder: Path, ranks: int) -> Layout:
    """The layout of a checkpoint that `ranks` ranks wrote."""
    names = [path.name for path in folder.iterdir()]
    cuts_weights = any(name.startswith("zero_pp_rank_") and name.endswith("model_states.pt") for name in names)
    return Layout(ranks=ranks, cuts_optimizer=any(name.endswith("optim_states.pt") for name in names), cuts_weights=cuts_weights)


def layout_for(stage: int, ranks: int) -> Layout:
    """The layout that a ZeRO stage writes."""
    return Layout(ranks=ranks, cuts_optimizer=stage > 0, cuts_weights=stage == 3)


def fits(written: Layout, wanted: Layout, kind: OptimizerKind) -> bool:
    """Whether a checkpoint can be read as it is. Raises ValueError where it can be neither read nor converted."""
    if written.cuts_optimizer != wanted.cuts_optimizer:
        raise ValueError(f"a checkpoint of {written} cannot be taken up at {wanted}: ZeRO 0 is not converted; keep deepspeed.zero_optimization.stage")
    is_fitting = not written.cuts_optimizer or written == wanted
    if not is_fitting and kind is OptimizerKind.muon:
        raise ValueError(
            f"a checkpoint of {written} cannot be taken up at {wanted}: optim.kind=muon cannot be converted, since DeepSpeed's universal checkpoint "
            "holds AdamW's state only; start as many ranks at the same stage"
        )
    return is_fitting


@contextmanager
def converted(folder: Path, tag: str) -> Iterator[Path]:
    """The folder that holds checkpoint `tag` of RUN/checkpoints in universal form, for as long as the context lasts; every rank calls it.

    Raises ValueError where the converter fails.
    """
    universal = folder / files.PARTIAL / "universal"
    on_main_at_length(lambda: _convert(folder, tag, universal / tag))
    yield universal  # an error leaves it to the next save, or start: the other ranks would wait here for one that has failed
    barrier()
    if is_main():
        shutil.rmtree(folder / files.PARTIAL)


def _convert(folder: Path, tag: str, target: Path) -> None:
    files.begin_partial(folder)
    arguments = ["--input_folder", str((folder / tag).resolve()), "--output_folder", str(target.resolve()), "--inject_missing_state"]
    reason = run_child("deepspeed.checkpoint.ds_to_universal", *arguments, "--num_extract_workers", "1", "--num_merge_workers", "1")
    if reason is not None:
        raise ValueError(f"{folder / tag} cannot be converted for other ranks or another ZeRO stage ({reason})")
    steps = _wrap_states(target / "zero")
    _write_common_state(target / "zero/optimizer_state.pt", steps)
    _write_model_states(folder / tag, target)


def _wrap_states(folder: Path) -> torch.Tensor:
    """Bring every state into the form that all stages read, with the optimizer's steps beside it; returns those. Raises ValueError where there are none."""
    shared = torch.load(folder / "optimizer_state.pt", weights_only=False)
    steps = shared["optimizer_state_dict"]["state"][0]["step"] if "optimizer_state_dict" in shared else None
    for path in folder.glob("*/*.pt"):
        if path.stem in STATES:
            state = torch.load(path, weights_only=False)
            if not isinstance(state, dict):
                torch.save({"param": state.detach(), "cat_dim": 0}, path)
        elif steps is None:
            steps = torch.load(path, weights_only=False)
    if steps is None:
        raise ValueError(f"{folder} holds no optimizer state")
    for path in folder.iterdir():
        if (path / "exp_avg.pt").is_file():
            torch.save(steps, path / "step.pt")
    return steps


def _write_common_state(path: Path, steps: torch.Tensor) -> None:
    """What ZeRO 1 and 2 and what ZeRO 3 look for in the optimizer's common state, in one."""
    shared = torch.load(path, weights_only=False)
    groups = shared["param_groups"]
    shared |= {"ds_version": importlib.metadata.version("deepspeed"), "optimizer_state_dict": {"state": {0: {"step": steps}}, "param_groups": groups}}
    shared.pop("fp32_flat_groups", None)
    torch.save(shared, path)


def _write_model_states(source: Path, target: Path) -> None:
    """One file under the names that all stages look for, without the weights that the folders hold, and with those that do not train."""
    parts = sorted(source.glob("*model_states.pt"), key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])
    states = [torch.load(path, map_location="cpu", mmap=True, weights_only=False) for path in parts]
    shared = states[0]
    others = {f"model.{name}" for name in shared["opd"]["buffers"]} | set(shared["shared_params"])  # the latter are second names of tied weights
    frozen = {name for name in shared["module"] if name not in others and not (target / "zero" / name / "exp_avg.pt").is_file()}
    shared["opd"]["frozen"] = {name: _frozen(name, states).clone() for name in sorted(frozen)}
    shared["module"] = {}
    for path in target.glob("*model_states.pt"):
        path.unlink()
    torch.save(shared, target / "mp_rank_00_model_states.pt")
    (target / "zero_pp_rank_0_mp_rank_00_model_states.pt").hardlink_to(target / "mp_rank_00_model_states.pt")


def _frozen(name: str, states: list[dict]) -> torch.Tensor:
    """A parameter that does not train: whole among the weights, or (ZeRO 3) in pieces of equal length, one for each rank and the last filled up."""
    shape = (states[0]["frozen_param_shapes"] or {}).get(name)
    if shape is None:
        return states[0]["module"][name]
    return torch.cat([state["frozen_param_fragments"][name].flatten() for state in states])[: shape.numel()].view(shape)


class _NoShare:
    """What DeepSpeed keeps for a parameter of which this rank holds numbers, for one of which it holds none."""

    def __init__(self):
        self.optim_fragment: dict[str, torch.Tensor] = {}

    def get_optim_state_keys(self) -> list[str]:
        return ["exp_avg", "exp_avg_sq"]

    def get_hp_fragment_address(self) -> SimpleNamespace:
        return SimpleNamespace(start=0, numel=0)

    def get_hp_fragment(self, optim_state_key: str) -> torch.Tensor:
        return torch.empty(0)


@contextmanager
def padding_loads(groups: list[list[torch.nn.Parameter]]) -> Iterator[None]:
    """Within it DeepSpeed's universal loader (ZeRO 1 and 2) gets through groups of which a rank's share is padding alone; by itself it looks for the steps
    of a first parameter that is not there.
    """
    firsts = [group[0] for group in groups if all(parameter._hp_mapping is None for parameter in group)]
    own = [parameter.load_hp_checkpoint_state for parameter in firsts]
    for parameter in firsts:
        parameter._hp_mapping = _NoShare()
        parameter.load_hp_checkpoint_state = lambda folder, *_, **__: torch.load(Path(folder) / "step.pt", weights_only=False)
    try:
        yield
    finally:
        for parameter, load in zip(firsts, own, strict=True):
            parameter._hp_mapping, parameter.load_hp_checkpoint_state = None, load
