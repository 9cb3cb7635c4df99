"""The lightning indexer in FP4: what it computes, that it is the same however it is run, that it travels with the model, and what it forgets.

The oracle is written out below in numpy: Hadamard matrix, FP4 by distance to every value, scores, top-k of the visible entries.
"""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from rollout.config import Dtype, ModelConfig
from rollout.fp4 import fake_quantize, fake_quantize_activation
from rollout.indexer import find_indexers, has_quantized_indexer, indexer_recall, quantize_indexer, rotate
from rollout.model import backbone_of, build_model, load_model, save_model

LENGTH = 31
"""Seven compressed entries at the last token, of which the indexer keeps two."""

CSA = "compressed_sparse_attention"
STUDENT = {"layer_types": [CSA, CSA, "heavily_compressed_attention"], "index_head_dim": 32}
EVEN_CODES_FIRST = np.array([0, 1, 2, 4, 0.5, 1.5, 3, 6])
"""Values of E2M1: of two at the same distance the one with the even code is found first."""


@pytest.fixture(scope="module")
def plain(new_student):
    """A student with two layers of compressed sparse attention, its indexers as transformers makes them."""
    return new_student("deepseek_v4_tiny", **STUDENT)


@pytest.fixture
def model(plain):
    copied = copy.deepcopy(plain)
    quantize_indexer(copied, "student")
    return copied


@pytest.fixture(scope="module")
def tokens_BL(tokenizer) -> torch.Tensor:
    return torch.randint(3, len(tokenizer), (8, LENGTH), generator=torch.Generator().manual_seed(1))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scorer_of(model):
    return next(iter(find_indexers(model).values())).scorer


@torch.no_grad()
def logits(model, tokens_BL: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens_BL, use_cache=False).logits


@torch.no_grad()
def observe(model, tokens_BL: torch.Tensor) -> list[tuple[tuple, torch.Tensor]]:
    """(inputs of the scorer before quantisation, entries chosen) of each indexer, in one forward."""
    seen, chosen, handles = [], [], []
    for indexer in find_indexers(model).values():
        handles.append(indexer.scorer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs), prepend=True))
        handles.append(indexer.register_forward_hook(lambda _module, _inputs, output: chosen.append(output)))
    backbone_of(model)(input_ids=tokens_BL, use_cache=False)
    for handle in handles:
        handle.remove()
    return list(zip(seen, chosen, strict=True))


def hadamard(width: int) -> np.ndarray:
    """Sylvester's recursion."""
    if width == 1:
        return np.ones((1, 1))
    half = hadamard(width // 2)
    return np.block([[half, half], [half, -half]])


def naive_rotation(values: torch.Tensor) -> np.ndarray:
    width = values.shape[-1]
    rotated = torch.from_numpy(values.double().numpy() @ hadamard(width) / np.sqrt(width))
    return rotated.to(values.dtype).double().numpy()


def naive_fp4(values: np.ndarray) -> np.ndarray:
    """Each block of 32 over the smallest power of two that needs no value above 6, to the nearest value of E2M1, ties to the even code."""
    blocks = values.reshape(-1, 32)
    powers = 2.0 ** np.arange(-126, 128)
    scale = powers[np.searchsorted(6 * powers, np.abs(blocks).max(1))][:, None]
    nearest = np.abs((np.abs(blocks) / scale)[..., None] - EVEN_CODES_FIRST).argmin(-1)
    return (np.sign(blocks) * EVEN_CODES_FIRST[nearest] * scale).reshape(values.shape)


def naive_scores(scorer, query: torch.Tensor, key: torch.Tensor, hidden: torch.Tensor, is_quantized: bool = True) -> np.ndarray:
    """sum_h w_h ReLU(q_h . k_s), [B, L, T]."""
    heads, width = query.shape[2:]
    query, key = (naive_fp4(naive_rotation(x)) if is_quantized else x.double().numpy() for x in (query, key))
    weights = scorer.weights_proj(hidden).detach().double().numpy() / np.sqrt(heads)
    products = np.einsum("blhd,btd->blht", query, key) / np.sqrt(width)
    return np.einsum("blh,blht->blt", weights, np.maximum(products, 0))


def naive_choice(scores_BLT: np.ndarray, rate: int, kept: int) -> list[list[set[int]]]:
    """The entries each query keeps among those that end at or before it."""

    def choice(scores_T: np.ndarray, position: int) -> set[int]:
        visible = scores_T[: (position + 1) // rate]
        return set(np.argsort(-visible, kind="stable")[:kept].tolist())

    return [[choice(scores_T, position) for position, scores_T in enumerate(scores_LT)] for scores_LT in scores_BLT]


@pytest.mark.parametrize("width", [32, 64, 128])
def test_the_rotation_is_the_hadamard_matrix_over_the_root_of_its_width(width):
    values = random(5, 3, width)
    np.testing.assert_allclose(rotate(values).numpy(), naive_rotation(values), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rotation_is_rounded_once_to_the_dtype_it_came_in(dtype):
    values = random(200, 128).to(dtype)
    assert rotate(values).dtype == dtype
    assert torch.equal(rotate(values), rotate(values.float()).to(dtype))


def test_the_rotation_alone_changes_no_score(plain):
    scorer = scorer_of(plain)
    query, key, hidden = random(2, 5, 8, 32), random(2, 7, 32, seed=1), random(2, 5, 64, seed=2)
    torch.testing.assert_close(scorer(rotate(query), rotate(key), hidden), scorer(query, key, hidden), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_those_of_the_written_out_formula(dtype, model):
    scorer = copy.deepcopy(scorer_of(model)).to(dtype)
    query, key, hidden = (x.to(dtype) for x in (random(2, 5, 8, 32), random(2, 7, 32, seed=1), random(2, 5, 64, seed=2)))
    np.testing.assert_allclose(scorer(query, key, hidden).detach().numpy(), naive_scores(scorer, query, key, hidden), atol=1e-5)


def test_the_model_keeps_the_entries_with_the_highest_quantised_scores(model, tokens_BL):
    found = observe(model, tokens_BL)
    assert len(found) == 2
    for indexer, (inputs, chosen_BLK) in zip(find_indexers(model).values(), found, strict=True):
        expected = naive_choice(naive_scores(indexer.scorer, *inputs), indexer.compress_rate, indexer.index_topk)
        assert [[set(row) - {-1} for row in rows] for rows in chosen_BLK.tolist()] == expected


def test_quantisation_changes_some_choices_and_with_them_the_logits(plain, model, tokens_BL):
    (_, before), (_, after) = observe(plain, tokens_BL)[0], observe(model, tokens_BL)[0]
    assert not torch.equal(before.sort(-1).values, after.sort(-1).values)
    difference_L = (logits(plain, tokens_BL) - logits(model, tokens_BL)).abs().amax((0, 2))
    assert difference_L[-1] > 1e-3
    assert difference_L[:11].max() == 0.0, "up to its 11th token a query sees no more entries than are kept"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 7, 64])
def test_an_entry_is_quantised_to_the_same_bits_alone_and_among_others(dtype, count):
    entries = random(4, count, 64).to(dtype)
    together = fake_quantize_activation(rotate(entries))
    alone = [[fake_quantize_activation(rotate(entry[None]))[0] for entry in row] for row in entries]
    assert torch.equal(together, torch.stack([torch.stack(row) for row in alone]))


def test_activations_are_quantised_as_weights_are():
    values = random(300, 64) * torch.exp(3 * random(300, 1, seed=1))
    assert torch.equal(fake_quantize_activation(values), fake_quantize(values))
    assert fake_quantize_activation(values[:0]).shape == (0, 64)


def test_nan_and_infinity_stay_where_they_are():
    values = random(3, 64)
    values[0, 5], values[1, 40] = float("nan"), float("inf")
    quantized = fake_quantize_activation(values)
    assert quantized[0, 5].isnan()
    assert quantized[1, 40] == float("inf")
    others = values.isfinite()
    assert quantized[others].isfinite().all()
    assert torch.equal(quantized[:, 32:][[0, 2]], fake_quantize(values[:, 32:][[0, 2]])), "other blocks do not notice"


def test_a_model_with_nan_gives_nan_for_the_loss_to_report(model, tokens_BL):
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    assert logits(model, tokens_BL).isnan().all()


@pytest.mark.parametrize("prefill", [1, 5, 17])
def test_decoding_step_by_step_equals_the_forward_with_more_entries_than_the_indexer_keeps(prefill, model, tokens_BL):
    assert model.config.index_n_heads >= 8, "fewer tie at zero"
    cache, steps = DynamicCache(config=model.config), []
    starts = [0, *range(prefill, LENGTH)]
    with torch.no_grad():
        for start, end in zip(starts, [*starts[1:], LENGTH], strict=True):
            steps.append(model(input_ids=tokens_BL[:, start:end], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), logits(model, tokens_BL), rtol=0, atol=1e-5)


def test_the_cache_holds_unquantised_keys(plain, model, tokens_BL):
    caches = []
    for each in (plain, model):
        caches.append(DynamicCache(config=each.config))
        with torch.no_grad():
            each(input_ids=tokens_BL, past_key_values=caches[-1], use_cache=True)
    first, quantised = (cache.layers[0].compressed_kv["indexer"] for cache in caches)
    assert torch.equal(first, quantised)
    assert first.shape[1] == LENGTH // 4


def test_a_copy_of_a_quantised_model_is_quantised_and_apart_from_it(model, tokens_BL):
    copied, expected = copy.deepcopy(model), logits(model, tokens_BL)
    assert torch.equal(logits(copied, tokens_BL), expected)
    with torch.no_grad():
        for indexer in find_indexers(copied).values():
            indexer.scorer.weights_proj.weight.neg_()
    assert (logits(copied, tokens_BL) - expected).abs().max() > 1e-3
    assert torch.equal(logits(model, tokens_BL), expected)


def test_quantising_a_copy_leaves_the_original_as_it_was(plain, tokens_BL):
    expected, copied = logits(plain, tokens_BL), copy.deepcopy(plain)
    quantize_indexer(copied, "student")
    assert torch.equal(logits(plain, tokens_BL), expected)
    assert has_quantized_indexer(copied.config)
    assert not has_quantized_indexer(plain.config)


def test_quantising_twice_is_quantising_once(model, tokens_BL):
    expected = logits(model, tokens_BL)
    quantize_indexer(model, "student")
    assert all(len(indexer.scorer._forward_pre_hooks) == 1 for indexer in find_indexers(model).values())
    assert torch.equal(logits(model, tokens_BL), expected)


def test_a_saved_model_says_that_its_indexer_is_quantised_and_is_loaded_so(model, plain, tokenizer, tokens_BL, tmp_path):
    for name, each in [("fp4", model), ("plain", plain)]:
        save_model(tmp_path / name, each, tokenizer, each.state_dict())
        loaded = load_model(ModelConfig(model=str(tmp_path / name)), "teacher of law")
        assert has_quantized_indexer(AutoConfig.from_pretrained(tmp_path / name)) is (name == "fp4")
        assert has_quantized_indexer(loaded.config) is (name == "fp4")
        assert torch.equal(logits(loaded, tokens_BL), logits(each, tokens_BL))
    assert not torch.equal(logits(model, tokens_BL), logits(plain, tokens_BL))


def test_a_new_model_follows_its_architecture(architecture, tokenizer):
    for settings in ({}, {"indexer_dtype": "fp4"}):
        model = build_model(architecture("deepseek_v4_tiny", **STUDENT, **settings), len(tokenizer), ModelConfig(), "student")
        assert bool(scorer_of(model)._forward_pre_hooks) is has_quantized_indexer(model.config) is bool(settings)


def test_a_format_that_is_not_known_is_refused(architecture, tokenizer):
    with pytest.raises(ValueError, match="indexer_dtype=fp8: this version knows fp4"):
        build_model(architecture("deepseek_v4_tiny", indexer_dtype="fp8"), len(tokenizer), ModelConfig(), "student")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3_moe_tiny", {}, r"needs a DeepSeek-V4 model with compressed sparse attention; the student \(qwen3_moe\) has no such indexer"),
        ("deepseek_v4_tiny", {"layer_types": ["sliding_attention"] * 3}, "needs a DeepSeek-V4 model with compressed sparse attention"),
        ("deepseek_v4_tiny", {"index_head_dim": 16}, "a power of two and at least 32; that of the student is 16"),
        ("deepseek_v4_tiny", {"index_head_dim": 96}, "a power of two and at least 32; that of the student is 96"),
    ],
)
def test_a_model_that_cannot_have_it_is_refused_and_left_alone(name, changes, message, new_student):
    model = new_student(name, **changes)
    with pytest.raises(ValueError, match=message):
        quantize_indexer(model, "student")
    assert not has_quantized_indexer(model.config)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_indexer_of_another_family_is_not_taken_for_it():
    """DeepSeek-V3.2 has one too, over single tokens."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v32", num_hidden_layers=1, n_routed_experts=8))
    assert any("indexer" in name for name, _ in model.named_modules())
    assert find_indexers(model) == {}


def test_the_indexer_gets_no_gradient_and_everything_else_a_finite_one(model, tokens_BL):
    model.requires_grad_(True)
    model(input_ids=tokens_BL, use_cache=False).logits.log_softmax(-1)[:, :-1].gather(2, tokens_BL[:, 1:, None]).mean().backward()
    silent = {name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    assert silent == {name for name, _ in model.named_parameters() if ".indexer." in name}
    assert all(parameter.grad.isfinite().all() for name, parameter in model.named_parameters() if name not in silent)


def naive_recall(model, tokens_BL: torch.Tensor, real_BL: torch.Tensor) -> tuple[int, int]:
    matched, total = 0, 0
    for indexer, (inputs, chosen_BLK) in zip(find_indexers(model).values(), observe(model, tokens_BL), strict=True):
        scores_BLT = naive_scores(indexer.scorer, *inputs, is_quantized=False)
        best = naive_choice(scores_BLT, indexer.compress_rate, indexer.index_topk)
        for row, position in real_BL.nonzero().tolist():
            if (position + 1) // indexer.compress_rate > indexer.index_topk:
                matched += len(best[row][position] & set(chosen_BLK[row, position].tolist()))
                total += len(best[row][position])
    return matched, total


def recall(model, *batches: tuple[torch.Tensor, torch.Tensor]) -> list[int]:
    """(matched, total) of forwards over (tokens, real)."""
    sums = torch.zeros(2, dtype=torch.int64)
    for tokens_BL, real_BL in batches:
        with torch.no_grad(), indexer_recall(model, real_BL) as counted:
            backbone_of(model)(input_ids=tokens_BL, use_cache=False)
        sums += counted
    return sums.tolist()


def real_rows(*lengths: int) -> torch.Tensor:
    return torch.arange(LENGTH) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recall_is_the_written_out_count_over_layers_queries_and_rows_of_mixed_lengths(dtype, model, tokens_BL):
    model, real_BL = model.to(dtype), real_rows(31, 31, 30, 24, 12, 11, 5, 1)
    matched, total = recall(model, (tokens_BL, real_BL))
    assert (matched, total) == naive_recall(model, tokens_BL, real_BL)
    assert total == 2 * 2 * (20 + 20 + 19 + 13 + 1), "two layers keep two entries, from the 12th token on, where three are visible"
    assert 0.5 < matched / total < 1


def test_counts_of_micro_batches_add_up(model, tokens_BL):
    real_BL = real_rows(31, 31, 30, 24, 12, 11, 5, 1)
    parts = [(tokens_BL[:3], real_BL[:3]), (tokens_BL[3:], real_BL[3:])]
    assert recall(model, *parts) == recall(model, (tokens_BL, real_BL))


def test_what_stands_in_the_padding_does_not_count(model, tokens_BL):
    real_BL = real_rows(*[20] * 8)
    padded = torch.where(real_BL, tokens_BL, 0)
    assert recall(model, (tokens_BL, real_BL)) == recall(model, (padded, real_BL)) == recall(model, (tokens_BL[:, :20], real_BL[:, :20]))


@pytest.mark.parametrize("length", [3, 11])
def test_queries_that_see_no_more_entries_than_are_kept_do_not_count(length, model, tokens_BL):
    assert recall(model, (tokens_BL[:, :length], torch.ones(8, length, dtype=torch.bool))) == [0, 0]


def test_recall_is_one_where_queries_and_keys_are_fp4_values_already(new_student, tokens_BL):
    """A width of 64 makes the rotation and its inverse exact; without RoPE what the projections give is what the scorer gets."""
    model = new_student("deepseek_v4_tiny", **STUDENT | {"index_head_dim": 64})
    quantize_indexer(model, "student")

    def to_fp4(_module, _inputs, output):
        heads = output.unflatten(-1, (-1, 64))
        return rotate(fake_quantize(rotate(heads))).flatten(-2)

    real_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
    for indexer in find_indexers(model).values():
        indexer.rotary_emb.compress_inv_freq.zero_()
    matched, total = recall(model, (tokens_BL, real_BL))
    assert matched < total
    for indexer in find_indexers(model).values():
        indexer.q_b_proj.register_forward_hook(to_fp4)
        indexer.kv_norm.register_forward_hook(to_fp4)
    matched, total = recall(model, (tokens_BL, real_BL))
    assert matched == total > 0


def test_measuring_changes_no_result_and_leaves_nothing_behind(model, tokens_BL):
    expected = logits(model, tokens_BL)
    hooks = [(len(module._forward_pre_hooks), len(module._forward_hooks)) for module in model.modules()]
    with indexer_recall(model, torch.ones_like(tokens_BL, dtype=torch.bool)) as sums:
        assert torch.equal(logits(model, tokens_BL), expected)
    counted = sums.tolist()
    logits(model, tokens_BL)
    assert sums.tolist() == counted
    with pytest.raises(KeyError), indexer_recall(model, torch.ones_like(tokens_BL, dtype=torch.bool)):
        raise KeyError
    assert hooks == [(len(module._forward_pre_hooks), len(module._forward_hooks)) for module in model.modules()]


def test_a_bfloat16_student_loaded_with_the_setting_computes_as_one_quantised_after_it_was_loaded(plain, model, tokenizer, tokens_BL, tmp_path):
    loaded = {}
    for name, student in (("plain", plain), ("fp4", model)):
        save_model(tmp_path / name, student, tokenizer, student.state_dict())
        loaded[name] = load_model(ModelConfig(model=str(tmp_path / name), dtype=Dtype.bfloat16), "student")
    assert not torch.equal(logits(loaded["plain"], tokens_BL), logits(loaded["fp4"], tokens_BL))
    quantize_indexer(loaded["plain"], "student")
    assert torch.equal(logits(loaded["plain"], tokens_BL), logits(loaded["fp4"], tokens_BL))
