"""A step's work, rates and balance against naive counts: shapes seen by hooks in the forwards, and formulas over two gloo ranks."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from opd.batch import supervised_batches
from opd.config import BatchConfig
from opd.flops import model_flops
from opd.throughput import memory_metrics, phase_metrics, rollout_work, score_work, update_work
from rollout.config import PromptsConfig, RolloutConfig
from rollout.prompts import PromptMixture, load_prompts
from rollout.replay import replay_file, save_rollouts
from rollout.sampler import LocalSampler
from rollout.stream import RolloutStream
from rollout.types import Rollout
from teachers.config import DomainConfig, SignalKind, TeacherConfig, TeachersConfig
from teachers.pool import TeacherPool

SHAPES = [("law", 3, 9), ("code", 9, 2), ("law", 6, 4), ("code", 2, 12), ("law", 12, 1), ("code", 5, 5), ("law", 1, 7)]
LENGTHS = [before + after for _, before, after in SHAPES]
WEIGHT = {"law": 0.5, "code": 0.5}


@contextmanager
def positions_seen(module: nn.Module) -> Iterator[list[int]]:
    """Positions, padded ones included, of each forward of a backbone."""
    seen: list[int] = []
    handle = module.register_forward_pre_hook(lambda _module, _args, inputs: seen.append(inputs["input_ids"].numel()), with_kwargs=True)
    yield seen
    handle.remove()


@pytest.fixture
def pool(teacher_folders, tokenizer, device) -> Callable[..., TeacherPool]:
    def make(**settings) -> TeacherPool:
        names = {"law": "v4", "code": "qwen3_moe"}
        domains = {domain: DomainConfig(teacher=TeacherConfig(model=str(teacher_folders[name]))) for domain, name in names.items()}
        return TeacherPool(domains, TeachersConfig(max_resident=2, **settings), tokenizer, device)

    return make


@pytest.mark.parametrize("max_tokens", [20, 45, 1000])
def test_padding_of_the_update_is_what_its_forwards_read_beyond_the_sequences(max_tokens, v4_model, make_config, random_rollouts):
    batches = supervised_batches(random_rollouts(SHAPES), WEIGHT, BatchConfig(max_tokens_per_micro_batch=max_tokens))
    with positions_seen(v4_model.base_model) as seen, torch.no_grad():
        for batch in batches:
            v4_model(input_ids=batch.tokens_BL, use_cache=False)
    metrics = update_work(batches, v4_model, make_config(), None)
    assert metrics["work/update_tokens"] == sum(LENGTHS)
    assert metrics["batch/padding"] == pytest.approx(1 - sum(LENGTHS) / sum(seen))


def test_packed_micro_batches_have_no_padding(qwen3_moe_model, make_config, random_rollouts):
    batches = supervised_batches(random_rollouts(SHAPES), WEIGHT, BatchConfig(max_tokens_per_micro_batch=30, packing=True))
    assert update_work(batches, qwen3_moe_model, make_config(), None)["batch/padding"] == 0.0


def test_a_filler_is_padding_and_no_work(v4_model, make_config, random_rollouts):
    [batch] = supervised_batches(random_rollouts(SHAPES[:1]), WEIGHT, BatchConfig())
    alone, beside = (update_work(batches, v4_model, make_config(), None) for batches in ([batch], [batch, replace(batch, is_filler=True)]))
    assert (alone["batch/padding"], beside["batch/padding"]) == (0.0, 0.5)
    assert [beside[f"work/update_{name}"] for name in ("tokens", "flops")] == [alone[f"work/update_{name}"] for name in ("tokens", "flops")]


@pytest.mark.parametrize(("recomputes", "passes"), [(False, 3), (True, 4)])
def test_an_update_is_three_forwards_or_four_and_three_products_with_the_head(recomputes, passes, v4_model, make_config, random_rollouts):
    batches = supervised_batches(random_rollouts(SHAPES), WEIGHT, BatchConfig(max_tokens_per_micro_batch=40))
    model, head = model_flops(v4_model), v4_model.get_output_embeddings()
    expected = passes * sum(model.sequence(length) for length in LENGTHS)
    expected += 3 * 2 * head.in_features * head.out_features * sum(after for _, _, after in SHAPES)
    metrics = update_work(batches, v4_model, make_config(student={"gradient_checkpointing": recomputes}), None)
    assert metrics["work/update_flops"] == pytest.approx(expected)


@pytest.mark.parametrize("max_tokens", [20, 1000])
def test_padding_of_scoring_is_what_the_teachers_forwards_read_beyond_the_sequences(max_tokens, pool, random_rollouts):
    teachers = pool(max_tokens_per_forward=max_tokens)
    backbones = [teachers.get(name).model.base_model for name in teachers.configs]
    with positions_seen(backbones[0]) as first, positions_seen(backbones[1]) as second:
        scored = teachers.score(random_rollouts(SHAPES))
    metrics = score_work(scored, teachers)
    assert metrics["work/score_tokens"] == sum(LENGTHS)
    assert metrics["batch/score_padding"] == pytest.approx(1 - sum(LENGTHS) / sum(first + second))


@pytest.mark.parametrize(("kind", "products"), [(SignalKind.hidden_states, 0), (SignalKind.top_k, 1)])
def test_scoring_is_each_teachers_forward_over_its_own_sequences(kind, products, pool, random_rollouts):
    teachers, expected = pool(), 0.0
    for domain, before, after in SHAPES:
        model = teachers.get(teachers.teacher_of[domain]).model
        head = model.get_output_embeddings()
        expected += model_flops(model).sequence(before + after) + products * after * 2 * head.in_features * head.out_features
    scored = teachers.score(random_rollouts(SHAPES), kind)
    assert score_work(scored, teachers)["work/score_flops"] == pytest.approx(expected)


@pytest.fixture
def sampled(qwen3_moe_model, tokenizer, make_prompt, tmp_path) -> Callable[..., tuple[list[Rollout], RolloutStream]]:
    """sampled([5, 5], width=4, completions=1): rollouts of prompts with these lengths, none of which ends early, and their stream."""

    def make(lengths: list[int], width: int, completions: int = 1, **settings) -> tuple[list[Rollout], RolloutStream]:
        prompts = load_prompts({"tools": PromptsConfig(path="synthetic:tools", rows=8)}, tokenizer, longest=64)
        cfg = RolloutConfig(prompts_per_step=4, max_new_tokens=6, decode_width=width, log=False, **settings)
        sampler = LocalSampler(qwen3_moe_model, [], seed=0, vocab_size=len(tokenizer))
        asked = [make_prompt("tools", [3 + number] * length, number) for number, length in enumerate(lengths)]
        rollouts = sampler.sample(asked, cfg, completions)
        stream = RolloutStream(PromptMixture(prompts, 4, 0), sampler, cfg, str(tmp_path))
        stream.figures = sampler.figures  # as after a step that the stream itself has sampled
        return rollouts, stream

    return make


@pytest.mark.parametrize(("lengths", "width", "occupancy", "feed"), [([5] * 4, 4, 1.0, 0.0), ([5], 4, 0.25, 0.0), ([5, 8], 2, 12 / 18, 3 / 18)])
def test_occupancy_and_prompt_feed_are_shares_of_rows_and_decode_steps(lengths, width, occupancy, feed, sampled):
    """In the last case nine steps of two rows: the longer prompt is fed for three of them, and then the shorter one has ended for three."""
    metrics = rollout_work(*sampled(lengths, width, fixed_width=True))
    assert metrics["rollout/occupancy"] == pytest.approx(occupancy)
    assert metrics["rollout/prompt_feed"] == pytest.approx(feed)
    assert metrics["work/rollout_tokens"] == 6 * len(lengths)


def test_a_rollout_reads_its_prompt_once_for_all_completions(sampled, qwen3_moe_model):
    model = model_flops(qwen3_moe_model)
    metrics = rollout_work(*sampled([5, 9], 4, completions=2))
    expected = sum(model.sequence(length) + 2 * model.completion(length, 6) for length in (5, 9))
    assert metrics["work/rollout_flops"] == pytest.approx(expected)


def test_replayed_rollouts_are_no_work(sampled, tmp_path):
    rollouts, stream = sampled([5], 4)
    save_rollouts(replay_file(tmp_path, 0), 0, rollouts)
    stream.cfg = replace(stream.cfg, replay=str(tmp_path))
    assert rollout_work(rollouts, stream) == {}


def test_the_sampler_taking_over_weights_is_timed(sampled, qwen3_moe_model):
    class Source:
        policy_step = 3

        def weights(self):
            return qwen3_moe_model.state_dict().items()

    _, stream = sampled([5], 4)
    rollouts = stream.next(0, Source())
    assert 0 < rollout_work(rollouts, stream)["seconds/weight_sync"] == stream.sync_seconds


def test_rates_and_utilisation_are_work_by_seconds(device):
    work = {"work/rollout_tokens": 300.0, "work/rollout_flops": 6e9, "work/score_tokens": 900.0, "work/update_tokens": 900.0, "work/update_flops": 3e10}
    metrics = phase_metrics(work, {"rollout": 2.0, "score": 0.5, "update": 4.0}, torch.float32)
    rate = metrics["throughput/matmul_tflops_per_device"] * 1e12
    tokens = {phase: metrics[f"throughput/{phase}_tokens_per_second_per_device"] for phase in ("rollout", "score", "update")}
    assert tokens == pytest.approx({"rollout": 150.0, "score": 1800.0, "update": 225.0})
    assert metrics["throughput/rollout_mfu"] == pytest.approx(3e9 / rate)
    assert metrics["throughput/update_mfu"] == pytest.approx(7.5e9 / rate)
    assert metrics["throughput/mfu"] == pytest.approx(3.6e10 / 6.0 / rate), "scoring, whose FLOPs are not known here, is left out on both sides"
    assert "throughput/score_mfu" not in metrics


def test_peak_memory_is_at_least_what_is_held_now_and_stays():
    held = torch.ones(50_000_000)
    now = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
    peak = memory_metrics()["memory/peak_rss_gb"]
    assert held.nbytes / 1e9 < 0.95 * now < peak < 1000  # the kernel counts pages in steps
    del held
    assert memory_metrics()["memory/peak_rss_gb"] >= peak


SCRIPT = """
import json, sys
from dataclasses import replace
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from opd.batch import supervised_batches
from opd.config import BatchConfig, DistillConfig
from opd.job_config import LoggerConfig, LoggerKind, ProfileConfig
from opd.distributed import Group, rank, start_processes, stop_processes
from opd.throughput import phase_metrics, update_work
from opd.tracker import Tracker
from rollout.types import Prompt, completed

start_processes()
own, folder = rank(Group.data), Path(sys.argv[1])
cfg = AutoConfig.for_model("qwen3", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
                           vocab_size=20, max_position_embeddings=64)
lengths = ([4, 6], [10, 12, 3])[own]
rollouts = [completed(Prompt(domain="law", request=n, row="r", tokens=(5,)), [6] * (length - 1)) for n, length in enumerate(lengths)]
batches = supervised_batches(rollouts, {"law": 1.0}, BatchConfig(max_tokens_per_micro_batch=24))
work = update_work(batches, AutoModelForCausalLM.from_config(cfg), DistillConfig(), None)
rates = phase_metrics(work, {"rollout": (1.0, 3.0)[own], "update": (4.0, 4.5)[own]}, torch.float32)
(folder / f"{own}.json").write_text(json.dumps([work, rates]))
for all_ranks in (False, True):
    run_dir = folder / str(all_ranks)
    run_dir.mkdir(exist_ok=True)
    profile = ProfileConfig(steps=[1, 1], all_ranks=all_ranks)
    tracker = Tracker(run_dir, "test", DistillConfig(logger=LoggerConfig(kind=LoggerKind.none), num_steps=1, profile=profile))
    for step in (0, 1):
        tracker.log(step, {})
stop_processes()
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two_ranks")
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(folder / "script.py"), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


@pytest.mark.slow
@pytest.mark.multi
def test_two_ranks_add_up_their_work_and_the_slowest_sets_the_pace(two_ranks):
    """Sequences of 4 and 6 are one micro-batch of 12 positions, those of 10 and 12 one of 24, that of 3 another: the first rank repeats its only one."""
    (work, rates), second = (json.loads((two_ranks / f"{place}.json").read_text()) for place in range(2))
    assert second == [work, rates], "every rank has the same figures"
    real, padded = 4 + 6 + 10 + 12 + 3, 12 + 12 + 24 + 3
    assert work["work/update_tokens"] == real
    assert work["batch/padding"] == pytest.approx(1 - real / padded)
    assert work["balance/update_positions"] == pytest.approx(27 / ((12 + 27) / 2))
    assert rates["seconds/rollout"] == 3.0
    assert rates["balance/rollout"] == pytest.approx(3.0 / ((1.0 + 3.0) / 2))
    assert rates["balance/update"] == pytest.approx(4.5 / ((4.0 + 4.5) / 2))
    assert rates["throughput/update_tokens_per_second_per_device"] == pytest.approx(real / 4.5 / 2)
    assert rates["throughput/update_mfu"] == pytest.approx(work["work/update_flops"] / 4.5 / (2 * rates["throughput/matmul_tflops_per_device"] * 1e12))


@pytest.mark.slow
@pytest.mark.multi
@pytest.mark.parametrize(("all_ranks", "ranks"), [(False, [0]), (True, [0, 1])])
def test_the_main_rank_is_traced_alone_or_all_are(all_ranks, ranks, two_ranks):
    found = sorted(path.name for path in (two_ranks / str(all_ranks) / "profile").iterdir())
    assert found == [f"rank-{place}-steps-1-1.json.gz" for place in ranks]
