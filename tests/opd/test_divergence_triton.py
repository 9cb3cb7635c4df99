"""The three backends of the divergence compute the same: compiled passes, and Triton's kernels in its interpreter (tests/conftest.py asks for it).

The tests marked gpu run the kernels themselves. What is right is in test_divergence.py: here eager is the measure, and once the formula.
"""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import opd.tiles
from opd.divergence import divergence
from opd.divergence_passes import COMPILE_FROM, automatic
from opd.loss_config import Backend
from rollout.types import LogitTransform

N, V, D_STUDENT, D_TEACHER = 3, 101, 8, 12
KINDS = ["reverse_kl", "forward_kl", "jsd"]
SETTINGS = {
    "plain": {},
    "scales": {"temperature": 1.7, "student_transform": LogitTransform(0.5), "teacher_transform": LogitTransform(1.5)},
    "smoothing and cap": {"smoothing": 0.05, "beta": 0.2, "cap": 3.5},
    "soft caps": {"student_transform": LogitTransform(0.7, 4.0), "teacher_transform": LogitTransform(1.0, 3.0), "temperature": 0.9, "beta": 0.8},
    "soft cap of the teacher": {"teacher_transform": LogitTransform(1.0, 3.0), "smoothing": 0.01},
}
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on the GPU here")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}


def tensors(device: str, dtype: torch.dtype, num_tokens: int = N, vocab_size: int = V, padding: int = 0) -> list[Tensor]:
    """Student's hidden states and head (both with gradients), teacher's hidden states and head; logits N(0, 4)."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for width in (D_STUDENT, D_TEACHER):
        head_VD = 2 * width**-0.5 * torch.randn(vocab_size + padding, width, generator=generator)
        head_VD[vocab_size:] = 1e4
        found += [torch.randn(num_tokens, width, generator=generator), head_VD]
    found = [tensor.to(device, dtype) for tensor in found]
    return [found[0].requires_grad_(), found[1].requires_grad_(), *found[2:]]


def weights(num_tokens: int, device: str) -> Tensor:
    return torch.linspace(0.2, 1.0, num_tokens, device=device)


def results(inputs: list[Tensor], backend: str, **settings) -> list[Tensor]:
    """Loss of each token, gradients by the student's hidden states and head."""
    loss, kl_N = divergence(*inputs, weights(len(inputs[0]), inputs[0].device), backend=backend, **settings)
    return [kl_N, *torch.autograd.grad(loss, inputs[:2])]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def require_same(found: list[Tensor], expected: list[Tensor], value: float = 1e-6, gradient: float = 1e-5) -> None:
    for one, other, tolerance in zip(found, expected, (value, gradient, gradient), strict=True):
        assert one.dtype is other.dtype
        assert relative(one, other) <= tolerance


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    """Two tokens a tile, 60 columns a block of the walk, 32 columns a step of a kernel: remainders everywhere."""
    pytest.importorskip("triton")
    import opd.divergence_triton

    for device in ("cpu", "cuda"):
        monkeypatch.setitem(opd.tiles.TILE_ELEMENTS, device, 2 * V)
    monkeypatch.setattr(opd.tiles, "BLOCK_COLUMNS", 60)
    monkeypatch.setattr(opd.divergence_triton, "BLOCK", 32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "dtype"), [("plain", torch.float32), ("smoothing and cap", torch.float32), ("soft caps", torch.float32), ("soft caps", torch.bfloat16)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_triton_is_eager(small_blocks, kind, name, dtype, device):
    inputs, settings = tensors(device, dtype), SETTINGS[name]
    require_same(results(inputs, "triton", kind=kind, **settings), results(inputs, "eager", kind=kind, **settings), gradient=TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_takes_rows_longer_than_a_step_of_its_kernels(dtype, device):
    pytest.importorskip("triton")
    inputs = tensors(device, dtype, num_tokens=2, vocab_size=9001, padding=7)
    settings = {"kind": "jsd", "vocab_size": 9001}
    require_same(results(inputs, "triton", **settings), results(inputs, "eager", **settings), gradient=TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_gives_zero_for_a_teacher_equal_to_the_student(small_blocks, dtype, device):
    hidden_ND, head_VD, *_ = tensors(device, dtype)
    found = results([hidden_ND, head_VD, hidden_ND.detach().clone(), head_VD.detach().clone()], "triton")
    assert all((tensor == 0).all() for tensor in found)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_triton_stays_finite_and_right_on_logits_of_size_200(small_blocks, kind, device):
    student_NV, teacher_NV = 400 * torch.rand(2, N, V, generator=torch.Generator().manual_seed(5)) - 200
    student_NV[0], teacher_NV[0] = 200.0, -200.0
    unit_NN = torch.eye(N, device=device)
    inputs = [unit_NN.clone().requires_grad_(), student_NV.T.contiguous().to(device).requires_grad_(), unit_NN, teacher_NV.T.contiguous().to(device)]
    (found_N, _, found_VD), (expected_N, _, expected_VD) = results(inputs, "triton", kind=kind), results(inputs, "eager", kind=kind)
    torch.testing.assert_close(found_N, expected_N, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found_VD, expected_VD, rtol=1e-5, atol=5e-7 * max(1.0, float(expected_N.max())))


@pytest.mark.parametrize("device", DEVICES)
def test_triton_has_a_soft_cap_as_exact_as_torchs(small_blocks, device):
    inputs = tensors(device, torch.float32)
    settings = {"student_transform": LogitTransform(1.0, 50.0), "teacher_transform": LogitTransform(1.0, 50.0)}
    require_same(results(inputs, "triton", **settings), results(inputs, "eager", **settings))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["auto", "eager", "compiled", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_backend_on_a_gpu_is_the_formula(monkeypatch, kind, backend, dtype, device):
    monkeypatch.setitem(opd.tiles.TILE_ELEMENTS, "cuda", 32 * V)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    inputs = tensors(device, dtype, num_tokens=45)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs[:2]]
    log_p_NV = (exact[0] @ exact[1].T).log_softmax(-1)
    log_q_NV = (inputs[2].double() @ inputs[3].double().T).log_softmax(-1)
    log_m_NV = torch.logaddexp(log_p_NV, log_q_NV) - math.log(2)
    expected_N = {
        "reverse_kl": log_p_NV.exp() * (log_p_NV - log_q_NV),
        "forward_kl": log_q_NV.exp() * (log_q_NV - log_p_NV),
        "jsd": (log_p_NV.exp() * (log_p_NV - log_m_NV) + log_q_NV.exp() * (log_q_NV - log_m_NV)) / 2,
    }[kind].sum(-1)
    expected = torch.autograd.grad((weights(45, device) * expected_N).sum(), exact)
    found = results(inputs, backend, kind=kind)
    assert relative(found[0], expected_N.detach()) <= 1e-6
    assert all(relative(one, other) <= TOLERANCE[dtype] for one, other in zip(found[1:], expected, strict=True))


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
def test_compiled_is_eager(monkeypatch):
    monkeypatch.setitem(opd.tiles.TILE_ELEMENTS, "cpu", 2 * V)  # tiles of 2, 2 and 1 tokens
    monkeypatch.setattr(opd.tiles, "BLOCK_COLUMNS", 60)
    inputs = tensors("cpu", torch.float32, num_tokens=5)
    for settings in ({}, {"kind": "jsd", "beta": 0.3, "smoothing": 0.1, **SETTINGS["scales"]}):
        require_same(results(inputs, "compiled", **settings), results(inputs, "eager", **settings))


def test_triton_without_a_gpu_is_refused(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"^loss\.backend=triton needs a CUDA device, and this one is cpu: use loss\.backend=auto$"):
        divergence(*tensors("cpu", torch.float32), weights(N, "cpu"), backend="triton")


def executable(folder: Path, name: str, exit_code: int = 0) -> None:
    (folder / name).write_text(f"#!/bin/sh\nexit {exit_code}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def without_compiler(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


def test_compiled_without_a_compiler_is_refused(without_compiler):
    with pytest.raises(ValueError, match=r"^loss\.backend=compiled needs a C\+\+ compiler: install g\+\+ \(or set CXX\), or use loss\.backend=eager$"):
        divergence(*tensors("cpu", torch.float32), weights(N, "cpu"), backend="compiled")


def test_a_compiler_that_cxx_names_and_that_does_not_exist_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))  # torch.compile looks for no other
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        divergence(*tensors("cpu", torch.float32), weights(N, "cpu"), backend="compiled")


@pytest.mark.skipif(sys.platform != "linux", reason="torch.compile asks for g++ on Linux")
@pytest.mark.parametrize("name", ["c++", "clang++"])
def test_a_compiler_that_torch_does_not_ask_for_is_none(without_compiler, tmp_path, name):
    executable(tmp_path, name)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        divergence(*tensors("cpu", torch.float32), weights(N, "cpu"), backend="compiled")
    assert automatic(torch.device("cpu"), COMPILE_FROM) is Backend.eager


def test_auto_compiles_a_large_vocabulary_on_a_cpu_with_a_compiler(without_compiler, tmp_path):
    executable(tmp_path, "g++")
    assert automatic(torch.device("cpu"), COMPILE_FROM) is Backend.compiled
    assert automatic(torch.device("cpu"), COMPILE_FROM - 1) is Backend.eager


def test_auto_is_eager_where_the_compiler_does_not_run(without_compiler, tmp_path):
    executable(tmp_path, "g++", exit_code=1)
    assert automatic(torch.device("cpu"), COMPILE_FROM) is Backend.eager


def test_auto_is_eager_without_a_compiler(without_compiler):
    assert automatic(torch.device("cpu"), 10 * COMPILE_FROM) is Backend.eager


@pytest.mark.parametrize("vocab_size", [100, 10 * COMPILE_FROM])
def test_auto_is_triton_on_a_gpu(without_compiler, vocab_size):
    pytest.importorskip("triton")
    assert automatic(torch.device("cuda"), vocab_size) is Backend.triton


def test_auto_computes_what_eager_does_below_the_size_to_compile():
    inputs = tensors("cpu", torch.float32)
    assert all(torch.equal(*pair) for pair in zip(results(inputs, "auto"), results(inputs, "eager"), strict=True))


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="fastest"):
        divergence(*tensors("cpu", torch.float32), weights(N, "cpu"), backend="fastest")


COMPILE = """
import inspect, math
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import opd.divergence_triton as kernels

def cubin(kernel, **settings):
    names = list(inspect.signature(kernel.fn).parameters)
    kinds = {name: "*fp32" for name in names if name.endswith("_ptr")} | {"rows": "i32", "columns": "i32"}
    kinds |= {"gradient_ptr": "*bf16"} if "gradient_ptr" in names else {}
    source = ASTSource(kernel, {name: kinds.get(name, "constexpr") for name in names}, {(names.index(name),): value for name, value in settings.items()})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]

terms = dict(BLOCK=1024, KIND=2, BETA=0.3, LOG_BETA=math.log(0.3), LOG_REST=math.log(0.7), SMOOTHING=0.1, LOG_SMOOTHING=math.log(0.1), LOG_KEPT=math.log(0.9))
plain = terms | dict(KIND=0, SMOOTHING=0.0, LOG_SMOOTHING=0.0, LOG_KEPT=0.0)
print(all([
    cubin(kernels._normalise, BLOCK=1024, SCALE=0.5, CAP=30.0, TEACHER_SCALE=1.0, TEACHER_CAP=0.0),
    cubin(kernels._integrate, **terms),
    cubin(kernels._differentiate, SCALE=1.0, CAP=0.0, **plain),
    cubin(kernels._differentiate, SCALE=1.0, CAP=30.0, **terms),
]))
"""


def test_the_kernels_compile_for_an_h100_without_one():
    """Triton's interpreter runs Python; that a kernel is Triton's language too shows when it becomes machine code."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "True", result.stderr
