"""What student and teacher would have said, at the worst tokens and at every sixteenth, against whole logits of transformers' own forward; and that the update
does not notice it.
"""

import copy
import json
from pathlib import Path

import pytest
import torch

from opd.config import DistillConfig
from opd.divergence import ModelStates
from opd.job_config import SamplesConfig
from opd.likeliest import LIKELIEST, STRIDE, TOP, WORST, Compared, compare, start_place
from opd.loss_config import DivergenceKind, LossConfig
from opd.samples import Samples
from opd.update import update
from rollout.config import ModelConfig
from rollout.model import load_model
from teachers.config import DomainConfig, SignalKind, TeacherConfig, TeachersConfig
from teachers.pool import TeacherPool

TEACHERS = {"law": "v4", "code": "qwen3_moe"}
SIGNALS = {
    "zero3": (3, LossConfig(temperature=0.7), TeachersConfig(max_resident=2)),
    "forward KL": (1, LossConfig(kind=DivergenceKind.forward_kl, smoothing=0.1, cap=0.5), TeachersConfig(max_resident=2)),
    "policy gradient": (1, LossConfig(policy_gradient=True), TeachersConfig(max_resident=2)),
    "top_k": (1, LossConfig(), TeachersConfig(max_resident=2, signal=SignalKind.top_k, top_k=3)),
    "wide top_k": (1, LossConfig(), TeachersConfig(max_resident=2, signal=SignalKind.top_k, top_k=20)),
    "sampled_token": (1, LossConfig(), TeachersConfig(max_resident=2, signal=SignalKind.sampled_token)),
}


@pytest.fixture
def rollouts(random_rollouts) -> list:
    """Of two domains; one has tokens outside the loss, one fewer tokens than are looked at."""
    found = random_rollouts([("law", 3, 19), ("code", 9, 2), ("law", 6, 4), ("code", 2, 12), ("law", 12, 11), ("code", 5, 15)])
    found[0].completion_mask_T[2:5] = False
    return found


@pytest.fixture
def setting(make_config, teacher_folders):
    """(config, pool settings) by name."""

    def make(name: str) -> tuple[DistillConfig, TeachersConfig]:
        stage, loss, teachers = SIGNALS[name]
        domains = {domain: DomainConfig(teacher=TeacherConfig(model=str(teacher_folders[model]))) for domain, model in TEACHERS.items()}
        return make_config(domains, stage=stage, loss=loss, teachers=teachers, samples=SamplesConfig(every=1), max_tokens=40), teachers

    return make


@pytest.fixture
def one_update(make_engine, v4_model, tokenizer, device, rollouts):
    """(metrics, weights afterwards) of one update, with samples kept in a folder where one is given."""

    def make(cfg: DistillConfig, teachers: TeachersConfig, folder: Path | None = None, rollouts: list = rollouts, scores: dict | None = None):
        pool = TeacherPool(cfg.domains, teachers, tokenizer, device)
        engine = make_engine(v4_model, cfg)
        metrics = update(engine, pool, pool.score(rollouts), cfg, None if folder is None else Samples(folder, cfg, tokenizer), scores)
        return metrics, engine.full_weights()

    return make


def logprobs_of(model, rollout, vocab_size: int) -> torch.Tensor:
    """[T, V] at temperature 1, by the model's own forward."""
    ids = torch.tensor([[*rollout.prompt.tokens, *rollout.completion_T.tolist()]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(rollout.prompt.tokens) - 1 : -1, :vocab_size]
    return logits.double().log_softmax(-1)


def require_likeliest(found: list[dict], logprob_V: torch.Tensor, count: int = LIKELIEST) -> None:
    expected = logprob_V.topk(count)
    assert [token["token"] for token in found] == expected.indices.tolist()
    assert [token["logprob"] for token in found] == pytest.approx(expected.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("name", SIGNALS)
def test_what_was_likely_is_what_the_models_own_forward_says(name, setting, one_update, rollouts, v4_model, teacher_folders, tokenizer, tmp_path):
    cfg, teachers = setting(name)
    one_update(cfg, teachers, tmp_path)
    student = copy.deepcopy(v4_model).eval()
    models = {domain: load_model(ModelConfig(model=str(teacher_folders[model])), "teacher").eval() for domain, model in TEACHERS.items()}
    by_request = {rollout.prompt.request: rollout for rollout in rollouts}
    looked_at = 0
    for domain, kept in json.loads((tmp_path / "samples/000001.json").read_text())["domains"].items():
        for record in kept:
            rollout = by_request[record["request"]]
            own_TV, other_TV = (logprobs_of(model, rollout, len(tokenizer)) for model in (student, models[domain]))
            inside = [(-kl, place) for place, kl in enumerate(record["kl"]) if kl is not None]
            assert len(record["at_worst"]) == min(WORST, len(inside))
            if cfg.loss.cap is None:
                assert [worst["position"] for worst in record["at_worst"]] == [place for _, place in sorted(inside)[:WORST]]
            for worst in record["at_worst"]:
                place = worst["position"]
                require_likeliest(worst["student"], own_TV[place])
                if name == "sampled_token":
                    target = int(rollout.completion_T[place])
                    [given] = worst["teacher"]
                    assert (given["token"], given["logprob"]) == (target, pytest.approx(float(other_TV[place, target]), abs=1e-4))
                else:
                    require_likeliest(worst["teacher"], other_TV[place], min(LIKELIEST, teachers.top_k))
                looked_at += 1
    assert looked_at > 20


def average(values: list) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("name", SIGNALS)
def test_overlap_and_ratios_are_those_of_every_sixteenth_token_by_the_models_own_forward(
    name, setting, one_update, random_rollouts, v4_model, teacher_folders, tokenizer
):
    """Of two domains, with both grades in the one; the other has no grader."""
    cfg, teachers = setting(name)
    rollouts = random_rollouts([("law", 3, 36), ("code", 9, 2), ("law", 6, 31), ("code", 2, 28), ("law", 12, 21), ("code", 5, 30)])
    rollouts[0].completion_mask_T[2:5] = False
    scores = {(rollout.prompt.request, rollout.sample): grade for rollout, grade in zip(rollouts, (1.0, 0.0, 0.5, 1.0, 0.0, 1.0), strict=True)}
    scores = {key: grade for key, grade in scores.items() if key[0] % 2 == 0}
    student = copy.deepcopy(v4_model).eval()
    metrics, _ = one_update(cfg, teachers, rollouts=rollouts, scores=scores)
    overlaps, ratios = {domain: [] for domain in TEACHERS}, {"right": [], "wrong": []}
    for rollout in rollouts:
        domain, key = rollout.prompt.domain, (rollout.prompt.request, rollout.sample)
        teacher = load_model(ModelConfig(model=str(teacher_folders[TEACHERS[domain]])), "teacher").eval()
        own_TV, other_TV = (logprobs_of(model, rollout, len(tokenizer)) for model in (student, teacher))
        for place in range(len(rollout.completion_T)):
            if (place - start_place(*key)) % STRIDE == 0 and rollout.completion_mask_T[place]:
                own, other = (set(row_V[place].topk(TOP).indices.tolist()) for row_V in (own_TV, other_TV))
                overlaps[domain].append(len(own & other) / TOP)
                if key in scores:
                    token = rollout.completion_T[place]
                    ratios["right" if scores[key] == 1 else "wrong"].append(abs(float(own_TV[place, token] - other_TV[place, token])))
    expected = {f"domain/{domain}/overlap": average(values) for domain, values in overlaps.items() if name not in ("top_k", "sampled_token")}
    expected |= {f"domain/law/log_ratio_{kind}": average(values) for kind, values in ratios.items() if "top_k" not in name}
    found = {key: value for key, value in metrics.items() if "overlap" in key or "log_ratio" in key}
    assert found == {key: pytest.approx(value, abs=1e-4) for key, value in expected.items()}


@pytest.mark.parametrize("every", [1, 2, 8, 16])
def test_a_domain_whose_requests_are_a_fixed_number_apart_is_compared_at_all_places(every):
    places = [start_place(request, 0) for request in range(3, 3 + 400 * every, every)]
    counts = [places.count(place) for place in range(STRIDE)]
    assert sum(counts) == 400
    assert min(counts) > 5


def test_pieces_of_rows_and_of_the_vocabulary_change_no_figure(monkeypatch):
    """A head with rows beyond the vocabulary; pieces that cut both rows and columns unevenly."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (ModelStates(torch.randn(11, 8, generator=generator), torch.randn(60, 8, generator=generator)) for _ in range(2))
    rows, target_N = torch.tensor([0, 2, 3, 7, 8, 10]), torch.randint(53, (11,), generator=generator)
    monkeypatch.setattr("opd.likeliest.BLOCK_COLUMNS", 9)
    monkeypatch.setattr("opd.likeliest.ROWS_AT_A_TIME", 4)
    found = compare(student, teacher, rows, target_N, 53)
    own_RV, other_RV = ((states.hidden_ND[rows].double() @ states.head_VD[:53].double().T).log_softmax(1) for states in (student, teacher))
    shared = [len(set(own.topk(TOP).indices.tolist()) & set(other.topk(TOP).indices.tolist())) / TOP for own, other in zip(own_RV, other_RV, strict=True)]
    assert found.overlap_R.tolist() == shared
    torch.testing.assert_close(found.log_ratio_R, (own_RV - other_RV).gather(1, target_N[rows, None])[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["zero3", "wide top_k"])
def test_an_update_whose_tokens_are_compared_is_bit_identical_to_one_without(name, setting, one_update, monkeypatch):
    cfg, teachers = setting(name)
    metrics, weights = one_update(cfg, teachers)
    monkeypatch.setattr("opd.trained_model.compare", lambda student, signal, rows, *rest: Compared(row_R=rows[:0], overlap_R=None, log_ratio_R=None))
    without, weights_without = one_update(cfg, teachers)
    assert "domain/code/overlap" in metrics
    assert "domain/code/overlap" not in without
    assert all(torch.equal(tensor, weights_without[key]) for key, tensor in weights.items())


@pytest.mark.parametrize("name", ["zero3", "top_k"])
def test_an_update_whose_samples_are_kept_is_bit_identical_to_one_without(name, setting, one_update, tmp_path):
    cfg, teachers = setting(name)
    metrics, weights = one_update(cfg, teachers)
    with_samples, weights_with_samples = one_update(cfg, teachers, tmp_path)
    clocks = ("seconds", "loads", "bytes_loaded", "load_seconds", "load_hidden")
    for key in metrics:
        assert metrics[key] == with_samples[key] or key.endswith(clocks), key
    assert all(torch.equal(tensor, weights_with_samples[key]) for key, tensor in weights.items())
