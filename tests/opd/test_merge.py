"""Merging of teachers: weights against the formulas written out, the choice of a setting, and what is refused."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file

from opd.__main__ import load_config
from opd.merge import Setting, candidates, merge, merged_weights
from opd.merge_config import MergeConfig, MergeKind
from rollout.model import save_model

DOMAINS = ("tools", "sorting")


@pytest.fixture(scope="module")
def folders(session_v4_model, tokenizer, tmp_path_factory):
    """The base's folder, and those of two teachers that are it with noise on every trained weight."""
    found = {}
    for number, name in enumerate(("base", *DOMAINS)):
        model = copy.deepcopy(session_v4_model)
        generator = torch.Generator().manual_seed(number)
        for weight in model.parameters():
            if number and weight.is_floating_point():
                weight.data += 0.01 * torch.randn(weight.shape, generator=generator)
        found[name] = tmp_path_factory.mktemp("merge") / name
        save_model(found[name], model, tokenizer, model.state_dict())
    return found


@pytest.fixture
def settings(folders, tmp_path) -> list[str]:
    own = [f"base.model={folders['base']}", "domain=[tools,sorting]", f"run_dir={tmp_path / 'merged'}", "rollout.max_new_tokens=3", "rollout.decode_width=8"]
    return [*own, *(f"domains.{name}.{part}" for name in DOMAINS for part in (f"teacher.model={folders[name]}", "prompts.rows=8")), "prompts=4"]


def weights_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_average_is_the_mean_of_the_teachers_weights(folders, settings, tmp_path, device):
    merge(load_config("merge", [*settings, "kind=average"]))
    base, one, other, found = (weights_of(folder) for folder in (folders["base"], folders["tools"], folders["sorting"], tmp_path / "merged/student"))
    assert found.keys() == base.keys()
    for name, weight in found.items():
        wanted = (one[name].double() + other[name].double()) / 2 if weight.is_floating_point() else base[name]
        assert torch.allclose(weight.double(), wanted.double(), atol=1e-6)


def test_task_arithmetic_adds_the_scaled_differences(folders, settings, tmp_path, device):
    merge(load_config("merge", [*settings, "kind=task_arithmetic", "scales=[0.7]"]))
    base, one, other, found = (weights_of(folder) for folder in (folders["base"], folders["tools"], folders["sorting"], tmp_path / "merged/student"))
    for name, weight in found.items():
        if weight.is_floating_point():
            wanted = base[name].double() + 0.7 * (one[name].double() + other[name].double() - 2 * base[name].double())
            assert torch.allclose(weight.double(), wanted, atol=1e-6)


def test_ties_trims_elects_a_sign_and_takes_the_mean_of_those_that_have_it():
    base = {"weight": torch.zeros(6)}
    differences = [{"weight": torch.tensor([4.0, -3.0, 0.1, 2.0, 0.2, 0.0])}, {"weight": torch.tensor([2.0, 1.0, 0.3, -5.0, 0.1, 0.0])}]
    found = merged_weights(base, differences, Setting(scale=2.0, density=0.5))["weight"]
    # of each the three largest stay: [4, -3, 0, 2, 0, 0] and [2, 1, 0, -5, 0, 0]; signs by weight: +, -, ., -; means of those with the sign: 3, -3, 0, -5
    assert found.tolist() == [6.0, -6.0, 0.0, -10.0, 0.0, 0.0]


def test_of_several_settings_the_one_with_the_best_accuracy_on_training_prompts_is_kept(folders, settings, tmp_path, device):
    merge(load_config("merge", [*settings, "kind=ties", "scales=[0.5,1.0]", "densities=[0.2,0.6]"]))
    record = json.loads((tmp_path / "merged/merge.json").read_text())
    assert [(found["scale"], found["density"]) for found in record["candidates"]] == [(0.5, 0.2), (1.0, 0.2), (0.5, 0.6), (1.0, 0.6)]
    assert all(found["accuracy"].keys() == set(DOMAINS) for found in record["candidates"])
    best = max(record["candidates"], key=lambda found: found["mean"])
    assert record["chosen"] == {"scale": best["scale"], "density": best["density"]}


def test_the_average_has_one_setting_and_ties_each_density_with_each_scale():
    assert candidates(MergeConfig(kind=MergeKind.average), 4) == [Setting(scale=0.25)]
    assert len(candidates(MergeConfig(kind=MergeKind.ties, scales=[1.0, 2.0], densities=[0.1, 0.2, 0.3]), 4)) == 6


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["kind=average", "scales=[0.5]"], "scales would be ignored with kind=average"),
        (["kind=task_arithmetic", "densities=[0.3]"], "densities belong to kind=ties"),
        (["kind=ties", "densities=[1.0]"], "densities must be below 1"),
        (["scales=[]"], "scales must be numbers above 0, and one at least"),
        (["prompts=0"], "prompts must be at least 1"),
    ],
)
def test_settings_that_cannot_be_or_would_be_ignored_are_refused(overrides, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load_config("merge", ["domain=[tools]", *overrides])


def test_a_teacher_of_another_base_is_refused(settings, teacher_folders, device):
    with pytest.raises(ValueError, match="has other weights than the base"):
        merge(load_config("merge", [*settings, f"domains.tools.teacher.model={teacher_folders['qwen3_moe']}"]))


def test_teachers_that_equal_the_base_are_refused(settings, folders, device):
    same = [f"domains.{name}.teacher.model={folders['base']}" for name in DOMAINS]
    with pytest.raises(ValueError, match="every teacher equals the base"):
        merge(load_config("merge", [*settings, *same]))


def test_a_setting_is_not_chosen_on_held_out_prompts(settings, device):
    with pytest.raises(ValueError, match=r"training row tools/prompts:0 is equal to the held-out prompt tools/held_out:0"):
        merge(load_config("merge", [*settings, "kind=task_arithmetic", "scales=[0.5,1.0]", "domains.tools.held_out.split=train"]))


def test_several_settings_need_graders(settings, device):
    with pytest.raises(ValueError, match="sorting has no grader"):
        merge(load_config("merge", [*settings, "domains.sorting.grader=null"]))
