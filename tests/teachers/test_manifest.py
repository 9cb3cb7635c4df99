"""The teacher manifest: its format, what counts as another teacher, and what a resume may do about it."""

import copy
import hashlib
import json
import logging
import re
import shutil

import pytest

from rollout.config import Dtype, PerturbationConfig, PromptsConfig
from rollout.grader_process import end_processes
from teachers.config import DomainConfig, TeacherConfig
from teachers.manifest import TeacherManifest, changes, describe_domains, teacher_identity

SETTINGS = {"prompts": {"path": "law.jsonl", "share": {"0": 0.5, "200": 0.25}, "system_prompt": "You are a judge."}, "grader": "exact", "loss_weight": 1.0}


def domain(model: str, **teacher) -> dict:
    return {"teacher": {"model": model, "dtype": "bfloat16", "hash": "1" * 64} | teacher, "settings": copy.deepcopy(SETTINGS)}


def two_domains() -> dict:
    return {"law": domain("org/law", revision="3f1c2ab"), "code": domain("/models/code", config_hash="c" * 64)}


def served(server: str, fingerprint: list[float]) -> dict:
    return {"math": {"teacher": {"server": server, "model": "math", "fingerprint": fingerprint}, "settings": {}}}


def taken_up(manifest: TeacherManifest, step: int, domains: dict, allow_change: bool = False) -> TeacherManifest:
    """A resume from a checkpoint that was saved with the manifest, through JSON as on disk."""
    resumed = TeacherManifest()
    resumed.take_up(json.loads(json.dumps(manifest.record())), step, domains, allow_change)
    return resumed


@pytest.fixture
def begun() -> TeacherManifest:
    manifest = TeacherManifest()
    manifest.take_up(None, 0, two_domains(), False)
    return manifest


def test_the_manifest_has_the_format_on_file(golden_dir, tmp_path):
    begun = TeacherManifest()
    begun.record_check({"law": {"passed": True}})
    begun.take_up(None, 0, two_domains(), False)
    changed = two_domains() | served("http://127.0.0.1:8000", [-1.5, -0.25])
    changed["law"]["teacher"] |= {"revision": "9a0b3cd", "hash": "2" * 64}
    changed["code"]["settings"]["loss_weight"] = 0.5
    manifest = taken_up(begun, 5, changed, allow_change=True)
    manifest.record_failure("math", 7, "the teacher of math did not answer")
    manifest.write(tmp_path)
    assert (tmp_path / "teachers.json").read_text() == (golden_dir / "teachers.json").read_text()


def test_the_format_on_file_is_taken_up(golden_dir):
    record = json.loads((golden_dir / "teachers.json").read_text())
    manifest = TeacherManifest()
    manifest.take_up(copy.deepcopy(record), 9, record["spans"][-1]["domains"], False)
    assert manifest.record() == record
    assert list(manifest.dropped) == ["math"]


def test_a_manifest_of_another_schema_is_refused(begun):
    with pytest.raises(ValueError, match="schema 2; this version reads schema 1"):
        TeacherManifest().take_up(begun.record() | {"schema": 2}, 5, two_domains(), True)


def test_the_same_teachers_continue_their_span(begun):
    assert taken_up(begun, 5, two_domains()).record() == begun.record()


CHANGES = {
    "path": (lambda d: d["law"]["teacher"].update(model="org/other"), 'law: teacher.model was "org/law" and is "org/other"'),
    "revision": (lambda d: d["law"]["teacher"].update(revision="main"), 'law: teacher.revision was "3f1c2ab" and is "main"'),
    "content": (lambda d: d["code"]["teacher"].update(hash="3" * 64), "code: teacher.hash was 111111111111 and is 333333333333"),
    "config": (lambda d: d["code"]["teacher"].update(config_hash="d" * 64), "code: teacher.config_hash was cccccccccccc and is dddddddddddd"),
    "dtype": (lambda d: d["code"]["teacher"].update(dtype="float32"), 'code: teacher.dtype was "bfloat16" and is "float32"'),
    "adapter": (lambda d: d["code"]["teacher"].update(adapter="/adapters/code"), 'code: teacher.adapter was null and is "/adapters/code"'),
    "added": (lambda d: d.update(tools=domain("org/tools")), "tools is new (its teacher is org/tools)"),
    "dropped": (lambda d: d.pop("code"), "code is gone (its teacher was /models/code)"),
    "weight": (lambda d: d["law"]["settings"].update(loss_weight=0.5), "law: loss_weight was 1.0 and is 0.5"),
    "share": (lambda d: d["law"]["settings"]["prompts"].update(share=1.0), 'law: prompts.share was {"0": 0.5, "200": 0.25} and is 1.0'),
    "grader": (lambda d: d["law"]["settings"].update(grader={"kind": "json"}), 'law: grader was "exact" and is {"kind": "json"}'),
    "order": (lambda d: d.update(law=d.pop("law")), "the order of the domains was law, code and is code, law"),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_difference_is_refused_by_its_domain_and_setting_with_the_way_on(change, begun):
    edit, words = CHANGES[change]
    domains = two_domains()
    edit(domains)
    with pytest.raises(ValueError, match=r"of this run's step 5 \(.*teachers\.allow_change=true") as refusal:
        taken_up(begun, 5, domains)
    assert f"({words})" in str(refusal.value)


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_difference_that_is_allowed_begins_a_span_and_is_logged(change, begun, caplog):
    edit, words = CHANGES[change]
    domains = two_domains()
    edit(domains)
    caplog.clear()
    with caplog.at_level(logging.INFO, "teachers"):
        spans = taken_up(begun, 5, domains, allow_change=True).spans
    assert [span["from_step"] for span in spans] == [1, 6]
    assert [span["domains"] for span in spans] == [two_domains(), domains]
    assert caplog.messages == [f"from step 6 on: {words}"]


def test_a_refusal_of_many_domains_names_three_and_counts_the_others(begun):
    many = two_domains() | {f"new_{number}": domain("org/new") for number in range(5)}
    with pytest.raises(ValueError, match=r"new_0 is new .*new_2 is new .*; and 2 more\)"):
        taken_up(begun, 5, many)


def test_a_change_that_stays_allowed_changes_nothing_where_nothing_differs(begun, caplog):
    changed = two_domains()
    del changed["code"]
    manifest = taken_up(begun, 5, changed, allow_change=True)
    caplog.clear()
    with caplog.at_level(logging.INFO, "teachers"):
        assert taken_up(manifest, 8, changed, allow_change=True).record() == manifest.record()
    assert caplog.messages == []


def test_a_checkpoint_without_a_manifest_begins_one_and_says_so(caplog):
    manifest = TeacherManifest()
    with caplog.at_level(logging.INFO, "teachers"):
        manifest.take_up(None, 5, two_domains(), False)
    assert [span["from_step"] for span in manifest.spans] == [6]
    assert caplog.messages == ["the checkpoint of step 5 does not say which teachers scored it: the record of teachers begins with step 6"]


def test_a_domain_that_was_dropped_by_failure_stays_dropped(begun):
    begun.record_failure("code", 4, "NaN")
    assert taken_up(begun, 5, two_domains()).dropped == {"code": {"step": 4, "reason": "NaN"}}


def test_a_domain_that_was_dropped_by_failure_is_tried_again_where_changes_are_allowed(begun, caplog):
    begun.record_failure("code", 4, "NaN")
    with caplog.at_level(logging.INFO, "teachers"):
        manifest = taken_up(begun, 5, two_domains(), allow_change=True)
    assert manifest.dropped == {}
    assert [span["dropped"] for span in manifest.spans] == [{"code": {"step": 4, "reason": "NaN"}}, {}]
    assert caplog.messages == ["from step 6 on: code is tried again, dropped at step 4 (NaN)"]


def test_the_history_has_the_teachers_and_nothing_of_the_settings(begun):
    [span] = begun.history()
    assert span == {"from_step": 1, "teachers": {name: described["teacher"] for name, described in two_domains().items()}}
    assert "judge" not in json.dumps(begun.history())


@pytest.mark.parametrize(("shift", "is_same"), [(0.0, True), (0.01, True), (0.05, False), (float("nan"), False)])
def test_a_server_may_move_where_its_probe_stays_within_rounding(shift, is_same):
    before, after = served("http://a:8000", [-1.0, -2.0]), served("http://b:9000", [-1.0 - shift, -2.0 + shift])
    assert (changes(before, after, 0.02) == {}) == is_same


def test_a_server_that_does_not_move_is_held_to_its_model():
    before, after = served("http://a:8000", [-1.0, -2.0]), served("http://a:8000", [-1.0, -2.0])
    after["math"]["teacher"]["model"] = "other"
    assert changes(before, after, 0.02) == {"math": 'math: teacher.model was "math" and is "other"'}


def test_a_description_is_the_whole_domain_as_it_reads_back_from_json():
    law = DomainConfig(teacher=TeacherConfig(model="org/law"), prompts=PromptsConfig(share={0: 0.5, 200: 0.25}), loss_weight=2.0)
    described = describe_domains({"law": law}, {"law": {"model": "org/law"}})
    assert described["law"]["teacher"] == {"model": "org/law"}
    assert described["law"]["settings"]["prompts"]["share"] == {"0": 0.5, "200": 0.25}
    assert set(described["law"]["settings"]) == {"prompts", "held_out", "grader", "loss_weight"}
    assert json.loads(json.dumps(described)) == described


def test_a_grader_is_described_with_the_settings_it_has_and_one_without_any_as_in_manifests_of_before():
    domains = {name: DomainConfig(grader=grader) for name, grader in {"law": "exact", "code": {"kind": "numeric", "tolerance": 0.5}, "math": None}.items()}
    described = describe_domains(domains, {name: {} for name in domains})
    assert [described[name]["settings"]["grader"] for name in domains] == ["exact", {"kind": "numeric", "tolerance": 0.5, "relative_tolerance": 0.0}, None]


def test_a_perturbation_is_described_where_there_is_one_and_else_left_out_as_in_manifests_of_before():
    domains = {"law": DomainConfig(perturbation=PerturbationConfig(rate=0.1, alphabet=["0", "1"])), "code": DomainConfig()}
    described = describe_domains(domains, {name: {} for name in domains})
    assert described["law"]["settings"]["perturbation"] == {"rate": 0.1, "alphabet": ["0", "1"]}
    assert "perturbation" not in described["code"]["settings"]


def test_a_function_that_grades_is_described_with_the_hash_of_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grader = {"kind": "python", "function": "described_grader:score"}
    found = []
    for share in ("0.5", "0.25"):
        source = f"def score(completion, answer):\n    return {share}\n"
        (tmp_path / "described_grader.py").write_text(source)
        found.append(describe_domains({"law": DomainConfig(grader=grader)}, {"law": {}}))
        assert found[-1]["law"]["settings"]["grader"]["source_hash"] == hashlib.sha256(source.encode()).hexdigest()
        end_processes()
    [words] = changes(*found, 0.02).values()
    assert re.fullmatch(r"law: grader.source_hash was [0-9a-f]{12} and is [0-9a-f]{12}", words)


def identity(folder, **settings) -> dict:
    return teacher_identity(TeacherConfig(model=str(folder), **settings), "teacher of law")


def differing(left: dict, right: dict) -> set[str]:
    return {name for name in left | right if left.get(name) != right.get(name)}


def test_an_identity_is_of_the_content_and_not_of_the_copy(saved_qwen3_moe, tmp_path):
    shutil.copytree(saved_qwen3_moe, tmp_path / "copy")
    assert differing(identity(saved_qwen3_moe), identity(tmp_path / "copy")) == {"model"}


def test_other_numbers_under_the_same_names_are_another_hash(saved_qwen3_moe, changed_checkpoint):
    def scale(weights: dict) -> None:
        for name in weights:
            weights[name] *= 1.01

    assert differing(identity(saved_qwen3_moe), identity(changed_checkpoint(saved_qwen3_moe, scale))) == {"model", "hash"}


def test_another_config_over_the_same_weights_is_another_config_hash(saved_qwen3_moe, changed_checkpoint):
    changed = changed_checkpoint(saved_qwen3_moe, config={"rms_norm_eps": 1e-3})
    assert differing(identity(saved_qwen3_moe), identity(changed)) == {"model", "config_hash"}


def test_the_settings_that_decide_a_teachers_numbers_are_in_its_identity(saved_qwen3_moe):
    assert differing(identity(saved_qwen3_moe), identity(saved_qwen3_moe, dtype=Dtype.bfloat16)) == {"dtype"}


@pytest.mark.parametrize(("changed", "file"), [("adapter_hash", "adapter_model.safetensors"), ("adapter_config_hash", "adapter_config.json")])
def test_an_adapter_has_hashes_of_its_own(changed, file, saved_qwen3_moe, tmp_path):
    adapters = [tmp_path / "first", tmp_path / "second"]
    for folder in adapters:
        folder.mkdir()
        shutil.copy(saved_qwen3_moe / "model.safetensors", folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text('{"lora_alpha": 16}')
    path = adapters[1] / file
    path.write_bytes(path.read_bytes()[:-2] + b"9}")
    first, second = (identity(saved_qwen3_moe, adapter=str(folder)) for folder in adapters)
    assert differing(first, second) == {"adapter", changed}
    assert differing(first, identity(saved_qwen3_moe)) == {"adapter", "adapter_hash", "adapter_config_hash"}
