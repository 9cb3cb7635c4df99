"""Tasks of lm_eval: its figures against naive loops over the model, without padding, cache or the harness. All but the refusal need `pip install -e '.[eval]'`,
which brings 40 packages and is therefore no part of `[test]`: without it they are skipped.
"""

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from opd.__main__ import load_config
from opd.evaluate import evaluate
from rollout.config import SamplingConfig
from rollout.sampler import LocalSampler

QUESTIONS = ["S:31=", "T:a1b2=", "1+2=", "((", "T:aaabbbccc1234567890=", "9+", "S:5443322110099=", "12+34=", "[()]", "S:7=", "abc", "T:z=" * 6]
LENGTH = 12


@pytest.fixture
def lm_eval(monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    return pytest.importorskip("lm_eval", reason="the harness is not installed: pip install -e '.[eval]'")


@pytest.fixture
def harness_model(lm_eval, session_v4_model, tokenizer):
    return adapter(session_v4_model, tokenizer)


def adapter(model, tokenizer, **changes):
    from opd.harness import HarnessLimits, HarnessModel

    sampler = LocalSampler(model, [tokenizer.eos_token_id], 0, len(tokenizer))
    return HarnessModel(sampler, tokenizer, HarnessLimits(max_new_tokens=LENGTH, decode_width=8, tokens_per_forward=64), **changes)


def request(*arguments) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


@torch.no_grad()
def greedy_text(model, tokenizer, text: str, until: list[str], length: int = LENGTH) -> str:
    """One prompt alone, the whole sequence read anew for each token."""
    tokens = tokenizer(text)["input_ids"]
    start = len(tokens)
    while len(tokens) < start + length and tokens[-1:] != [tokenizer.eos_token_id]:
        tokens = [*tokens, int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1, : len(tokenizer)].argmax())]
    said = tokenizer.decode(tokens[start:], skip_special_tokens=True)
    for stop in until:
        said = said.split(stop)[0]
    return said


@torch.no_grad()
def naive_logprobs(model, tokenizer, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    logprob_LV = model(input_ids=torch.tensor([[*context, *continuation]]), use_cache=False).logits[0, :, : len(tokenizer)].double().log_softmax(-1)
    rows = logprob_LV[len(context) - 1 : -1]
    return float(sum(row[token] for row, token in zip(rows, continuation, strict=True))), rows.argmax(-1).tolist() == continuation


def write_task(folder: Path, name: str, rows: list[dict], **settings) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"test": str(folder / f"{name}.jsonl")}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test", "metadata": {"version": 3.0}, **settings}
    (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML


def test_greedy_answers_to_prompts_of_different_lengths_are_those_of_each_prompt_alone(harness_model, session_v4_model, tokenizer):
    """Padding on the left would change the logits of this family."""
    answers = harness_model.generate_until([request(text, {"until": [], "max_gen_toks": LENGTH}) for text in QUESTIONS])
    assert answers == [greedy_text(session_v4_model, tokenizer, text, []) for text in QUESTIONS]
    assert len(set(answers)) > 3


def test_an_answer_ends_before_the_earliest_of_its_stop_strings(harness_model, session_v4_model, tokenizer):
    for text in QUESTIONS:
        whole = greedy_text(session_v4_model, tokenizer, text, [])
        until = ["", whole[7:9] or "never", whole[3:5] or "never"]
        assert harness_model.generate_until([request(text, {"until": until})]) == [greedy_text(session_v4_model, tokenizer, text, until[1:])]


def test_decoding_ends_with_the_stop_string(harness_model, session_v4_model, tokenizer):
    stop = greedy_text(session_v4_model, tokenizer, QUESTIONS[0], [])[2:4]
    harness_model.generate_until([request(QUESTIONS[0], {"until": stop})])
    assert 0 < harness_model.sampler.figures.sampled < LENGTH


def test_a_tasks_settings_of_generation_are_the_samplers(harness_model):
    sampling, until = harness_model._sampling({"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "max_gen_toks": 7, "until": "x"})
    assert (sampling, until) == (SamplingConfig(temperature=0.5, top_p=0.9, top_k=3, max_new_tokens=7, decode_width=8), ["x"])
    assert harness_model._sampling({"temperature": 0.5, "do_sample": False})[0].temperature == 0


def test_a_stop_string_that_is_the_end_token_ends_decoding_and_is_no_text(harness_model, tokenizer):
    sampling, until = harness_model._sampling({"until": [tokenizer.eos_token, "x"]})
    assert (sampling.stop_tokens, until) == ([tokenizer.eos_token_id], ["x"])


def test_drawn_answers_to_one_question_differ(harness_model):
    settings = {"do_sample": True, "temperature": 1.0}
    assert len(set(harness_model.generate_until([request("T:a1b2=", settings)] * 8))) > 4


@pytest.mark.parametrize(
    ("settings", "reason"), [({"num_beams": 4}, "num_beams=4, which opd's sampler does not have"), ({"max_gen_toks": 10**6}, "no room for its prompt")]
)
def test_what_the_sampler_cannot_do_is_refused(harness_model, settings, reason):
    with pytest.raises(ValueError, match=reason):
        harness_model.generate_until([request("1+2=", settings)])


def test_likelihoods_are_sums_over_the_whole_softmax(harness_model, session_v4_model, tokenizer):
    """Continuations of the model's own too, which are greedy; and several of one context, that differ in one token."""
    pairs = [(text, QUESTIONS[number - 5][:4]) for number, text in enumerate(QUESTIONS)]
    pairs += [(text, greedy_text(session_v4_model, tokenizer, text, [], 3)) for text in QUESTIONS[:4]] + [("1+2=", digit) for digit in "0123456789"]
    found = harness_model.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (logprob, is_greedy) in zip(pairs, found, strict=True):
        expected, is_expected_greedy = naive_logprobs(session_v4_model, tokenizer, *([*tokenizer(text)["input_ids"]] for text in (context, continuation)))
        assert logprob == pytest.approx(expected, abs=1e-5)
        assert is_greedy == is_expected_greedy
    assert {is_greedy for _, is_greedy in found} == {True, False}


def test_a_whole_text_is_predicted_once_token_by_token_in_windows_of_the_context(lm_eval, new_student, tokenizer):
    model = new_student("qwen3_moe_tiny", max_position_embeddings=16)
    tokens = tokenizer("T:a1b2c3d4=12+34=46[()]")["input_ids"]
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    windows = [([prefix], tokens[:16]), (tokens[-17 : 16], tokens[16:])]  # the second with as much context as fits
    expected = sum(naive_logprobs(model, tokenizer, *window)[0] for window in windows)
    found = adapter(model, tokenizer)
    assert found.loglikelihood_rolling([request(tokenizer.decode(tokens))]) == [pytest.approx(expected, abs=1e-4)]
    assert found.cut == 0


def test_what_does_not_fit_loses_its_beginning_and_is_counted(lm_eval, new_student, tokenizer):
    model = new_student("qwen3_moe_tiny", max_position_embeddings=32)
    found, text = adapter(model, tokenizer), "T:a1b2=" * 8
    assert found.generate_until([request(text, {"until": []}), request("1+2=", {"until": []})])[0] == greedy_text(model, tokenizer, text[-20:], [])
    assert found.cut == 1
    [(logprob, _)] = found.loglikelihood([request(text, "46")], disable_tqdm=True)
    assert logprob == pytest.approx(naive_logprobs(model, tokenizer, tokenizer(text[-31:])["input_ids"], tokenizer("46")["input_ids"])[0], abs=1e-4)
    assert found.cut == 2


def test_opd_evaluate_writes_and_prints_the_tasks_figures(lm_eval, device, saved_v4, session_v4_model, tokenizer, tmp_path, capsys):
    """Every second answer is made what the model says; the likelier of two choices is found as naively."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    said = [greedy_text(session_v4_model, tokenizer, text, ["="]) for text in QUESTIONS]
    answers = [{"question": text, "answer": answer if number % 2 else "never"} for number, (text, answer) in enumerate(zip(QUESTIONS, said, strict=True))]
    metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    generation = {"until": ["="], "max_gen_toks": LENGTH}
    texts = {"doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}
    write_task(folder, "ours_said", answers, output_type="generate_until", generation_kwargs=generation, metric_list=[metric], **texts)
    choices = [{"question": text, "choices": ["12", "ab"], "label": number % 2} for number, text in enumerate(QUESTIONS)]
    asked = {"doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}", "target_delimiter": ""}
    write_task(folder, "ours_chosen", choices, output_type="multiple_choice", metric_list=[metric | {"metric": "acc"}], **asked)
    overrides = [f"student.model={saved_v4}", f"base.model={saved_v4}", f"run_dir={tmp_path / 'run'}", f"lm_eval.include_path={folder}"]
    evaluate(load_config("evaluate", [*overrides, "lm_eval.tasks=[ours_said,ours_chosen]", "evaluation.decode_width=8"]))
    record = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert (record["schema"], record["domains"]) == (1, {})
    found = record["lm_eval"]["models"]["student"]["tasks"]
    assert found == record["lm_eval"]["models"]["base"]["tasks"]
    right = []
    for row in choices:
        context, *ends = (tokenizer(text)["input_ids"] for text in (row["question"], *row["choices"]))
        first, second = (naive_logprobs(session_v4_model, tokenizer, context, end)[0] for end in ends)
        right.append((second > first) == row["label"])
    share = sum(right) / len(right)
    assert found["ours_chosen"]["metrics"]["acc,none"]["value"] == pytest.approx(share)
    stderr = math.sqrt(share * (1 - share) / (len(right) - 1))
    assert found["ours_chosen"]["metrics"]["acc,none"]["stderr"] == pytest.approx(stderr)
    assert found["ours_said"]["metrics"]["exact_match,none"]["value"] == 0.5
    counts = ("version", "num_fewshot", "samples", "available_samples")
    assert [found["ours_said"][name] for name in counts] == [3.0, 0, len(QUESTIONS), len(QUESTIONS)]
    assert (record["lm_eval"]["is_result"], record["lm_eval"]["version"]) == (True, importlib.metadata.version("lm_eval"))
    printed = capsys.readouterr().out
    assert "ours_said" in printed
    assert "no result" not in printed


def test_a_limit_takes_the_first_documents_and_is_no_result(lm_eval, device, saved_v4, tmp_path, capsys):
    write_task(tmp_path, "ours", [{"q": text, "a": "1"} for text in QUESTIONS], output_type="generate_until", doc_to_text="{{q}}", doc_to_target="{{a}}",
               generation_kwargs={"until": ["="], "max_gen_toks": 2}, metric_list=[{"metric": "exact_match"}])  # fmt: skip
    settings = [f"lm_eval.include_path={tmp_path}", "lm_eval.tasks=[ours]", "lm_eval.limit=3", "evaluation.decode_width=8"]
    evaluate(load_config("evaluate", [f"student.model={saved_v4}", f"run_dir={tmp_path / 'run'}", *settings]))
    record = json.loads((tmp_path / "run" / "evaluation.json").read_text())["lm_eval"]
    assert record["is_result"] is False
    assert list(record["models"]) == ["student"]
    assert [record["models"]["student"]["tasks"]["ours"][name] for name in ("samples", "available_samples")] == [3, len(QUESTIONS)]
    assert "no result: lm_eval.limit=3" in capsys.readouterr().out


def test_teachers_are_scored_beside_the_domains_table(lm_eval, device, saved_v4, saved_qwen3_moe, tmp_path):
    write_task(tmp_path, "ours", [{"q": text, "a": "1"} for text in QUESTIONS[:3]], output_type="loglikelihood", doc_to_text="{{q}}", doc_to_target="a{{a}}",
               metric_list=[{"metric": "perplexity"}])  # fmt: skip
    domain = [f"domains.tools.teacher.model={saved_qwen3_moe}", "domains.tools.held_out.rows=2", "evaluation.max_new_tokens=2", "evaluation.decode_width=2"]
    settings = [f"lm_eval.include_path={tmp_path}", "lm_eval.tasks=[ours]", "lm_eval.models=[student,teachers]"]
    evaluate(load_config("evaluate", ["domain=[tools]", f"student.model={saved_v4}", f"run_dir={tmp_path / 'run'}", *domain, *settings]))
    record = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert record["domains"]["tools"]["student"]["prompts"] == 2
    perplexities = [part["tasks"]["ours"]["metrics"]["perplexity,none"]["value"] for part in record["lm_eval"]["models"].values()]
    assert list(record["lm_eval"]["models"]) == ["student", "teacher of tools"]
    assert perplexities[0] != perplexities[1]


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_without_the_extra_the_sentence_says_how_to_install_it(device, tmp_path):
    with pytest.raises(ValueError, match=r"pip install -e '.\[eval\]'"):
        evaluate(load_config("evaluate", [f"student.model={tmp_path}", f"run_dir={tmp_path / 'run'}", "lm_eval.tasks=[gsm8k]"]))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["lm_eval.limit=3"], "lm_eval.limit would be ignored without tasks"),
        (["lm_eval.tasks=[a,a]"], "names a task twice"),
        (["lm_eval.tasks=[a]", "lm_eval.limit=0"], "lm_eval.limit must be at least 1"),
        (["lm_eval.tasks=[a]", "lm_eval.num_fewshot=-1"], "lm_eval.num_fewshot must be at least 0"),
        (["lm_eval.tasks=[a]", "lm_eval.models=[]"], "lm_eval.models is empty"),
        (["lm_eval.tasks=[a]", "lm_eval.models=[base]"], "set base.model"),
        (["lm_eval.tasks=[a]", "lm_eval.models=[teachers]"], "there are no domains"),
    ],
)
def test_settings_that_say_nothing_are_refused(overrides, reason):
    with pytest.raises(ValueError, match=reason):
        load_config("evaluate", overrides)


def test_nothing_to_evaluate_on_is_refused(device, tmp_path):
    with pytest.raises(ValueError, match="add domains"):
        evaluate(load_config("evaluate", [f"student.model={tmp_path}", f"run_dir={tmp_path / 'run'}"]))
