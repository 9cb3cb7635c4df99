"""MXFP4: every number is the one the rule gives, whatever the layout, the dtype and the compiler; others read our bytes as we do."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from rollout import fp4
from rollout.compiler import has_compiler
from rollout.fp4 import LARGEST, MAX_SPREAD, PackedFP4, dequantize, fake_quantize, quantize, round_to_e2m1, scale_spread

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code
TINY = 6 * 2.0**-127  # a block that is no larger becomes zeros
BITS = {"nan": 0x7FC00000, "-nan": 0xFFC00000, "all ones": 0xFFFFFFFF, "signalling nan": 0x7FA00000, "inf": 0x7F800000, "-inf": 0xFF800000}
NOT_FINITE = {name: torch.tensor(pattern, dtype=torch.uint32).view(torch.float32) for name, pattern in BITS.items()}

QUANTISERS = (quantize, fake_quantize)
each_quantiser = pytest.mark.parametrize("quantiser", QUANTISERS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def bits(values: Tensor) -> Tensor:
    """For comparisons that see the sign of zero."""
    return values.contiguous().view({torch.float32: torch.int32, torch.bfloat16: torch.int16}[values.dtype])


def random_weight(*shape: int, dtype: torch.dtype, low: int = -140, high: int = 124) -> Tensor:
    """Gaussian blocks of 2^low to 2^high, some of them subnormal; two elements of each are 0 and -0."""
    generator = torch.Generator().manual_seed(len(shape))
    blocks = torch.randn(math.prod(shape) // 32, 32, generator=generator, dtype=torch.float64)
    weight = torch.ldexp(blocks, torch.randint(low, high + 1, (len(blocks), 1), generator=generator)).to(dtype)
    weight[:, 3], weight[:, 4] = 0.0, -0.0
    return weight.reshape(shape)


def one_block(*elements: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([[*elements, *[0.0] * (32 - len(elements))]], dtype=torch.float64).to(dtype)


def exact_scale(largest: float) -> int:
    """Scale byte of a block: the smallest e with largest <= 6 * 2^e, in rational numbers."""
    exponent = math.frexp(largest)[1] - 5 if largest else -127
    while Fraction(largest) > 6 * Fraction(2) ** exponent:
        exponent += 1
    return max(exponent + 127, 0)


def naive_codes(block: list[float], scale: int) -> list[int]:
    """Code of the nearest magnitude, the even one of two as near; a block with scale byte 0 keeps only its signs."""
    scaled = [abs(Fraction(element)) / Fraction(2) ** (scale - 127) if scale else 0 for element in block]
    nearest = [min(range(8), key=lambda code: (abs(element - Fraction(E2M1[code])), code % 2)) for element in scaled]
    return [code + 8 * (math.copysign(1, element) < 0) for code, element in zip(nearest, block, strict=True)]


def codes_of(packed: PackedFP4) -> Tensor:
    """uint8 [..., K], one code each."""
    byte = packed.codes.view(torch.uint8)
    return torch.stack([byte % 16, byte // 16], dim=-1).flatten(-2)


@each_dtype
def test_codes_scales_and_values_are_the_rule_in_rational_numbers(dtype):
    weight = random_weight(96, 32, dtype=dtype)
    packed = quantize(weight)
    scales = [exact_scale(max(map(abs, block))) for block in weight.tolist()]
    codes = [naive_codes(block, scale) for block, scale in zip(weight.tolist(), scales, strict=True)]
    values = [[math.ldexp(-E2M1[code - 8] if code > 7 else E2M1[code], scale - 127) for code in row] for row, scale in zip(codes, scales, strict=True)]
    assert packed.scale.flatten().tolist() == scales
    assert codes_of(packed).tolist() == codes
    assert torch.equal(bits(dequantize(packed, dtype)), bits(torch.tensor(values, dtype=torch.float64).to(dtype)))


@each_dtype
def test_codes_are_those_of_ml_dtypes(dtype):
    weight = random_weight(2000, 32, dtype=dtype, low=-120)
    packed = quantize(weight)
    scale = packed.scale.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    theirs = (weight.double().numpy() / scale).astype(np.float32).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    assert torch.equal(codes_of(packed), torch.from_numpy(theirs))


@pytest.mark.parametrize("shape", [(400, 64), (5, 40, 96)], ids=["2d", "3d"])
def test_bytes_are_those_of_torchao(shape):
    """In bfloat16: in float32 its log2 errs beside 6 * 2^k."""
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    weight = random_weight(*shape, dtype=torch.bfloat16)
    theirs = MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.RCEIL)
    packed = quantize(weight)
    assert torch.equal(packed.scale, theirs.scale.view(torch.uint8))
    assert torch.equal(packed.codes.view(torch.uint8), theirs.qdata.view(torch.uint8))


@each_dtype
@pytest.mark.parametrize("exponent", [-110, -7, 0, 60, 125])
@pytest.mark.parametrize(("tie", "even"), [(0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0)])
def test_a_tie_goes_to_the_even_code_and_its_neighbours_to_the_nearest(tie, even, exponent, dtype):
    middle = torch.tensor(tie, dtype=dtype)
    below, above = (float(torch.nextafter(middle, torch.tensor(end, dtype=dtype))) for end in (0.0, 6.0))
    lower, upper = max(m for m in E2M1 if m < tie), min(m for m in E2M1 if m > tie)
    weight = torch.ldexp(one_block(6, tie, -tie, below, -below, above, -above), torch.tensor(exponent)).to(dtype)
    expected = torch.ldexp(one_block(6, even, -even, lower, -lower, upper, -upper), torch.tensor(exponent)).to(dtype)
    assert torch.equal(bits(fake_quantize(weight)), bits(expected))


@each_dtype
def test_scales_beside_six_times_a_power_of_two_are_exact(dtype):
    boundary = torch.ldexp(torch.tensor(6.0), torch.arange(-146, 126)).to(dtype)
    steps = torch.arange(-20, 21)
    largest = (bits(boundary)[:, None] + steps).clamp(min=0).to(bits(boundary).dtype).view(dtype).flatten()
    largest = largest[largest <= LARGEST]
    assert len(largest) > 250 * len(steps)
    weight = torch.zeros(len(largest), 32, dtype=dtype)
    weight[:, 13] = -largest
    assert quantize(weight).scale.flatten().tolist() == [exact_scale(amax) for amax in largest.tolist()]


def test_magnitudes_saturate_at_six():
    assert round_to_e2m1(torch.tensor([5.0, 5.5, 6.0, 6.9, 7.0, 8.0, 2.0**127, math.inf])).tolist() == [4, *[6] * 7]


@each_dtype
def test_zeros_and_what_rounds_to_zero_keep_their_sign(dtype):
    packed = quantize(torch.cat([one_block(0.0, -0.0, -0.0, dtype=dtype), one_block(2.0**100, -1.0, 1.0, -(2.0**-130), 2.0**-130, -0.0, dtype=dtype)]))
    assert packed.scale.tolist() == [[0], [127 + 98]]
    assert codes_of(packed)[:, :7].tolist() == [[0, 8, 8, 0, 0, 0, 0], [6, 8, 0, 8, 0, 8, 0]]


@each_dtype
@pytest.mark.parametrize("share", [2.0**-8, 0.3, 0.5, 1.0])
def test_a_block_up_to_six_times_the_smallest_scale_becomes_signed_zeros(dtype, share):
    weight = one_block(share * TINY, -share * TINY, dtype=dtype)
    assert float(weight[0, 0]) > 0
    assert quantize(weight).scale.tolist() == [[0]]
    assert torch.equal(bits(fake_quantize(weight)), bits(one_block(0.0, -0.0, dtype=dtype)))


LAYOUTS = {
    "transposed": lambda base: base.T,
    "transposed, one block long": lambda base: base[:32].T,
    "columns": lambda base: base[:, 32:64],
    "expanded": lambda base: base[:1].expand(5, -1),
    "expanded, 3-D": lambda base: base.expand(3, -1, -1),
    "permuted, 3-D": lambda base: base.reshape(4, 32, 48).permute(2, 0, 1),
    "offset": lambda base: base.flatten()[7 : 7 + 320],
}


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_in_memory_does_not_matter(layout, dtype):
    view = LAYOUTS[layout](random_weight(64, 96, dtype=dtype))
    copy = torch.tensor(view.tolist(), dtype=dtype)
    packed, expected = quantize(view), quantize(copy)
    assert torch.equal(packed.scale, expected.scale)
    assert torch.equal(packed.codes, expected.codes)
    assert torch.equal(bits(fake_quantize(view)), bits(fake_quantize(copy)))


def test_parts_of_a_packed_weight_decode_to_the_parts():
    packed = quantize(random_weight(4, 64, 96, dtype=torch.float32))
    part = PackedFP4(packed.codes[1:, ::3, 16:], packed.scale[1:, ::3, 1:])
    assert torch.equal(bits(dequantize(part, torch.float32)), bits(dequantize(packed, torch.float32)[1:, ::3, 32:]))


@each_dtype
@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 4, 64), (2, 0, 64), (0,)], ids=str)
def test_empty_weights_stay_empty(shape, dtype):
    packed = quantize(torch.empty(shape, dtype=dtype))
    assert (packed.codes.shape, packed.scale.shape) == ((*shape[:-1], shape[-1] // 2), (*shape[:-1], shape[-1] // 32))
    assert dequantize(packed, dtype).shape == fake_quantize(torch.empty(shape, dtype=dtype)).shape == shape


def test_torchs_default_dtype_and_device_do_not_matter():
    weight = random_weight(8, 64, dtype=torch.float32, low=-60, high=60)
    expected = dequantize(quantize(weight), torch.float32)
    fp4._pairs.cache_clear()
    torch.set_default_dtype(torch.float16)  # as transformers does while it loads a model of that dtype
    try:
        with torch.device("meta"):
            found = dequantize(quantize(weight), torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
        fp4._pairs.cache_clear()
    assert torch.equal(found, expected)


@each_dtype
def test_quantising_decoded_values_gives_the_same_values(dtype):
    """But for blocks between 6 and 7 * 2^-127: their largest element rounds to 6 * 2^-127, which quantises to zero."""
    weight = random_weight(3000, 32, dtype=dtype)
    largest = weight.abs().amax(1).float()
    once = dequantize(quantize(weight[(largest <= TINY) | (largest >= TINY / 6 * 7)]), dtype)
    assert torch.equal(bits(dequantize(quantize(once), dtype)), bits(once))


@each_dtype
@pytest.mark.parametrize("largest", E2M1[1:])
def test_every_representable_block_is_a_fixed_point(largest, dtype):
    values = [sign * magnitude for magnitude in E2M1 if magnitude <= largest for sign in (1, -1)]
    weight = torch.ldexp(one_block(*values).double(), torch.arange(-126, 126)[:, None]).to(dtype)
    weight = weight[weight.abs().amax(1) > TINY]
    assert len(weight) > 245
    assert torch.equal(bits(fake_quantize(weight)), bits(weight))


@each_dtype
def test_fake_quantising_is_packing_and_decoding_bit_for_bit(dtype):
    weight = random_weight(10, 40, 96, dtype=dtype)
    before = weight.clone()
    assert torch.equal(bits(fake_quantize(weight)), bits(dequantize(quantize(weight), dtype)))
    assert torch.equal(bits(weight), bits(before))


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=["fp32", "bf16"])
def test_compiled_is_eager_bit_for_bit_and_refuses_the_same(dtype, monkeypatch):
    weight = torch.cat([random_weight(300, 96, dtype=dtype), random_weight(3, 300, 96, dtype=torch.bfloat16).flatten(0, 1).to(dtype)])  # bf16 has ties
    packed, fake = quantize(weight), fake_quantize(weight)
    monkeypatch.setattr(fp4, "COMPILE_FROM", weight.numel())
    assert all(fp4._fastest(function, weight) is not function for function in (fp4._quantize, fp4._fake_quantize))
    assert torch.equal(quantize(weight).scale, packed.scale)
    assert torch.equal(quantize(weight).codes, packed.codes)
    assert torch.equal(bits(fake_quantize(weight)), bits(fake))
    for element in NOT_FINITE.values():
        for quantiser in QUANTISERS:
            refused = weight.clone()
            refused[7, 17] = element
            with pytest.raises(ValueError, match="NaN or infinite"):
                quantiser(refused)


@pytest.mark.gpu
@each_dtype
def test_a_gpu_gives_the_same_bits(dtype):
    weight = random_weight(300, 96, dtype=dtype)
    ours, theirs = quantize(weight), quantize(weight.cuda())
    assert torch.equal(theirs.scale.cpu(), ours.scale)
    assert torch.equal(theirs.codes.cpu(), ours.codes)
    assert torch.equal(bits(fake_quantize(weight.cuda()).cpu()), bits(fake_quantize(weight)))
    assert torch.equal(bits(dequantize(theirs, dtype).cpu()), bits(dequantize(ours, dtype)))


def test_bytes_hold_the_even_column_low_and_the_sign_in_bit_3():
    packed = quantize(one_block(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0) / 4)
    assert (packed.codes.dtype, packed.scale.dtype) == (torch.int8, torch.uint8)
    assert packed.codes.view(torch.uint8).tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] + [0x00] * 8]
    assert packed.scale.tolist() == [[125]]


def test_transformers_reads_the_bytes_as_we_do():
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes = torch.arange(256, dtype=torch.uint8).view(torch.int8).reshape(16, 16)
    packed = PackedFP4(codes.repeat(1, 253), torch.arange(253, dtype=torch.uint8).repeat(16, 1))  # every byte with every scale that decodes to finite numbers
    theirs = Fp8Dequantize(None)._dequantize_one(packed.codes, packed.scale.view(torch.float8_e8m0fnu), output_dtype=torch.float32)
    assert torch.equal(bits(dequantize(packed, torch.float32)), bits(theirs))


def test_a_weight_takes_four_and_a_quarter_bits():
    assert quantize(random_weight(6, 40, 96, dtype=torch.bfloat16)).num_bytes * 8 == 4.25 * 6 * 40 * 96


def test_max_spread_is_the_width_of_the_window_in_which_fp8_is_normal():
    """Times 2^d, all magnitudes are exact in E4M3 for -8 <= d <= 6, and normal for -5 <= d <= 6."""
    magnitude = torch.tensor(E2M1[1:])
    exact = [d for d in range(-30, 31) if torch.equal((magnitude * 2.0**d).to(torch.float8_e4m3fn).float(), magnitude * 2.0**d)]
    normal = [d for d in exact if 0.5 * 2.0**d >= torch.finfo(torch.float8_e4m3fn).smallest_normal]
    assert exact == list(range(-8, 7))
    assert normal == list(range(-5, 7))
    assert normal[-1] - normal[0] == MAX_SPREAD


@pytest.mark.parametrize(("spread", "is_lossless"), [(0, True), (MAX_SPREAD, True), (14, True), (15, False)])
def test_a_tile_converts_to_fp8_with_one_scale_up_to_a_spread(spread, is_lossless):
    generator = torch.Generator().manual_seed(spread)
    values = torch.tensor([*E2M1, *(-m for m in E2M1)])[torch.randint(16, (128, 4, 32), generator=generator)]
    values[..., 0] = 6
    exponent = torch.randint(-20, spread - 19, (128, 4, 1), generator=generator)
    exponent[0, 0], exponent[77, 2] = -20, spread - 20
    weight = torch.ldexp(values, exponent).flatten(1)
    packed = quantize(weight)
    assert scale_spread(packed).tolist() == [[spread]]
    scale = 2.0 ** (int(packed.scale.max()) - 127 - 6)
    assert torch.equal((weight / scale).to(torch.float8_e4m3fn).float() * scale, weight) is is_lossless


@pytest.mark.parametrize("tile", [32, 64, 128])
@pytest.mark.parametrize("shape", [(128, 128), (130, 160), (1, 32), (2, 256, 384), (3, 5, 96), (2, 2, 33, 64)], ids=str)
def test_scale_spread_is_the_largest_less_the_smallest_scale_of_a_tile(shape, tile):
    weight = random_weight(*shape, dtype=torch.bfloat16, low=-20, high=3)
    blocks = weight.view(-1, 32)
    blocks[::5], blocks[1::7], blocks[2::9, ::2], blocks[3::9, 1::2] = 0.0, -0.0, 0.0, 0.0  # nothing; nothing; odd columns only; even ones only
    weight[..., -tile:, :tile] = -0.0  # whole tiles without anything
    packed = quantize(weight)
    tiles = {(*index, row // tile, column // tile): [0] for *index, row, column in np.ndindex(shape)}
    for *index, row, block in np.ndindex(tuple(packed.scale.shape)):
        if weight[(*index, row, slice(32 * block, 32 * block + 32))].any():
            tiles[(*index, row // tile, 32 * block // tile)].append(int(packed.scale[(*index, row, block)]))
    found = scale_spread(packed, tile)
    assert found.shape == (*shape[:-2], -(-shape[-2] // tile), -(-shape[-1] // tile))
    for index, scales in tiles.items():
        assert int(found[index]) == max(scales) - min(scales[1:] or [0])


@each_quantiser
@each_dtype
@pytest.mark.parametrize("element", NOT_FINITE)
@pytest.mark.parametrize("is_transposed", [False, True])
def test_nan_and_infinity_are_refused(element, is_transposed, dtype, quantiser):
    for position in (0, 13, 31):
        weight = torch.ones(32, 40, dtype=dtype).T if is_transposed else torch.ones(40, 32, dtype=dtype)
        weight[3, position] = NOT_FINITE[element]
        with pytest.raises(ValueError, match=r"^[^\n]*NaN or infinite[^\n]*$"):
            quantiser(weight)


@each_quantiser
@each_dtype
def test_magnitudes_that_would_decode_to_infinity_are_refused(dtype, quantiser):
    weight = torch.nextafter(one_block(0, -LARGEST, dtype=dtype), torch.tensor(-math.inf, dtype=dtype))
    with pytest.raises(ValueError, match=r"^a weight is as large as 2\.5\de\+38; FP4 holds magnitudes up to 2\.55e\+38$"):
        quantiser(weight)


@each_quantiser
@pytest.mark.parametrize("shape", [(), (33,), (32, 16), (2, 64, 1)], ids=str)
def test_a_last_dimension_that_is_no_multiple_of_32_is_refused(shape, quantiser):
    with pytest.raises(ValueError, match=r"^[^\n]*no multiple of 32$"):
        quantiser(torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("function", [*QUANTISERS, lambda weight: dequantize(quantize(weight.float()), weight.dtype)], ids=["pack", "fake", "decode"])
def test_another_dtype_is_refused(function, dtype):
    with pytest.raises(ValueError, match=f"^[^\n]*exact in float32 and bfloat16, not in {dtype}: use one of these$"):
        function(torch.ones(2, 32).to(dtype))


def test_the_scale_byte_of_nan_is_refused():
    packed = quantize(torch.ones(3, 64))
    packed.scale[2, 1] = 255
    with pytest.raises(ValueError, match=r"^[^\n]*scale byte 255[^\n]*$"):
        dequantize(packed, torch.bfloat16)
