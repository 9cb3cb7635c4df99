"""Packing is offered only where documents of one row do not see each other, and refused by name elsewhere."""

import pytest
import torch

from opd.batch import PACKING_FAMILIES, require_packing, supervised_batches
from opd.config import BatchConfig
from rollout.model import backbone_of


def hidden_states(model, batch) -> torch.Tensor:
    """Hidden states that predict the completion tokens, [N, D]."""
    with torch.no_grad():
        hidden_BLD = backbone_of(model)(input_ids=batch.tokens_BL, position_ids=batch.position_ids_BL, use_cache=False)[0]
    return hidden_BLD.flatten(0, 1)[batch.position_N]


def dense_qwen3(tokenizer):
    from rollout.config import ModelConfig
    from rollout.model import build_model

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    return build_model({"model_type": "qwen3", "initializer_range": 0.1, **sizes}, len(tokenizer), ModelConfig(), "student")


@pytest.mark.parametrize("family", PACKING_FAMILIES)
def test_packed_documents_give_the_hidden_states_they_give_alone(family, qwen3_moe_model, tokenizer, random_rollouts):
    model = qwen3_moe_model if family == "qwen3_moe" else dense_qwen3(tokenizer)
    assert model.config.model_type == family
    rollouts = random_rollouts([("law", 5, 7), ("law", 11, 3), ("law", 2, 9)])
    [packed] = supervised_batches(rollouts, {"law": 1.0}, BatchConfig(max_tokens_per_micro_batch=1000, packing=True))
    assert packed.tokens_BL.shape == (1, 37)
    alone = [supervised_batches([rollout], {"law": 1.0}, BatchConfig())[0] for rollout in rollouts]
    expected = torch.cat([hidden_states(model, batch) for batch in alone])
    torch.testing.assert_close(hidden_states(model, packed), expected, atol=2e-6, rtol=0)


def test_packing_would_change_deepseek_v4_and_is_refused(v4_model, random_rollouts):
    rollouts = random_rollouts([("law", 5, 7), ("law", 11, 3)])
    [packed] = supervised_batches(rollouts, {"law": 1.0}, BatchConfig(max_tokens_per_micro_batch=1000, packing=True))
    alone = [supervised_batches([rollout], {"law": 1.0}, BatchConfig())[0] for rollout in rollouts]
    expected = torch.cat([hidden_states(v4_model, batch) for batch in alone])
    assert (hidden_states(v4_model, packed) - expected).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"packing.*deepseek_v4"):
        require_packing("deepseek_v4")


def test_a_packed_row_holds_at_most_the_tokens_allowed(random_rollouts):
    rollouts = random_rollouts([("law", 5, 7)] * 5)
    batches = supervised_batches(rollouts, {"law": 1.0}, BatchConfig(max_tokens_per_micro_batch=30, packing=True))
    assert [batch.tokens_BL.shape[1] for batch in batches] == [24, 24, 12]
