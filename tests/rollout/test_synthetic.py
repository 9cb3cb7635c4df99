"""The embedded domains' rows: always the same, in disjoint splits at every difficulty, as many as asked; and the character tokenizer."""

import hashlib
import json

import pytest
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from opd.__main__ import load_config
from rollout.prompts import load_prompts, require_no_overlap
from rollout.synthetic import CHARACTERS, SYNTHETIC_DOMAINS, character_tokenizer, is_held_out, synthetic_rows
from rollout.synthetic_rules import DIFFICULTIES

TRAIN, HELD_OUT = 6000, 2000


@pytest.fixture(params=SYNTHETIC_DOMAINS, scope="module")
def domain(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def train(domain) -> list[dict[str, str]]:
    return synthetic_rows(domain, "train", TRAIN)


@pytest.fixture(scope="module")
def held_out(domain) -> list[dict[str, str]]:
    return synthetic_rows(domain, "held_out", HELD_OUT)


def test_the_quickstarts_rows_are_those_that_its_recorded_results_come_from(golden_dir):
    """They are the same at the default difficulty whatever is added to the rules."""
    golden = json.loads((golden_dir / "synthetic_rows.json").read_text())
    assert list(golden) == ["arithmetic", "sorting", "brackets", "tools"]
    for name, splits in golden.items():
        for split, expected in splits.items():
            rows = synthetic_rows(name, split, expected["rows"])
            assert rows[:3] == expected["first"]
            assert hashlib.sha256(json.dumps(rows).encode()).hexdigest() == expected["sha256"]


def test_train_and_held_out_prompts_are_disjoint(train, held_out):
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}


def test_the_split_of_a_prompt_follows_from_its_text(train, held_out):
    assert not any(is_held_out(row["prompt"]) for row in train)
    assert all(is_held_out(row["prompt"]) for row in held_out)


@pytest.mark.parametrize("name", SYNTHETIC_DOMAINS)
def test_no_training_prompt_of_any_difficulty_is_held_out_at_another(name):
    rows = {split: [row for difficulty in DIFFICULTIES for row in synthetic_rows(name, split, 500, difficulty)] for split in ("train", "held_out")}
    train, held_out = ({row["prompt"] for row in rows[split]} for split in ("train", "held_out"))
    assert not train & held_out
    assert not any(is_held_out(prompt) for prompt in train)
    assert all(is_held_out(prompt) for prompt in held_out)
    assert len(train) == len(held_out) == 500 * len(DIFFICULTIES), "and no prompt is drawn at two difficulties"


def test_there_are_as_many_distinct_rows_as_asked(train, held_out):
    assert len({row["prompt"] for row in train}) == TRAIN
    assert len({row["prompt"] for row in held_out}) == HELD_OUT


def test_fewer_rows_are_the_first_of_more_rows(domain, train):
    assert synthetic_rows(domain, "train", 100) == synthetic_rows(domain, "train", 100, difficulty=1) == train[:100]


def test_the_shipped_domains_ask_for_rows_that_exist(domain, conf_dir):
    cfg = OmegaConf.load(conf_dir / "domain" / f"{domain}.yaml")
    assert cfg.prompts.path == cfg.held_out.path == f"synthetic:{domain}"
    assert cfg.held_out.rows >= 1000
    assert len(synthetic_rows(domain, "train", cfg.prompts.rows)) == cfg.prompts.rows
    assert len(synthetic_rows(domain, cfg.held_out.split, cfg.held_out.rows)) == cfg.held_out.rows


def test_no_row_of_all_domains_together_overlaps_with_a_held_out_prompt(tokenizer):
    """As `opd check` finds it, over the shipped configuration of all of them with fewer rows."""
    domains = load_config("specialize", [f"domain=[{','.join(SYNTHETIC_DOMAINS)}]", "student=deepseek_v4_tiny"]).domains
    for domain in domains.values():
        domain.prompts.rows, domain.held_out.rows = TRAIN // 20, HELD_OUT // 20
    held_out = {name: domain.held_out for name, domain in domains.items()}
    prompts = load_prompts({name: domain.prompts for name, domain in domains.items()}, tokenizer, longest=64, held_out=held_out)
    require_no_overlap(prompts)
    assert sum(domain.num_rows for domain in prompts.values()) == TRAIN // 20 * len(SYNTHETIC_DOMAINS)
    assert all(domain.overlap.duplicates_within == domain.overlap.duplicates_across == 0 for domain in prompts.values())


def test_asking_for_more_rows_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"'arithmetic' has only \d+ distinct held_out prompts"):
        synthetic_rows("arithmetic", "held_out", 5000)


def test_an_unknown_domain_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="no synthetic domain is called 'law'; there are: arithmetic, sorting, brackets, tools, modular"):
        synthetic_rows("law", "train", 1)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="splits train and held_out, not 'test'"):
        synthetic_rows("sorting", "test", 1)


@pytest.mark.parametrize("difficulty", [0, 4, -1])
def test_an_impossible_difficulty_is_refused_with_the_range(difficulty):
    with pytest.raises(ValueError, match=rf"have the difficulties 1 to 3, not {difficulty}$"):
        synthetic_rows("sorting", "train", 1, difficulty)


def test_the_tokenizer_reads_back_every_character_it_writes(tokenizer):
    tokens = tokenizer(CHARACTERS, add_special_tokens=False)["input_ids"]
    assert len(tokens) == len(set(tokens)) == len(CHARACTERS)
    assert tokenizer.decode(tokens) == CHARACTERS


def test_the_tokenizer_reads_back_every_row(domain, train, tokenizer):
    for row in train[:200]:
        for text in [row["prompt"], row["answer"], row["slip"], *([row["repaired"].text] if "repaired" in row else [])]:
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert len(tokens) == len(text)
            assert tokenizer.unk_token_id not in tokens
            assert tokenizer.decode(tokens) == text


def test_special_tokens_are_one_token_each_and_leave_no_text(tokenizer):
    tokens = tokenizer("<bos><user>hi<assistant><eos>", add_special_tokens=False)["input_ids"]
    assert len(tokens) == 6
    assert (tokens[0], tokens[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "hi"


def test_a_foreign_character_becomes_unknown(tokenizer):
    assert tokenizer("é", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "<bos><user>" + CHARACTERS + "<eos>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.get_vocab() == tokenizer.get_vocab()
    assert (again.chat_template, again.pad_token_id, again.eos_token_id) == (tokenizer.chat_template, tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_every_call_makes_the_same_tokenizer(tokenizer):
    assert character_tokenizer().get_vocab() == tokenizer.get_vocab()
