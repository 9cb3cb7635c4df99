"""`opd bench teachers`: everyone scores and trains on the same tokens, files are cold when they should be, and figures fit together. No timing is asserted."""

import csv
import os
import statistics
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import opd.bench_teachers
from opd.__main__ import load_config, main
from opd.bench_config import PageCache
from opd.bench_residency import (
    AnonymousPeak,
    Contender,
    Memory,
    StepFigures,
    base_config,
    build_workplace,
    cached_share,
    contenders_of,
    drop_from_cache,
    make_rollouts,
    memory_of_steps,
    relabelled,
    require_cold,
    save_teachers,
    step_config,
    step_figures,
    with_equal_batches,
    word_tokenizer,
)
from opd.bench_teachers import bench_teachers, summary, teacher_lines
from rollout.padding import sequence_length

SMALL = [
    "num_teachers=[1,3]", "tokens_per_step=90", "rollouts_per_teacher=2", "vocab_size=64", "repeats=1", "memory=false",
    "teacher_architecture=deepseek_v4_tiny", "student_architecture=deepseek_v4_tiny",
]  # fmt: skip

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the page cache and anonymous memory are read as Linux tells them")


def config(folder: Path, *overrides: str):
    return load_config("bench_teachers", [f"run_dir={folder}", *SMALL, *overrides])


def read_lines(folder: Path) -> list[dict[str, str]]:
    with (folder / "teachers.csv").open() as file:
        return list(csv.DictReader(file))


def on_disk(path: Path, num_bytes: int = 1 << 20) -> Path:
    """A file that is in the page cache and on the disk; skips where the folder is no disk."""
    path.write_bytes(os.urandom(num_bytes))
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    assert cached_share(path) == 1
    drop_from_cache(path)
    if cached_share(path) == 1:
        pytest.skip("the folder for temporary files is in memory")
    path.read_bytes()
    return path


def figures(score: float, update: float, load: float, waited: float) -> StepFigures:
    return StepFigures(
        score_seconds=score, update_seconds=update, cpu_seconds=score, loads=2, load_seconds=load, waited_seconds=waited, num_bytes=10, disk_bytes=4
    )


@pytest.mark.slow
def test_the_table_file_has_every_column_of_the_docstring_and_figures_that_fit_together(device, tmp_path, capsys):
    on_disk(tmp_path / "probe")
    folder = tmp_path / "bench"
    bench_teachers(config(folder))
    lines = read_lines(folder)
    assert not [column for column in lines[0] if column not in opd.bench_teachers.__doc__]
    contenders = [("1", "True"), ("3", "True"), ("3", "False")]
    assert [(line["teachers"], line["prefetch"], line["cache"]) for line in lines] == [(*each, cache) for cache in ("warm", "cold") for each in contenders]
    for line in lines:
        assert [line[name] for name in ("schema", "tokens", "rollouts", "repeats", "vocab_size")] == ["1", "90", "6", "1", "64"]
        assert 0 < float(line["min_seconds"]) <= float(line["median_seconds"])
        assert float(line["waited_seconds"]) <= float(line["load_seconds"])
    weights = int(lines[0]["teacher_parameters"]) * 2
    one, several, waiting = lines[:3]
    assert (one["bytes_read"], one["hidden_share"], one["ratio"]) == ("0", "", "1.0")
    assert float(several["bytes_read"]) > weights, "two of three teachers stay: one is read in every step"
    assert float(waiting["bytes_read"]) > 2 * weights, "one of three stays"
    assert float(waiting["hidden_share"]) < 0.9
    assert [path.name for path in sorted(folder.iterdir())] == ["config.yaml", "teachers.csv"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("page cache warm: a step with 3 teachers takes ")


def test_ratios_are_of_the_same_round_and_the_first_step_does_not_count():
    one, twelve = Contender(1), Contender(12)
    steps = {
        (one, PageCache.cold): [figures(90, 9, 0, 0), figures(1, 1, 0, 0), figures(4, 4, 0, 0), figures(2, 2, 0, 0)],
        (twelve, PageCache.cold): [figures(1, 1, 90, 90), figures(1, 2, 3, 0), figures(4, 8, 4, 1), figures(4, 2, 1, 1)],
    }
    first, second = teacher_lines({}, steps, {one: Memory(2, 10), twelve: Memory(2, 12)})
    assert (first["ratio"], first["hidden_share"], first["first_seconds"], first["memory_ratio"]) == (1, None, 99, 1)
    assert second["ratio"] == statistics.median([3 / 2, 12 / 8, 6 / 4])
    assert (second["score_ratio"], second["update_ratio"], second["median_seconds"], second["min_seconds"]) == (1, 2, 6, 3)
    assert second["hidden_share"] == pytest.approx(1 - (0 + 1 + 1) / (3 + 4 + 1))
    assert (second["loads"], second["bytes_read"], second["disk_bytes"], second["memory_ratio"]) == (2, 10, 4, 1.2)
    assert summary([first, second]) == (
        "page cache cold: a step with 12 teachers takes 1.50 x one with 1, 75% of its load time is hidden; its peak of anonymous memory is 1.20 x"
    )


def test_waiting_is_what_the_metrics_do_not_call_hidden():
    metrics = {"teacher/a/load_seconds": 2.0, "teacher/a/load_hidden": 0.75, "teacher/b/load_seconds": 1.0, "teacher/b/load_hidden": 0.0}
    metrics |= {"teacher/a/bytes_loaded": 5, "teacher/b/bytes_loaded": 6, "teacher/c/bytes_loaded": 0, "system/teacher_loads": 3, "teacher/c/seconds": 9.0}
    found = step_figures(metrics, score_seconds=1.0, update_seconds=2.0, cpu_seconds=0.5, disk_bytes=0)
    assert (found.loads, found.load_seconds, found.waited_seconds, found.num_bytes, found.seconds) == (3, 3.0, 1.5, 11, 3.0)


@pytest.mark.parametrize(("spread", "shortest", "longest"), [(0.0, 15, 15), (0.5, 8, 22)])
def test_all_numbers_of_teachers_score_the_same_tokens(spread, shortest, longest, tmp_path):
    cfg = replace(config(tmp_path), length_spread=spread)
    rollouts = make_rollouts(cfg)
    lengths = [sequence_length(rollout) for rollout in rollouts]
    assert (sum(lengths), min(lengths), max(lengths)) == (cfg.tokens_per_step, shortest, longest)
    for num_teachers, share in ((1, 6), (2, 3), (3, 2)):
        own = relabelled(rollouts, num_teachers)
        assert [rollout.prompt.tokens for rollout in own] == [rollout.prompt.tokens for rollout in rollouts]
        assert all(mine.completion_T is theirs.completion_T for mine, theirs in zip(own, rollouts, strict=True))
        assert list(Counter(rollout.prompt.domain for rollout in own).values()) == [share] * num_teachers


def test_contenders_differ_in_their_teachers_and_prefetch_alone(tmp_path):
    cfg = config(tmp_path, "overrides=['optim.lr=0.5']")
    base = base_config(cfg, "deepseek_v4_tiny")
    one, three, waiting = (step_config(base, contender, tmp_path) for contender in contenders_of(cfg))
    assert (len(one.domains), len(three.domains), one.teachers.max_resident, three.teachers.prefetch, waiting.teachers.prefetch) == (1, 3, 1, True, False)
    waiting.teachers.prefetch, one.domains = True, three.domains
    assert one == three == waiting
    assert one.optim.lr == 0.5


def test_a_file_that_is_dropped_is_no_longer_in_the_page_cache(tmp_path):
    path = on_disk(tmp_path / "weights")
    assert cached_share(path) == 1
    drop_from_cache(path)
    assert cached_share(path) < 0.05


def test_teachers_in_a_folder_that_is_memory_cannot_be_cold(tmp_path):
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        pytest.skip("there is no shared memory")
    folder = shared / f"bench-{os.getpid()}"
    try:
        (folder / "domain00").mkdir(parents=True)
        (folder / "domain00" / "model.safetensors").write_bytes(bytes(1 << 16))
        with pytest.raises(ValueError, match=r"^files in /dev/shm stay in memory .*: set teacher_folder to one on a disk, or caches=\[warm\]$"):
            require_cold(folder)
    finally:
        (folder / "domain00" / "model.safetensors").unlink()
        (folder / "domain00").rmdir()
        folder.rmdir()


def test_the_peak_is_of_anonymous_memory_even_where_it_is_gone_at_the_end(tmp_path):
    size = 64 << 20
    file = on_disk(tmp_path / "file", size)
    with AnonymousPeak() as peak:
        start = peak.bytes
        held = torch.ones(size, dtype=torch.uint8)
        for _ in range(1000):  # until the thread has had its turn
            if peak.bytes >= start + 3 * size // 4:
                break
            time.sleep(0.01)
        del held
        content = torch.from_file(str(file), size=size, dtype=torch.uint8)
        assert int(content.max()) > 0, "every page of the file is looked at"
    assert 0.75 * size <= peak.bytes - start < 1.5 * size


@pytest.mark.slow
def test_memory_is_looked_at_while_steps_run(device, tmp_path):
    cfg = config(tmp_path)
    save_teachers(cfg, tmp_path)
    contender = Contender(3)
    workplace = build_workplace(cfg, [contender], tmp_path, device)
    memory = memory_of_steps(workplace, contender)
    workplace.close()
    assert memory.peak >= memory.start > 0
    assert workplace.engine.policy_step == 2


def test_memory_is_compared_at_forwards_of_one_size(tmp_path):
    cfg = with_equal_batches(config(tmp_path, "overrides=['optim.lr=0.5']"))
    base = base_config(cfg, cfg.student_architecture)
    assert (base.teachers.max_tokens_per_forward, base.batch.max_tokens_per_micro_batch, base.optim.lr) == (30, 30, 0.5)


def test_the_tokenizer_has_as_many_tokens_as_asked():
    assert len(word_tokenizer(100)) == 100


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("num_teachers=[]", "num_teachers must not be empty: write num_teachers=[N]"),
        ("num_teachers=[0]", "num_teachers must be at least 1, not 0"),
        ("caches=[]", "caches must not be empty: write caches=[warm], or [warm,cold]"),
        ("tokens_per_step=20", "tokens_per_step=20 makes rollouts of 3 tokens, which is too short: use at least 72"),
        ("length_spread=1", "length_spread must be from 0 to below 1, not 1.0"),
        ("vocab_size=4", "vocab_size must be above 4, not 4: so many are special tokens"),
        ("teacher_architecture=deepseek_v5", "there is no student called 'deepseek_v5'"),
        ("overrides=['rollout.widht=1']", "distill has no setting 'rollout.widht'"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(override, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("opd.__main__._stop", lambda: None)  # the other tests' process group stays
    monkeypatch.setattr("opd.distributed.set_threads", lambda threads: None)
    assert main(["bench", "teachers", f"run_dir={tmp_path / 'bench'}", *SMALL, override]) == 2
    assert capsys.readouterr().err.startswith(f"opd: {sentence}")
    assert not (tmp_path / "bench").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("do not touch me")
    with pytest.raises(ValueError, match="is not a folder of `opd bench`"):
        bench_teachers(config(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
