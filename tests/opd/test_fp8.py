"""FP8 in 128 x 128 blocks: the rule by hand, and what it cannot hold."""

import math

import pytest
import torch

from opd.fp8 import dequantize_blocks, quantize_blocks


def test_fp8_is_the_nearest_value_of_the_smallest_sufficient_power_of_two():
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 256)[:, None]
    weight[130:140] = 0
    values, scale = quantize_blocks(weight)
    assert values.dtype == torch.float8_e4m3fn
    for row in range(2):
        block = weight[row * 128 : (row + 1) * 128]
        exponent = math.ceil(math.log2(float(block.abs().max()) / 448))
        assert int(scale[row, 0]) - 127 == exponent
        assert torch.equal(values[row * 128 : (row + 1) * 128].float(), (block / 2.0**exponent).to(torch.float8_e4m3fn).float())
    decoded = dequantize_blocks(values, scale, torch.float32)
    assert torch.equal(dequantize_blocks(*quantize_blocks(decoded), torch.float32), decoded)
    assert torch.equal(dequantize_blocks(values, scale, torch.bfloat16).float(), decoded)


def test_a_block_of_zeros_and_the_largest_value_are_held():
    weight = torch.zeros(128, 256)
    weight[3, 130] = 448.0
    values, scale = quantize_blocks(weight)
    assert scale.tolist() == [[1, 127]]
    assert torch.equal(dequantize_blocks(values, scale, torch.float32), weight)
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_blocks(weight.fill_(torch.nan))
    with pytest.raises(ValueError, match=r"shape \(64, 64\) is not made of them"):
        quantize_blocks(torch.zeros(64, 64))
