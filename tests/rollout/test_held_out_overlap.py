"""Overlap with held-out prompts from data files to the prompts of a run: what is refused, what is left out, and that clean data stays as it is."""

import json
import random
import re

import datasets
import pytest

from rollout.config import HeldOutConfig, PromptsConfig, SourceConfig, TooLong
from rollout.prompts import DomainPrompts, PromptMixture, load_prompts, require_no_overlap

TALE = "an old ferryman rows nine goats over the wide river before the church bells of the far town ring"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def file(tmp_path):
    """file("name", ["2+2=", ...]): a .jsonl of these prompts; a row that is a list is a conversation."""

    def write(name: str, rows: list) -> str:
        fields = [{"messages" if isinstance(row, list) else "prompt": row, "answer": "a"} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in fields))
        return str(tmp_path / f"{name}.jsonl")

    return write


def load(tokenizer, cfgs: dict[str, PromptsConfig], held_out: dict[str, str | None], longest: int = 400) -> dict[str, DomainPrompts]:
    return load_prompts(cfgs, tokenizer, longest, {name: HeldOutConfig(path=path) for name, path in held_out.items()})


def indices(domain: DomainPrompts, source: str = "prompts") -> list[int]:
    return [row["index"] for row in domain.sources[source]]


def test_an_equal_row_is_refused_with_both_rows_and_the_fix(file, tokenizer):
    cfgs = {"law": PromptsConfig(path=file("law", ["1+1=", "2+2=", "3+3="])), "code": PromptsConfig(path=file("code", ["4+4="]))}
    prompts = load(tokenizer, cfgs, {"law": None, "code": file("test", ["5+5=", "3+3=", "2+2="])})
    sentence = (
        "training row law/prompts:1 is equal to the held-out prompt code/held_out:2 (2 of 3 rows of domain law overlap like this): "
        "remove such rows from the data, or leave them out with domains.law.prompts.exclude_held_out=true"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        require_no_overlap(prompts)


def test_thirteen_shared_words_are_refused(file, tokenizer):
    prompts = load(tokenizer, {"law": PromptsConfig(path=file("law", ["1+1=", f"so {TALE}"]))}, {"law": file("test", [f"now {TALE}"])})
    with pytest.raises(ValueError, match="training row law/prompts:1 shares 13 consecutive words with the held-out prompt law/held_out:0"):
        require_no_overlap(prompts)


def test_rows_that_overlap_are_left_out_and_counted_and_the_others_keep_their_index(file, tokenizer):
    path = file("law", ["1+1=", "2+2=", f"so {TALE}", "3+3=", " 2+2= "])
    [domain] = load(tokenizer, {"law": PromptsConfig(path=path, exclude_held_out=True)}, {"law": file("test", ["2+2=", TALE])}).values()
    require_no_overlap({"law": domain})
    assert indices(domain) == [0, 3]
    assert domain.dropped == {"too_long": 0, "held_out": 3}


def test_each_domain_decides_for_itself(file, tokenizer):
    cfgs = {name: PromptsConfig(path=file(name, ["1+1=", "2+2="]), exclude_held_out=name == "law") for name in ("law", "code")}
    prompts = load(tokenizer, cfgs, {"law": file("test", ["2+2="])})
    assert indices(prompts["law"]) == [0]
    with pytest.raises(ValueError, match=r"code/prompts:1 .* domains\.code\.prompts\.exclude_held_out=true"):
        require_no_overlap(prompts)


def test_rows_of_every_source_are_left_out_and_duplicates_across_sources_counted(file, tokenizer):
    sources = {"easy": SourceConfig(path=file("easy", ["1+1=", "2+2="])), "hard": SourceConfig(path=file("hard", ["2+2=", "9*9=", "1+1="]))}
    [domain] = load(tokenizer, {"law": PromptsConfig(sources=sources, exclude_held_out=True)}, {"law": file("test", ["2+2="])}).values()
    assert (indices(domain, "easy"), indices(domain, "hard")) == ([0], [1, 2])
    assert (domain.overlap.duplicates_within, domain.overlap.duplicates_across) == (2, 0)


def test_a_row_too_long_counts_as_such_and_not_as_held_out(file, tokenizer):
    path = file("law", ["1+1=", "2" * 40, "3+3="])
    cfg = PromptsConfig(path=path, too_long=TooLong.drop, exclude_held_out=True)
    [domain] = load(tokenizer, {"law": cfg}, {"law": file("test", ["2" * 40, "3+3="])}, longest=20).values()
    assert (indices(domain), domain.dropped) == ([0], {"too_long": 1, "held_out": 1})


def test_system_prompt_and_template_of_the_run_are_no_overlap(file, tokenizer):
    cfg = PromptsConfig(path=file("law", ["1+1="]), system_prompt=TALE)
    require_no_overlap(load(tokenizer, {"law": cfg}, {"law": file("test", ["2+2="])}))


def test_a_prompt_and_a_conversation_of_one_turn_are_equal(file, tokenizer):
    prompts = load(tokenizer, {"law": PromptsConfig(path=file("law", [[{"role": "user", "content": "2+2="}]]))}, {"law": file("test", ["2+2="])})
    assert prompts["law"].overlap.held_out[0].is_equal


def test_a_source_of_which_nothing_is_left_is_refused(file, tokenizer):
    cfg = PromptsConfig(path=file("law", ["2+2="]), exclude_held_out=True)
    with pytest.raises(ValueError, match="every prompt of domain law, source prompts overlaps with a held-out prompt"):
        load(tokenizer, {"law": cfg}, {"law": file("test", ["2+2="])})


def test_a_held_out_row_that_is_no_prompt_is_refused(file, tokenizer):
    cfg = PromptsConfig(path=file("law", ["2+2="]))
    with pytest.raises(ValueError, match=r"the messages of row law/held_out:0 must end in a user or tool turn"):
        load(tokenizer, {"law": cfg}, {"law": file("test", [[{"role": "assistant", "content": "4"}]])})


def test_clean_data_gives_the_stream_that_it_gives_without_the_search(file, tokenizer):
    """Also where overlap would be left out: nothing is, so rows, order and source of every prompt stay."""
    rng = random.Random(0)
    paths = {name: file(name, [f"{rng.randrange(10**6)}+{place}=" for place in range(50)]) for name in ("easy", "hard")}

    def stream(held_out: dict | None, **settings) -> list:
        cfg = PromptsConfig(sources={name: SourceConfig(path=path) for name, path in paths.items()}, **settings)
        mixture = PromptMixture(load_prompts({"law": cfg}, tokenizer, 60, held_out), prompts_per_step=8, seed=3)
        return [mixture.next(step) for step in range(20)]

    expected = stream(None)
    held_out = {"law": HeldOutConfig(path=file("test", ["2+2=", TALE]))}
    assert stream(held_out) == stream(held_out, exclude_held_out=True) == expected
