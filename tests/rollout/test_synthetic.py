"""The synthetic domains: right answers by another implementation, well-formed slips, disjoint splits, and the character tokenizer."""

import re

import pytest
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from rollout.synthetic import CHARACTERS, SYNTHETIC_DOMAINS, character_tokenizer, is_held_out, synthetic_rows

TRAIN, HELD_OUT = 3000, 1024


@pytest.fixture(params=SYNTHETIC_DOMAINS, scope="module")
def domain(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def train(domain) -> list[dict[str, str]]:
    return synthetic_rows(domain, "train", TRAIN)


@pytest.fixture(scope="module")
def held_out(domain) -> list[dict[str, str]]:
    return synthetic_rows(domain, "held_out", HELD_OUT)


def add_on_paper(question: str, flips_first_carry: bool = False) -> str:
    """Column by column from the right with a carry, written down in that order."""
    left, right = question.split("+")
    ones = int(left[1]) + int(right[1])
    tens = int(left[0]) + int(right[0]) + ((ones > 9) != flips_first_carry)
    return f"{ones % 10}{tens % 10}{tens // 10}"


def sort_by_counting(question: str) -> str:
    return "".join(digit * question.count(digit) for digit in "0123456789")


def close_brackets(question: str) -> str:
    """Whatever closes the innermost open bracket, until none is open."""
    opened, written = list(question), ""
    while opened:
        written += {"(": ")", "[": "]", "{": "}", "<": ">"}[opened.pop()]
    return written


def call_tools(question: str) -> str:
    (first, first_argument), (second, second_argument) = re.fullmatch(r"([a-z]\d)([a-z]\d)", question).groups()
    return "{" + f"{second}({first_argument})" + ";" + f"{first}({second_argument})" + "}"


MISCONCEPTIONS = {
    "arithmetic": lambda question: add_on_paper(question, flips_first_carry=True),
    "sorting": lambda question: sort_by_counting(question)[::-1],
    "brackets": lambda question: question[::-1],
    "tools": lambda question: f"{{{question[2]}({question[3]});{question[0]}({question[1]})}}",
}
ORACLES = {"arithmetic": add_on_paper, "sorting": sort_by_counting, "brackets": close_brackets, "tools": call_tools}
LETTERS = {"arithmetic": "A", "sorting": "S", "brackets": "B", "tools": "T"}
WELL_FORMED = {"arithmetic": r"\d\d[012]", "sorting": r"\d{6}", "brackets": r"[)\]}>]{5,7}|[(\[{<]{5,7}", "tools": r"\{[a-z]\(\d\);[a-z]\(\d\)\}"}


def question_of(prompt: str) -> str:
    return prompt[2:-1]


def test_a_prompt_begins_with_its_domains_letter_and_ends_in_an_equals_sign(domain, train):
    assert all(re.fullmatch(rf"{LETTERS[domain]}:[^=]+=", row["prompt"]) for row in train)


def test_answers_are_right(domain, train, held_out):
    for row in train + held_out:
        assert row["answer"] == ORACLES[domain](question_of(row["prompt"]))


def test_slips_are_wrong_and_well_formed(domain, train, held_out):
    for row in train + held_out:
        assert row["slip"] != row["answer"]
        assert len(row["slip"]) == len(row["answer"])
        assert re.fullmatch(WELL_FORMED[domain], row["slip"])
        assert re.fullmatch(WELL_FORMED[domain], row["answer"])


def test_a_slip_is_what_the_domains_misconception_gives_unless_that_is_right(domain, train):
    for row in train:
        assert MISCONCEPTIONS[domain](question_of(row["prompt"])) in (row["slip"], row["answer"])


def test_train_and_held_out_prompts_are_disjoint(train, held_out):
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}


def test_the_split_of_a_prompt_follows_from_its_text(train, held_out):
    assert not any(is_held_out(row["prompt"]) for row in train)
    assert all(is_held_out(row["prompt"]) for row in held_out)


def test_there_are_as_many_distinct_rows_as_asked(train, held_out):
    assert len({row["prompt"] for row in train}) == TRAIN
    assert len({row["prompt"] for row in held_out}) == HELD_OUT


def test_fewer_rows_are_the_first_of_more_rows(domain, train):
    assert synthetic_rows(domain, "train", 100) == train[:100]


def test_the_shipped_domains_ask_for_rows_that_exist(domain, conf_dir):
    cfg = OmegaConf.load(conf_dir / "domain" / f"{domain}.yaml")
    assert cfg.prompts.path == cfg.held_out.path == f"synthetic:{domain}"
    assert cfg.held_out.rows >= 1000
    assert len(synthetic_rows(domain, "train", cfg.prompts.rows)) == cfg.prompts.rows
    assert len(synthetic_rows(domain, cfg.held_out.split, cfg.held_out.rows)) == cfg.held_out.rows


def test_asking_for_more_rows_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"'arithmetic' has only \d+ distinct held_out prompts"):
        synthetic_rows("arithmetic", "held_out", 5000)


def test_an_unknown_domain_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="no synthetic domain is called 'law'; there are: arithmetic, sorting, brackets, tools"):
        synthetic_rows("law", "train", 1)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="splits train and held_out, not 'test'"):
        synthetic_rows("sorting", "test", 1)


def test_the_tokenizer_reads_back_every_character_it_writes(tokenizer):
    tokens = tokenizer(CHARACTERS, add_special_tokens=False)["input_ids"]
    assert len(tokens) == len(set(tokens)) == len(CHARACTERS)
    assert tokenizer.decode(tokens) == CHARACTERS


def test_the_tokenizer_reads_back_every_row(domain, train, tokenizer):
    for row in train[:200]:
        for text in row.values():
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
