"""The student: every path of the quickstart's DeepSeek-V4 is alive on twenty tokens, hash tables are filled, and what cannot work is refused."""

import pytest
import torch
from transformers import DynamicCache

from opd.config import Router, StudentConfig
from opd.student import build_student, copy_for_sampling, fill_hash_tables, load_student_tokenizer, seed_everything
from rollout.config import Attention, Dtype, Experts
from rollout.synthetic import character_tokenizer, synthetic_rows

LENGTH = 20
CSA, HCA = "model.layers.1.self_attn.compressor", "model.layers.2.self_attn.compressor"


@pytest.fixture(scope="module")
def tokens_BL(tokenizer) -> torch.Tensor:
    """Eight quickstart sequences of twenty tokens: prompts of the embedded domains with their answers, cut to one length."""
    rows = [row for name in ("arithmetic", "sorting", "brackets", "tools") for row in synthetic_rows(name, "train", 40)]
    texts = [f"<bos><user>{row['prompt']}<assistant>{row['answer']}" for row in rows]
    found = [tokens[:LENGTH] for tokens in tokenizer(texts, add_special_tokens=False)["input_ids"] if len(tokens) >= LENGTH]
    assert len(found) >= 8, "the quickstart's sequences have become shorter than twenty tokens"
    return torch.tensor(found[:8])


def outputs(model, names: list[str], tokens_BL: torch.Tensor) -> dict[str, object]:
    """What modules return in one forward."""
    found = {}
    handles = [model.get_submodule(n).register_forward_hook(lambda _m, _i, output, n=n: found.__setitem__(n, output)) for n in names]
    with torch.no_grad():
        model(input_ids=tokens_BL, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def logits(model, tokens_BL: torch.Tensor, **arguments) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens_BL, use_cache=False, **arguments).logits


def gradient(model, tokens_BL: torch.Tensor, position: int, source: int) -> float:
    """Size of the derivative of the logits at one position by the embedding at another."""
    embeddings = model.get_input_embeddings()(tokens_BL).detach().requires_grad_()
    handle = model.get_input_embeddings().register_forward_hook(lambda *_: embeddings)
    model(input_ids=tokens_BL, use_cache=False).logits[:, position].square().sum().backward()
    handle.remove()
    return float(embeddings.grad[:, source].abs().max())


def test_the_student_has_less_than_a_million_parameters(v4_model, qwen3_moe_model):
    assert v4_model.num_parameters() < 1_000_000
    assert qwen3_moe_model.num_parameters() < 1_000_000


def test_its_three_layers_are_one_of_each_kind_of_attention_with_hash_and_top_k_routing(v4_model):
    assert v4_model.config.layer_types == ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
    assert [type(layer.mlp.gate).__name__ for layer in v4_model.model.layers] == ["DeepseekV4HashRouter", "DeepseekV4TopKRouter", "DeepseekV4TopKRouter"]


def test_compressed_entries_are_formed_in_both_compressing_layers(v4_model, tokens_BL):
    found = outputs(v4_model, [CSA, HCA], tokens_BL)
    assert found[CSA][0].shape[2] == LENGTH // 4
    assert found[HCA][0].shape[2] == LENGTH // 8


def test_late_queries_see_entries_of_both_and_early_ones_none(v4_model, tokens_BL):
    found = outputs(v4_model, [CSA, HCA], tokens_BL)
    for name, rate in [(CSA, 4), (HCA, 8)]:
        visible_BL = (found[name][1] == 0).any(dim=-1)[:, 0]
        assert not visible_BL[:, : rate - 1].any()
        assert visible_BL[:, rate - 1 :].all()


def test_the_indexer_drops_entries_and_queries_differ_in_which(v4_model, tokens_BL):
    chosen_BLK = outputs(v4_model, [CSA + ".indexer"], tokens_BL)[CSA + ".indexer"]
    last_BK = chosen_BLK[:, -1]
    assert chosen_BLK.shape[-1] == v4_model.config.index_topk == 2
    assert LENGTH // 4 == 5, "three of five entries are dropped at the last token"
    assert (last_BK >= 0).all()
    assert len({tuple(sorted(row)) for row in last_BK.tolist()}) > 1, "which ones depends on the sequence"


def test_the_compressed_entries_matter(v4_model, tokens_BL):
    before = logits(v4_model, tokens_BL)
    for name in (CSA, HCA):
        weight = v4_model.get_submodule(name).kv_norm.weight
        with torch.no_grad():
            weight.mul_(3)
        assert (logits(v4_model, tokens_BL)[:, -1] - before[:, -1]).abs().max() > 1e-3, name
        with torch.no_grad():
            weight.div_(3)


def test_what_the_indexer_chooses_matters(v4_model, tokens_BL):
    before = logits(v4_model, tokens_BL)
    with torch.no_grad():
        v4_model.get_submodule(CSA).indexer.scorer.weights_proj.weight.neg_()
    assert (logits(v4_model, tokens_BL)[:, -1] - before[:, -1]).abs().max() > 1e-3


def test_the_sliding_window_cuts_in_the_layer_without_compression(new_student, tokens_BL):
    """One sliding layer sees exactly as many tokens as its window has."""
    model = new_student("deepseek_v4_tiny", num_hidden_layers=1, layer_types=["sliding_attention"], mlp_layer_types=["moe"])
    window = model.config.sliding_window
    assert window < LENGTH
    last = LENGTH - 1
    assert gradient(model, tokens_BL, last, last - window + 1) > 0
    assert gradient(model, tokens_BL, last, last - window) == 0.0


def test_compressed_attention_sees_beyond_the_window_and_only_whole_entries(new_student, tokens_BL):
    """At token 19 the window of 12 begins at token 8; heavy compression at rate 8 brings tokens 0 to 7 back."""
    changes = {"num_hidden_layers": 1, "layer_types": ["heavily_compressed_attention"], "mlp_layer_types": ["moe"]}
    model = new_student("deepseek_v4_tiny", **changes)
    assert gradient(model, tokens_BL, 19, 0) > 0
    assert gradient(model, tokens_BL, 19, 7) > 0
    small = new_student("deepseek_v4_tiny", sliding_window=2, **changes)
    assert gradient(small, tokens_BL, 19, 15) > 0, "the last token of the second entry"
    assert gradient(small, tokens_BL, 19, 16) == 0.0, "neither in an entry yet nor in the window"


def test_another_window_gives_other_logits_from_where_it_cuts_on(new_student, tokens_BL):
    narrow, wide = (logits(new_student("deepseek_v4_tiny", sliding_window=window), tokens_BL) for window in (12, 32))
    difference_L = (narrow - wide).abs().amax(dim=(0, 2))
    assert difference_L[:12].max() < 1e-6
    assert (difference_L[12:] > 1e-4).all()


def test_hash_routing_follows_the_token_and_top_k_routing_the_hidden_state(v4_model, tokens_BL):
    names = [f"model.layers.{layer}.mlp.gate" for layer in range(3)]
    found = outputs(v4_model, names, tokens_BL)
    experts_of_token: dict[int, dict[int, set]] = {0: {}, 1: {}, 2: {}}
    for layer, name in enumerate(names):
        for token, experts in zip(tokens_BL.flatten().tolist(), found[name][2].tolist(), strict=True):
            experts_of_token[layer].setdefault(token, set()).add(tuple(sorted(experts)))
    assert all(len(choices) == 1 for choices in experts_of_token[0].values())
    for layer in (1, 2):
        assert any(len(choices) > 1 for choices in experts_of_token[layer].values())


def test_each_layer_uses_most_of_its_experts(v4_model, tokens_BL):
    names = [f"model.layers.{layer}.mlp.gate" for layer in range(3)]
    for name, (_logits, weights, indices) in outputs(v4_model, names, tokens_BL).items():
        assert len(indices.unique()) >= 6, name
        assert (weights > 0).all()


def test_every_residual_stream_carries_signal_of_its_own(v4_model, tokens_BL):
    found = outputs(v4_model, [f"model.layers.{layer}" for layer in range(3)], tokens_BL)
    for name, streams_BLHD in found.items():
        assert streams_BLHD.shape[2] == v4_model.config.hc_mult == 2
        assert (streams_BLHD.std(dim=(0, 1, 3)) > 1e-2).all(), name
        assert (streams_BLHD[:, :, 0] - streams_BLHD[:, :, 1]).abs().max() > 1e-3, name


def test_the_last_layer_reads_and_writes_every_stream(v4_model, tokens_BL):
    for stream in range(2):
        before = logits(v4_model, tokens_BL)

        def silence(_module, _inputs, output, stream=stream):
            output = output.clone()
            output[:, :, stream] = 0
            return output

        handle = v4_model.model.layers[-1].register_forward_hook(silence)
        assert (logits(v4_model, tokens_BL) - before).abs().max() > 1e-2
        handle.remove()


def test_every_parameter_but_the_indexers_gets_a_gradient(v4_model, tokens_BL):
    v4_model.requires_grad_(True)
    v4_model(input_ids=tokens_BL, use_cache=False).logits.log_softmax(-1)[:, :-1].gather(2, tokens_BL[:, 1:, None]).mean().backward()
    silent = {name for name, parameter in v4_model.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    assert silent == {name for name, _ in v4_model.named_parameters() if ".indexer." in name}


@pytest.mark.parametrize("length", [20, 31])
def test_decoding_step_by_step_equals_the_forward_with_more_entries_than_the_indexer_keeps(length, v4_model, tokenizer):
    tokens_BL = torch.randint(3, len(tokenizer), (8, length), generator=torch.Generator().manual_seed(1))
    assert length // 4 > v4_model.config.index_topk
    expected, cache, steps = logits(v4_model, tokens_BL), DynamicCache(config=v4_model.config), []
    with torch.no_grad():
        steps.append(v4_model(input_ids=tokens_BL[:, :5], past_key_values=cache, use_cache=True).logits)
        for position in range(5, length):
            steps.append(v4_model(input_ids=tokens_BL[:, position : position + 1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=0, atol=1e-5)


def test_right_padding_changes_no_logits_and_left_padding_does(v4_model, tokens_BL):
    short_BL, padding = tokens_BL[:, :14], torch.zeros(8, 6, dtype=torch.int64)
    expected = logits(v4_model, short_BL)
    torch.testing.assert_close(logits(v4_model, torch.cat([short_BL, padding], dim=1))[:, :14], expected, rtol=0, atol=5e-6)
    assert (logits(v4_model, torch.cat([padding, short_BL], dim=1))[:, 6:] - expected).abs().max() > 1e-2


def test_hash_tables_have_distinct_experts_that_differ_from_token_to_token(v4_model):
    table = v4_model.get_submodule("model.layers.0.mlp.gate").tid2eid
    assert all(len(set(row)) == 2 for row in table.tolist())
    assert len({tuple(row) for row in table.tolist()}) > 10
    counts_E = torch.bincount(table.flatten(), minlength=8)
    assert counts_E.min() > 0.4 * counts_E.float().mean()


def test_hash_tables_are_drawn_with_the_seeded_generator(v4_model):
    tables = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        fill_hash_tables(v4_model)
        tables.append(v4_model.get_submodule("model.layers.0.mlp.gate").tid2eid.clone())
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


def test_a_loaded_student_keeps_its_hash_tables(saved_v4, session_v4_model, tokenizer):
    model = build_student(StudentConfig(model=str(saved_v4)), tokenizer)
    expected = session_v4_model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_a_new_student_is_the_same_for_the_same_seed(new_student):
    one, same, other = (new_student("deepseek_v4_tiny", seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("router", list(Router))
def test_frozen_are_the_indexer_and_with_router_frozen_the_gates(router, architecture, tokenizer):
    model = build_student(StudentConfig(architecture=architecture("deepseek_v4_tiny"), router=router), tokenizer)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    gates = {name for name, _ in model.named_parameters() if name.endswith("mlp.gate.weight")}
    indexer = {name for name, _ in model.named_parameters() if ".indexer." in name}
    assert gates
    assert indexer
    assert frozen == indexer | (gates if router is Router.frozen else set())


def test_the_samplers_copy_is_apart_from_the_student_and_needs_no_gradients(v4_model, device, tokens_BL):
    copied = copy_for_sampling(v4_model, device)
    expected = logits(v4_model, tokens_BL)
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert any(parameter.requires_grad for parameter in v4_model.parameters())
    with torch.no_grad():
        v4_model.lm_head.weight.zero_()
    assert torch.equal(logits(copied, tokens_BL), expected)


@pytest.mark.parametrize("source", ["new", "loaded"])
def test_a_bfloat16_student_has_parameters_of_one_dtype_and_buffers_in_float32(source, architecture, saved_v4, tokenizer):
    where = {"new": {"architecture": architecture("deepseek_v4_tiny")}, "loaded": {"model": str(saved_v4)}}[source]
    model = build_student(StudentConfig(dtype=Dtype.bfloat16, **where), tokenizer)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers() if buffer.is_floating_point()} == {torch.float32}


def test_the_tokenizer_is_the_models_or_the_character_tokenizer_for_a_new_one(saved_v4, architecture, tokenizer):
    loaded = load_student_tokenizer(StudentConfig(model=str(saved_v4)))
    new = load_student_tokenizer(StudentConfig(architecture=architecture("deepseek_v4_tiny")))
    assert loaded.get_vocab() == new.get_vocab() == character_tokenizer().get_vocab()
    assert load_student_tokenizer(StudentConfig(architecture={"model_type": "x"}, tokenizer=str(saved_v4))).get_vocab() == loaded.get_vocab()


def test_seeding_seeds_every_library():
    import random

    import numpy as np

    drawn = []
    for seed in (1, 1, 2):
        seed_everything(seed)
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(1))))
    assert drawn[0] == drawn[1]
    assert all(one != other for one, other in zip(drawn[1], drawn[2], strict=True))


DENSE = {"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of student.model"),
        ({"model": "somewhere", "architecture": DENSE}, "exactly one of student.model"),
        ({"architecture": {"hidden_size": 32}}, "needs a model_type"),
        ({"architecture": {"model_type": "no_such_family"}}, "cannot be built from its architecture"),
        ({"architecture": DENSE, "router": Router.train}, "needs a mixture-of-experts student"),
        ({"architecture": DENSE, "router_bias_speed": 0.1}, "need student.router=train"),
        ({"architecture": DENSE, "router_balance_loss": 0.1}, "need student.router=train"),
        ({"architecture": DENSE, "experts": Experts.eager}, "would be ignored: remove it"),
        ({"model": "./no/such/folder"}, "the student is not at ./no/such/folder"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        build_student(StudentConfig(**settings), tokenizer)


def test_a_bias_speed_for_a_family_without_a_balance_bias_is_refused(architecture, tokenizer):
    settings = {"architecture": architecture("qwen3_moe_tiny"), "router": Router.train, "router_bias_speed": 0.1}
    with pytest.raises(ValueError, match="this family has none: set it to 0"):
        build_student(StudentConfig(**settings), tokenizer)


def test_an_attention_that_the_family_lacks_is_refused(architecture, tokenizer):
    with pytest.raises(ValueError, match="cannot be built from its architecture"):
        build_student(StudentConfig(architecture=architecture("deepseek_v4_tiny"), attention=Attention.sdpa), tokenizer)


def test_a_student_with_fewer_vocabulary_rows_than_the_tokenizer_is_refused(new_student, tokenizer, tmp_path):
    from rollout.model import save_model

    model = new_student("qwen3_moe_tiny")
    model.resize_token_embeddings(len(tokenizer) - 5)
    save_model(tmp_path / "small", model, tokenizer, model.state_dict())
    with pytest.raises(ValueError, match="90 vocabulary rows, fewer than the tokenizer's 95"):
        build_student(StudentConfig(model=str(tmp_path / "small")), tokenizer)
