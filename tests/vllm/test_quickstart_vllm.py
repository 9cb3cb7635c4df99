"""The quickstart through a real vLLM server: every domain recovered. Needs OPD_VLLM_PYTHON, as the tests beside it; -m 'vllm and not slow' leaves it out."""

import json
import os
import subprocess
import sys

import pytest

from rollout.model import save_model

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif("OPD_VLLM_PYTHON" not in os.environ, reason="OPD_VLLM_PYTHON names no Python with vLLM"),
]


def test_the_quickstart_whose_rollouts_a_server_draws_recovers_every_domain(start, new_student, tokenizer, tmp_path):
    model = new_student("qwen3_tiny")
    save_model(tmp_path / "served", model, tokenizer, model.state_dict())
    _, url = start(tmp_path / "served", None, "--logprobs-mode", "processed_logprobs", "--max-num-seqs", "64")
    command = [sys.executable, "-m", "opd", "pipeline=quickstart_vllm", "logger=none"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OPD_VLLM_SERVER": url})
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    summary = json.loads((tmp_path / "runs/quickstart_vllm/summary.json").read_text())
    assert set(summary["domains"]) == {"arithmetic", "sorting", "brackets", "tools"}
    for name, domain in summary["domains"].items():
        assert 0.10 <= domain["base"]["accuracy"] <= 0.45, name
        assert domain["teacher"]["accuracy"] >= 0.98, name
        assert domain["recovery"]["value"] >= 0.95, name
