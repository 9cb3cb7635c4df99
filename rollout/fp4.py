"""MXFP4 numerics: the one home of what training fake-quantises, the sampler decodes and the export writes.

A weight is cut into blocks of 32 along its last dimension, the input of its matrix product. A block has one scale 2^e and each of its elements is
one of +-{0, 0.5, 1, 1.5, 2, 3, 4, 6} (E2M1: sign, two bits of exponent, one of mantissa) times it: 4.25 bits per weight. Exact in float32 and
bfloat16, so that every holder of a packed weight multiplies with the same numbers.

    e = ceil(log2(amax / 6))        of the block's largest magnitude, taken from the bits of amax: log2 would err beside 6 * 2^k
    q = round(w / 2^e)              to the nearest of the eight magnitudes, ties to the even code; saturates at 6, which e never asks for

It is the rule of the quantiser in DeepSeek's published kernels and of torchao's RCEIL, byte for byte; what rule made the weights of DeepSeek-V4's own
experts (arXiv:2606.19348, 5.2.1), DeepSeek does not say. The OCP rule floor(log2 amax) - 2 has up to a twentieth less error on Gaussian weights and
clips three or four blocks of ten; a search over two scales has less again. Any of them decodes the same way. Stochastic rounding would make training
differ from what samples.

Storage is DeepSeek-V4's: two codes to a byte, the even column in the low nibble, bit 3 the sign; the scale is E8M0, the byte e + 127. Zero keeps its
sign. A block whose largest magnitude is at most 6 * 2^-127 has byte 0 and decodes to zeros. Quantising decoded values gives the same values (of blocks
whose largest magnitude is at least 7 * 2^-127), though perhaps other bytes: a block whose largest code is 3 or less has a smaller scale that represents
it too. So values are compared, never bytes.

Quantising large weights goes through torch.compile, which gives the same bits as the functions run as written.

N: blocks. P: packed bytes of a block (16).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from rollout.compiler import has_compiler

BLOCK = 32
"""Elements that share a scale."""

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of E2M1 by code, without the sign (bit 3)."""

LARGEST = 1.5 * 2.0**127
"""Largest magnitude whose block still decodes to finite float32."""

LARGEST_SCALE = 252
"""Its scale byte."""

EXPONENT_BIAS = 127
MAX_SPREAD = 11
"""Largest difference of two scale exponents in a 128 x 128 block that FP8 (E4M3) with one power-of-two scale holds in normal numbers; DeepSeek's bound."""

COMPILE_FROM = 1 << 20
"""Weights from which compiling is worth its start-up on a CPU."""


@dataclass(frozen=True, slots=True)
class PackedFP4:
    """A weight [..., K] in MXFP4.

    codes: int8 [..., K / 2], two codes to a byte, the even column low.
    scale: uint8 [..., K / 32], exponent + 127.
    """

    codes: torch.Tensor
    scale: torch.Tensor

    @property
    def num_bytes(self) -> int:
        return self.codes.numel() + self.scale.numel()


def quantize(weight: torch.Tensor) -> PackedFP4:
    """Pack a float32 or bfloat16 weight [..., K].

    Raises ValueError for another dtype, a last dimension that is no multiple of 32, NaN, infinity, or magnitudes above 1.5 * 2^127.
    """
    blocks_N32 = _blocks(weight)
    codes_NP, scale_N = _fastest(_quantize, blocks_N32)(blocks_N32)
    _require_finite(blocks_N32, scale_N)
    *leading, columns = weight.shape
    return PackedFP4(codes_NP.view(torch.int8).reshape(*leading, columns // 2), scale_N.reshape(*leading, columns // BLOCK))


def dequantize(packed: PackedFP4, dtype: torch.dtype) -> torch.Tensor:
    """The values [..., K] of a packed weight, in float32 or bfloat16. Raises ValueError for another dtype and for scale bytes above 252, which reach infinity
    (255 is NaN) and which `quantize` never writes.
    """
    _require_dtype(dtype)
    if packed.scale.numel() and int(packed.scale.max()) > LARGEST_SCALE:
        raise ValueError(f"a packed FP4 weight has the scale byte {int(packed.scale.max())}, which reaches infinity: its file is damaged")
    return decode(packed, dtype)


def decode(packed: PackedFP4, dtype: torch.dtype) -> torch.Tensor:
    """`dequantize` without looking for damage, which on a GPU waits for all that was asked of it before: for what `quantize` packed."""
    *leading, half = packed.codes.shape
    codes = packed.codes.contiguous().view(torch.uint8).flatten()
    values_N32 = _pairs(codes.device, dtype).index_select(0, codes.int()).view(dtype).reshape(-1, BLOCK)
    return values_N32.mul_(_powers(codes.device, dtype).index_select(0, packed.scale.flatten().int())[:, None]).reshape(*leading, 2 * half)


def fake_quantize(weight: torch.Tensor) -> torch.Tensor:
    """`dequantize(quantize(weight), weight.dtype)`, bit for bit, without packing. Raises as `quantize`. Gradients: opd/qat.py."""
    blocks_N32 = _blocks(weight)
    values_N32, scale_N = _fastest(_fake_quantize, blocks_N32)(blocks_N32)
    _require_finite(blocks_N32, scale_N)
    return values_N32.reshape(weight.shape)


def fake_quantize_activation(activation: torch.Tensor) -> torch.Tensor:
    """`fake_quantize` without its look at the values, which waits for the device: NaN gives NaN. Raises for dtype and shape only; no gradient."""
    blocks_N32 = _blocks(activation)
    return _fastest(_fake_quantize, blocks_N32)(blocks_N32)[0].reshape(activation.shape)


def scale_spread(packed: PackedFP4, tile: int = 128) -> torch.Tensor:
    """Largest less smallest scale exponent in each tile x tile block of the last two dimensions, [..., out / tile, in / tile], rounded up.

    tile: a multiple of 32.

    Blocks of 32 that are all zero are left out, since any scale holds them; a tile without others has spread 0. Up to MAX_SPREAD, the weight
    converts to FP8 with one scale a tile without loss (arXiv:2606.19348, 5.2.1; the bound is that of DeepSeek's kernels).
    """
    assert tile % BLOCK == 0, f"a tile of {tile} is not made of blocks of {BLOCK}"
    *leading, out, num_blocks = packed.scale.shape
    is_used = ((packed.codes.view(torch.uint8) & 0x77) != 0).unflatten(-1, (num_blocks, BLOCK // 2)).any(-1)
    exponent = packed.scale.to(torch.int16)
    low, high = exponent.masked_fill(~is_used, 255), exponent.masked_fill(~is_used, -1)
    columns = tile // BLOCK
    pad = (0, -num_blocks % columns, 0, -out % tile)
    shape = (*leading, -(-out // tile), tile, -(-num_blocks // columns), columns)
    lowest = torch.nn.functional.pad(low, pad, value=255).reshape(shape).amin((-3, -1))
    highest = torch.nn.functional.pad(high, pad, value=-1).reshape(shape).amax((-3, -1))
    return (highest - lowest).clamp(min=0)


def round_to_e2m1(magnitude: torch.Tensor) -> torch.Tensor:
    """Nearest of MAGNITUDES, ties to the even code, saturating at 6; for magnitudes >= 0."""
    per_unit = torch.where(magnitude < 2, 2.0, torch.where(magnitude < 4, 1.0, 0.5))  # codes between two whole numbers; torch.round breaks ties to even
    return ((magnitude * per_unit).round() / per_unit).clamp(max=MAGNITUDES[-1])


def _scale(blocks_N32: torch.Tensor) -> torch.Tensor:
    """int32 [N]: exponent + 127 of each block."""
    bits_N = blocks_N32.abs().amax(1).float().view(torch.int32) & 0x7FFFFFFF  # amax may set the sign of NaN
    return ((bits_N >> 23) - 2 + ((bits_N & 0x7FFFFF) > 0x400000).int()).clamp(min=0)  # 6 is 1.5 * 4, and 0x400000 the mantissa of 1.5


def _rounded(blocks_N32: torch.Tensor, scale_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the elements over their scale, their magnitudes rounded); exact but for the rounding."""
    inverse_N = torch.where(scale_N == 0, 0, (2 * EXPONENT_BIAS - scale_N) << 23).view(torch.float32)
    scaled_N32 = blocks_N32.float() * inverse_N[:, None]
    return scaled_N32, round_to_e2m1(scaled_N32.abs())


def _power_of_two(scale_N: torch.Tensor) -> torch.Tensor:
    """float32 2^e of scale bytes in int32; byte 0 is the subnormal 2^-127."""
    return torch.where(scale_N == 0, 0x00400000, scale_N << 23).view(torch.float32)


def _quantize(blocks_N32: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale_N = _scale(blocks_N32)
    scaled_N32, magnitude_N32 = _rounded(blocks_N32, scale_N)
    code_N32 = torch.where(magnitude_N32 <= 2, 2 * magnitude_N32, torch.where(magnitude_N32 <= 4, magnitude_N32 + 2, 7.0))
    sign_N32 = torch.copysign(torch.ones_like(scaled_N32), scaled_N32)  # signbit sees -0 too, and is five times slower compiled
    code_N32 = torch.where(sign_N32 < 0, code_N32 + 8, code_N32).to(torch.uint8).contiguous()
    pair_NP = code_N32.view(torch.int16)  # of two bytes the first is the low one
    return (pair_NP | (pair_NP >> 4)).to(torch.uint8), scale_N.to(torch.uint8)


def _fake_quantize(blocks_N32: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale_N = _scale(blocks_N32)
    scaled_N32, magnitude_N32 = _rounded(blocks_N32, scale_N)
    values_N32 = torch.copysign(magnitude_N32, scaled_N32) * _power_of_two(scale_N)[:, None]
    return values_N32.to(blocks_N32.dtype), scale_N.to(torch.uint8)


@lru_cache
def _pairs(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The two values of each byte as one integer [256] of twice the size: on a CPU torch looks up single elements three times as fast as rows of two."""
    byte = torch.arange(256, device=device)
    values = torch.tensor([*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES)], dtype=dtype, device=device)
    return torch.stack([values[byte & 15], values[byte >> 4]], dim=1).view({torch.float32: torch.int64, torch.bfloat16: torch.int32}[dtype])[:, 0]


@lru_cache
def _powers(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """2^e of each scale byte [256]."""
    return _power_of_two(torch.arange(256, dtype=torch.int32, device=device)).to(dtype)


def _blocks(weight: torch.Tensor) -> torch.Tensor:
    _require_dtype(weight.dtype)
    if weight.ndim == 0 or weight.shape[-1] % BLOCK:
        raise ValueError(f"FP4 blocks are {BLOCK} long, and the last dimension of a weight of shape {tuple(weight.shape)} is no multiple of {BLOCK}")
    return weight.detach().reshape(-1, BLOCK).contiguous()  # each pattern of strides would be compiled anew


def _require_dtype(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"FP4 values are exact in float32 and bfloat16, not in {dtype}: use one of these")


def _require_finite(blocks_N32: torch.Tensor, scale_N: torch.Tensor) -> None:
    """One look at the scales; NaN and infinity have the largest exponents there are."""
    if not scale_N.numel() or int(scale_N.max()) <= LARGEST_SCALE:
        return
    if blocks_N32.isfinite().all():
        raise ValueError(f"a weight is as large as {float(blocks_N32.abs().max()):.3g}; FP4 holds magnitudes up to {LARGEST:.3g}")
    raise ValueError("a weight to be quantised to FP4 is NaN or infinite: training has diverged, or its file is damaged")


def _fastest(function: Callable, first: torch.Tensor) -> Callable:
    """The function, compiled where that is worth it."""
    is_large = first.device.type == "cuda" or first.numel() >= COMPILE_FROM
    return _compiled(function) if is_large and (first.device.type == "cuda" or has_compiler()) else function


@lru_cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)
