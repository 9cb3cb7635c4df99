"""`opd bench qat`: kernels are held to the right numbers, both kinds of step do the same work, and memory is counted. No timing is asserted."""

import csv
import sys
from pathlib import Path

import pytest
import torch

import opd.bench_qat
from opd.__main__ import load_config, main
from opd.bench_kernels import KERNELS, Kernel, choose_kernels, make_experts
from opd.bench_qat import bench_qat, measure_kernels
from opd.bench_qat_steps import phase_time, sampler_memory, step_config
from opd.quant_config import ExpertFormat
from opd.student import build_student, load_student_tokenizer
from rollout.fp4 import MAGNITUDES

SMALL = ["shape=[3,8,64]", "tokens_per_expert=5", "repeats=2", "steps=0"]
SHORT_STEPS = [
    "rollout.prompts_per_step=2", "rollout.max_new_tokens=3", "rollout.decode_width=2", "quant.measure_every=2", "quant.measure_rollouts=1",
    "~domains.sorting", "~domains.brackets", "~domains.tools", "domains.arithmetic.prompts.rows=8",
]  # fmt: skip
TORCHAO = "torchao.prototype.mx_formats.mx_tensor"


def config(folder: Path, *overrides: str):
    return load_config("bench_qat", [f"run_dir={folder}", *SMALL, *overrides])


def read_lines(folder: Path) -> list[dict[str, str]]:
    with (folder / "qat.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_table_file_has_every_column_of_the_docstring_and_figures_that_fit_together(device, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, TORCHAO, None)
    cfg = config(tmp_path, "steps=3")
    cfg.overrides = SHORT_STEPS
    bench_qat(cfg)
    lines = read_lines(tmp_path)
    assert not [column for column in lines[0] if column not in opd.bench_qat.__doc__]
    assert {(line["schema"], line["threads"]) for line in lines} == {("1", str(torch.get_num_threads()))}

    kernels = {line["name"]: line for line in lines if line["table"] == "kernel"}
    assert list(kernels) == [name for name in KERNELS if name != "torchao"]
    for line in kernels.values():
        assert [line[name] for name in ("experts", "outputs", "inputs", "tokens_per_expert", "repeats", "quant")] == ["3", "8", "64", "5", "2", ""]
        assert 0 < float(line["min_seconds"]) <= float(line["median_seconds"])
        assert float(line["ratio"]) == pytest.approx(float(line["median_seconds"]) / float(kernels["grouped"]["median_seconds"]))
    assert float(kernels["copy"]["gigabytes_per_second"]) == pytest.approx(2 * 2 * 3 * 8 * 64 / float(kernels["copy"]["median_seconds"]) / 1e9)

    steps = {(line["name"], line["quant"]): line for line in lines if line["table"] == "step"}
    assert list(steps) == [(phase, quant) for phase in ("rollout", "score", "update", "step") for quant in ("none", "mxfp4_experts")]
    for (phase, _), line in steps.items():
        assert [line[name] for name in ("completion_tokens", "repeats", "measuring_repeats")] == ["6", "2", "1"]
        median, measuring, expected = (float(line[name]) for name in ("median_seconds", "measuring_seconds", "expected_seconds"))
        assert expected == pytest.approx((median + measuring) / 2)
        assert float(line["ratio"]) == pytest.approx(expected / float(steps[phase, "none"]["expected_seconds"]))

    held = {(line["name"], line["quant"]): line for line in lines if line["table"] == "memory"}
    assert int(held["weights", "none"]["num_bytes"]) == 2 * 3 * 8 * 64
    assert [float(held[name, "mxfp4_experts"]["bits_per_weight"]) for name in ("weights", "experts")] == [4.25, 4.25]

    printed = capsys.readouterr().out
    assert "torchao cannot be imported" in printed
    assert printed.splitlines()[-1].startswith("0.00154 M bfloat16 weights [3, 8, 64] fake-quantised in ")
    assert all(words in printed for words in ("6 completion tokens", "a step with FP4 experts takes", "4.25 bits an expert's weight"))


def test_the_values_that_kernels_are_held_to_are_the_nearest_of_each_block():
    experts = make_experts([2, 4, 64], 3, seed=1, device="cpu")
    blocks_N32 = experts.weight_EOI.double().reshape(-1, 32)
    largest_N1 = blocks_N32.abs().amax(1, keepdim=True)
    scale_N1 = 2.0 ** (largest_N1 / 6).log2().ceil()
    grid = torch.tensor([sign * magnitude for magnitude in MAGNITUDES for sign in (1, -1)], dtype=torch.float64)
    distance = (blocks_N32[..., None] / scale_N1[..., None] - grid).abs().amin(-1)
    found_N32 = experts.values_EOI.double().reshape(-1, 32) / scale_N1
    assert torch.isin(found_N32, grid).all()
    torch.testing.assert_close((blocks_N32 / scale_N1 - found_N32).abs(), distance, rtol=0, atol=0)


def wrong(name: str, change) -> Kernel:
    """A kernel whose result is changed by a little."""
    kernel = KERNELS[name]

    def prepare(experts):
        run = kernel.prepare(experts)
        return lambda: change(run())

    return Kernel(prepare, kernel.num_bytes, kernel.is_right)


def one_less(packed):
    packed.codes[0, 0, 0] ^= 1
    return packed


@pytest.mark.parametrize("name", list(KERNELS))
def test_a_kernel_that_computes_something_else_is_refused(name, tmp_path):
    if name not in choose_kernels()[0]:
        pytest.skip(f"{name} is not installed")
    change = one_less if name.startswith("quantize") else lambda found: found * 1.02
    cfg, experts = config(tmp_path), make_experts([3, 8, 64], 5, seed=0, device="cpu")
    assert KERNELS[name].is_right(experts, KERNELS[name].prepare(experts)())
    with pytest.raises(ValueError, match=f"^{name} is not timed: what it computes on weights of shape .* is not what it should$"):
        measure_kernels(experts, {name: wrong(name, change)}, cfg, "cpu")


@pytest.mark.parametrize(
    ("measure_every", "expected"),
    [(3, (2 * 20 + 7) / 3), (1, 20.0), (0, 20.0), (100, None)],
)
def test_what_any_step_takes_weighs_both_kinds_by_their_number(measure_every, expected):
    """Steps 3 and 6 measure where every third does; the first step never counts."""
    seconds = {3: [99.0, 10.0, 20.0, 7.0, 20.0, 30.0, 7.0]}.get(measure_every, [99.0, 10.0, 20.0, 30.0])
    found = phase_time(seconds, measure_every)
    assert found.expected == (None if expected is None else pytest.approx(expected))
    assert found.num_plain + found.num_measuring == len(seconds) - 1
    assert (found.measuring is None) == (measure_every in (0, 100))


def test_steps_differ_in_nothing_but_the_experts_format(tmp_path):
    without, quantized = (step_config(config(tmp_path, "seed=5"), quant) for quant in ("none", "mxfp4_experts"))
    assert (without.quant.experts, quantized.quant.experts) == (ExpertFormat.none, ExpertFormat.mxfp4)
    without.quant.experts = ExpertFormat.mxfp4
    assert without == quantized
    assert (quantized.seed, quantized.rollout.prompts_per_step, quantized.rollout.max_new_tokens, quantized.rollout.decode_width) == (5, 128, 20, 64)


def test_memory_of_the_sampler_is_that_of_its_tensors(tmp_path):
    cfg = config(tmp_path)
    found, settings = sampler_memory(cfg), step_config(cfg, "none")
    student = build_student(settings.student, load_student_tokenizer(settings.student))
    experts = [parameter for name, parameter in student.named_parameters() if ".experts." in name]
    assert found["none"].experts == 4 * sum(parameter.numel() for parameter in experts)
    assert found["none"].num_expert_weights == found["mxfp4_experts"].num_expert_weights == sum(parameter.numel() for parameter in experts)
    assert 8 * found["mxfp4_experts"].experts == 4.25 * found["none"].num_expert_weights
    others = {quant: memory.model - memory.experts for quant, memory in found.items()}
    assert others["none"] == others["mxfp4_experts"] > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["qat", "num_tokens=[16]"], "bench qat has no setting 'num_tokens'"),
        (["divergence", "shape=[2,8,64]"], "bench divergence has no setting 'shape'"),
        (["qat", "shape=[8,64]"], "shape must be [experts, outputs, inputs] with inputs a multiple of 32, not [8, 64]"),
        (["qat", "shape=[2,64,33]"], "shape must be [experts, outputs, inputs] with inputs a multiple of 32, not [2, 64, 33]"),
        (["qat", "tokens_per_expert=0"], "tokens_per_expert must be at least 1, not 0"),
        (["qat", "steps=-1"], "steps must be at least 0, not -1"),
        (["qat", "overrides=['rollout.widht=1']"], "distill has no setting 'rollout.widht'"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(arguments, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("opd.__main__._stop", lambda: None)  # the other tests' process group stays
    monkeypatch.setattr("opd.distributed.set_threads", lambda threads: None)
    assert main(["bench", *arguments, f"run_dir={tmp_path / 'bench'}"]) == 2
    assert capsys.readouterr().err.startswith(f"opd: {sentence}")
    assert not (tmp_path / "bench").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("do not touch me")
    with pytest.raises(ValueError, match="is not a folder of `opd bench`"):
        bench_qat(config(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
