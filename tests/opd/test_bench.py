"""`opd bench divergence`: everyone computes the same, what is wrong is refused, and memory is what the system says. No timing is asserted."""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import opd.bench_divergence
from opd.__main__ import load_config, split_command
from opd.bench_contenders import OWN, Inputs, Outcome, Problem, make_inputs, reference, require_agreement
from opd.bench_divergence import bench_divergence, choose, what_fits
from opd.bench_memory import measure_peak, peak_bytes
from opd.bench_peers import PEERS
from opd.loss_config import DivergenceKind
from rollout.config import Dtype

PROBLEM = Problem(num_tokens=16, vocab_size=64, hidden=8, teacher_hidden=12, dtype=Dtype.float32, kind=DivergenceKind.reverse_kl, seed=3, device="cpu")
SMALL = ["num_tokens=[16]", "vocab_sizes=[64]", "hidden=8", "repeats=1", "memory=false"]
LOSSES = [name for name in OWN | PEERS if not name.startswith("products")]


def config(folder: Path, *overrides: str):
    return load_config("bench_divergence", [f"run_dir={folder}", *SMALL, *overrides])


def naive_loss(inputs: Inputs) -> torch.Tensor:
    """The mean over tokens by torch's own divergence, in float64: an oracle that shares no line with the contenders."""
    log_p_NV = (inputs.student_hidden_ND.double() @ inputs.student_head_VD.double().T).log_softmax(-1)
    log_q_NV = (inputs.teacher_hidden_ND.double() @ inputs.teacher_head_VD.double().T).log_softmax(-1)

    def divergence(of_NV: torch.Tensor, to_NV: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.kl_div(to_NV, of_NV, reduction="batchmean", log_target=True)

    if inputs.kind is DivergenceKind.jsd:
        middle_NV = torch.logaddexp(log_p_NV, log_q_NV) - torch.tensor(2.0).log()
        return (divergence(log_p_NV, middle_NV) + divergence(log_q_NV, middle_NV)) / 2
    return divergence(log_p_NV, log_q_NV) if inputs.kind is DivergenceKind.reverse_kl else divergence(log_q_NV, log_p_NV)


@pytest.mark.parametrize("kind", list(DivergenceKind))
@pytest.mark.parametrize("name", LOSSES)
def test_each_contender_computes_the_naive_loss_and_gradients(name, kind):
    if name in PEERS and name not in choose(None, "cpu")[0]:
        pytest.skip(f"{name} is not installed")
    inputs = make_inputs(replace(PROBLEM, kind=kind))
    loss = naive_loss(inputs)
    gradients = torch.autograd.grad(loss, (inputs.student_hidden_ND, inputs.student_head_VD))
    with torch.compiler.set_stance("force_eager"):  # Liger's loss without the seconds of its compilation
        found = (OWN | PEERS)[name].prepare(inputs)()
    torch.testing.assert_close(found.loss.double(), loss.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.hidden_gradient_ND, gradients[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.head_gradient_VD, gradients[1], rtol=1e-4, atol=1e-7)
    require_agreement(name, found, reference(inputs), Dtype.float32)


def test_both_products_multiply_the_same_matrices():
    inputs = make_inputs(PROBLEM)
    logits_NV = inputs.student_hidden_ND @ inputs.student_head_VD.T
    for name in ("products", "products_into"):
        found = OWN[name].prepare(inputs)()
        torch.testing.assert_close(found.hidden_gradient_ND, (logits_NV @ inputs.student_head_VD).detach())
        torch.testing.assert_close(found.head_gradient_VD, (logits_NV.T @ inputs.student_hidden_ND).detach())


def test_bfloat16_inputs_agree_within_their_tolerance():
    inputs = make_inputs(replace(PROBLEM, dtype=Dtype.bfloat16))
    for name in ("ours", "naive"):
        require_agreement(name, OWN[name].prepare(inputs)(), reference(inputs), Dtype.bfloat16)


@pytest.mark.parametrize(("wrong", "what"), [(0, "loss"), (1, "gradient by the hidden states"), (2, "gradient by the head")])
@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_contender_with_a_wrong_value_is_refused(wrong, what, factor):
    expected = reference(make_inputs(PROBLEM))
    values = [expected.loss, expected.hidden_gradient_ND, expected.head_gradient_VD]
    values[wrong] = values[wrong] * factor
    with pytest.raises(ValueError, match=f"rival is not timed: its {what} differs from the naive formula"):
        require_agreement("rival", Outcome(*values), expected, Dtype.float32)


def test_a_line_of_the_table_file_has_every_column_and_the_docstring_has_them_too(tmp_path, capsys):
    bench_divergence(config(tmp_path / "bench", "vocab_sizes=[64,65]", "contenders=[products,ours,naive,deepspeed]"))
    with (tmp_path / "bench" / "divergence.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["vocab_size"], line["contender"]) for line in lines] == [
        (size, name) for size in ("64", "65") for name in ("products", "ours", "naive", "deepspeed")
    ]
    assert not [column for column in lines[0] if column not in opd.bench_divergence.__doc__]
    for line in lines:
        assert (line["schema"], line["num_tokens"], line["dtype"], line["kind"]) == ("1", "16", "float32", "reverse_kl")
        assert line["peak_mib"] == line["matrix_rate_share"] == ""
        assert 0 < float(line["min_seconds"]) <= float(line["median_seconds"])
        medians = {other["contender"]: float(other["median_seconds"]) for other in lines if other["vocab_size"] == line["vocab_size"]}
        assert float(line["ratio_to_products"]) == pytest.approx(float(line["median_seconds"]) / medians["products"])
        assert float(line["ours_to_it"]) == pytest.approx(medians["ours"] / float(line["median_seconds"]))
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("vocabulary 64", "vocabulary 65", "deepspeed", "first call of ours"))
    assert "peak" not in printed


def test_the_subject_is_the_word_after_bench():
    assert split_command(["bench", "divergence", "repeats=3"]) == ("bench_divergence", ["repeats=3"])
    assert split_command(["bench", "qat"]) == ("bench_qat", [])
    for arguments in (["bench"], ["bench", "repeats=3"]):
        with pytest.raises(ValueError, match="bench needs a subject, as in `opd bench divergence`; the subjects are divergence, qat, teachers"):
            split_command(arguments)
    with pytest.raises(ValueError, match=r"bench has no subject 'divergance' \(did you mean 'divergence'\?\); the subjects are divergence, qat, teachers"):
        split_command(["bench", "divergance"])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("contenders=[nave]", r"there is no contender 'nave' \(did you mean 'naive'\?\); there are products, .*deepspeed"),
        ("contenders=[]", "contenders is empty: choose from products"),
        ("num_tokens=[]", r"num_tokens must not be empty: write num_tokens=\[N\]"),
        ("vocab_sizes=[64,0]", "vocab_sizes must be at least 1, not 0"),
        ("repeats=0", "repeats must be at least 1, not 0"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_written(override, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        bench_divergence(config(tmp_path / "bench", override))
    assert not (tmp_path / "bench").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("do not touch me")
    with pytest.raises(ValueError, match="is not a folder of `opd bench`"):
        bench_divergence(config(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_peer_that_is_not_installed_is_a_line_unless_it_was_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.chunked_loss", None)
    chosen, missing = choose(None, "cpu")
    assert not {"liger", "liger_128"} & set(chosen)
    assert set(OWN) < set(chosen)
    assert [line for line in missing if line.startswith("liger cannot be imported") and line.endswith("pip install 'opd[bench]'")]
    with pytest.raises(ValueError, match=r"liger cannot be imported .*: pip install 'opd\[bench\]'"):
        choose(["liger"], "cpu")


def test_whole_matrices_that_do_not_fit_are_left_out_unless_they_were_asked_for():
    huge = replace(PROBLEM, num_tokens=10**7, vocab_size=10**6)
    fitting, lines = what_fits(OWN, huge, is_asked=False)
    assert list(fitting) == ["ours", "ours_eager"]
    assert [line.split()[0] for line in lines] == ["products", "products_into", "naive"]
    with pytest.raises(ValueError, match=r"naive needs about .* GiB .* leave it out of contenders"):
        what_fits({"naive": OWN["naive"]}, huge, is_asked=True)


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")


@on_linux
def test_the_peak_is_what_was_allocated_even_where_it_is_gone_at_the_end():
    def work() -> torch.Tensor:
        torch.ones(16 << 20)  # 64 MiB, dropped at once
        return torch.ones(10 << 20)

    peak, result = peak_bytes(work, "cpu")
    assert result.nbytes == 40 << 20
    assert peak == pytest.approx(64 << 20, rel=0.1)


@on_linux
def test_memory_of_tiles_does_not_grow_with_the_tokens():
    few, many = (replace(PROBLEM, num_tokens=count, vocab_size=8192) for count in (1536, 3072))
    ours_few, ours_many = (measure_peak("ours_eager", problem, 1).without_gradients for problem in (few, many))
    assert ours_many == pytest.approx(ours_few, rel=0.1)
    assert ours_many < 3 * 4 * many.num_tokens * many.vocab_size, "three whole matrices, and the naive formula holds seven"
