"""From data sets to tokenised prompts: files, columns, lengths, held-out rows, and what is refused."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from rollout.config import HeldOutConfig, PromptsConfig, SourceConfig, TooLong
from rollout.prompts import DomainPrompts, load_domain_prompts, load_held_out, load_prompts, load_rows
from rollout.synthetic import synthetic_rows


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def json_lines(path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ROWS = [{"prompt": "2+2=", "answer": "4"}, {"prompt": "3+3=", "answer": "6"}, {"prompt": "1+1=", "answer": "2"}]


def write(path, rows: list[dict]) -> str:
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        json_lines(path, rows)
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_file_gives_its_rows_in_order(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix}", ROWS)
    assert load_rows(SourceConfig(path=path), "law") == ROWS


def test_a_folder_gives_the_rows_of_its_split(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl", ROWS[:2])
    write(folder / "test.jsonl", ROWS[2:])
    assert load_rows(SourceConfig(path=str(folder)), "law") == ROWS[:2]
    assert load_rows(SourceConfig(path=str(folder), split="test"), "law") == ROWS[2:]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_columns_are_mapped_to_our_names_and_others_left_out(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix}", [{"question": "2+2=", "solution": 4, "level": "easy"}])
    assert load_rows(SourceConfig(path=path, columns={"prompt": "question", "answer": "solution"}), "law") == [{"prompt": "2+2=", "answer": "4"}]


def test_conversations_come_through_files_turn_by_turn(tmp_path):
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "v"}]
    for suffix in (".jsonl", ".parquet"):
        assert load_rows(SourceConfig(path=write(tmp_path / f"rows{suffix}", [{"messages": messages}])), "law") == [{"messages": messages}]


def test_rows_takes_the_first_ones(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    assert load_rows(SourceConfig(path=path, rows=2), "law") == ROWS[:2]
    assert load_rows(SourceConfig(path=path, rows=9), "law") == ROWS


def test_a_source_without_path_is_refused():
    with pytest.raises(ValueError, match="law has no prompts: set its path"):
        load_rows(SourceConfig(), "law")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_missing_file_is_refused(tmp_path, suffix):
    with pytest.raises(ValueError, match=rf"law: there is no file .*nowhere\{suffix}"):
        load_rows(SourceConfig(path=str(tmp_path / f"nowhere{suffix}")), "law")


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"law: the data set .*nowhere cannot be read"):
        load_rows(SourceConfig(path=str(tmp_path / "nowhere")), "law")


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file_is_refused(tmp_path, text):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"^law: the data set .*rows\.jsonl (is empty|cannot be read)"):
        load_rows(SourceConfig(path=str(tmp_path / "rows.jsonl")), "law")


def test_a_parquet_file_without_rows_is_refused(tmp_path):
    pa.parquet.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"law: the data set .*rows\.parquet"):
        load_rows(SourceConfig(path=str(tmp_path / "rows.parquet")), "law")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_damaged_file_is_refused_with_the_sources_name(tmp_path, suffix):
    (tmp_path / f"rows{suffix}").write_text('{"prompt": "2+2="')
    with pytest.raises(ValueError, match=rf"^law: the data set .*rows\{suffix} cannot be read"):
        load_rows(SourceConfig(path=str(tmp_path / f"rows{suffix}")), "law")


def test_a_mapped_column_that_the_data_lacks_is_refused_with_those_it_has(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ValueError, match="law: the data has no column 'question'; it has prompt, answer"):
        load_rows(SourceConfig(path=path, columns={"prompt": "question"}), "law")


def test_a_misspelt_name_in_columns_is_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ValueError, match="law: columns maps 'promt', but the names to map are prompt, messages, answer, slip"):
        load_rows(SourceConfig(path=path, columns={"promt": "prompt"}), "law")


def test_synthetic_rows_need_a_number():
    with pytest.raises(ValueError, match="law is synthetic, hence endless: set rows"):
        load_rows(SourceConfig(path="synthetic:sorting"), "law")


def test_synthetic_rows_are_of_the_difficulty_asked_for():
    lengths = [{len(row["answer"]) for row in load_rows(SourceConfig(path="synthetic:sorting", rows=20, difficulty=level), "law")} for level in (1, 2, 3)]
    assert lengths == [{6}, {8}, {10}]


def test_a_difficulty_of_data_that_has_none_is_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"law: .*rows\.jsonl is not synthetic, so difficulty=2 would be ignored: leave it out"):
        load_rows(SourceConfig(path=path, difficulty=2), "law")


@pytest.mark.parametrize("path", ["synthetic:sorting", "rows.jsonl"])
@pytest.mark.parametrize("rows", [0, -1])
def test_asking_for_no_rows_is_refused(path, rows):
    with pytest.raises(ValueError, match=f"law asks for rows={rows}"):
        load_rows(SourceConfig(path=path, rows=rows), "law")


# From rows to tokenised domains


def lengths_of(domain: DomainPrompts, source: str = "prompts") -> list[int]:
    return [len(row["tokens"]) for row in domain.sources[source]]


LONG_SECOND = [{"prompt": "short"}, {"prompt": "x" * 40}, {"prompt": "also short"}]


def test_rows_become_tokens_with_answer_and_slip(tmp_path, tokenizer):
    path = json_lines(tmp_path / "rows.jsonl", [{"prompt": "2+2=", "answer": 4, "slip": "5"}])
    rows = load_domain_prompts("law", PromptsConfig(path=path), tokenizer, longest=20).sources["prompts"]
    assert rows == [{"index": 0, "tokens": tokenizer("<bos><user>2+2=<assistant>")["input_ids"], "answer": "4", "slip": "5"}]


def test_rows_of_a_domain_with_a_backspace_have_their_repaired_answers(tokenizer):
    rows = load_domain_prompts("law", PromptsConfig(path="synthetic:backspace", rows=5), tokenizer, longest=20).sources["prompts"]
    assert [row["repaired"] for row in rows] == [row["repaired"] for row in synthetic_rows("backspace", "train", 5)]


def test_a_prompt_too_long_is_refused_by_row(tmp_path, tokenizer):
    path = json_lines(tmp_path / "rows.jsonl", LONG_SECOND)
    with pytest.raises(ValueError, match="prompt in row law/prompts:1 has 43 tokens and only 20 fit"):
        load_domain_prompts("law", PromptsConfig(path=path), tokenizer, longest=20)


def test_a_prompt_too_long_is_dropped_and_counted_where_asked(tmp_path, tokenizer):
    path = json_lines(tmp_path / "rows.jsonl", LONG_SECOND)
    domain = load_domain_prompts("law", PromptsConfig(path=path, too_long=TooLong.drop), tokenizer, longest=20)
    assert (lengths_of(domain), domain.dropped["too_long"]) == ([8, 13], 1)


def test_a_prompt_that_just_fits_is_kept(tmp_path, tokenizer):
    path = json_lines(tmp_path / "rows.jsonl", LONG_SECOND)
    domain = load_domain_prompts("law", PromptsConfig(path=path), tokenizer, longest=43)
    assert (lengths_of(domain), domain.num_dropped) == ([8, 43, 13], 0)


def test_a_domain_all_of_whose_prompts_are_too_long_is_refused(tmp_path, tokenizer):
    path = json_lines(tmp_path / "rows.jsonl", LONG_SECOND)
    with pytest.raises(ValueError, match=r"domain law, source prompts .* has no usable prompt"):
        load_domain_prompts("law", PromptsConfig(path=path, too_long=TooLong.drop), tokenizer, longest=5)


def test_each_source_is_read_on_its_own(tmp_path, tokenizer):
    files = {"easy": json_lines(tmp_path / "easy.jsonl", ROWS[:1]), "hard": json_lines(tmp_path / "hard.jsonl", [{"q": "9*9="}])}
    sources = {"easy": SourceConfig(path=files["easy"]), "hard": SourceConfig(path=files["hard"], columns={"prompt": "q"}, weight=2.0)}
    domain = load_domain_prompts("law", PromptsConfig(sources=sources), tokenizer, longest=20)
    texts = {name: tokenizer.decode(rows[0]["tokens"]) for name, rows in domain.sources.items()}
    assert texts == {"easy": "<bos><user>2+2=<assistant>", "hard": "<bos><user>9*9=<assistant>"}


@pytest.mark.parametrize("settings", [
    {"path": "x.jsonl"}, {"rows": 5}, {"columns": {"prompt": "q"}}, {"weight": 2.0}, {"split": "test"}, {"name": "main"}, {"difficulty": 2},
])  # fmt: skip
def test_settings_beside_sources_that_would_be_ignored_are_refused(tokenizer, settings):
    cfg = PromptsConfig(sources={"a": SourceConfig(path="synthetic:sorting", rows=5)}, **settings)
    with pytest.raises(ValueError, match=r"domain law has prompts\.sources, so .* would be ignored"):
        load_domain_prompts("law", cfg, tokenizer, longest=20)


def test_a_weight_without_sources_would_be_ignored_and_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"prompts\.weight=0\.5 would be ignored: its part of a step is prompts\.share"):
        load_domain_prompts("law", PromptsConfig(path="synthetic:sorting", rows=5, weight=0.5), tokenizer, longest=20)


@pytest.mark.parametrize("weights", [(-1.0, 2.0), (0.0, 0.0), (float("nan"), 1.0)])
def test_weights_that_are_no_shares_are_refused(tokenizer, weights):
    sources = {name: SourceConfig(path="synthetic:sorting", rows=5, weight=weight) for name, weight in zip("ab", weights, strict=True)}
    with pytest.raises(ValueError, match="domain law: the weights of its sources must be numbers >= 0"):
        load_domain_prompts("law", PromptsConfig(sources=sources), tokenizer, longest=20)


def test_every_domain_is_loaded_under_its_name(tokenizer):
    cfgs = {name: PromptsConfig(path=f"synthetic:{name}", rows=5) for name in ("sorting", "tools")}
    assert {name: (domain.name, len(domain.sources["prompts"])) for name, domain in load_prompts(cfgs, tokenizer, longest=30).items()} == {
        "sorting": ("sorting", 5),
        "tools": ("tools", 5),
    }


def test_held_out_prompts_are_rendered_as_the_training_prompts_are(tmp_path, tokenizer):
    path = json_lines(tmp_path / "test.jsonl", [{"q": "2+2=", "a": "4"}])
    cfgs = {"law": PromptsConfig(path="train.jsonl", rows=3, columns={"prompt": "other"}, system_prompt="brief")}
    sources = {"law": HeldOutConfig(path=path, columns={"prompt": "q", "answer": "a"})}
    (row,) = load_held_out(cfgs, sources, tokenizer, longest=40)["law"].sources["held_out"]
    assert (tokenizer.decode(row["tokens"]), row["answer"]) == ("<bos><system>brief<user>2+2=<assistant>", "4")


def test_a_domain_without_held_out_path_has_no_held_out_prompts(tokenizer):
    cfgs = {name: PromptsConfig(path="synthetic:sorting", rows=5) for name in ("law", "code")}
    sources = {"law": HeldOutConfig(), "code": HeldOutConfig(path="synthetic:sorting", split="held_out", rows=5)}
    assert list(load_held_out(cfgs, sources, tokenizer, longest=30)) == ["code"]


def test_held_out_rows_are_known_by_their_content(tmp_path, tokenizer):
    def known(answer: str, name: str) -> tuple[int, str] | None:
        path = json_lines(tmp_path / name, [{"prompt": "2+2=", "answer": answer}])
        cfgs = {"law": PromptsConfig(path="synthetic:sorting", rows=5)}
        return load_prompts(cfgs, tokenizer, 40, {"law": HeldOutConfig(path=path)})["law"].held_out

    assert known("4", "a.jsonl") == known("4", "b.jsonl")
    assert known("4", "a.jsonl") != known("5", "c.jsonl")
    assert known("4", "a.jsonl")[0] == 1
    assert load_prompts({"law": PromptsConfig(path="synthetic:sorting", rows=5)}, tokenizer, 40, {"law": HeldOutConfig()})["law"].held_out is None


def test_held_out_prompts_too_long_are_dropped_and_counted(tmp_path, tokenizer):
    path = json_lines(tmp_path / "test.jsonl", LONG_SECOND)
    domain = load_held_out({"law": PromptsConfig(too_long=TooLong.drop)}, {"law": HeldOutConfig(path=path)}, tokenizer, longest=20)["law"]
    assert (lengths_of(domain, "held_out"), domain.dropped["too_long"]) == ([8, 13], 1)


def test_held_out_prompts_too_long_are_refused_as_the_domains_are(tmp_path, tokenizer):
    path = json_lines(tmp_path / "test.jsonl", LONG_SECOND)
    with pytest.raises(ValueError, match="too_long=drop"):
        load_held_out({"law": PromptsConfig()}, {"law": HeldOutConfig(path=path)}, tokenizer, longest=20)


def test_a_row_keeps_its_place_in_the_data_when_another_is_dropped(tmp_path, tokenizer):
    path = json_lines(tmp_path / "rows.jsonl", LONG_SECOND)
    domain = load_domain_prompts("law", PromptsConfig(path=path, too_long=TooLong.drop), tokenizer, longest=20)
    assert [row["index"] for row in domain.sources["prompts"]] == [0, 2]


def test_a_slice_of_a_file_is_that_slice(tmp_path):
    path = json_lines(tmp_path / "rows.jsonl", [{"prompt": str(number)} for number in range(10)])
    assert [row["prompt"] for row in load_rows(SourceConfig(path=path, split="train[80%:]"), "law")] == ["8", "9"]


@pytest.mark.parametrize("setting", [{"split": "validation"}, {"revision": "main"}, {"name": "default"}])
def test_a_setting_that_a_file_would_ignore_is_refused(tmp_path, setting):
    path = json_lines(tmp_path / "rows.jsonl", [{"prompt": "2+2="}])
    with pytest.raises(ValueError, match="would be ignored"):
        load_rows(SourceConfig(path=path, **setting), "law")


def test_messages_in_a_column_called_prompt_are_messages_only(tmp_path):
    turns = [{"role": "user", "content": "2+2="}]
    path = json_lines(tmp_path / "rows.jsonl", [{"prompt": turns}])
    [row] = load_rows(SourceConfig(path=path, columns={"messages": "prompt"}), "law")
    assert row == {"messages": turns}
