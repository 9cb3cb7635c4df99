"""Kept rollouts: the format by a golden file, who is best and worst, the tokens' losses as the update has them, on one rank and on two."""

import json
from pathlib import Path

import pytest
import torch

from opd.batch import supervised_batches
from opd.config import BatchConfig
from opd.job_config import LoggerConfig, LoggerKind, SamplesConfig
from opd.samples import Samples, forget_after, pieces
from opd.tiles import TokenLosses
from opd.tracker import Tracker
from teachers.config import DomainConfig


@pytest.fixture
def make_samples(make_config, tokenizer, tmp_path):
    def make(*domains: str, grader: str | None = None, every: int = 2) -> Samples:
        cfg = make_config({name: DomainConfig(grader=grader) for name in domains}, samples=SamplesConfig(every=every), num_steps=9)
        return Samples(tmp_path, cfg, tokenizer)

    return make


def with_losses(samples: Samples, rollouts: list, losses: dict[int, float]) -> None:
    """Add the rollouts, each with one loss on all its tokens, by request."""
    weights = dict.fromkeys(samples.cfg.domains, 1.0)
    for batch in supervised_batches(rollouts, weights, BatchConfig()):
        loss_N = torch.tensor([losses[batch.rollouts[number].prompt.request] for number in batch.rollout_N.tolist()])
        samples.add(batch, TokenLosses(loss_N=loss_N, student_entropy_N=torch.zeros_like(loss_N)))


def written(folder: Path, step: int) -> dict:
    return json.loads((folder / "samples" / f"{step:06d}.json").read_text())


def test_a_file_is_as_the_golden_one(make_samples, make_rollout, tokenizer, tmp_path, golden_dir):
    samples = make_samples("law", "code", grader="exact")
    prompt, right = tokenizer("2+2=")["input_ids"], tokenizer("4")["input_ids"]
    rollouts = [make_rollout("law", prompt, [*right, tokenizer.eos_token_id], request=request, answer="4") for request in range(2)]
    rollouts.append(make_rollout("law", prompt, [*right, *right, *right], request=2, answer="4", finished=False, mask=[True, False, True]))
    with_losses(samples, rollouts, {0: 0.5, 1: 0.25, 2: 2.0})
    samples.write(12)
    assert (tmp_path / "samples/000012.json").read_text() == (golden_dir / "samples.json").read_text()


def test_the_end_of_a_prompt_is_shown_without_what_the_template_puts_behind_every_prompt(make_samples, make_rollout, tokenizer, tmp_path):
    samples = make_samples("law")
    prompt = [*tokenizer("2+2=")["input_ids"], tokenizer.eos_token_id]
    with_losses(samples, [make_rollout("law", prompt, [7, 8], request=0)], {0: 0.5})
    samples.write(2)
    assert [found["text"] for found in written(tmp_path, 2)["figures"]["law"]["prompts"]] == ["2+2="]


@pytest.mark.parametrize(
    ("losses", "places"),
    [
        ([0.5], {"worst": 0}),
        ([0.5, 0.1], {"best": 1, "worst": 0}),
        ([0.5, 0.1, 0.9, 0.2, 0.7], {"best": 1, "median": 0, "worst": 2}),
        ([0.5, 0.5, 0.5], {"best": 0, "median": 1, "worst": 2}),
    ],
)
def test_the_places_go_by_the_mean_loss_and_ties_by_request(losses, places, make_samples, make_rollout, tmp_path):
    samples = make_samples("law")
    with_losses(samples, [make_rollout("law", [5, 6], [7, 8], request=request) for request in range(len(losses))], dict(enumerate(losses)))
    samples.write(2)
    assert {record["place"]: record["request"] for record in written(tmp_path, 2)["domains"]["law"]} == places


def test_what_is_left_out_of_the_loss_is_never_chosen_and_a_domain_without_rollouts_is_not_there(make_samples, make_rollout, tmp_path):
    samples = make_samples("law", "code", "other")
    rollouts = [make_rollout("law", [5], [7, 8], request=0), make_rollout("law", [5], [7, 8], request=1, mask=[False, False])]
    rollouts += [make_rollout("code", [5], [7], request=2, mask=[False]), make_rollout("law", [5], [7], request=3)]
    with_losses(samples, rollouts, {0: 1.0, 1: 9.0, 2: 1.0, 3: float("nan")})
    samples.write(2)
    domains = written(tmp_path, 2)["domains"]
    assert list(domains) == ["law"]
    assert [record["request"] for record in domains["law"]] == [0]


@pytest.mark.parametrize(("every", "due"), [(0, []), (4, [4, 8, 9]), (9, [9]), (50, [9])])
def test_files_are_due_every_so_many_steps_and_at_the_last(every, due, make_samples):
    samples = make_samples("law", every=every)
    assert [step for step in range(1, 10) if samples.is_due(step)] == due


def test_a_run_keeps_what_its_update_measured(short_run):
    """Both steps are done: the file is of the last. The mean over all rollouts of the domain lies between the best and the worst."""
    [path] = (short_run / "samples").iterdir()
    assert path.name == "000002.json"
    record = json.loads((short_run / "metrics.jsonl").read_text().splitlines()[-1])
    domains = json.loads(path.read_text())["domains"]
    assert set(domains) == {"arithmetic", "tools"}
    for name, kept in domains.items():
        means = [sum(rollout["kl"]) / len(rollout["kl"]) for rollout in kept]
        assert means == sorted(means)
        assert means[0] <= record[f"domain/{name}/kl_per_token"] <= means[-1]
        for rollout in kept:
            assert len(rollout["kl"]) == len(rollout["tokens"]) == len(rollout["pieces"])
    assert {rollout["grade"] for rollout in domains["tools"]} == {None}, "its grader is null"


def test_a_resume_forgets_the_files_of_steps_that_will_be_done_again(tmp_path, make_config):
    (tmp_path / "samples").mkdir()
    for step in (2, 4, 6):
        (tmp_path / "samples" / f"{step:06d}.json").write_text("{}")
    forget_after(tmp_path, 4)
    assert sorted(path.stem for path in (tmp_path / "samples").iterdir()) == ["000002", "000004"]
    cfg = make_config()
    cfg.logger = LoggerConfig(kind=LoggerKind.none)
    Tracker(tmp_path, "test", cfg).resume(2)
    assert sorted(path.stem for path in (tmp_path / "samples").iterdir()) == ["000002"]


def test_pieces_join_to_the_text_where_characters_take_several_tokens():
    """Bytes as tokens: a character's text stands at the last of its bytes."""

    class Bytes:
        def decode(self, tokens):
            return bytes(tokens).decode(errors="replace")

    text = "a é 🙂 b 漢字"
    found = pieces(list(text.encode()), Bytes())
    assert "".join(found) == text
    assert len(found) == len(text.encode())
    assert found[2:4] == ["", "é"]


def test_pieces_keep_the_spaces_that_a_token_loses_by_itself():
    class Words:
        words = ["the", "law", "says", "no"]

        def decode(self, tokens):
            return " ".join(self.words[token] for token in tokens)

    assert pieces([0, 1, 2, 3], Words()) == ["the", " law", " says", " no"]
