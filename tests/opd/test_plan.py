"""`opd plan`: counts by hand on tiny models, the published sizes of DeepSeek-V4, ZeRO's division, and the verdict."""

import pytest
import torch

from opd.__main__ import load_config
from opd.config import OptimConfig, OptimizerKind
from opd.memory import GIB, Phase, StudentCounts, Zero, checkpoint_bytes, optimizer_bytes, student_parts
from opd.memory_trace import LiveBytes, trace_training
from opd.plan import Plan, plan
from opd.plan_config import DeviceKind
from opd.plan_models import planned_student
from opd.student import prepare_training

COUNTS = StudentCounts(
    trained=1_000_000, frozen=200_000, muon=600_000, experts=500_000,
    largest_group=900_000, largest_module=300_000, largest_parameter=300_000, small=0, buffers=0,
)  # fmt: skip


def zero(stage: int, ranks: int = 4, weight_bytes: int = 4, **settings) -> Zero:
    return Zero(stage=stage, weight_bytes=weight_bytes, num_ranks=ranks, device=DeviceKind.cuda, settings=settings)


def bytes_of(stage: int, name: str, **fields) -> float:
    return sum(part.num_bytes for part in student_parts(COUNTS, zero(stage, **fields), OptimConfig()) if part.name == name)


@pytest.fixture(scope="module")
def tiny() -> list[str]:
    return ["student=qwen3_moe_tiny", "plan.teachers=2", "plan.ranks=2", "rollout.prompts_per_step=8", "rollout.decode_width=4", "rollout.max_new_tokens=8"]


@pytest.fixture(scope="module")
def tiny_plan(tiny) -> Plan:
    return Plan(load_config("plan", [*tiny, "plan.prompt_tokens=8"]))


@pytest.mark.parametrize(("name", "total", "active"), [("deepseek_v4_flash", 284e9, 13), ("deepseek_v4_pro", 1.6e12, 49)])
def test_the_published_shapes_have_the_published_sizes(name, total, active):
    """Active: without the embedding, which is looked up, and without the routed experts that a token is not sent to."""
    planned = planned_student(load_config("plan", [f"student={name}"]).student)
    model = planned.build()
    count = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(parameter.numel() for part, parameter in model.named_parameters() if ".experts." in part)
    used = count - experts + experts * planned.config.num_experts_per_tok / planned.config.n_routed_experts
    assert abs(count / total - 1) < 0.02
    assert round((used - model.get_input_embeddings().weight.numel()) / 1e9) == active


@pytest.mark.parametrize(("stage", "weights"), [(0, 4.8e6), (1, 4.8e6), (2, 4.8e6), (3, 1.2e6)])
def test_stage_3_divides_the_weights_among_the_ranks(stage, weights):
    assert bytes_of(stage, "student weights") == weights


@pytest.mark.parametrize(("stage", "moments"), [(0, 8e6), (1, 2e6), (2, 2e6), (3, 2e6)])
def test_the_moments_are_divided_from_stage_1_on(stage, moments):
    assert bytes_of(stage, "optimizer moments") == moments


@pytest.mark.parametrize(("stage", "weight_bytes", "masters"), [(0, 4, 0), (1, 4, 1e6), (2, 2, 1e6), (3, 2, 1e6), (3, 4, 0)])
def test_masters_are_a_copy_except_where_the_weights_are_they(stage, weight_bytes, masters):
    assert bytes_of(stage, "float32 masters", weight_bytes=weight_bytes) == masters


def test_muon_has_one_moment_for_what_it_takes():
    assert optimizer_bytes(COUNTS, OptimConfig(kind=OptimizerKind.muon)) == 4 * 600_000 + 8 * 400_000


def test_offloaded_state_is_the_hosts():
    parts = student_parts(COUNTS, zero(2, offload_optimizer={"device": "cpu"}), OptimConfig())
    assert {part.name for part in parts if part.on_host} == {"float32 masters", "optimizer moments", "gradients", "update"}


def test_a_checkpoint_holds_weights_masters_and_moments():
    assert checkpoint_bytes(COUNTS, zero(1), OptimConfig()) == 4 * 1_200_000 + 12 * 1_000_000


def test_live_bytes_counts_what_is_alive_together():
    with LiveBytes() as found:
        first = torch.empty(100, device="meta")
        second = first + 1
        del first
        third = second * 2
        del second, third
    assert (found.peak, found.live) == (800, 0)


def test_the_sampler_holds_the_student_whole(tiny_plan, new_student):
    model = new_student("qwen3_moe_tiny")
    whole = 4 * sum(parameter.numel() for parameter in model.parameters()) + sum(buffer.nbytes for buffer in model.buffers())
    assert tiny_plan.of("sampler weights") == whole


def test_a_cache_holds_keys_and_values_of_every_position(tiny_plan):
    layers, heads, width, rows, positions = 3, 2, 32, 4, 8 + 8 - 1
    assert tiny_plan.of("sampler cache") >= 2 * 4 * layers * heads * width * rows * positions
    assert tiny_plan.of("sampler cache") < 2.1 * 4 * layers * heads * width * rows * positions


def test_a_phase_is_the_sum_of_its_parts(tiny_plan):
    expected = sum(part.num_bytes for part in tiny_plan.parts if Phase.rollout in part.phases and not part.on_host)
    assert tiny_plan.phase_bytes(Phase.rollout) == expected


def test_checkpointing_takes_less_for_activations(tiny):
    variants = ([], ["student.gradient_checkpointing=true"])
    plain, less = (planned_student(load_config("plan", [*tiny, *more]).student).training(4, 72).kept for more in variants)
    assert less < plain


def test_a_plan_that_fits_has_no_problem(tiny_plan):
    assert tiny_plan.problems == []


def test_what_does_not_fit_is_refused_with_phase_part_and_remedy(tiny):
    with pytest.raises(ValueError, match=r"rollout takes .* GiB of each rank, which has .*: the most is .*; "):
        plan(load_config("plan", [*tiny, "plan.memory_gib=0.001", "plan.prompt_tokens=8"]))


def test_the_line_through_two_depths_meets_the_model_itself(tiny):
    """A model of twelve equal layers, drawn from six and ten, and traced whole."""
    student = planned_student(load_config("plan", [*tiny, "student.architecture.num_hidden_layers=12"]).student)
    model = student.build()
    prepare_training(model, student.settings)
    drawn, traced = student.training(2, 16), trace_training(model, 2, 16)
    assert drawn.kept == pytest.approx(traced.kept, rel=0.01)


def test_the_host_is_judged_where_it_is_given(tiny):
    made = Plan(load_config("plan", [*tiny, "plan.host_memory_gib=0.000001", "plan.prompt_tokens=8"]))
    assert any("host memory" in problem for problem in made.problems)
    assert made.peak() < 80 * GIB


def test_a_student_that_no_number_of_ranks_makes_fit_is_said_to_be_so(tiny):
    made = Plan(load_config("plan", [*tiny, "plan.memory_gib=0.001", "plan.prompt_tokens=8"]))
    [sentence] = [problem for problem in made.problems if "no number of ranks and no ZeRO stage" in problem]
    assert "every rank builds the student whole" in sentence
    assert "samples from a whole copy" in sentence
