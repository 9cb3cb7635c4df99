"""The quickstart's claim: every domain recovered from a base that mostly answers wrong."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_quickstart_recovers_every_domain(tmp_path):
    result = subprocess.run([sys.executable, "-m", "opd"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    summary = json.loads((tmp_path / "runs/quickstart/summary.json").read_text())
    assert set(summary["domains"]) == {"arithmetic", "sorting", "brackets", "tools"}
    exported = json.loads((tmp_path / "runs/quickstart/export/export.json").read_text())
    assert exported["format"] == "fp4"
    assert exported["experts"]["share_off_grid"] == 0
    for name, domain in summary["domains"].items():
        assert 0.10 <= domain["base"]["accuracy"] <= 0.45, name
        assert domain["teacher"]["accuracy"] >= 0.98, name
        assert domain["recovery"]["value"] >= 0.95, name
        assert domain["student"]["prompts"] >= 1000
