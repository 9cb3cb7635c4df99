"""The table of a run's data, and prompts shown as the models read them."""

import json

import pytest

from rollout.config import HeldOutConfig, PromptsConfig, SourceConfig, TooLong
from rollout.data_report import DomainReport, data_report, report_table, show_prompts
from rollout.prompts import DomainPrompts, load_domain_prompts, load_prompts

TALE = "an old ferryman rows nine goats over the wide river before the church bells of the far town ring"


@pytest.fixture
def file(tmp_path):
    """file("name", [{...}, ...]): a .jsonl of these rows."""

    def write(name: str, rows: list[dict]) -> str:
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / f"{name}.jsonl")

    return write


@pytest.fixture
def prompts(file, tokenizer) -> dict[str, DomainPrompts]:
    """law: six rows, of which one is too long, one comes twice, one is also in code, one is held out and one shares words with what is."""
    law = file("law", [{"prompt": text} for text in ["1", "2", "1", "x" * 200, "held out", f"so {TALE}"]])
    cfgs = {
        "law": PromptsConfig(path=law, too_long=TooLong.drop, exclude_held_out=True),
        "code": PromptsConfig(path=file("code", [{"prompt": "2"}, {"prompt": "3"}])),
    }
    held_out = {"law": HeldOutConfig(path=file("test", [{"prompt": "held out"}, {"prompt": TALE}])), "code": HeldOutConfig()}
    return load_prompts(cfgs, tokenizer, 150, held_out)


def test_the_report_counts_rows_by_what_became_of_them(prompts):
    law = DomainReport(
        read=6, used=3, dropped_too_long=1, dropped_held_out=2, duplicates_within=1, duplicates_across=1, held_out_equal=1, held_out_13_gram=1
    )
    code = DomainReport(
        read=2, used=2, dropped_too_long=0, dropped_held_out=0, duplicates_within=0, duplicates_across=1, held_out_equal=0, held_out_13_gram=0
    )
    assert data_report(prompts) == {"law": law, "code": code}


def test_the_table_has_a_column_for_each_count(prompts):
    header, rows = report_table(data_report(prompts))
    assert rows == [["law", "6", "3", "1", "2", "1", "1", "1", "1"], ["code", "2", "2", "0", "0", "0", "1", "0", "0"]]
    assert len(header) == len(rows[0])


def ids(text: str, tokenizer) -> str:
    return " ".join(str(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_prompt_is_shown_with_template_special_tokens_and_ids_and_its_answer_with_its_end(file, tokenizer):
    cfg = PromptsConfig(path=file("law", [{"prompt": "2+2=", "answer": "4"}]), system_prompt="brief")
    shown = show_prompts({"law": load_domain_prompts("law", cfg, tokenizer, 60)}, tokenizer, 3).splitlines()
    text = "<bos><system>brief<user>2+2=<assistant>"
    assert shown == [
        "law/prompts:0, 17 tokens, the same for student and teacher".replace("17", str(len(ids(text, tokenizer).split()))),
        f"  prompt text: {text}",
        f"  prompt ids:  {ids(text, tokenizer)}",
        "  answer text: 4<eos>",
        f"  answer ids:  {ids('4<eos>', tokenizer)}",
        "",
    ]


def test_a_row_without_an_answer_shows_none(file, tokenizer):
    shown = show_prompts({"law": load_domain_prompts("law", PromptsConfig(path=file("law", [{"prompt": "2"}])), tokenizer, 60)}, tokenizer, 1)
    assert "answer" not in shown


def test_the_first_rows_in_use_of_every_source_are_shown(file, tokenizer):
    sources = {name: SourceConfig(path=file(name, [{"prompt": "x" * 99}, *({"prompt": f"{name} {n}"} for n in range(5))])) for name in ("easy", "hard")}
    domain = load_domain_prompts("law", PromptsConfig(sources=sources, too_long=TooLong.drop), tokenizer, 30)
    shown = show_prompts({"law": domain}, tokenizer, 2)
    assert [line.split(",")[0] for line in shown.splitlines() if line.startswith("law/")] == ["law/easy:1", "law/easy:2", "law/hard:1", "law/hard:2"]
