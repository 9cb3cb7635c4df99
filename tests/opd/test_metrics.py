"""The figures of a step against naive computations on hand-made rollouts, and the names under which they are recorded."""

import json
import re

import pytest
import torch

import opd.metrics
from opd.batch import supervised_batches
from opd.config import BatchConfig, DistillConfig
from opd.metrics import DomainTotals, add_losses, data_metrics, loss_metrics, rollout_metrics, teacher_loss_metrics
from opd.tiles import TokenLosses
from rollout.config import PromptsConfig, RolloutConfig
from rollout.grader_config import GraderKind
from rollout.prompts import PromptMixture, load_prompts
from rollout.repetition import mask_loops
from rollout.sampler import LocalSampler
from rollout.stream import RolloutStream
from rollout.types import Rollout
from teachers.config import DomainConfig

DOMAINS = ["law", "code", "absent"]
WEIGHT = {"law": 0.3, "code": 0.7, "absent": 0.0}
SHAPES = [("law", 3, 9), ("code", 2, 4), ("law", 5, 1), ("law", 1, 3), ("code", 7, 2)]


def losses_of(rollouts: list[Rollout], max_tokens: int, is_distillation: bool = True) -> tuple[dict[str, float], list[dict]]:
    """(metrics of random per-token losses in micro-batches, one record per token that counts)."""
    generator = torch.Generator().manual_seed(0)
    totals, tokens = DomainTotals(DOMAINS), []
    for batch in supervised_batches(rollouts, WEIGHT, BatchConfig(max_tokens_per_micro_batch=max_tokens)):
        loss_N, student_N, teacher_N = torch.rand(3, len(batch.target_N), generator=generator)
        add_losses(totals, batch, TokenLosses(loss_N, student_N, teacher_N if is_distillation else None))
        owners = [rollout for rollout in batch.rollouts for _ in rollout.completion_T]
        counts = [bool(mask) for rollout in batch.rollouts for mask in rollout.completion_mask_T]
        for index, rollout in enumerate(owners):
            if counts[index]:
                values = {"loss": float(loss_N[index]), "student": float(student_N[index]), "teacher": float(teacher_N[index])}
                tokens.append(values | {"domain": rollout.prompt.domain, "request": rollout.prompt.request})
    return loss_metrics(totals, is_distillation), tokens


def average(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("max_tokens", [10, 30, 1000])
def test_divergences_and_entropies_are_sums_over_tokens_by_their_number(max_tokens, random_rollouts):
    metrics, tokens = losses_of(random_rollouts(SHAPES), max_tokens)
    for domain in ("law", "code"):
        own = [token for token in tokens if token["domain"] == domain]
        assert metrics[f"domain/{domain}/kl_per_token"] == pytest.approx(average([token["loss"] for token in own]))
        assert metrics[f"domain/{domain}/student_entropy"] == pytest.approx(average([token["student"] for token in own]))
        assert metrics[f"domain/{domain}/teacher_entropy"] == pytest.approx(average([token["teacher"] for token in own]))
        sequences = len({token["request"] for token in own})
        assert metrics[f"domain/{domain}/kl_per_sequence"] == pytest.approx(sum(token["loss"] for token in own) / sequences)


@pytest.mark.parametrize("max_tokens", [10, 1000])
def test_tails_and_the_capped_share_are_averages_over_the_tokens_of_a_domain(max_tokens, random_rollouts):
    rollouts, generator, cap = random_rollouts(SHAPES), torch.Generator().manual_seed(1), 0.7
    rollouts[0].completion_mask_T[2:5] = False
    totals, tokens = DomainTotals(DOMAINS), []
    for batch in supervised_batches(rollouts, WEIGHT, BatchConfig(max_tokens_per_micro_batch=max_tokens)):
        loss_N, entropy_N, student_N, teacher_N = torch.rand(4, len(batch.target_N), generator=generator)
        loss_N = loss_N.clamp(max=cap)
        add_losses(totals, batch, TokenLosses(loss_N, entropy_N, None, student_N, teacher_N, loss_N == cap))
        owners = [rollout.prompt.domain for rollout in batch.rollouts for _ in rollout.completion_T]
        rows = zip(owners, batch.mask_N.tolist(), loss_N.tolist(), student_N.tolist(), teacher_N.tolist(), strict=True)
        tokens += [row for row in rows if row[1]]
    metrics = loss_metrics(totals, True)
    for domain in ("law", "code"):
        own = [token for token in tokens if token[0] == domain]
        assert metrics[f"domain/{domain}/student_tail"] == pytest.approx(average([token[3] for token in own]))
        assert metrics[f"domain/{domain}/teacher_tail"] == pytest.approx(average([token[4] for token in own]))
        assert metrics[f"domain/{domain}/capped"] == pytest.approx(average([float(token[2] == max(row[2] for row in own)) for token in own]))
        assert 0 < metrics[f"domain/{domain}/capped"] < 1
    assert not [name for name in metrics if name.endswith("teacher_entropy")], "a top-k has no entropy"


def test_tails_and_the_capped_share_are_left_out_where_there_are_none(random_rollouts):
    metrics, _ = losses_of(random_rollouts(SHAPES), 1000)
    assert not [name for name in metrics if name.endswith(("_tail", "/capped"))]


def test_a_long_rollout_counts_by_its_tokens_and_not_as_one_of_two_means(make_rollout):
    long, short = make_rollout("law", [5], [6] * 9, request=0), make_rollout("law", [5], [7], request=1)
    totals = DomainTotals(DOMAINS)
    for rollout, loss in [(long, 0.0), (short, 1.0)]:
        [batch] = supervised_batches([rollout], WEIGHT, BatchConfig())
        losses_N = torch.full((len(rollout.completion_T),), loss)
        add_losses(totals, batch, TokenLosses(losses_N, losses_N, losses_N))
    assert loss_metrics(totals, True)["domain/law/kl_per_token"] == pytest.approx(0.1)
    assert loss_metrics(totals, True)["domain/law/kl_per_sequence"] == pytest.approx(0.5)


def test_figures_of_a_teacher_are_those_of_its_domains_tokens_together():
    totals = DomainTotals(["law", "code", "math"])
    totals.add("law", tokens=6, loss=3.0, teacher_entropy=1.2)
    totals.add("code", tokens=2, loss=0.2, teacher_entropy=0.4)
    totals.add("math", tokens=8, loss=0.8, teacher_entropy=1.6)
    metrics = teacher_loss_metrics(totals, {"law+code": ["law", "code"], "math": ["math"], "absent": []})
    expected = {"law+code": {"token_share": 0.5, "kl_per_token": 0.4, "entropy": 0.2}, "math": {"token_share": 0.5, "kl_per_token": 0.1, "entropy": 0.2}}
    assert metrics == {f"teacher/{teacher}/{name}": pytest.approx(value) for teacher, own in expected.items() for name, value in own.items()}


def test_tokens_outside_the_mask_enter_no_figure(make_rollout):
    rollout = make_rollout("law", [5], [6, 7, 8], mask=[True, False, True])
    [batch] = supervised_batches([rollout], WEIGHT, BatchConfig())
    totals, values_N = DomainTotals(DOMAINS), torch.tensor([1.0, 1000.0, 3.0])
    add_losses(totals, batch, TokenLosses(values_N, values_N, values_N))
    metrics = loss_metrics(totals, True)
    assert metrics["domain/law/kl_per_token"] == metrics["domain/law/student_entropy"] == metrics["domain/law/teacher_entropy"] == 2.0
    assert metrics["step/loss"] == pytest.approx(4 * WEIGHT["law"])


@pytest.mark.parametrize("count", [1, 99, 100, 101, 250, 1000])
def test_the_99th_percentile_is_exact_over_the_tokens_of_a_step(count):
    values = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    totals = DomainTotals(DOMAINS)
    for piece in values.split(37):
        totals.add_values("law", piece)
    ordered = sorted(values.tolist())
    expected = next(value for place, value in enumerate(ordered, start=1) if 100 * place >= 99 * count)
    assert totals.reduced_percentile() == {"law": expected, "code": 0.0, "absent": 0.0}


def test_the_steps_loss_is_the_weighted_sum_and_its_shares_add_up_to_one(random_rollouts):
    metrics, tokens = losses_of(random_rollouts(SHAPES), 30)
    parts = {domain: sum(WEIGHT[domain] * token["loss"] for token in tokens if token["domain"] == domain) for domain in ("law", "code")}
    assert metrics["step/loss"] == pytest.approx(sum(parts.values()))
    for domain, part in parts.items():
        assert metrics[f"domain/{domain}/loss_share"] == pytest.approx(part / sum(parts.values()))


def test_a_domain_without_tokens_has_no_divergence(random_rollouts):
    metrics, _ = losses_of(random_rollouts(SHAPES), 1000)
    assert not [name for name in metrics if name.startswith("domain/absent/")]


def test_supervised_training_reports_a_loss_per_token_and_no_divergence(random_rollouts):
    metrics, tokens = losses_of(random_rollouts(SHAPES), 1000, is_distillation=False)
    assert metrics["domain/law/loss_per_token"] == pytest.approx(average([token["loss"] for token in tokens if token["domain"] == "law"]))
    assert not [name for name in metrics if "kl_" in name or "teacher" in name]


@pytest.fixture
def stream(tokenizer, v4_model) -> RolloutStream:
    """A stream that asks for shares 3 : 1 : 1 in its first step."""
    prompts = {name: PromptsConfig(path="synthetic:tools", rows=8, share=3.0 if name == "law" else 1.0) for name in DOMAINS}
    mixture = PromptMixture(load_prompts(prompts, tokenizer, 100), 5, seed=0)
    stream = RolloutStream(mixture, LocalSampler(v4_model, [tokenizer.eos_token_id], 0), RolloutConfig(), "run")
    stream.asked_shares = mixture.asked_shares(0)
    return stream


@pytest.fixture
def cfg() -> DistillConfig:
    return DistillConfig(domains={"law": DomainConfig(grader=GraderKind.exact), "code": DomainConfig(), "absent": DomainConfig(grader=GraderKind.exact)})


def test_lengths_shares_and_accuracy_are_those_of_the_steps_rollouts(stream, cfg, tokenizer, make_rollout):
    def answer(text: str, request: int, finished: bool = True) -> Rollout:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"] + ([tokenizer.eos_token_id] if finished else [])
        return make_rollout("law", [5], tokens, request=request, answer="42", finished=finished)

    rollouts = [answer("42", 0), answer("43", 1), answer("424242", 2, finished=False), make_rollout("code", [5], [6], request=3)]
    metrics = rollout_metrics(rollouts, stream, cfg, tokenizer)
    assert metrics["step/rollouts"] == 4
    assert metrics["step/completion_tokens"] == 3 + 3 + 6 + 1
    assert metrics["domain/law/completion_length"] == pytest.approx(12 / 3)
    assert metrics["domain/law/truncated"] == pytest.approx(1 / 3)
    assert metrics["domain/law/accuracy"] == pytest.approx(1 / 3)
    assert metrics["domain/code/truncated"] == 0.0
    assert [metrics[f"domain/{name}/prompt_share"] for name in DOMAINS] == [0.75, 0.25, 0.0]
    assert [metrics[f"domain/{name}/token_share"] for name in DOMAINS] == pytest.approx([12 / 13, 1 / 13, 0.0])
    assert [metrics[f"domain/{name}/prompt_share_asked"] for name in DOMAINS] == pytest.approx([0.6, 0.2, 0.2])


def test_loops_are_counted_by_completions_and_what_they_mask_by_tokens(stream, cfg, tokenizer, make_rollout):
    rollouts = [make_rollout("law", [5], tokens, request=number, answer="42") for number, tokens in enumerate([[6] * 40, list(range(60))])]
    rollouts.append(make_rollout("code", [5], [6], request=2))
    metrics = rollout_metrics(rollouts, stream, cfg, tokenizer)
    assert (metrics["domain/law/looped"], metrics["domain/code/looped"]) == (0.5, 0.0)
    assert "domain/law/loop_masked_tokens" not in metrics
    cfg.rollout.mask_loops = True
    masked = mask_loops(rollouts)
    metrics = rollout_metrics(masked, stream, cfg, tokenizer)
    assert metrics["domain/law/loop_masked_tokens"] == pytest.approx((100 - sum(rollout.num_loss_tokens for rollout in masked[:2])) / 100)
    assert (metrics["domain/law/loop_masked_tokens"], metrics["domain/code/loop_masked_tokens"]) == (0.24, 0.0)


def test_a_domain_without_rollouts_has_shares_of_zero_and_no_means(stream, cfg, tokenizer, make_rollout):
    metrics = rollout_metrics([make_rollout("code", [5], [6])], stream, cfg, tokenizer)
    assert {name.split("/")[-1] for name in metrics if name.startswith("domain/absent/")} == {"prompt_share", "token_share", "prompt_share_asked"}


def test_a_domain_without_a_grader_has_no_accuracy(stream, cfg, tokenizer, make_rollout):
    assert "domain/code/accuracy" not in rollout_metrics([make_rollout("code", [5], [6])], stream, cfg, tokenizer)


def test_data_metrics_count_rows_and_dropped_rows_by_reason(stream):
    stream.prompts.domains["law"].dropped = {"too_long": 3, "held_out": 2}
    metrics = data_metrics(stream.prompts)
    assert (metrics["data/law/rows"], metrics["data/law/dropped"], metrics["data/code/dropped"]) == (8.0, 5.0, 0.0)
    assert (metrics["data/law/dropped_too_long"], metrics["data/law/dropped_held_out"]) == (3.0, 2.0)


def test_data_metrics_count_rows_that_domains_have_in_common(stream):
    """All of this stream's domains have the same eight rows, each once."""
    metrics = data_metrics(stream.prompts)
    assert (metrics["data/law/duplicates_within"], metrics["data/law/duplicates_across"]) == (0.0, 8.0)


def general(name: str) -> str:
    """A record's name with D for its domain and LL for its layer, as the docstring of opd/metrics.py writes them."""
    name = re.sub(r"^conflict/\w+/\w+/", "conflict/T/U/", name)
    return re.sub(r"layer_\d\d", "layer_LL", re.sub(r"/(arithmetic|tools)/", "/D/", name)).replace("teacher/D/", "teacher/T/")


def test_records_of_a_distillation_have_the_names_on_file(short_run, golden_dir):
    records = [json.loads(line) for line in (short_run / "metrics.jsonl").read_text().splitlines()]
    found = "".join(f"step {record['step']}\n" + "".join(f"    {name}\n" for name in sorted({general(name) for name in record})) for record in records)
    assert found == (golden_dir / "metrics_names.txt").read_text()


def test_every_name_on_file_is_in_the_docstring(golden_dir):
    names = {line.split("/")[-1].strip() for line in (golden_dir / "metrics_names.txt").read_text().splitlines() if "/" in line}
    phases = {"rollout", "score", "update"}
    ends = {f"{name}_{end}" for name in ("kl_per_token", "kl_per_sequence", "answer_gain") for end in ("low", "high")}
    assert not [name for name in names - phases - ends if not re.search(rf"\b{name}\b", opd.metrics.__doc__)]


def test_every_record_is_numbers_only_and_carries_the_schema(short_run):
    for line in (short_run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["schema"] == 1
        assert all(isinstance(value, int | float) for value in record.values())
