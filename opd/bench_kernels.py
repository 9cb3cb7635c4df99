"""Ways to bring experts' weights to FP4 and back, beside a copy of the weights and the product that they are for.

    grouped               torch.nn.functional.grouped_mm of some tokens per expert through the weights, forward: the yardstick
    copy                  the weights into new memory: what is left if the arithmetic were free
    fake_quantize         rollout/fp4.py as training uses it (compiled where the weights are large); fake_quantize_eager is the same as written
    quantize              the same, packed: what the sampler holds; quantize_eager is the same as written
    dequantize            packed weights decoded, as the sampler does
    torchao               MXTensor.to_mx (RCEIL) and its dequantize: torchao's way to the values of fake_quantize (torchao 0.18.0)

A kernel is prepared on the weights and is then a function without arguments that does everything once. Its first result is held to the right
one: the FP4 values bit for bit, the product to a product expert by expert.

E: experts. O: outputs. I: inputs. N: tokens, those of an expert together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from opd.bench import Run
from rollout.fp4 import BLOCK, PackedFP4, dequantize, fake_quantize, quantize

PRODUCT_TOLERANCE = 1e-2
"""Relative difference (Frobenius norm) of two bfloat16 products."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """What the kernels work on: weights N(0, 1 / I) and tokens N(0, 1) in bfloat16, the weights' FP4 values, and these packed."""

    weight_EOI: torch.Tensor
    hidden_NI: torch.Tensor
    offset_E: torch.Tensor
    values_EOI: torch.Tensor
    packed: PackedFP4


@dataclass(frozen=True, slots=True)
class Kernel:
    """prepare: from experts to the function that does everything once.

    num_bytes: what it has to read and to write, whatever else it does.
    is_right: whether what it returned is what it should.
    """

    prepare: Callable[[Experts], Run]
    num_bytes: Callable[[Experts], int]
    is_right: Callable[[Experts, Any], bool]


def make_experts(shape: list[int], tokens_per_expert: int, seed: int, device: str) -> Experts:
    """The same on every machine, for they are drawn on the CPU. Raises ValueError for a shape that FP4 experts cannot have."""
    if len(shape) != 3 or shape[2] % BLOCK:
        raise ValueError(f"shape must be [experts, outputs, inputs] with inputs a multiple of {BLOCK}, not {shape}")
    generator = torch.Generator().manual_seed(seed)
    num_experts, _, inputs = shape
    weight_EOI = (torch.randn(shape, generator=generator) * inputs**-0.5).to(device, torch.bfloat16)
    hidden_NI = torch.randn(num_experts * tokens_per_expert, inputs, generator=generator).to(device, torch.bfloat16)
    offset_E = torch.arange(1, num_experts + 1, dtype=torch.int32, device=device) * tokens_per_expert
    with torch.compiler.set_stance("force_eager"):
        values_EOI, packed = fake_quantize(weight_EOI), quantize(weight_EOI)
    return Experts(weight_EOI=weight_EOI, hidden_NI=hidden_NI, offset_E=offset_E, values_EOI=values_EOI, packed=packed)


def choose_kernels() -> tuple[dict[str, Kernel], list[str]]:
    """(kernels by name, a line for each that is not installed)."""
    try:
        from torchao.prototype.mx_formats.mx_tensor import MXTensor  # noqa: F401
    except Exception as error:  # a package that is broken raises anything while it is imported
        line = f"torchao cannot be imported ({' '.join(str(error).split())[:200] or type(error).__name__}): pip install torchao"
        return {name: kernel for name, kernel in KERNELS.items() if name != "torchao"}, [line]
    return KERNELS, []


def _product(experts: Experts) -> torch.Tensor:
    return torch.nn.functional.grouped_mm(experts.hidden_NI, experts.weight_EOI.transpose(-2, -1), offs=experts.offset_E)


def _is_product(experts: Experts, found_NO: torch.Tensor) -> bool:
    parts = experts.hidden_NI.chunk(len(experts.weight_EOI))
    expected_NO = torch.cat([part @ weight.T for part, weight in zip(parts, experts.weight_EOI, strict=True)]).float()
    return bool((found_NO.float() - expected_NO).norm() <= PRODUCT_TOLERANCE * expected_NO.norm())


def _torchao(experts: Experts) -> Run:
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    weight_EOI = experts.weight_EOI
    return lambda: MXTensor.to_mx(weight_EOI, torch.float4_e2m1fn_x2, BLOCK, ScaleCalculationMode.RCEIL).dequantize(weight_EOI.dtype)


def _as_written(run: Run) -> Run:
    """Without torch.compile."""

    def run_eagerly() -> Any:
        with torch.compiler.set_stance("force_eager"):
            return run()

    return run_eagerly


def _is_values(experts: Experts, found_EOI: torch.Tensor) -> bool:
    """Bit for bit: the sign of zero counts."""
    return torch.equal(found_EOI.view(torch.int16), experts.values_EOI.view(torch.int16))


def _is_packed(experts: Experts, found: PackedFP4) -> bool:
    return _is_values(experts, dequantize(found, experts.weight_EOI.dtype))


def _twice(experts: Experts) -> int:
    return 2 * experts.weight_EOI.nbytes


def _with_packed(experts: Experts) -> int:
    return experts.weight_EOI.nbytes + experts.packed.num_bytes


def _of_product(experts: Experts) -> int:
    outputs = 2 * len(experts.hidden_NI) * experts.weight_EOI.shape[1]
    return experts.weight_EOI.nbytes + experts.hidden_NI.nbytes + outputs


KERNELS = {
    "grouped": Kernel(lambda experts: lambda: _product(experts), _of_product, _is_product),
    "copy": Kernel(lambda experts: lambda: experts.weight_EOI.clone(), _twice, lambda experts, found: torch.equal(found, experts.weight_EOI)),
    "fake_quantize": Kernel(lambda experts: lambda: fake_quantize(experts.weight_EOI), _twice, _is_values),
    "fake_quantize_eager": Kernel(lambda experts: _as_written(lambda: fake_quantize(experts.weight_EOI)), _twice, _is_values),
    "quantize": Kernel(lambda experts: lambda: quantize(experts.weight_EOI), _with_packed, _is_packed),
    "quantize_eager": Kernel(lambda experts: _as_written(lambda: quantize(experts.weight_EOI)), _with_packed, _is_packed),
    "dequantize": Kernel(lambda experts: lambda: dequantize(experts.packed, experts.weight_EOI.dtype), _with_packed, _is_values),
    "torchao": Kernel(_torchao, _twice, _is_values),
}
