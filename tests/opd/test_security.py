"""What a run must not do: run a model's own code unasked, listen to other machines, let secrets out, write outside its folder."""

import json
import os
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import psutil
import pytest

from opd.config import SCHEMAS
from opd.config import StudentConfig as Student
from opd.distributed import open_store, rank_environment
from opd.pipeline_config import PipelineConfig, StageConfig
from opd.slurm import slurm_ranks
from opd.stages import plan
from opd.student import build_student
from rollout.config import ModelConfig, ServerConfig
from rollout.model import load_model, load_tokenizer
from rollout.server import Server

SECRETS = {"WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567", "HF_TOKEN": "hf_ASecretThatNobodyElseKnows", "OPENAI_API_KEY": "sk-another-one"}
OUTSIDE = "../../outside"


def trust_settings(schema: type) -> list[Any]:
    """Defaults of every trust_remote_code within a schema."""
    found = []
    for field in fields(schema):
        kind = get_type_hints(schema)[field.name]
        found += [field.default] if field.name == "trust_remote_code" else []
        for inner in (kind, *get_args(kind)):
            found += trust_settings(inner) if is_dataclass(inner) else []
    return found


def test_no_command_trusts_a_models_code_unless_told():
    defaults = {name: trust_settings(schema) for name, schema in SCHEMAS.items()}
    assert len(defaults["distill"]) >= 2, "the student's and the teachers'"
    assert not any(value for values in defaults.values() for value in values)


OWN_CODE = """
import pathlib
from transformers import PreTrainedConfig

pathlib.Path({mark!r}).touch()


class Own(PreTrainedConfig):
    model_type = "own"
"""


@pytest.fixture
def model_with_code(saved_v4, tmp_path, monkeypatch) -> Path:
    """Folder of a model and a tokenizer that bring code, which leaves a mark when it is imported."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])
    folder = tmp_path / "model"
    folder.mkdir()
    for file in saved_v4.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "own.py").write_text(OWN_CODE.format(mark=str(tmp_path / "mark")))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}))
    return folder


def test_a_models_code_is_not_run(model_with_code, tmp_path, tokenizer, device):
    with pytest.raises(ValueError, match=r"custom code|trust_remote_code"):
        build_student(Student(model=str(model_with_code)), tokenizer)
    with pytest.raises(ValueError, match=r"custom code|trust_remote_code"):
        load_model(ModelConfig(model=str(model_with_code)), "teacher of law", device)
    assert not (tmp_path / "mark").exists()


def test_a_tokenizers_code_is_not_run(model_with_code, tmp_path):
    change = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    for name, changed in (("tokenizer_config.json", change), ("config.json", {"model_type": "deepseek_v4", "auto_map": {}})):
        file = model_with_code / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(ValueError, match=r"custom code|trust_remote_code"):
        load_tokenizer(str(model_with_code))
    assert not (tmp_path / "mark").exists()


def test_a_models_code_is_run_where_it_is_trusted(model_with_code, tmp_path, device):
    """Or the two tests above would show nothing."""
    with pytest.raises(ValueError, match="Own"):
        load_model(ModelConfig(model=str(model_with_code), trust_remote_code=True), "teacher of law", device)
    assert (tmp_path / "mark").exists()


LISTENING = """
import psutil
from opd.distributed import start_processes, stop_processes
start_processes(1.0)
print(sorted({place.laddr.ip for place in psutil.Process().net_connections("inet") if place.status == "LISTEN"}))
stop_processes()
"""


def free_port() -> int:
    return open_store().port


@pytest.mark.multi
@pytest.mark.parametrize("launcher", ["supervisor", "srun"])
def test_the_ranks_of_one_host_listen_to_no_other(launcher):
    if launcher == "supervisor":
        store = open_store()
        places = [rank_environment(number, 2, store) for number in range(2)]
    else:
        step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "gpu7", "SLURM_STEP_TASKS_PER_NODE": "2"}
        step["MASTER_PORT"] = str(free_port())
        places = [slurm_ranks(step | {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}) for number in range(2)]
    command = [sys.executable, "-c", LISTENING]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | place) for place in places]
    assert [rank.communicate(timeout=120)[0].strip() for rank in ranks] == ["['127.0.0.1']"] * 2


def test_the_store_at_which_ranks_meet_listens_to_no_other_machine():
    store = open_store()
    [place] = [found.laddr for found in psutil.Process().net_connections("inet") if found.status == "LISTEN" and found.laddr.port == store.port]
    assert place.ip == "127.0.0.1"


def test_the_server_that_comes_with_the_tests_listens_to_no_other_machine():
    command = (Path(__file__).parents[1] / "vllm" / "start_server.sh").read_text().partition("exec ")[2]
    assert "--host 127.0.0.1 " in command


def test_a_password_in_a_servers_address_is_refused_and_not_repeated():
    with pytest.raises(ValueError, match="without a name or a password") as refusal:
        Server("http://user:geheim@host:80", "teacher of law", ServerConfig())
    assert "geheim" not in str(refusal.value)


def test_a_stage_of_a_pipeline_cannot_be_a_folder_outside_of_the_run():
    with pytest.raises(ValueError, match=r"stage '\.\./\.\./outside' cannot name a folder of the run"):
        plan(PipelineConfig(stages={OUTSIDE: StageConfig(command="specialize")}))


HOSTILE = """# @package _global_
domains:
  {outside}:
    teacher: {{model: {teacher}}}
    prompts: {{sources: {{{outside}: {{path: {rows}}}}}}}
    held_out: {{path: {held_out}}}
    grader: exact
"""


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory, saved_v4, saved_qwen3_moe) -> tuple[Path, set[Path], str]:
    """A folder in which a run was made at deep/run, of data whose names and rows are paths outside of it, in an environment with secrets; what was in the
    folder before; and all that the run printed.
    """
    folder = tmp_path_factory.mktemp("hostile")
    rows = [{"prompt": f"{OUTSIDE}/{number}", "answer": f"{folder}/absolute"} for number in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "held_out.jsonl").write_text(json.dumps({"prompt": "/etc/x", "answer": "../y"}) + "\n")
    (folder / "conf" / "domain").mkdir(parents=True)
    files = {"rows": folder / "rows.jsonl", "held_out": folder / "held_out.jsonl"}
    (folder / "conf" / "domain" / "hostile.yaml").write_text(HOSTILE.format(outside=OUTSIDE, teacher=saved_qwen3_moe, **files))
    settings = ["domain=[hostile]", f"student.model={saved_v4}", "run_dir=deep/run", "num_steps=1", "threads=1", "check.signal=off", "logger=offline"]
    settings += ["logger.project=a-project-of-ours", "rollout.prompts_per_step=4", "rollout.max_new_tokens=4", "rollout.decode_width=4", "rollout.save=true"]
    settings += ["evaluation.every=1", "evaluation.prompts=2", "evaluation.max_new_tokens=2", "evaluation.decode_width=2"]
    (folder / "deep").mkdir()
    before = {path for path in folder.rglob("*") if path.is_file()}
    command = [sys.executable, "-m", "opd", "distill", *settings]
    environment = os.environ | SECRETS | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout
    return folder, before, done.stdout


def test_names_and_rows_that_are_paths_leave_all_files_in_the_runs_folder(hostile_run):
    folder, before, _ = hostile_run
    written = {path for path in folder.rglob("*") if path.is_file()} - before
    assert len(written) > 10
    assert {path.relative_to(folder).parts[:2] for path in written} == {("deep", "run")}
    assert not list(folder.parent.glob("outside*"))
    assert json.loads((folder / "deep/run/metrics.jsonl").read_text().splitlines()[-1])[f"domain/{OUTSIDE}/prompt_share"] == 1.0


def test_secrets_of_the_environment_are_in_no_file_of_a_run_and_in_nothing_it_prints(hostile_run):
    folder, _, printed = hostile_run
    contents = {path: path.read_bytes() for path in (folder / "deep" / "run").rglob("*") if path.is_file()}
    assert [path for path, content in contents.items() if path.suffix == ".wandb" and b"a-project-of-ours" in content], "W&B's file can be read"
    for secret in SECRETS.values():
        assert not [path for path, content in contents.items() if secret.encode() in content]
        assert secret not in printed
