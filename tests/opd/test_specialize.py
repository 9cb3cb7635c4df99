"""Supervised examples: answers with their end, slips in the share asked for, the same whatever was drawn before, and refusals at the start."""

import json

import pytest

from opd.config import SpecializeConfig
from opd.specialize import ExampleStream
from rollout.config import HeldOutConfig, PromptsConfig
from teachers.config import DomainConfig


def config(path: str, step_size: int = 40, rows: int | None = 30, **fields) -> SpecializeConfig:
    return SpecializeConfig(domains={"tools": DomainConfig(prompts=PromptsConfig(path=path, rows=rows))}, examples_per_step=step_size, **fields)


@pytest.fixture
def file(tmp_path):
    """file([{...}, ...]): a .jsonl with these rows."""

    def write(rows: list[dict]) -> str:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / "rows.jsonl")

    return write


def texts(examples, tokenizer) -> list[str]:
    return [tokenizer.decode(example.completion_T) for example in examples]


def test_a_completion_is_the_answer_and_the_end_of_the_sequence_and_all_of_it_is_learnt(tokenizer, file):
    stream = ExampleStream(config(file([{"prompt": "T:a1b2=", "answer": "b(1)"}]), step_size=2, rows=None), tokenizer, 256)
    for example in stream.next(0):
        assert tokenizer.decode(example.completion_T) == "b(1)<eos>"
        assert example.completion_mask_T.all()
        assert tokenizer.decode(example.prompt.tokens) == "<bos><user>T:a1b2=<assistant>"


@pytest.mark.parametrize(("rate", "low", "high"), [(0.0, 0, 0), (1.0, 400, 400), (0.25, 70, 130)])
def test_slips_take_the_place_of_answers_at_the_rate_asked_for(rate, low, high, tokenizer, file):
    """400 draws: 0.25 lies within 70 to 130 unless the draws are not independent."""
    rows = [{"prompt": f"T:{n}=", "answer": "right", "slip": "wrong"} for n in range(7)]
    stream = ExampleStream(config(file(rows), step_size=400, rows=None, slip_rate=rate), tokenizer, 256)
    assert low <= texts(stream.next(0), tokenizer).count("wrong<eos>") <= high


def test_the_slip_rate_follows_its_schedule(tokenizer, file):
    rows = [{"prompt": f"T:{n}=", "answer": "right", "slip": "wrong"} for n in range(7)]
    stream = ExampleStream(config(file(rows), rows=None, slip_rate={0: 0.0, 3: 1.0}), tokenizer, 256)
    assert [set(texts(stream.next(step), tokenizer)) for step in (2, 3)] == [{"right<eos>"}, {"wrong<eos>"}]


def test_a_stream_taken_up_again_gives_the_same_examples(tokenizer):
    cfg = config("synthetic:tools", slip_rate=0.5)
    one, other = ExampleStream(cfg, tokenizer, 256), ExampleStream(cfg, tokenizer, 256)
    one.next(0)
    state = json.loads(json.dumps(one.state()))
    expected = one.next(1)
    other.restore(state)
    found = other.next(1)
    assert texts(found, tokenizer) == texts(expected, tokenizer)
    assert [example.prompt for example in found] == [example.prompt for example in expected]
    assert texts(expected, tokenizer) != texts(one.next(2), tokenizer)


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ([{"prompt": "a", "answer": "b"}, {"prompt": "c"}], {}, r"row tools/prompts:1 has no answer to learn from"),
        ([{"prompt": "a", "answer": "b"}], {"slip_rate": 0.5}, r"row tools/prompts:0 has no slip: set slip_rate=0"),
        ([{"prompt": "a", "answer": "b"}], {"slip_rate": {0: 0.0, 9: 0.1}}, r"row tools/prompts:0 has no slip"),
        ([{"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": "b" * 20}], {"max_tokens": 16}, r"prompts:1 has 25 tokens with its answer, more than 16"),
        ([{"prompt": "a", "answer": "b", "slip": "b" * 20}], {"max_tokens": 16, "slip_rate": 0.5}, r"25 tokens with its slip, more than 16"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused_before_training(rows, fields, message, tokenizer, file):
    with pytest.raises(ValueError, match=message):
        ExampleStream(config(file(rows), rows=None, **fields), tokenizer, 256)


def test_an_answer_may_be_as_long_as_the_context(tokenizer, file):
    stream = ExampleStream(config(file([{"prompt": "a", "answer": "b" * 11}]), step_size=1, rows=None), tokenizer, 16)
    [example] = stream.next(0)
    assert len(example.prompt.tokens) + len(example.completion_T) == 16


def test_rows_that_overlap_with_held_out_prompts_are_never_an_example(tokenizer, file):
    """Row 1 is held out; the rows behind it keep the names that messages call them by."""
    path = file([{"prompt": f"T:{n}=", "answer": "b"} for n in range(4)])
    prompts = PromptsConfig(path=path, exclude_held_out=True)
    domain = DomainConfig(prompts=prompts, held_out=HeldOutConfig(path=path, split="test[1:2]"))
    stream = ExampleStream(SpecializeConfig(domains={"tools": domain}, examples_per_step=6), tokenizer, 256)
    assert {example.prompt.row for example in stream.next(0)} == {"prompts:0", "prompts:2", "prompts:3"}
