"""Supervised examples: answers with their end, slips and repaired errors in the shares asked for, the same whatever was drawn before, and refusals at
the start.
"""

import json

import pytest
import torch

from opd.batch import supervised_batches
from opd.config import BatchConfig, SpecializeConfig
from opd.estimators import cross_entropy, student_states
from opd.specialize import ExampleStream
from rollout.config import HeldOutConfig, PromptsConfig
from rollout.self_repair import after_backspaces
from rollout.synthetic import synthetic_rows
from rollout.types import IDENTITY
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


# Repaired errors


def repaired(tokenizer, step_size: int = 40, **fields) -> ExampleStream:
    return ExampleStream(config("synthetic:backspace", step_size, **fields), tokenizer, 256)


def test_the_errors_of_a_repaired_answer_and_nothing_else_are_left_out_of_the_loss(tokenizer):
    rows = synthetic_rows("backspace", "train", 30)
    for example in repaired(tokenizer, repair_rate=1.0).next(0):
        expected = rows[int(example.prompt.row.split(":")[1])]["repaired"]
        assert tokenizer.decode(example.completion_T) == expected.text + "<eos>"
        assert (~example.completion_mask_T).nonzero().flatten().tolist() == list(expected.errors)


def test_states_that_predict_errors_get_no_gradient_and_all_others_do(tokenizer, v4_model):
    examples = repaired(tokenizer, step_size=6, repair_rate=1.0).next(0)
    [batch] = supervised_batches(examples, {"tools": 0.1}, BatchConfig())
    student = student_states(v4_model, batch, IDENTITY)
    student.hidden_ND.retain_grad()
    cross_entropy(student, batch.target_N, batch.weight_N, len(tokenizer))[0].backward()
    is_learnt_N = torch.cat([example.completion_mask_T for example in batch.rollouts])
    assert ((student.hidden_ND.grad != 0).any(1) == is_learnt_N).all()
    assert 6 <= (~is_learnt_N).sum() < len(is_learnt_N) / 2


def test_an_error_is_context_for_what_comes_after_it(tokenizer, v4_model):
    """Another wrong token in its place changes the loss of the tokens behind it."""
    [example] = repaired(tokenizer, step_size=1, repair_rate=1.0).next(0)
    first = int((~example.completion_mask_T).nonzero()[0])

    def losses(error: str) -> torch.Tensor:
        example.completion_T[first] = tokenizer.convert_tokens_to_ids(error)
        [batch] = supervised_batches([example], {"tools": 1.0}, BatchConfig())
        with torch.no_grad():
            return cross_entropy(student_states(v4_model, batch, IDENTITY), batch.target_N, batch.weight_N, len(tokenizer))[1].loss_N

    assert (losses("5") != losses("a"))[first + 1 :].any()


@pytest.mark.parametrize(("slip_rate", "repair_rate"), [(0.0, 0.25), (0.5, 0.25), (0.5, 0.5), (0.0, 1.0)])
def test_an_example_is_a_slip_or_repaired_or_right_at_the_rates_asked_for(slip_rate, repair_rate, tokenizer):
    """400 draws, within five standard errors."""
    rows = synthetic_rows("backspace", "train", 30)
    kinds = {"slip": 0, "repaired": 0, "answer": 0}
    for example in repaired(tokenizer, 400, slip_rate=slip_rate, repair_rate=repair_rate).next(0):
        text, row = tokenizer.decode(example.completion_T).removesuffix("<eos>"), rows[int(example.prompt.row.split(":")[1])]
        assert after_backspaces(text) in (row["answer"], row["slip"])
        kinds[{row["slip"]: "slip", row["repaired"].text: "repaired", row["answer"]: "answer"}[text]] += 1
    for kind, rate in (("slip", slip_rate), ("repaired", repair_rate), ("answer", 1 - slip_rate - repair_rate)):
        assert kinds[kind] == pytest.approx(400 * rate, abs=5 * (400 * rate * (1 - rate)) ** 0.5)


def test_a_repair_rate_changes_no_example_that_is_a_slip(tokenizer):
    alone, beside = (texts(repaired(tokenizer, slip_rate=0.4, repair_rate=rate).next(0), tokenizer) for rate in (0.0, 0.6))
    slips = {row["slip"] + "<eos>" for row in synthetic_rows("backspace", "train", 30)}
    assert [text in slips for text in alone] == [text in slips for text in beside]
    assert alone != beside


def test_the_repair_rate_follows_its_schedule(tokenizer):
    stream = repaired(tokenizer, repair_rate={0: 0.0, 3: 1.0})
    assert [{"<" in text.removesuffix("<eos>") for text in texts(stream.next(step), tokenizer)} for step in (2, 3)] == [{False}, {True}]


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ([{"prompt": "a", "answer": "b"}, {"prompt": "c"}], {}, r"row tools/prompts:1 has no answer to learn from"),
        ([{"prompt": "a", "answer": "b"}], {"slip_rate": 0.5}, r"row tools/prompts:0 has no slip: set slip_rate=0"),
        ([{"prompt": "a", "answer": "b"}], {"slip_rate": {0: 0.0, 9: 0.1}}, r"row tools/prompts:0 has no slip"),
        ([{"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": "b" * 20}], {"max_tokens": 16}, r"prompts:1 has 25 tokens with its answer, more than 16"),
        ([{"prompt": "a", "answer": "b"}], {"repair_rate": 0.5}, r"row tools/prompts:0 has no repaired text, .*: set repair_rate=0"),
        ([{"prompt": "a", "answer": "b"}], {"repair_rate": {0: 0.0, 9: 0.1}}, r"row tools/prompts:0 has no repaired text"),
        ([{"prompt": "a", "answer": "b", "slip": "b" * 20}], {"max_tokens": 16, "slip_rate": 0.5}, r"25 tokens with its slip, more than 16"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused_before_training(rows, fields, message, tokenizer, file):
    with pytest.raises(ValueError, match=message):
        ExampleStream(config(file(rows), rows=None, **fields), tokenizer, 256)


def test_a_repaired_text_that_does_not_fit_is_refused(tokenizer):
    """Prompt and answer with its end are nineteen tokens; each error adds two."""
    with pytest.raises(ValueError, match=r"row tools/prompts:0 has 21 tokens with its repaired text, more than 19"):
        repaired(tokenizer, repair_rate=0.1, max_tokens=19)
    repaired(tokenizer, repair_rate=0.0, max_tokens=19)


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
