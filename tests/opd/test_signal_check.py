"""The check of the teachers' signal: sound teachers pass, each kind of unsound one is refused by name, what is measured is what a naive computation gives.

The models are small Qwen3-MoEs that learnt eight rows of a domain by heart in a few seconds.
"""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from opd.__main__ import load_config
from opd.check import check
from opd.config import CheckCommandConfig
from opd.distill import distill
from opd.evaluator import Evaluator
from opd.rollouts import FirstRequest, build_stream
from opd.signal_check import CheckReport, run_checks
from opd.student import build_student, load_student_tokenizer
from rollout.config import ModelConfig, SamplingConfig
from rollout.model import load_model, save_model
from rollout.padding import completion_span, pad_right
from rollout.prompts import load_prompts
from rollout.sampler import LocalSampler
from teachers.pool import TeacherPool

DOMAINS = ("arithmetic", "tools")
ROWS = 8


def learn(model, rows: list[dict], tokenizer, steps: int) -> None:
    """Cross-entropy on the rows' answers, all at once, in the naive way."""
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=3e-3)
    answers = [tokenizer(row["answer"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for row in rows]
    length = max(len(row["tokens"]) + len(answer) for row, answer in zip(rows, answers, strict=True))
    tokens, labels = torch.zeros(len(rows), length, dtype=torch.int64), torch.full((len(rows), length), -100)
    for index, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        whole, before = torch.tensor(row["tokens"] + answer), len(row["tokens"])
        tokens[index, : len(whole)] = whole
        labels[index, before : len(whole)] = whole[before:]
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def models(new_student, tokenizer, tmp_path_factory) -> dict[str, str]:
    """Folders of a base that half knows both domains, of a teacher of each made from it, and of random weights."""
    folder = tmp_path_factory.mktemp("models")
    prompts = load_config("check", [f"domain=[{','.join(DOMAINS)}]", *(f"domains.{name}.prompts.rows={ROWS}" for name in DOMAINS)]).domains
    loaded = load_prompts({name: domain.prompts for name, domain in prompts.items()}, tokenizer, 200)
    rows = {name: domain.sources["prompts"] for name, domain in loaded.items()}
    model = new_student("qwen3_moe_tiny", seed=3)
    save_model(folder / "random", model, tokenizer, model.state_dict())
    base = new_student("qwen3_moe_tiny", seed=0)
    learn(base, rows["arithmetic"] + rows["tools"], tokenizer, 40)
    save_model(folder / "base", base, tokenizer, base.state_dict())
    for name in DOMAINS:
        teacher = new_student("qwen3_moe_tiny", seed=0)
        teacher.load_state_dict(base.state_dict())
        learn(teacher, rows[name], tokenizer, 40)
        save_model(folder / name, teacher, tokenizer, teacher.state_dict())
    return {path.name: str(path) for path in folder.iterdir()}


@pytest.fixture
def settings(models, tmp_path) -> list[str]:
    """Settings of a run from the base with its two teachers."""
    chosen = [f"domain=[{','.join(DOMAINS)}]", f"student.model={models['base']}", f"run_dir={tmp_path / 'run'}", "logger=none", "num_steps=1"]
    chosen += ["rollout.prompts_per_step=8", "rollout.max_new_tokens=12", "rollout.decode_width=8", "check.prompts=8"]
    return chosen + [f"domains.{name}.{part}" for name in DOMAINS for part in (f"prompts.rows={ROWS}", f"teacher.model={models[name]}")]


def parts(overrides: list[str], device: torch.device) -> tuple:
    cfg = load_config("check", overrides)
    tokenizer = load_student_tokenizer(cfg.student)
    student = build_student(cfg.student, tokenizer)
    teachers = TeacherPool(cfg.domains, cfg.teachers, tokenizer, device)
    return cfg, build_stream(cfg, student, tokenizer, device), Evaluator(cfg, student, tokenizer, teachers)


@pytest.fixture
def report(settings, device):
    """report("check.signal=warn", ...): what is found with the settings and some more."""

    def found(*overrides: str) -> CheckReport:
        return run_checks(*parts([*settings, *overrides], device))

    return found


def test_sound_teachers_pass_and_beat_the_student_on_right_answers(report):
    found = report()
    assert found.refusals == ()
    for figures in found.figures.values():
        assert figures.answer_gain.low > 0
        assert figures.answer_logprob > figures.answer_logprob_student
        assert figures.kl_per_token > 0.01
        assert figures.gradient_norm > 0
    found.raise_or_warn()


def test_a_teacher_of_random_weights_is_refused_by_its_right_answers(report, models):
    found = report(f"domains.tools.teacher.model={models['random']}")
    [sentence] = found.refusals
    assert re.search(r"the teacher of tools \(.*random\) gives its domain's right answers -4\.\d+ nats per token, where a uniform guess gives -4\.55", sentence)
    with pytest.raises(ValueError, match=r"as untrained weights do: correct domains\.tools\.teacher, or accept it with check\.signal=warn"):
        found.raise_or_warn()


def test_without_graded_answers_a_teacher_of_random_weights_is_refused_by_its_entropy(report, models):
    found = report(f"domains.tools.teacher.model={models['random']}", "domains.tools.grader=null")
    assert len(found.refusals) == 1
    assert "the teacher of tools" in found.refusals[0]
    assert "is as uncertain as untrained weights are" in found.refusals[0]
    assert "tools has no graded answers, so whether its teacher knows more than the student was not judged" in found.notes


def test_the_teachers_of_two_domains_exchanged_are_both_refused(report, models):
    found = report(f"domains.arithmetic.teacher.model={models['tools']}", f"domains.tools.teacher.model={models['arithmetic']}")
    for name, sentence in zip(DOMAINS, found.refusals, strict=True):
        assert re.match(rf"the teacher of {name} \(.*\) gives its own domain's right answers less probability than the student does", sentence)
    with pytest.raises(ValueError, match=r"the teacher of arithmetic .*\(1 more: see `opd check`\)"):
        found.raise_or_warn()


def test_the_student_as_its_own_teacher_passes_at_divergence_0_with_a_note(report, models):
    found = report(*(f"domains.{name}.teacher.model={models['base']}" for name in DOMAINS))
    assert (found.refusals, found.warnings) == ((), ())
    for name, figures in found.figures.items():
        assert abs(figures.kl_per_token) < 1e-6
        assert figures.overlap > 0.99
        assert abs(figures.answer_gain.value) < 1e-4
        assert any(f"the teacher of {name} is the student itself" in note for note in found.notes)


def test_a_teacher_that_says_the_same_whatever_it_reads_is_refused(report, models, changed_checkpoint):
    def forget_tokens(weights: dict) -> None:
        weights["model.embed_tokens.weight"][:] = weights["model.embed_tokens.weight"][5]

    constant = changed_checkpoint(Path(models["tools"]), forget_tokens)
    found = report(f"domains.tools.teacher.model={constant}")
    assert any("gives the same distribution whatever it reads" in sentence for sentence in found.refusals)
    assert found.figures["tools"].shift_change < 1e-5 < found.figures["arithmetic"].shift_change


@pytest.mark.parametrize("on_failure", ["stop", "drop"])
def test_no_run_begins_without_a_domain_whose_teacher_fails(on_failure, report, models, changed_checkpoint):
    broken = changed_checkpoint(Path(models["tools"]), lambda weights: weights["model.norm.weight"].fill_(math.nan))
    with pytest.raises(ValueError, match=r"^the teacher of tools \(.*\) failed twice: it gave NaN or infinity"):
        report(f"domains.tools.teacher.model={broken}", f"teachers.on_failure={on_failure}")


def test_a_loss_without_a_gradient_is_refused(report):
    found = report("loss.cap=1e-9")
    assert len(found.refusals) == 2
    assert all(re.match(r"the loss on \w+ has no gradient, .*: change loss.cap or loss.smoothing", sentence) for sentence in found.refusals)


def test_a_student_that_scores_itself_otherwise_than_it_is_trained_is_refused(settings, device):
    cfg, stream, evaluator = parts(settings, device)
    generator = torch.Generator().manual_seed(0)

    def disturb(_module, _inputs, output):
        output[0].add_(torch.randn(output[0].shape, generator=generator))  # as dropout that was left on would
        return output

    stream.sampler.model.base_model.register_forward_hook(disturb)
    found = run_checks(cfg, stream, evaluator)
    assert any("away from itself on tools when it is scored as a teacher is" in sentence for sentence in found.refusals)


def test_a_student_that_overlaps_little_and_is_never_right_is_warned_of(report, models):
    found = report(f"student.model={models['random']}")
    assert found.refusals == ()
    assert sum("of the 16 likeliest tokens" in sentence for sentence in found.warnings) == 2
    assert sum("the student is never right on" in sentence for sentence in found.warnings) == 2
    assert all(sentence.endswith("begin with warmup=sft") for sentence in found.warnings)
    found.raise_or_warn()


def test_a_domain_that_is_warmed_up_is_not_warned_of(report, models):
    found = report(f"student.model={models['random']}", "warmup=sft", "warmup.domains=[tools]")
    assert len(found.warnings) == 2
    assert all("on arithmetic" in sentence for sentence in found.warnings)


def test_warn_accepts_what_refuse_does_not(report, models, caplog):
    report(f"domains.tools.teacher.model={models['random']}", "check.signal=warn").raise_or_warn()
    assert "as untrained weights do" in caplog.text


def test_off_measures_nothing(report, models):
    found = report(f"domains.tools.teacher.model={models['random']}", "check.signal=off")
    assert (found.figures, found.metrics(), found.refusals) == ({}, {}, ())


def test_the_verdict_is_json_with_every_figure(report):
    found = report()
    verdict = json.loads(json.dumps(found.verdict()))
    assert set(verdict) == {"schema", "signal", "refusals", "warnings", "notes", "domains"}
    assert {f"check/{name}/{figure}": value for name, own in verdict["domains"].items() for figure, value in own.items()} == found.metrics()


def naive_logprobs(model, rollout) -> torch.Tensor:
    """Log-probabilities of the whole vocabulary at the positions that predict the completion, [T, V]."""
    start, stop = completion_span(rollout)
    with torch.no_grad():
        return model(input_ids=pad_right([rollout]), use_cache=False).logits[0, start:stop].log_softmax(-1)


def test_figures_are_those_of_the_naive_computation(report, models, tokenizer, device, settings):
    figures = report().figures["arithmetic"]
    _, stream, _ = parts(settings, device)
    prompts = stream.prompts.choose("arithmetic", 8, "check", FirstRequest.check)
    student, teacher = (load_model(ModelConfig(model=models[name]), "model") for name in ("base", "arithmetic"))
    rollouts = LocalSampler(student, [tokenizer.eos_token_id], 0, len(tokenizer)).sample(prompts, SamplingConfig(max_new_tokens=12, decode_width=8))
    kl, overlap, tokens = 0.0, 0.0, 0
    for rollout in rollouts:
        ours, theirs = naive_logprobs(student, rollout), naive_logprobs(teacher, rollout)
        kl += float((ours.exp() * (ours - theirs)).sum())
        for row in range(len(ours)):
            overlap += len(set(ours[row].topk(16).indices.tolist()) & set(theirs[row].topk(16).indices.tolist())) / 16
        tokens += len(ours)
    assert figures.kl_per_token == pytest.approx(kl / tokens, rel=1e-4)
    assert figures.overlap == pytest.approx(overlap / tokens, abs=0.01)
    right = [tokenizer.decode(rollout.completion_T.tolist(), skip_special_tokens=True) == rollout.prompt.answer for rollout in rollouts]
    assert figures.accuracy == sum(right) / len(right)


def test_right_answers_weigh_as_their_naive_log_probability(report, models, tokenizer, device, settings, make_rollout):
    figures = report().figures["tools"]
    _, stream, _ = parts(settings, device)
    for folder, found in (("tools", figures.answer_logprob), ("base", figures.answer_logprob_student)):
        model, total, count = load_model(ModelConfig(model=models[folder]), "model"), 0.0, 0
        for row in stream.prompts.domains["tools"].sources["prompts"]:
            answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            logprob_TV = naive_logprobs(model, make_rollout("tools", row["tokens"], answer))
            total, count = total + float(logprob_TV.gather(1, torch.tensor(answer)[:, None]).sum()), count + len(answer)
        assert found == pytest.approx(total / count, rel=1e-4)


def records(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def distillation(settings: list[str]):
    return load_config("distill", settings)


def test_a_refused_run_writes_nothing(settings, models, tmp_path, device):
    with pytest.raises(ValueError, match="as untrained weights do"):
        distill(distillation([*settings, f"domains.tools.teacher.model={models['random']}"]))
    assert not (tmp_path / "run").exists()


def test_the_check_does_not_change_the_run_and_a_run_that_goes_on_is_not_judged_again(settings, models, tmp_path, device):
    chosen = [*settings, f"domains.tools.teacher.model={models['random']}"]
    for signal in ("off", "warn"):
        distill(distillation([*chosen, f"check.signal={signal}", f"run_dir={tmp_path / signal}"]))
    off, warn = records(tmp_path / "off"), records(tmp_path / "warn")
    names = [name for name in off[1] if name.startswith(("domain/", "step/", "optim/"))]
    assert names
    assert {name: off[1][name] for name in names} == {name: warn[1][name] for name in names}
    assert {name for name in warn[0] if name.startswith("check/tools/")}
    assert not {name for name in off[0] if name.startswith("check/")}
    distill(distillation([*chosen, "check.signal=refuse", f"run_dir={tmp_path / 'off'}"]))


def files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_command_prints_data_and_teachers_and_leaves_a_run_folder_as_it_is(settings, tmp_path, device, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    distill(distillation([*settings, "check.signal=off"]))
    before = files(tmp_path)
    capsys.readouterr()
    check(load_config("check", [*settings, "seed=5"]))
    printed = capsys.readouterr().out
    assert files(tmp_path) == before
    assert [line.split()[0] for line in printed.splitlines() if line.split()[:1] and line.split()[0] in DOMAINS] == [*DOMAINS, *DOMAINS]
    assert "refused" not in printed


def test_the_command_shows_rows_as_text_and_ids(settings, device, capsys):
    cfg = load_config("check", [*settings, "show=2", "check.signal=off"])
    assert isinstance(cfg, CheckCommandConfig)
    check(cfg)
    printed = capsys.readouterr().out
    assert printed.count("<assistant>") == 4
    assert "arithmetic/prompts:1" in printed


def test_the_command_lists_every_refusal_and_raises_the_first(settings, models, device, capsys):
    random = [f"domains.{name}.teacher.model={models['random']}" for name in DOMAINS]
    with pytest.raises(ValueError, match="the teacher of arithmetic"):
        check(load_config("check", [*settings, *random]))
    assert capsys.readouterr().out.count("refused:") == 2


def test_untrained_is_judged_against_the_vocabulary(report, models):
    figures = report(f"domains.tools.teacher.model={models['random']}").figures["tools"]
    assert figures.answer_logprob == pytest.approx(-math.log(95), abs=0.5)
    assert figures.teacher_entropy == pytest.approx(math.log(95), abs=0.5)
