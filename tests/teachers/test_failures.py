"""A teacher that fails: read again from disk, then the run stops with its name, or goes on without its domains. Never is a signal made up."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rollout.config import ModelConfig
from rollout.model import load_model
from teachers.config import DomainConfig, OnFailure, SignalKind, TeacherConfig, TeachersConfig
from teachers.hidden_store import HiddenStore
from teachers.pool import TeacherPool
from teachers.teacher import Teacher
from teachers.types import TeacherFailure

CPU = torch.device("cpu")


@pytest.fixture
def fragile(folders, tmp_path) -> Path:
    """A copy of the teacher "qwen" that a test may damage."""
    return Path(shutil.copytree(folders["qwen"], tmp_path / "fragile"))


@pytest.fixture
def pool(new_pool, fragile) -> TeacherPool:
    """law and code in memory by turns, code being the fragile one."""
    return new_pool({"law": "v4", "code": str(fragile)}, max_resident=1)


def of(rollouts: list, *domains: str) -> list:
    return [rollout for rollout in rollouts if rollout.prompt.domain in domains]


def damage_a_byte(folder: Path) -> None:
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as tensors:
        content = tensors.get_tensor("model.layers.1.self_attn.q_proj.weight").view(torch.uint8).numpy().tobytes()
    data = bytearray(file.read_bytes())
    data[data.index(content) + 9] ^= 4
    file.write_bytes(data)


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def replace_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_a_byte, r"model\.layers\.1\.self_attn\.q_proj\.weight at .* is not what it was when it was first read"),
        (cut_off, "Error while deserializing header"),
        (replace_weights, "is not what it was when it was first read"),
        (shutil.rmtree, "No such file or directory"),
    ],
)
def test_a_checkpoint_that_is_damaged_in_the_run_stops_it_with_the_teachers_name(damage, reason, pool, fragile, rollouts):
    chosen = of(rollouts, "law", "code")
    pool.score(chosen)
    pool.score(of(rollouts, "law"))  # code makes room
    damage(fragile)
    with pytest.raises(TeacherFailure, match=rf"^the teacher of code \({fragile}\) failed twice: .*{reason}"):
        pool.score(chosen)


def test_a_checkpoint_that_is_damaged_while_it_is_in_memory_does_no_harm(pool, fragile, rollouts):
    before = pool.score(of(rollouts, "code"))
    damage_a_byte(fragile)
    for one, other in zip(before, pool.score(of(rollouts, "code")), strict=True):
        assert torch.equal(pool.hidden(one.signal, one.rollout), pool.hidden(other.signal, other.rollout))


class Repair(logging.Handler):
    """Puts a folder's weights back when the log says that its teacher is read again."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder, self.whole = folder, (folder / "model.safetensors").read_bytes()

    def emit(self, record: logging.LogRecord) -> None:
        if "is read again" in record.getMessage():
            (self.folder / "model.safetensors").write_bytes(self.whole)


@pytest.mark.parametrize("damage", [damage_a_byte, cut_off])
def test_a_checkpoint_that_is_repaired_before_it_is_read_again_goes_on_and_the_log_says_so(damage, pool, fragile, rollouts, caplog):
    before = [pool.hidden(item.signal, item.rollout) for item in pool.score(of(rollouts, "code"))]
    pool.score(of(rollouts, "law"))
    repair = Repair(fragile)
    damage(fragile)
    logging.getLogger("teachers.pool").addHandler(repair)
    try:
        after = [pool.hidden(item.signal, item.rollout) for item in pool.score(of(rollouts, "code"))]
    finally:
        logging.getLogger("teachers.pool").removeHandler(repair)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert [record.levelname for record in caplog.records if f"the teacher of code ({fragile}) failed and is read again" in record.message] == ["WARNING"]


def test_a_head_that_is_damaged_before_the_update_asks_for_it_is_named(pool, fragile, rollouts):
    scored = pool.score(of(rollouts, "law", "code"))
    pool.score(of(rollouts, "law"))
    cut_off(fragile)
    with pytest.raises(TeacherFailure, match=r"the teacher of code .* failed twice"):
        pool.head(next(item.signal.teacher for item in scored if item.rollout.prompt.domain == "code"))


def test_a_head_that_is_damaged_after_scoring_drops_its_domain_before_the_update(new_pool, fragile, rollouts):
    pool = new_pool({"law": "v4", "code": str(fragile), "math": "wide"}, max_resident=1, on_failure=OnFailure.drop)
    scored = pool.score(rollouts)
    pool.score(of(rollouts, "law"))
    cut_off(fragile)
    kept = pool.recovered(scored)
    assert [item.rollout for item in kept] == of(rollouts, "law", "math")
    assert list(pool.dropped) == ["code"]
    assert not any(item.signal.stored.path.exists() for item in scored if item.rollout.prompt.domain == "code")


@pytest.fixture
def nan_teacher(folders, changed_checkpoint) -> str:
    def poison(weights: dict) -> None:
        weights["model.norm.weight"][3] = torch.nan

    return str(changed_checkpoint(folders["qwen"], poison))


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("max_resident", [1, 3])
def test_a_run_goes_on_without_the_domain_of_a_teacher_that_fails(max_resident, prefetch, new_pool, nan_teacher, rollouts):
    names = {"law": "v4", "code": nan_teacher, "math": "wide"}
    pool = new_pool(names, on_failure=OnFailure.drop, max_resident=max_resident, prefetch=prefetch)
    healthy = new_pool({"law": "v4", "math": "wide"})
    for _ in range(2):
        scored, expected = pool.score(rollouts), healthy.score(of(rollouts, "law", "math"))
        assert [item.rollout for item in scored] == of(rollouts, "law", "math")
        for one, other in zip(scored, expected, strict=True):
            assert torch.equal(pool.hidden(one.signal, one.rollout), healthy.hidden(other.signal, other.rollout))
    assert list(pool.dropped) == ["code"]
    assert pool.dropped["code"].endswith("failed twice: it gave NaN or infinity on request 1")


def test_a_dropped_teacher_is_not_read_again_and_the_log_names_its_domain_once(new_pool, nan_teacher, rollouts, caplog):
    pool = new_pool({"law": "v4", "code": nan_teacher, "math": "wide"}, on_failure=OnFailure.drop)
    pool.score(rollouts)
    loads = pool.num_loads
    pool.score(rollouts)
    assert pool.num_loads == loads
    assert len([record for record in caplog.records if "the run goes on without domain code" in record.message]) == 1


def test_all_domains_of_one_checkpoint_are_dropped_together(new_pool, nan_teacher, rollouts):
    pool = new_pool({"law": nan_teacher, "code": nan_teacher, "math": "wide"}, on_failure=OnFailure.drop)
    assert [item.rollout for item in pool.score(rollouts)] == of(rollouts, "math")
    assert set(pool.dropped) == {"law", "code"}


def test_a_run_that_would_be_left_without_any_domain_stops(new_pool, nan_teacher, rollouts):
    pool = new_pool({"law": nan_teacher}, on_failure=OnFailure.drop)
    with pytest.raises(TeacherFailure, match="no domain is left: the teacher of law"):
        pool.score(of(rollouts, "law"))


def test_what_is_left_of_a_step_without_other_domains_counts_for_nothing(new_pool, nan_teacher, rollouts):
    pool = new_pool({"law": "v4", "code": nan_teacher}, on_failure=OnFailure.drop)
    [item] = pool.score(of(rollouts, "code"))
    assert item.signal.kind is None
    assert item.rollout.num_loss_tokens == 0


class OtherRankFails:
    """Two ranks of which the other one's teacher of law failed."""

    count = local_count = 2

    def __init__(self):
        self.law: str | None = None

    def gather(self, value):
        """What failed, or the free memory."""
        return [value, {self.law: "the teacher of law failed twice: it gave NaN"} if isinstance(value, dict) else value]


def test_hidden_states_of_a_domain_that_another_rank_drops_are_not_kept(folders, tokenizer, rollouts):
    domains = {name: DomainConfig(teacher=TeacherConfig(model=folders[teacher])) for name, teacher in (("law", "v4"), ("code", "qwen"))}
    ranks = OtherRankFails()
    pool = TeacherPool(domains, TeachersConfig(on_failure=OnFailure.drop, hidden_memory_gb=1.0), tokenizer, CPU, ranks)
    ranks.law = pool.teacher_of["law"]
    scored = pool.score(of(rollouts, "law", "code"))
    assert [item.rollout for item in scored] == of(rollouts, "code")
    assert files_of(pool.store) == {item.signal.stored.path for item in scored}
    assert pool.store.in_memory == sum(item.signal.stored.num_bytes for item in scored)


def files_of(store: HiddenStore) -> set[Path]:
    return {path for folder in store.folders.values() for path in folder.glob("*") if path.name != ".lock"}


def flip(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def remove_folder(path: Path) -> None:
    shutil.rmtree(path.parent)


@pytest.mark.parametrize("lose", [Path.unlink, flip, remove_folder])
@pytest.mark.parametrize("memory_gb", [1.0, 0.0])
def test_a_lost_or_damaged_entry_is_scored_again_to_the_same_numbers(lose, memory_gb, new_pool, rollouts, folders, tmp_path, caplog):
    pool = new_pool({"law": "v4", "code": "qwen"}, max_resident=1, hidden_memory_gb=memory_gb, hidden_folder=str(tmp_path))
    scored = pool.score(of(rollouts, "law", "code")[:2])
    for item in scored:
        teacher = Teacher("oracle", load_model(ModelConfig(model=folders["v4" if item.rollout.prompt.domain == "law" else "qwen"]), "oracle"))
        if item.signal.stored.path.exists():
            lose(item.signal.stored.path)
        assert torch.equal(pool.hidden(item.signal, item.rollout), teacher.hidden([item.rollout], 1000)[0])
        assert f"request {item.rollout.prompt.request} is scored again" in caplog.text
    assert files_of(pool.store) == set()
    assert pool.store.in_memory == 0


def test_a_folder_of_hidden_states_that_cannot_be_written_is_the_users_to_mend_and_not_the_teachers_failure(new_pool, rollouts, tmp_path):
    (tmp_path / "file").touch()
    pool = new_pool({"law": "v4"}, hidden_memory_gb=0.0, hidden_folder=str(tmp_path / "file"), on_failure=OnFailure.drop)
    with pytest.raises(ValueError, match=r"teachers\.hidden_folder: .* cannot be written to") as refusal:
        pool.score(of(rollouts, "law"))
    assert not isinstance(refusal.value, TeacherFailure)


def test_after_a_failure_the_teachers_left_score_as_before(new_pool, fragile, rollouts):
    pool = new_pool({"law": "v4", "code": str(fragile), "math": "wide"}, max_resident=2, prefetch=True, on_failure=OnFailure.drop)
    before = {item.rollout.prompt.request: pool.hidden(item.signal, item.rollout) for item in pool.score(rollouts)}
    pool.score(of(rollouts, "law", "math"))
    pool.library.discard(pool.teacher_of["code"])
    cut_off(fragile)
    for _ in range(2):
        for item in pool.score(rollouts):
            assert torch.equal(pool.hidden(item.signal, item.rollout), before[item.rollout.prompt.request])
    assert list(pool.dropped) == ["code"]


@pytest.mark.parametrize("kind", [SignalKind.top_k, SignalKind.sampled_token])
def test_a_teacher_that_gives_nan_gives_no_other_signal_either(kind, new_pool, nan_teacher, rollouts):
    pool = new_pool({"law": "v4", "code": nan_teacher}, signal=kind, top_k=4)
    with pytest.raises(TeacherFailure, match="gave NaN or infinity"):
        pool.score(of(rollouts, "law", "code"))


def test_a_config_that_is_edited_in_the_run_changes_nothing(pool, fragile, rollouts):
    """The model without memory was made from the config at the start, so that a later edit of it changes nothing."""
    before = [pool.hidden(item.signal, item.rollout) for item in pool.score(of(rollouts, "code"))]
    file = fragile / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 0.5}))
    pool.score(of(rollouts, "law"))
    after = [pool.hidden(item.signal, item.rollout) for item in pool.score(of(rollouts, "code"))]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_teacher_whose_adapter_is_damaged_is_named_and_reads_it_anew(folders, tokenizer, rollouts, tmp_path):
    """The adapter stays in memory while its base does, so that the second attempt has to read both."""
    model = get_peft_model(load_model(ModelConfig(model=folders["qwen"]), "base"), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.save_pretrained(tmp_path / "adapter")
    pool = TeacherPool({"law": DomainConfig(teacher=TeacherConfig(model=folders["qwen"], adapter=str(tmp_path / "adapter")))}, TeachersConfig(), tokenizer, CPU)
    file = tmp_path / "adapter" / "adapter_model.safetensors"

    class Mend(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}, file)

    mend = Mend()
    logging.getLogger("teachers.pool").addHandler(mend)
    try:
        [item, *_] = pool.score(of(rollouts, "law"))
    finally:
        logging.getLogger("teachers.pool").removeHandler(mend)
    plain = Teacher("oracle", load_model(ModelConfig(model=folders["qwen"]), "oracle"))
    assert torch.allclose(pool.hidden(item.signal, item.rollout), plain.hidden([item.rollout], 1000)[0], atol=1e-5)
