"""Teachers sharded over two gloo ranks: same numbers, half of the bytes, and no rank that waits for one that failed.

One pair of processes runs every scenario of the script below and saves what came of it, rank by rank; each test looks at one property.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from opd.__main__ import load_config
from opd.distill import distill
from rollout.config import ModelConfig
from rollout.model import load_model, save_model
from teachers.config import DomainConfig, Placement, TeacherConfig, TeachersConfig
from teachers.pool import TeacherPool
from teachers.teacher import Teacher

NUM_STEPS = 4
RUN = [
    "domain=[arithmetic,tools]",
    f"num_steps={NUM_STEPS}",
    "rollout.prompts_per_step=6",
    "rollout.max_new_tokens=8",
    "rollout.decode_width=8",
    "domains.arithmetic.prompts.rows=32",
    "domains.tools.prompts.rows=32",
    "check.signal=warn",
    "evaluation.every=4",
    "evaluation.prompts=1",
    "optim.lr=1e-3",
    "logger=none",
    "threads=1",
]

SCRIPT = """
import logging, os, resource, sys
from contextlib import contextmanager
from dataclasses import replace

import torch

from opd.__main__ import load_config
from opd.distill import distill
from opd.distributed import Group, rank, start_processes
from opd.rollouts import data_ranks
from rollout.synthetic import character_tokenizer
from teachers.config import DomainConfig, Placement, TeacherConfig, TeachersConfig
from teachers.pool import TeacherPool
from teachers.sharding import SharedForwardError

folder, inputs = sys.argv[1], torch.load(sys.argv[2], weights_only=False)
device, own, found = start_processes(timeout_minutes=2), None, {}
own = rank(Group.data)
EVERYWHERE, mine = inputs["rollouts"], inputs["rollouts"][own::2]


def new_pool(domains=("law", "code", "math"), **settings):
    configs = {name: DomainConfig(teacher=TeacherConfig(model=inputs["folders"][name])) for name in domains}
    return TeacherPool(configs, TeachersConfig(placement=Placement.sharded, **settings), character_tokenizer(), device, data_ranks())


def hidden_of(pool, scored):
    return {item.rollout.prompt.request: pool.hidden(item.signal, item.rollout).clone() for item in scored}


def raised(action):
    try:
        action()
    except ValueError as error:
        return f"{type(error).__name__}: {error}"


def of(domain):
    return [rollout for rollout in EVERYWHERE if rollout.prompt.domain == domain]


@contextmanager
def no_files(until):
    '''No file can be opened, until a warning is logged that has a word in it.'''
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    restore = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, before)
    watch = logging.Handler()
    watch.emit = lambda record: restore() if until in record.getMessage() else None
    logging.getLogger("teachers.pool").addHandler(watch)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        restore()
        logging.getLogger("teachers.pool").removeHandler(watch)


@contextmanager
def nothing(until):
    yield


def turns():
    '''Two steps of three teachers in memory for one and the next.'''
    pool = new_pool(max_resident=1)
    steps, read = [], []
    for _ in range(2):
        steps.append(hidden_of(pool, pool.score(mine)))
        read.append(bytes_of(pool))
        heads = {domain: pool.head(pool.teacher_of[domain]).weight_VD.clone() for domain in pool.teacher_of}
        read.append(bytes_of(pool))
    models = {domain: id(pool.library.teachers[teacher].model) for domain, teacher in pool.teacher_of.items()}
    return {"steps": steps, "heads": heads, "bytes": read, "models": models, "sampled": raised(lambda: pool.get(pool.teacher_of["law"]))}


def bytes_of(pool):
    figures = pool.library.figures()
    return {domain: figures[teacher].num_bytes if teacher in figures else 0 for domain, teacher in pool.teacher_of.items()}


def uneven():
    '''Forwards of one rollout each; the second rank has rollouts of one teacher, in one step, and then none.'''
    pool = new_pool(max_tokens_per_forward=1)
    first = hidden_of(pool, pool.score(of("law") + of("code") if own == 0 else of("math")))
    return first | hidden_of(pool, pool.score(of("law") if own == 0 else []))


def failure_of_one_rank():
    pool = new_pool(["code", "law"])
    with (no_files if own else nothing)("never"):
        message = raised(lambda: pool.score(mine_of(pool)))
    return {"message": message, "afterwards": hidden_of(pool, pool.score(mine_of(pool)))}


def dropped_by_one_rank():
    from teachers.config import OnFailure

    pool = new_pool(["code", "law"], on_failure=OnFailure.drop)
    with (no_files if own else nothing)("goes on without domain"):
        return {"message": raised(lambda: pool.score(mine_of(pool))), "dropped": pool.dropped}


def transient():
    pool = new_pool(["law"])
    with (no_files if own else nothing)("is read again"):
        scored = pool.score(mine_of(pool))
    return {"hidden": hidden_of(pool, scored), "loads": pool.num_loads}


def lost():
    '''The second rank's states of one rollout are damaged, of another gone.'''
    pool = new_pool(["law"])
    scored = pool.score(mine_of(pool))
    if own:
        scored[0].signal.stored.path.unlink()
        content = bytearray(scored[1].signal.stored.path.read_bytes())
        content[5] ^= 1
        scored[1].signal.stored.path.write_bytes(content)
    hidden = hidden_of(pool, pool.recovered(scored))
    again = pool.score(mine_of(pool))
    again[0].signal.stored.path.unlink()
    return {"hidden": hidden, "too_late": raised(lambda: pool.hidden(again[0].signal, again[0].rollout))}


def mine_of(pool):
    return [rollout for rollout in mine if rollout.prompt.domain in pool.teacher_of]


for scenario in (turns, uneven, failure_of_one_rank, dropped_by_one_rank, transient, lost):
    found[scenario.__name__] = scenario()
torch.save(found, f"{folder}/found_{own}.pt")
distill(load_config("distill", inputs["run"]))

pool = new_pool(["law"])
try:  # to end with: the second rank sends a token that the teacher does not have, and the first one waits for it in the forward
    pool.score([replace(rollout, completion_T=rollout.completion_T + 1000 * own) for rollout in mine_of(pool)])
except SharedForwardError as error:
    torch.save(str(error), f"{folder}/broken_{own}.pt")
os._exit(0)
"""


@dataclass(frozen=True, slots=True)
class TwoRanks:
    """As many ranks as a placement needs to be sharded; both say the same."""

    count: int = 2
    local_count: int = 2

    def gather(self, value):
        return [value, value]


@pytest.fixture(scope="module")
def folders(saved_v4, saved_qwen3_moe, new_student, tokenizer, tmp_path_factory) -> dict[str, str]:
    """Teachers by domain: two of one architecture, and one of a family with a layer's experts and head tied otherwise."""
    other = new_student("deepseek_v4_tiny", seed=5)
    folder = tmp_path_factory.mktemp("saved") / "other"
    save_model(folder, other, tokenizer, other.state_dict())
    tied = new_student("qwen3_moe_tiny", seed=6, tie_word_embeddings=True, num_hidden_layers=2)
    save_model(folder.with_name("tied"), tied, tokenizer, tied.state_dict())
    return {"law": str(saved_v4), "code": str(folder), "math": str(folder.with_name("tied"))}


@pytest.fixture(scope="module")
def rollouts(random_rollouts):
    return random_rollouts([("law", 9, 12), ("code", 5, 8), ("law", 4, 20), ("math", 7, 7), ("code", 12, 15), ("law", 6, 3), ("math", 3, 1), ("law", 9, 12)])


@pytest.fixture(scope="module")
def settings(folders) -> list[str]:
    teachers = [f"domains.{name}.teacher.model={folders[domain]}" for name, domain in (("arithmetic", "law"), ("tools", "code"))]
    return [*RUN, "student=deepseek_v4_tiny", *teachers]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, settings, device) -> Path:
    """A run in one process, its teachers whole, that saved its rollouts."""
    run_dir = tmp_path_factory.mktemp("runs") / "saved"
    distill(load_config("distill", [*settings, f"run_dir={run_dir}", "rollout.save=true"]))
    return run_dir


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, folders, rollouts, settings, one_rank) -> tuple[Path, list[dict]]:
    """Folder of the run on two ranks with sharded teachers, and what each rank found in the scenarios."""
    folder = tmp_path_factory.mktemp("two_ranks")
    run = [*settings, f"run_dir={folder / 'run'}", f"rollout.replay={one_rank}", "teachers.placement=sharded", "teachers.max_resident=1"]
    torch.save({"folders": folders, "rollouts": rollouts, "run": run}, folder / "inputs.pt")
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "script.py", str(folder), "inputs.pt"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=folder, timeout=1200)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    found = [torch.load(folder / f"found_{rank}.pt") for rank in range(2)]
    return folder / "run", [own | {"broken": torch.load(folder / f"broken_{rank}.pt")} for rank, own in enumerate(found)]


@pytest.fixture(scope="module")
def expected(folders, rollouts) -> dict[int, torch.Tensor]:
    """Hidden states by request, each of the whole model on its rollout alone."""
    whole = {domain: Teacher(domain, load_model(ModelConfig(model=folder), domain)) for domain, folder in folders.items()}
    return {rollout.prompt.request: whole[rollout.prompt.domain].hidden([rollout], 1000)[0] for rollout in rollouts}


def assert_alike(found: dict[int, torch.Tensor], expected: dict[int, torch.Tensor]) -> None:
    for request, hidden_TD in found.items():
        assert torch.allclose(hidden_TD, expected[request], atol=1e-5), request


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.multi
@pytest.mark.slow
def test_sharded_teachers_that_take_turns_give_the_hidden_states_of_whole_ones(two_ranks, expected, rollouts):
    _, ranks = two_ranks
    for step in range(2):
        own = [found["turns"]["steps"][step] for found in ranks]
        assert sorted([*own[0], *own[1]]) == [rollout.prompt.request for rollout in rollouts]
        for hidden in own:
            assert_alike(hidden, expected)


@pytest.mark.multi
@pytest.mark.slow
def test_a_rank_reads_at_most_0_55_of_a_sharded_teacher_its_head_included(two_ranks, folders):
    _, ranks = two_ranks
    for found in ranks:
        scoring, heads, *later = found["turns"]["bytes"]
        for domain in ("law", "code"):
            size = sum(path.stat().st_size for path in Path(folders[domain]).glob("*.safetensors"))
            assert 0.4 * size < scoring[domain] + heads[domain] <= 0.55 * size
            assert sum(part[domain] for part in later) <= 0.55 * size


@pytest.mark.multi
@pytest.mark.slow
def test_to_score_with_a_new_teacher_both_ranks_together_read_it_once_and_its_head_and_buffers_twice(two_ranks, folders):
    _, ranks = two_ranks
    weights = load_model(ModelConfig(model=folders["law"]), "law")
    buffers = {name for name, _ in weights.named_buffers()}
    sizes = {name: tensor.nbytes for name, tensor in weights.state_dict().items()}
    twice = sum(size for name, size in sizes.items() if name in buffers or name == "lm_head.weight")
    assert sum(found["turns"]["bytes"][0]["law"] for found in ranks) == sum(sizes.values()) + twice


@pytest.mark.multi
@pytest.mark.slow
def test_teachers_of_one_architecture_share_a_skeleton_and_others_do_not(two_ranks):
    _, ranks = two_ranks
    for found in ranks:
        models = found["turns"]["models"]
        assert models["law"] == models["code"] != models["math"]


@pytest.mark.multi
@pytest.mark.slow
def test_the_head_of_a_sharded_teacher_is_whole_on_every_rank(two_ranks, folders):
    _, ranks = two_ranks
    for found in ranks:
        for domain, weight_VD in found["turns"]["heads"].items():
            assert torch.equal(weight_VD, load_model(ModelConfig(model=folders[domain]), domain).lm_head.weight)


@pytest.mark.multi
@pytest.mark.slow
def test_ranks_with_other_numbers_of_rollouts_or_none_score_together(two_ranks, expected, rollouts):
    _, ranks = two_ranks
    assert sorted(ranks[0]["uneven"]) == [rollout.prompt.request for rollout in rollouts if rollout.prompt.domain != "math"]
    assert sorted(ranks[1]["uneven"]) == [rollout.prompt.request for rollout in rollouts if rollout.prompt.domain == "math"]
    for found in ranks:
        assert_alike(found["uneven"], expected)


@pytest.mark.multi
@pytest.mark.slow
def test_a_teacher_that_one_rank_cannot_read_fails_on_both_by_name(two_ranks, expected):
    _, ranks = two_ranks
    for found in ranks:
        message = found["failure_of_one_rank"]["message"]
        assert message.startswith("TeacherFailure: the teacher of ")
        assert "failed twice" in message
        assert_alike(found["failure_of_one_rank"]["afterwards"], expected)
    assert "(on rank 1)" in ranks[0]["failure_of_one_rank"]["message"]


@pytest.mark.multi
@pytest.mark.slow
def test_a_teacher_that_one_rank_cannot_read_is_dropped_on_both(two_ranks):
    _, ranks = two_ranks
    assert [sorted(found["dropped_by_one_rank"]["dropped"]) for found in ranks] == [["code", "law"]] * 2
    assert all("no domain is left" in found["dropped_by_one_rank"]["message"] for found in ranks)


@pytest.mark.multi
@pytest.mark.slow
def test_a_reading_that_fails_once_on_one_rank_is_made_again_on_both(two_ranks, expected):
    _, ranks = two_ranks
    for found in ranks:
        assert found["transient"]["hidden"]
        assert_alike(found["transient"]["hidden"], expected)
    assert ranks[0]["transient"]["loads"] == 2


@pytest.mark.multi
@pytest.mark.slow
def test_lost_and_damaged_hidden_states_of_one_rank_are_scored_again_by_both(two_ranks, expected):
    _, ranks = two_ranks
    for found in ranks:
        assert len(found["lost"]["hidden"]) >= 2
        assert_alike(found["lost"]["hidden"], expected)


@pytest.mark.multi
@pytest.mark.slow
def test_hidden_states_lost_during_the_update_stop_the_run_by_the_teachers_name(two_ranks):
    _, ranks = two_ranks
    assert all("the teacher of law" in found["lost"]["too_late"] for found in ranks)


@pytest.mark.multi
@pytest.mark.slow
def test_a_forward_that_fails_on_one_rank_ends_on_both_by_the_teachers_name(two_ranks):
    _, ranks = two_ranks
    assert all(found["broken"].startswith("the teacher of law (") for found in ranks)
    assert all("failed in a forward that all ranks share" in found["broken"] for found in ranks)


@pytest.mark.multi
@pytest.mark.slow
def test_a_sharded_teacher_is_refused_as_a_model_to_sample_from(two_ranks):
    _, ranks = two_ranks
    assert all("is sharded over the ranks and cannot be sampled from" in found["turns"]["sampled"] for found in ranks)


@pytest.mark.multi
@pytest.mark.slow
def test_a_run_on_two_ranks_with_sharded_teachers_has_the_losses_and_divergences_of_one_rank_with_whole_ones(one_rank, two_ranks):
    run_dir, _ = two_ranks
    alone, sharded = records(one_rank), records(run_dir)
    assert [record["step/loss"] for record in sharded[1:]] == pytest.approx([record["step/loss"] for record in alone[1:]], rel=1e-5)
    assert len(sharded) == NUM_STEPS + 1
    for name in ("arithmetic", "tools"):
        key = f"evaluation/{name}/kl_per_token"
        assert sharded[0][key] == pytest.approx(alone[0][key], rel=1e-5)


def test_a_quantised_teacher_cannot_be_sharded(fp4_student, tokenizer, changed_checkpoint, saved_v4):
    quantised = changed_checkpoint(saved_v4, config={"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})
    domains = {"law": DomainConfig(teacher=TeacherConfig(model=str(quantised)))}
    with pytest.raises(ValueError, match=r"the teacher of law \(.*\) is quantised, .* so it cannot be sharded: set teachers.placement=replicated"):
        TeacherPool(domains, TeachersConfig(placement=Placement.sharded), tokenizer, torch.device("cpu"), TwoRanks())
