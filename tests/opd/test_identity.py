"""What samples is what ships: one token tensor has the same logits, bit for bit, in trainer, sampler and export (DESIGN section 5, property 4)."""

import pytest
import torch

from opd.batch import supervised_batches
from opd.config import BatchConfig, DistillConfig, Router, StudentConfig
from opd.engine import Engine
from opd.student import build_student, copy_for_sampling, seed_everything
from rollout.config import Dtype, ModelConfig, SamplingConfig
from rollout.model import load_model, save_model
from rollout.sampler import LocalSampler

FAMILIES = ["deepseek_v4_tiny", "qwen3_moe_tiny"]


def logits(model, tokens_BL: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens_BL, use_cache=False).logits


@pytest.fixture
def trained(architecture, tokenizer, device, make_config, random_rollouts):
    """trained("qwen3_moe_tiny"): an engine after three steps that moved every part, routers and balance biases too, and its sampler."""

    def train(family: str, dtype: Dtype = Dtype.float32) -> tuple[Engine, LocalSampler, DistillConfig]:
        student = {"architecture": architecture(family), "dtype": dtype, "router": Router.train}
        seed_everything(0)
        model = build_student(StudentConfig(**student), tokenizer)
        sampler = LocalSampler(copy_for_sampling(model, device), [tokenizer.eos_token_id], seed=0)
        cfg = make_config(student=student, optim={"lr": 1e-2})
        engine = Engine(model, len(tokenizer), cfg, device)
        [batch] = supervised_batches(random_rollouts([("law", 4, 12)] * 8), {"law": 1 / 96}, BatchConfig())
        for _ in range(3):
            engine.recorder.start_step()
            loss, _ = engine.loss(batch, None, True)
            engine.backward(loss)
            engine.step()
            if family == "deepseek_v4_tiny":
                engine.recorder.update_bias(0.01)
        sampler.refresh(engine)
        return engine, sampler, cfg

    return train


@pytest.fixture
def tokens_BL(tokenizer) -> torch.Tensor:
    return torch.randint(3, len(tokenizer), (5, 22), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize("family", FAMILIES)
def test_trainer_sampler_and_reloaded_export_give_the_same_logits(family, dtype, trained, tokens_BL, tokenizer, tmp_path):
    engine, sampler, cfg = trained(family, dtype)
    save_model(tmp_path / "student", engine.model, tokenizer, engine.full_weights())
    exported = load_model(ModelConfig(model=str(tmp_path / "student"), dtype=dtype), "student")
    cfg.student.model, cfg.student.architecture = str(tmp_path / "student"), {}
    expected = logits(engine.model, tokens_BL)
    assert torch.equal(logits(sampler.model, tokens_BL), expected)
    assert torch.equal(logits(exported, tokens_BL), expected)
    assert torch.equal(logits(build_student(cfg.student, tokenizer), tokens_BL), expected), "a student taken up again"


def test_a_sampler_that_is_not_refreshed_has_other_logits(trained, tokens_BL, session_qwen3_moe_model):
    engine, _, _ = trained("qwen3_moe_tiny")
    assert (logits(session_qwen3_moe_model, tokens_BL) - logits(engine.model, tokens_BL)).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_log_probabilities_agree_with_the_trainers_forward(family, trained, make_prompt):
    engine, sampler, _ = trained(family)
    prompts = [make_prompt("law", list(range(5, 5 + length)), request=length) for length in (3, 7, 7, 12)]
    rollouts = sampler.sample(prompts, SamplingConfig(max_new_tokens=14, decode_width=4))
    assert sum(len(rollout.completion_T) for rollout in rollouts) > 20
    for rollout in rollouts:
        whole = torch.tensor([[*rollout.prompt.tokens, *rollout.completion_T.tolist()]])
        log_p_TV = logits(engine.model, whole)[0, len(rollout.prompt.tokens) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(rollout.logprob_T, log_p_TV.gather(1, rollout.completion_T[:, None])[:, 0], rtol=0, atol=1e-5)
        assert rollout.policy_step == 3
