"""FP8 with one power-of-two scale for each 128 x 128 block: what DeepSeek-V4 stores attention and shared experts in.

    2^e with e = ceil(log2(amax / 448)) of the block, from the bits of amax / 448;  value = w / 2^e rounded to E4M3, to nearest, ties to even

E4M3 has four significant bits and the scale is a power of two, so the decoded values are exact in float32 and bfloat16, and quantising them again gives
the same values. The scale is stored as E8M0, the byte e + 127, at least 1 since 0 is subnormal (arXiv:2606.19348, 5.2.1; the rule is that of DeepSeek's
published kernels).

R: blocks down. C: blocks across.
"""

import torch

BLOCK = 128
LARGEST = 448.0
"""Largest magnitude of E4M3."""


def quantize_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(float8_e4m3fn [out, in], scale bytes uint8 [out / 128, in / 128]) of a finite weight whose sizes are multiples of 128."""
    if weight.ndim != 2 or weight.shape[0] % BLOCK or weight.shape[1] % BLOCK:
        raise ValueError(f"FP8 blocks are {BLOCK} x {BLOCK}, and a weight of shape {tuple(weight.shape)} is not made of them")
    if not weight.isfinite().all():
        raise ValueError("a weight to be quantised to FP8 is NaN or infinite: training has diverged, or its file is damaged")
    blocks = _blocks(weight)
    bits_RC = (blocks.abs().amax((1, 3)) / LARGEST).view(torch.int32)
    byte_RC = ((bits_RC >> 23) + ((bits_RC & 0x7FFFFF) > 0).int()).clamp(min=1)
    values = blocks * _power_of_two(254 - byte_RC)[:, None, :, None]
    return values.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).reshape(weight.shape), byte_RC.to(torch.uint8)


def dequantize_blocks(values: torch.Tensor, byte_RC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The decoded weight [out, in], in float32 or bfloat16."""
    return (_blocks(values) * _power_of_two(byte_RC.int())[:, None, :, None]).to(dtype).reshape(values.shape)


def _blocks(weight: torch.Tensor) -> torch.Tensor:
    """float32 [R, 128, C, 128]."""
    return weight.float().unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))


def _power_of_two(byte_RC: torch.Tensor) -> torch.Tensor:
    return (byte_RC << 23).view(torch.float32)
