"""lm_eval on our models: its answers and log-probabilities against naive computations. Needs the harness: pip install -e '.[test,eval]'; skipped without it."""

import json

import pytest
import torch

from opd.__main__ import load_config

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -e '.[eval]'")

from opd.evaluate import evaluate
from opd.harness import HarnessModel, before_stop, evaluate_tasks
from opd.harness_config import HarnessConfig

GENERATE = """task: own_sorting
dataset_path: json
dataset_kwargs: {data_files: {test: "FOLDER/rows.jsonl"}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["="], max_gen_toks: 6}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
metadata: {version: 3.0}
"""

CHOOSE = """task: own_choice
dataset_path: json
dataset_kwargs: {data_files: {test: "FOLDER/rows.jsonl"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


class Request:
    """What the harness hands over: the arguments of one request."""

    def __init__(self, *arguments):
        self.args = arguments


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def adapter(session_v4_model, tokenizer) -> HarnessModel:
    return HarnessModel(session_v4_model, tokenizer, HarnessConfig(decode_width=4), seed=0)


@torch.no_grad()
def naive_greedy(model, tokenizer, text: str, most: int) -> str:
    """The likeliest tokens one after another, each from a forward over the whole text, without batch or cache."""
    tokens = tokenizer(text)["input_ids"]
    begin = len(tokens)
    while len(tokens) < begin + most:
        token = int(model(torch.tensor([tokens])).logits[0, -1, : len(tokenizer)].argmax())
        if token == tokenizer.eos_token_id:
            break
        tokens.append(token)
    return tokenizer.decode(tokens[begin:], skip_special_tokens=True)


@torch.no_grad()
def naive_logprob(model, tokenizer, context: str, continuation: str) -> float:
    tokens = tokenizer(context + continuation)["input_ids"]
    begin = len(tokenizer(context)["input_ids"])
    log_p_LV = model(torch.tensor([tokens])).logits[0, :, : len(tokenizer)].double().log_softmax(-1)
    return sum(float(log_p_LV[place - 1, tokens[place]]) for place in range(begin, len(tokens)))


TEXTS = ["S:3", "S:318", "S:318264=", "T:k1p2=", "B:(<[{(<[{="]


def test_greedy_answers_to_prompts_of_different_lengths_are_those_of_each_prompt_alone(adapter, session_v4_model, tokenizer):
    found = adapter.generate_until([Request(text, {"until": [], "max_gen_toks": 7}) for text in TEXTS])
    assert found == [naive_greedy(session_v4_model, tokenizer, text, 7) for text in TEXTS]


def test_an_answer_ends_before_the_first_stop_string(adapter, session_v4_model, tokenizer):
    whole = naive_greedy(session_v4_model, tokenizer, TEXTS[2], 7)
    stop = whole[3:5]
    [found] = adapter.generate_until([Request(TEXTS[2], {"until": ["never", stop], "max_gen_toks": 7})])
    assert found == whole[: whole.index(stop)]
    assert before_stop("one two three", ["three", "two"]) == "one "
    assert before_stop("one", ["", "two"]) == "one"


def test_log_probabilities_are_those_of_the_whole_softmax(adapter, session_v4_model, tokenizer):
    pairs = [(text, answer) for text in TEXTS for answer in ("123", "9", "{p(1)}")]
    found = adapter.loglikelihood([Request(*pair) for pair in pairs])
    for pair, (logprob, _) in zip(pairs, found, strict=True):
        assert logprob == pytest.approx(naive_logprob(session_v4_model, tokenizer, *pair), abs=1e-4)


def test_a_continuation_is_greedy_where_every_token_is_the_likeliest(adapter, session_v4_model, tokenizer):
    likeliest = naive_greedy(session_v4_model, tokenizer, TEXTS[1], 4)
    changed = likeliest[:-1] + ("1" if likeliest[-1] != "1" else "2")
    [(_, is_greedy), (_, other)] = adapter.loglikelihood([Request(TEXTS[1], likeliest), Request(TEXTS[1], changed)])
    assert is_greedy
    assert not other


def test_the_log_probability_of_a_text_longer_than_the_context_is_that_of_its_windows(adapter, session_v4_model, tokenizer):
    adapter.max_length = 6
    text = "318264=T:k1p2"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    wanted = 0.0
    with torch.no_grad():
        for begin in range(0, len(tokens), 5):
            window = [tokens[begin - 1] if begin else adapter.prefix_token_id, *tokens[begin : begin + 5]]
            context = tokens[max(0, len(tokens) - 6) : begin] if len(window) < 6 else window[:1]
            whole = [*context, *window[1:]]
            log_p_LV = session_v4_model(torch.tensor([whole])).logits[0, :, : len(tokenizer)].double().log_softmax(-1)
            wanted += sum(float(log_p_LV[place - 1, whole[place]]) for place in range(len(context), len(whole)))
    [found] = adapter.loglikelihood_rolling([Request(text)])
    assert found == pytest.approx(wanted, abs=1e-4)


def test_a_context_that_is_too_long_loses_its_beginning_and_is_counted(adapter, session_v4_model, tokenizer):
    adapter.max_length = 10
    [(found, _)] = adapter.loglikelihood([Request("9999" + "S:31826", "4=")])
    assert adapter.shortened == 1
    with torch.no_grad():
        tokens = tokenizer("9999S:318264=")["input_ids"][-10:]
        log_p_LV = session_v4_model(torch.tensor([tokens])).logits[0, :, : len(tokenizer)].double().log_softmax(-1)
    assert found == pytest.approx(sum(float(log_p_LV[place - 1, tokens[place]]) for place in (8, 9)), abs=1e-4)


def test_settings_that_the_sampler_does_not_have_are_refused(adapter):
    with pytest.raises(ValueError, match="num_beams"):
        adapter.generate_until([Request("S:1", {"until": [], "max_gen_toks": 2, "num_beams": 4})])


@pytest.fixture
def tasks(tmp_path):
    """A folder with two tasks of one's own on four rows."""
    rows = [{"question": f"S:{text}=", "answer": "".join(sorted(text)), "choices": ["".join(sorted(text)), text]} for text in ("31", "3182", "97", "40213")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "generate.yaml").write_text(GENERATE.replace("FOLDER", str(tmp_path)))
    (tmp_path / "choose.yaml").write_text(CHOOSE.replace("FOLDER", str(tmp_path)))
    return tmp_path, rows


def test_tasks_of_ones_own_give_what_a_loop_over_their_rows_gives(tasks, session_v4_model, tokenizer):
    folder, rows = tasks
    cfg = HarnessConfig(tasks=["own_sorting", "own_choice"], include_path=str(folder))
    record = evaluate_tasks(session_v4_model, tokenizer, cfg, seed=0)
    answers = [before_stop(naive_greedy(session_v4_model, tokenizer, row["question"], 6), ["="]) for row in rows]
    right = sum(answer == row["answer"] for answer, row in zip(answers, rows, strict=True)) / len(rows)
    assert record["tasks"]["own_sorting"]["metrics"]["exact_match,none"]["value"] == pytest.approx(right)
    assert record["tasks"]["own_sorting"]["samples"] == 4
    assert record["tasks"]["own_sorting"]["version"] == 3.0
    chosen = [max(range(2), key=lambda place: naive_logprob(session_v4_model, tokenizer, row["question"] + " ", row["choices"][place])) for row in rows]
    assert record["tasks"]["own_choice"]["metrics"]["acc,none"]["value"] == pytest.approx(chosen.count(0) / len(rows))


def test_a_model_is_evaluated_on_tasks_alone(tasks, saved_v4, tmp_path, device, capsys):
    folder, _ = tasks
    settings = [f"student.model={saved_v4}", "lm_eval.tasks=[own_sorting]", f"lm_eval.include_path={folder}", "lm_eval.limit=2", f"run_dir={tmp_path / 'run'}"]
    evaluate(load_config("evaluate", settings))
    record = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert record["domains"] == {}
    assert record["lm_eval"]["student"]["tasks"]["own_sorting"]["samples"] == 2
    printed = capsys.readouterr().out
    assert "own_sorting" in printed
    assert "limited to 2 documents of each task: no result" in printed


def test_a_task_that_is_not_there_is_refused(session_v4_model, tokenizer):
    with pytest.raises(ValueError, match="lm_eval has no task 'nothing_like_it'"):
        evaluate_tasks(session_v4_model, tokenizer, HarnessConfig(tasks=["nothing_like_it"]), seed=0)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["lm_eval.limit=3"], "settings of lm_eval would be ignored without tasks"),
        (["lm_eval.tasks=[a]", "lm_eval.limit=0"], "lm_eval.limit must be at least 1"),
    ],
)
def test_settings_without_tasks_or_out_of_range_are_refused(overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_config("evaluate", overrides)
