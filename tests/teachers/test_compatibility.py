"""What is refused at start-up, by the domain's name: teachers that are not there, or do not read the student's tokens."""

import copy
from pathlib import Path

import pytest
import torch

from rollout.config import PromptsConfig
from rollout.synthetic import CHARACTERS, character_tokenizer
from teachers.compatibility import check_teacher, model_facts, template_fingerprint, tokenizer_fingerprint
from teachers.config import DomainConfig, TeacherConfig, TeachersConfig
from teachers.pool import TeacherPool


@pytest.fixture
def teacher_with_tokenizer(saved_qwen3_moe, changed_checkpoint):
    """teacher_with_tokenizer(tokenizer): the settings of a teacher whose folder holds that tokenizer."""

    def make(tokenizer) -> TeacherConfig:
        folder = changed_checkpoint(saved_qwen3_moe)
        tokenizer.save_pretrained(folder)
        return TeacherConfig(model=str(folder))

    return make


@pytest.mark.parametrize("saved", ["saved_v4", "saved_qwen3_moe"])
def test_a_teacher_of_either_family_with_the_students_tokenizer_is_accepted(request, tokenizer, saved):
    check_teacher("law", TeacherConfig(model=str(request.getfixturevalue(saved))), tokenizer)


def test_a_domain_without_teacher_is_refused_with_the_key_to_set(tokenizer):
    with pytest.raises(ValueError, match=r"domain law has no teacher: set domains\.law\.teacher\.model"):
        check_teacher("law", TeacherConfig(), tokenizer)


def test_a_missing_folder_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"the teacher of law is not at .*nowhere"):
        check_teacher("law", TeacherConfig(model=str(tmp_path / "nowhere")), tokenizer)


def test_a_hub_id_that_cannot_be_reached_is_refused(tokenizer):
    with pytest.raises(ValueError, match="the teacher of law cannot be read from nobody/nothing"):
        check_teacher("law", TeacherConfig(model="nobody/nothing"), tokenizer)


def test_an_unknown_family_is_refused(saved_qwen3_moe, changed_checkpoint, tokenizer):
    folder = changed_checkpoint(saved_qwen3_moe, config={"model_type": "nonsense"})
    with pytest.raises(ValueError, match=r"the teacher of law cannot be read from .*nonsense"):
        check_teacher("law", TeacherConfig(model=str(folder)), tokenizer)


@pytest.mark.parametrize("saved", ["saved_v4", "saved_qwen3_moe"])
def test_a_folder_without_tokenizer_is_refused(request, changed_checkpoint, tokenizer, saved):
    folder = changed_checkpoint(request.getfixturevalue(saved))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"the teacher of law cannot be read from .*: no tokenizer"):
        check_teacher("law", TeacherConfig(model=str(folder)), tokenizer)


def test_a_tokenizer_that_exchanges_two_tokens_is_refused(teacher_with_tokenizer, tokenizer, monkeypatch):
    monkeypatch.setattr("rollout.synthetic.CHARACTERS", CHARACTERS[1] + CHARACTERS[0] + CHARACTERS[2:])
    exchanged = character_tokenizer()
    assert len(exchanged) == len(tokenizer)
    with pytest.raises(ValueError, match=r"the teacher of law \(.*\) has another tokenizer than the student"):
        check_teacher("law", teacher_with_tokenizer(exchanged), tokenizer)


def test_a_tokenizer_with_an_added_token_is_refused(teacher_with_tokenizer, tokenizer):
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["<think>"])
    with pytest.raises(ValueError, match=r"the teacher of law .* has another tokenizer than the student"):
        check_teacher("law", teacher_with_tokenizer(larger), tokenizer)


def test_a_teacher_with_another_end_token_is_refused(teacher_with_tokenizer, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<pad>"
    with pytest.raises(ValueError, match="the teacher of law ends a sequence with token 0, the student with 2"):
        check_teacher("law", teacher_with_tokenizer(other), tokenizer)


def test_a_teacher_with_fewer_vocabulary_rows_than_tokens_is_refused(saved_qwen3_moe, changed_checkpoint, tokenizer):
    folder = changed_checkpoint(saved_qwen3_moe, config={"vocab_size": len(tokenizer) - 1})
    with pytest.raises(ValueError, match=f"the teacher of law has {len(tokenizer) - 1} vocabulary rows, fewer than the tokenizer's {len(tokenizer)}"):
        check_teacher("law", TeacherConfig(model=str(folder)), tokenizer)


def test_a_teacher_with_padded_vocabulary_rows_is_accepted(saved_qwen3_moe, changed_checkpoint, tokenizer):
    check_teacher("law", TeacherConfig(model=str(changed_checkpoint(saved_qwen3_moe, config={"vocab_size": 128}))), tokenizer)


def test_equal_vocabularies_have_equal_fingerprints_whatever_the_template(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = None
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(tokenizer)


@pytest.fixture
def other_template(teacher_with_tokenizer, tokenizer):
    """other_template("..."): the settings of a teacher whose tokenizer has that chat template."""

    def make(template: str | None) -> TeacherConfig:
        other = copy.deepcopy(tokenizer)
        other.chat_template = template
        cfg = teacher_with_tokenizer(other)
        if template is None:
            (Path(cfg.model) / "chat_template.jinja").unlink(missing_ok=True)
        return cfg

    return make


@pytest.mark.parametrize(("template", "what"), [("{{ messages[0]['content'] }}", "another chat template than the student"), (None, "no chat template")])
def test_another_chat_template_is_refused_where_it_would_be_used(other_template, tokenizer, template, what):
    cfg = other_template(template)
    with pytest.raises(ValueError, match=f"the teacher of law .* has {what}, .*: give both the same, or accept it with teachers.allow_other_template=true"):
        check_teacher("law", cfg, tokenizer, needs_template=True)
    check_teacher("law", cfg, tokenizer, needs_template=False)


@pytest.mark.parametrize("accepted", ["raw", "allow_other_template"])
def test_the_pool_accepts_another_template_of_raw_domains_and_where_it_is_allowed(other_template, tokenizer, accepted):
    def pool(**settings) -> TeacherPool:
        prompts = PromptsConfig(raw=settings.get("raw", False))
        domains = {"law": DomainConfig(teacher=cfg, prompts=prompts)}
        return TeacherPool(domains, TeachersConfig(allow_other_template=settings.get("allow_other_template", False)), tokenizer, torch.device("cpu"))

    cfg = other_template("{{ messages[0]['content'] }}")
    with pytest.raises(ValueError, match="another chat template"):
        pool()
    pool(**{accepted: True})


def test_a_teacher_that_begins_with_another_token_is_refused(teacher_with_tokenizer, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.bos_token = "<user>"
    with pytest.raises(ValueError, match="the teacher of law has <user> as its bos_token, the student <bos>: give both the same tokenizer files"):
        check_teacher("law", teacher_with_tokenizer(other), tokenizer)


def test_another_padding_token_is_accepted(teacher_with_tokenizer, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.pad_token = "<unk>"
    check_teacher("law", teacher_with_tokenizer(other), tokenizer)


def test_facts_of_a_teacher_are_those_of_its_files(saved_qwen3_moe, changed_checkpoint, tokenizer):
    facts = model_facts(TeacherConfig(model=str(changed_checkpoint(saved_qwen3_moe, config={"vocab_size": 128, "dtype": "bfloat16"}))), "teacher of law")
    assert (facts.vocab_rows, facts.context, facts.stored_dtype) == (128, 256, "bfloat16")
    assert (facts.tokenizer, facts.template) == (tokenizer_fingerprint(tokenizer), template_fingerprint(tokenizer))
