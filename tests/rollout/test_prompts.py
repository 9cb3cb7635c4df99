"""PromptMixture and the reading of data sets: stratified counts, keyed permutations, resumption, files, and what is refused."""

import json
from collections import Counter

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from rollout.config import HeldOutConfig, PromptsConfig, SourceConfig, TooLong
from rollout.prompts import DomainPrompts, PromptMixture, load_domain_prompts, load_held_out, load_prompts, load_rows
from rollout.types import Prompt


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def domain_of(name: str, num_rows: int, share=1.0) -> DomainPrompts:
    rows = [{"tokens": [index], "answer": f"{name}-{index}", "slip": None} for index in range(num_rows)]
    return DomainPrompts(name=name, cfg=PromptsConfig(share=share), sources={"prompts": rows})


def mixture_of(shares: dict, prompts_per_step: int, num_rows: int = 50, seed: int = 0) -> PromptMixture:
    return PromptMixture({name: domain_of(name, num_rows, share) for name, share in shares.items()}, prompts_per_step, seed)


def domain_of_two_sources(weights: tuple[float, float], rows: tuple[int, int] = (40, 60)) -> DomainPrompts:
    cfg = PromptsConfig(sources={name: SourceConfig(path="unread", weight=weight) for name, weight in zip("ab", weights, strict=True)})
    sources = {name: [{"tokens": [index], "answer": None, "slip": None} for index in range(count)] for name, count in zip("ab", rows, strict=True)}
    return DomainPrompts(name="law", cfg=cfg, sources=sources)


def counts_of(prompts: list[Prompt]) -> Counter:
    return Counter(prompt.domain for prompt in prompts)


def rows_of(prompts: list[Prompt]) -> list[tuple[str, str]]:
    return [(prompt.domain, prompt.row) for prompt in prompts]


def json_lines(path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# Which domains a step asks


SHARES = {"law": 5.0, "code": 3.0, "math": 1.7, "rare": 0.3}


def test_a_domains_count_is_within_one_of_its_share_at_every_step():
    mixture = mixture_of(SHARES, prompts_per_step=11)
    for step in range(500):
        counts = counts_of(mixture.next(step))
        assert counts.total() == 11
        assert all(abs(counts[name] - share / 10 * 11) < 1 for name, share in SHARES.items())


def test_counts_are_right_on_average():
    mixture = mixture_of(SHARES, prompts_per_step=11)
    steps = 3000
    totals = sum((counts_of(mixture.next(step)) for step in range(steps)), Counter())
    assert {name: totals[name] / steps for name in SHARES} == pytest.approx({name: share / 10 * 11 for name, share in SHARES.items()}, abs=0.03)


def test_shares_are_divided_by_their_sum():
    assert mixture_of(SHARES, 1).asked_shares(0) == pytest.approx({"law": 0.5, "code": 0.3, "math": 0.17, "rare": 0.03})


def test_a_scheduled_share_holds_from_its_step_on():
    mixture = mixture_of({"law": {0: 1.0, 5: 0.0}, "code": {0: 0.0, 3: 1.0}}, prompts_per_step=4)
    asked = [dict(counts_of(mixture.next(step))) for step in range(8)]
    assert asked == [{"law": 4}] * 3 + [{"law": 2, "code": 2}] * 2 + [{"code": 4}] * 3


def test_a_domain_of_share_zero_is_never_asked():
    mixture = mixture_of({"law": 0.3, "never": 0.0, "code": 0.6, "also never": 0}, prompts_per_step=7)
    assert all(not {"never", "also never"} & set(counts_of(mixture.next(step))) for step in range(300))


def test_a_step_in_which_every_share_is_zero_is_refused():
    mixture = mixture_of({"law": {0: 1.0, 2: 0.0}}, prompts_per_step=4)
    mixture.next(1)
    with pytest.raises(ValueError, match=r"every domain's prompts\.share is 0 at step 2"):
        mixture.next(2)


def test_no_domains_are_refused():
    with pytest.raises(ValueError, match="no domain is selected"):
        PromptMixture({}, 4, seed=0)


# Which rows a step asks


def test_requests_are_numbered_through_the_run():
    mixture = mixture_of(SHARES, prompts_per_step=5)
    assert [prompt.request for step in range(4) for prompt in mixture.next(step)] == list(range(20))


def test_each_epoch_is_another_permutation_of_the_rows():
    mixture = mixture_of({"law": 1.0}, prompts_per_step=10, num_rows=30)
    epochs = [[prompt.row for step in range(epoch * 3, epoch * 3 + 3) for prompt in mixture.next(step)] for epoch in range(3)]
    assert all(sorted(epoch) == sorted(f"prompts:{index}" for index in range(30)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != [f"prompts:{index}" for index in range(30)]


def test_two_domains_of_the_same_size_are_shuffled_differently():
    mixture = mixture_of({"law": 1.0, "code": 1.0}, prompts_per_step=60, num_rows=30)
    prompts = mixture.next(0)
    assert [p.row for p in prompts if p.domain == "law"] != [p.row for p in prompts if p.domain == "code"]


def test_a_prompt_is_the_row_it_names():
    for prompt, row in mixture_of(SHARES, prompts_per_step=20).next_rows(0):
        index = int(prompt.row.removeprefix("prompts:"))
        assert prompt.tokens == (index,) == tuple(row["tokens"])
        assert prompt.answer == f"{prompt.domain}-{index}" == row["answer"]


def test_the_stream_is_a_function_of_its_seed():
    streams = [[rows_of(mixture.next(step)) for step in range(5)] for mixture in (mixture_of(SHARES, 20, seed=seed) for seed in (0, 0, 1))]
    assert streams[0] == streams[1] != streams[2]


@pytest.mark.parametrize("stopped_at", [1, 4, 9])
def test_a_stream_resumed_from_its_state_equals_an_uninterrupted_one(stopped_at):
    def new_mixture():
        return PromptMixture({"law": domain_of_two_sources((3.0, 1.0)), "code": domain_of("code", 13)}, prompts_per_step=8, seed=0)

    uninterrupted, stopped, resumed = new_mixture(), new_mixture(), new_mixture()
    expected = [uninterrupted.next(step) for step in range(12)]
    for step in range(stopped_at):
        stopped.next(step)
    resumed.restore(json.loads(json.dumps(stopped.state())))
    assert [resumed.next(step) for step in range(stopped_at, 12)] == expected[stopped_at:]


def test_a_state_is_a_copy_that_later_steps_do_not_change():
    mixture = mixture_of({"law": 1.0}, prompts_per_step=4)
    mixture.next(0)
    state = mixture.state()
    mixture.next(1)
    assert state == {"law": {"prompts": 4}}


def test_a_domain_that_joins_at_a_resume_starts_from_its_first_row():
    old = mixture_of({"law": 1.0}, prompts_per_step=4)
    old.next(0)
    mixture = mixture_of({"law": 1.0, "code": 1.0}, prompts_per_step=4)
    mixture.restore(old.state())
    assert mixture.state() == {"law": {"prompts": 4}, "code": {}}
    fresh = mixture_of({"code": 1.0}, prompts_per_step=1)
    assert next(prompt.row for prompt in mixture.next(1) if prompt.domain == "code") == fresh.next(0)[0].row


def test_sources_are_drawn_by_their_weights():
    mixture = PromptMixture({"law": domain_of_two_sources((3.0, 1.0))}, prompts_per_step=4000, seed=0)
    drawn = Counter(prompt.row.split(":")[0] for prompt in mixture.next(0))
    assert drawn["a"] / 4000 == pytest.approx(0.75, abs=0.025)


def test_a_source_of_weight_zero_is_never_drawn():
    mixture = PromptMixture({"law": domain_of_two_sources((1.0, 0.0))}, prompts_per_step=500, seed=0)
    assert {prompt.row.split(":")[0] for prompt in mixture.next(0)} == {"a"}


def test_each_source_goes_through_all_its_rows_before_it_repeats_one():
    mixture = PromptMixture({"law": domain_of_two_sources((1.0, 1.0))}, prompts_per_step=1000, seed=0)
    drawn = [prompt.row for prompt in mixture.next(0)]
    for source, rows in (("a", 40), ("b", 60)):
        own = [row for row in drawn if row.startswith(source)]
        assert all(len(set(own[start : start + rows])) == rows for start in range(0, len(own) - rows, rows))


# Reading data sets


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
    assert rows == [{"tokens": tokenizer("<bos><user>2+2=<assistant>")["input_ids"], "answer": "4", "slip": "5"}]


def test_a_prompt_too_long_is_refused_by_row(tmp_path, tokenizer):
    path = json_lines(tmp_path / "rows.jsonl", LONG_SECOND)
    with pytest.raises(ValueError, match="prompt in row law/prompts:1 has 43 tokens and only 20 fit"):
        load_domain_prompts("law", PromptsConfig(path=path), tokenizer, longest=20)


def test_a_prompt_too_long_is_dropped_and_counted_where_asked(tmp_path, tokenizer):
    path = json_lines(tmp_path / "rows.jsonl", LONG_SECOND)
    domain = load_domain_prompts("law", PromptsConfig(path=path, too_long=TooLong.drop), tokenizer, longest=20)
    assert (lengths_of(domain), domain.dropped) == ([8, 13], 1)


def test_a_prompt_that_just_fits_is_kept(tmp_path, tokenizer):
    path = json_lines(tmp_path / "rows.jsonl", LONG_SECOND)
    domain = load_domain_prompts("law", PromptsConfig(path=path), tokenizer, longest=43)
    assert (lengths_of(domain), domain.dropped) == ([8, 43, 13], 0)


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


@pytest.mark.parametrize("settings", [{"path": "x.jsonl"}, {"rows": 5}, {"columns": {"prompt": "q"}}, {"weight": 2.0}, {"split": "test"}, {"name": "main"}])
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


def test_held_out_prompts_too_long_are_dropped_and_counted(tmp_path, tokenizer):
    path = json_lines(tmp_path / "test.jsonl", LONG_SECOND)
    domain = load_held_out({"law": PromptsConfig()}, {"law": HeldOutConfig(path=path)}, tokenizer, longest=20)["law"]
    assert (lengths_of(domain, "held_out"), domain.dropped) == ([8, 13], 1)
