"""Teachers behind a server: the signal is the local teacher's, every wrong answer is refused by name, and no failure lasts for ever."""

import copy
import json
import re
import signal
import socket
import threading
import time

import pytest
import torch

from opd.__main__ import load_config
from opd.distill import distill
from rollout.config import Attention, Dtype, Experts
from rollout.model import load_model, save_model
from rollout.synthetic import CHARACTERS, character_tokenizer
from teachers.config import DomainConfig, SignalKind, TeacherConfig, TeachersConfig
from teachers.manifest import changes
from teachers.pool import TeacherPool
from teachers.remote import RemoteTeacher
from teachers.teacher import Teacher
from teachers.types import TeacherFailure

CPU = torch.device("cpu")
K = 6
TOP_K, SAMPLED = SignalKind.top_k, SignalKind.sampled_token


@pytest.fixture(scope="session")
def model(session_qwen3_moe_model):
    """The server's model, which no test changes; a larger head than a new model's, so that tokens differ in likelihood."""
    model = copy.deepcopy(session_qwen3_moe_model)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3)
    return model


@pytest.fixture
def server(new_server, model):
    return new_server(model)


@pytest.fixture
def rollouts(random_rollouts):
    return random_rollouts([("law", 9, 12), ("law", 5, 8), ("law", 1, 20), ("law", 30, 1), ("law", 12, 15)])


@pytest.fixture
def new_remote(tokenizer):
    """new_remote(server, model="law", retries=0): a teacher of the domain law behind a server; settings go to whichever config has them."""

    def make(server, model: str | None = None, **settings) -> RemoteTeacher:
        settings = {"signal": TOP_K, "top_k": K, "retries": 1, "timeout_seconds": 10.0} | settings
        return RemoteTeacher("law", "law", TeacherConfig(model=model, server=server.url), TeachersConfig(**settings), tokenizer)

    return make


def score(remote: RemoteTeacher, rollouts, kind: SignalKind = TOP_K):
    return remote.score(rollouts, kind, K, remote.vocab_size)


def spoil_rows(edit):
    """A server's `spoil` that edits the list of positions of each answer."""

    def spoil(answer: dict) -> dict:
        positions = answer["choices"][0]["prompt_logprobs"]
        edit(positions)
        return answer

    return spoil


# The signal


@pytest.mark.parametrize("kind", [TOP_K, SAMPLED])
def test_a_server_gives_the_signal_of_the_same_model_held_here(server, new_remote, model, rollouts, kind, tokenizer):
    local = Teacher("law", model)
    for rollout, remote in zip(rollouts, score(new_remote(server), rollouts, kind), strict=True):
        expected = local.signal(rollout, local.hidden([rollout], 1000)[0], kind, K, len(tokenizer))
        assert (remote.kind, remote.teacher) == (kind, "law")
        assert torch.equal(remote.token_TK, expected.token_TK)
        assert torch.allclose(remote.logprob_TK, expected.logprob_TK, atol=1e-5)


def test_only_ids_are_sent_whole_and_with_neutral_sampling(server, new_remote, rollouts):
    remote = new_remote(server)
    server.asked.clear()
    score(remote, rollouts[:1])
    first = server.asked[0]
    assert first["prompt"] == [*rollouts[0].prompt.tokens, *rollouts[0].completion_T.tolist()]
    assert (first["max_tokens"], first["prompt_logprobs"], first["temperature"], first["top_p"], first["repetition_penalty"]) == (1, K, 1.0, 1.0, 1.0)


def test_rows_of_the_head_that_are_no_tokens_are_never_named(new_server, new_remote, new_student, tokenizer, rollouts):
    """A vocabulary padded to 128 rows, whose padding is likelier than any token."""
    padded = copy.deepcopy(new_student("qwen3_moe_tiny"))
    padded.resize_token_embeddings(128)
    with torch.no_grad():
        padded.get_output_embeddings().weight[len(tokenizer) :] = padded.get_output_embeddings().weight[9] * 1.01
    for rollout, remote in zip(rollouts, score(new_remote(new_server(padded)), rollouts), strict=True):
        tokens = torch.tensor([[*rollout.prompt.tokens, *rollout.completion_T.tolist()]])
        with torch.no_grad():
            logprobs = padded(tokens).logits[0].log_softmax(-1)[len(rollout.prompt.tokens) - 1 : -1, : len(tokenizer)]
        assert torch.equal(remote.token_TK, logprobs.topk(K).indices)
        assert torch.allclose(remote.logprob_TK, logprobs.topk(K).values, atol=1e-5)


def test_requests_are_made_side_by_side_and_no_more_than_asked(server, new_remote, random_rollouts):
    remote = new_remote(server, max_connections=3)
    running, most, lock = [0], [0], threading.Lock()
    original = server.positions

    def positions(tokens, count):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.05)
        found = original(tokens, count)
        with lock:
            running[0] -= 1
        return found

    server.positions = positions
    score(remote, random_rollouts([("law", 3, 3)] * 9))
    assert most[0] == 3


# What is refused at start-up


def test_hidden_states_are_refused_with_the_signal_to_set(server, new_remote):
    with pytest.raises(ValueError, match=r"the teacher of law is a server, .* no hidden states: set teachers\.signal=top_k"):
        new_remote(server, signal=SignalKind.hidden_states)


@pytest.mark.parametrize(
    ("setting", "name"),
    [({"revision": "3f1c2ab"}, "revision"), ({"dtype": Dtype.bfloat16}, "dtype"), ({"experts": Experts.eager}, "experts"),
     ({"attention": Attention.eager}, "attention"), ({"adapter": "org/lora"}, "adapter")],
)  # fmt: skip
def test_a_setting_that_a_server_would_ignore_is_refused(server, tokenizer, setting, name):
    with pytest.raises(ValueError, match=rf"domains\.law\.teacher\.{name} would be ignored: remove it"):
        RemoteTeacher("law", "law", TeacherConfig(server=server.url, **setting), TeachersConfig(signal=TOP_K), tokenizer)


def test_a_server_that_is_not_there_is_a_named_failure(tokenizer):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(TeacherFailure, match=rf"the teacher of law \({url}\) did not answer /v1/models in 1 attempts: .*refused"):
        RemoteTeacher("law", "law", TeacherConfig(server=url), TeachersConfig(signal=TOP_K, retries=0), tokenizer)


def test_a_model_that_the_server_does_not_report_is_refused(server, new_remote):
    with pytest.raises(TeacherFailure, match=r"the teacher of law .* serves law, and teacher\.model is code"):
        new_remote(server, "code")


@pytest.mark.parametrize("name", ["law", "models/law"])
def test_a_model_is_known_by_its_name_or_its_folder(server, new_remote, name):
    assert new_remote(server, name).identity()["model"] == "law"


def test_the_context_is_the_servers_less_the_token_that_it_samples(server, new_remote):
    assert new_remote(server).context == server.max_model_len - 1


def test_a_server_whose_tokenizer_exchanges_two_tokens_is_refused(server, new_remote, monkeypatch):
    monkeypatch.setattr("rollout.synthetic.CHARACTERS", CHARACTERS[1] + CHARACTERS[0] + CHARACTERS[2:])
    server.tokenizer = character_tokenizer()
    with pytest.raises(TeacherFailure, match="has another tokenizer than the student"):
        new_remote(server)


def test_a_difference_that_the_probes_text_does_not_show_is_found_among_all_ids(server, new_remote, monkeypatch):
    monkeypatch.setattr("rollout.synthetic.CHARACTERS", CHARACTERS.replace("Z", "#"))
    server.tokenizer = character_tokenizer()
    with pytest.raises(TeacherFailure, match="reads ids from 0 on as other text, so it has another tokenizer than the student"):
        new_remote(server)


def test_the_tokenizer_of_a_folder_that_the_server_reports_is_compared(new_server, new_remote, model, saved_qwen3_moe, changed_checkpoint, tokenizer):
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["<think>"])
    folder = changed_checkpoint(saved_qwen3_moe)
    new_remote(new_server(model, root=str(folder)), str(folder))
    larger.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"the teacher of law \(.*\) has another tokenizer than the student"):
        new_remote(new_server(model, root=str(folder)), str(folder))


@pytest.mark.parametrize("signal", [TOP_K, SAMPLED])
def test_logits_in_place_of_log_probabilities_are_refused(server, new_remote, signal):
    """--logprobs-mode raw_logits; here all below zero, so that no single value tells."""

    def shift(positions):
        for position in positions[1:]:
            for entry in position.values():
                entry["logprob"] -= 15.0

    server.spoil = spoil_rows(shift)
    with pytest.raises(TeacherFailure, match="does not give log-probabilities over its vocabulary: start it with --logprobs-mode raw_logprobs"):
        new_remote(server, signal=signal)


def test_a_server_that_gives_fewer_tokens_than_asked_names_the_option_to_start_it_with(server, new_remote):
    server.max_logprobs = 4
    with pytest.raises(TeacherFailure, match=r"refused /v1/completions: .*max allowed: 4: start it with --max-logprobs 6 or more, or lower teachers\.top_k"):
        new_remote(server)


def test_a_server_whose_answers_vary_by_more_than_the_tolerance_is_refused(server, new_remote):
    generator = torch.Generator().manual_seed(0)

    def blur(positions):
        for position in positions[1:]:
            for entry in position.values():
                entry["logprob"] -= float(torch.rand((), generator=generator)) * 0.2

    server.spoil = spoil_rows(blur)
    with pytest.raises(TeacherFailure, match=r"other weights would not be noticed: set teachers\.probe_tolerance to"):
        new_remote(server)
    new_remote(server, probe_tolerance=0.5)


# Failures while scoring


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_request_that_failed_once_is_made_again(server, new_remote, rollouts, status):
    remote = new_remote(server)
    expected = score(remote, rollouts)
    server.statuses = [status]
    for one, other in zip(expected, score(remote, rollouts), strict=True):
        assert torch.equal(one.logprob_TK, other.logprob_TK)


def test_attempts_are_bounded(server, new_remote, rollouts):
    remote = new_remote(server, retries=2)
    server.statuses, server.asked = [500] * 10, []
    with pytest.raises(TeacherFailure, match=r"the teacher of law \(http.*\) did not answer /v1/completions in 3 attempts: status 500, the engine is not well"):
        score(remote, rollouts[:1])
    assert len(server.asked) == 3


def test_a_refusal_is_not_repeated_and_says_what_the_server_said(server, new_remote, rollouts):
    remote = new_remote(server, retries=2)
    server.statuses, server.asked = [404] * 10, []
    with pytest.raises(TeacherFailure, match="refused /v1/completions: status 404, the engine is not well"):
        score(remote, rollouts[:1])
    assert len(server.asked) == 1


def test_nan_that_vllm_cannot_write_as_json_is_called_by_its_name(server, new_remote, rollouts):
    remote = new_remote(server)
    server.completion = lambda body: (400, {"error": {"message": "Out of range float values are not JSON compliant"}})
    with pytest.raises(TeacherFailure, match="Out of range float values are not JSON compliant: its model gives NaN or infinity"):
        score(remote, rollouts[:1])


def test_a_server_that_does_not_answer_in_time_is_a_failure(server, new_remote, rollouts):
    remote = new_remote(server, retries=0, timeout_seconds=3)
    server.delay = 6.0
    with pytest.raises(TeacherFailure, match="did not answer /v1/completions in 1 attempts: "):
        score(remote, rollouts[:1])


def drop_position(positions):
    positions.pop()


def repeat_position(positions):
    positions.append(positions[-1])


def name_too_few(positions):
    ranked = positions[-1]
    del ranked[next(token for token, entry in ranked.items() if entry["rank"] == 2)]


def leave_out_own(positions):
    for position in positions[1:]:
        for token in [token for token, entry in position.items() if entry["rank"] > K]:
            del position[token]


def make_nan(positions):
    next(iter(positions[-1].values()))["logprob"] = float("nan")


def make_infinite(positions):
    next(iter(positions[-1].values()))["logprob"] = float("inf")


def forget_ranks(positions):
    for entry in positions[-1].values():
        del entry["rank"]


def answer_null(positions):
    positions[-1] = {"7": None}


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (drop_position, "gave 20 positions for 21 tokens"),
        (repeat_position, "gave 22 positions for 21 tokens"),
        (name_too_few, "did not name 6 different tokens at each position"),
        (leave_out_own, "left out tokens that it was sent"),
        (make_nan, "gave NaN or infinity"),
        (make_infinite, "gave NaN or infinity"),
        (forget_ranks, "answers in another form than vLLM's"),
        (answer_null, "answers in another form than vLLM's"),
    ],
)
def test_a_wrong_answer_is_refused_by_the_teachers_name(server, new_remote, rollouts, edit, sentence):
    remote = new_remote(server)
    server.spoil = spoil_rows(edit)
    with pytest.raises(TeacherFailure, match=rf"the teacher of law \({server.url}\) {re.escape(sentence)}"):
        score(remote, rollouts[:1])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": "code"}, "answers as code, and was law at start-up"),
        ({"choices": []}, "answers in another form"),
        ({"choices": [{"prompt_token_ids": [5, 6, 7], "prompt_logprobs": [None, {}, {}]}]}, "scored other tokens than it was sent"),
    ],
)
def test_an_answer_about_something_else_is_refused(server, new_remote, rollouts, change, sentence):
    remote = new_remote(server)
    server.spoil = lambda answer: answer | change
    with pytest.raises(TeacherFailure, match=sentence):
        score(remote, rollouts[:1])


def test_probabilities_that_add_up_to_more_than_one_are_refused(server, new_remote, rollouts):
    def raise_all(positions):
        for entry in positions[-1].values():
            entry["logprob"] = -0.5

    remote = new_remote(server)
    server.spoil = spoil_rows(raise_all)
    with pytest.raises(TeacherFailure, match="does not give log-probabilities"):
        score(remote, rollouts[:1])


# Another model


def test_other_weights_under_the_same_name_are_noticed_before_the_signal_is_used(server, new_remote, rollouts, new_student):
    remote = new_remote(server)
    server.model = new_student("qwen3_moe_tiny", seed=5)
    with pytest.raises(TeacherFailure, match="has other weights than at start-up: the log-probabilities of a probe differ by"):
        score(remote, rollouts)


def test_another_folder_under_the_same_name_is_noticed(server, new_remote, rollouts):
    remote = new_remote(server)
    server.root = "models/law-2"
    with pytest.raises(TeacherFailure, match="serves models/law-2 as law now, and it was models/law at start-up"):
        score(remote, rollouts)


def test_identities_are_of_one_model_exactly_where_the_weights_are_the_same(new_server, new_remote, model, new_student):
    one, again = (new_remote(new_server(model)).identity() for _ in range(2))
    other = new_remote(new_server(new_student("qwen3_moe_tiny", seed=5))).identity()
    assert json.loads(json.dumps(one)) == one
    assert one["server"] != again["server"]
    described, moved, changed = ({"law": {"teacher": identity, "settings": {}}} for identity in (one, again, other))
    assert changes(described, moved, 0.02) == {}
    assert list(changes(described, changed, 0.02)) == ["law"]


# The pool


@pytest.fixture
def new_pool(tokenizer):
    def make(teachers: dict[str, TeacherConfig], **settings) -> TeacherPool:
        domains = {name: DomainConfig(teacher=teacher) for name, teacher in teachers.items()}
        return TeacherPool(domains, TeachersConfig(**{"signal": TOP_K, "top_k": K, "retries": 0} | settings), tokenizer, CPU)

    return make


def test_local_and_remote_teachers_score_their_own_domains(server, new_pool, saved_v4, model, random_rollouts, tokenizer):
    rollouts = random_rollouts([("law", 9, 5), ("code", 5, 8), ("law", 4, 6), ("code", 7, 3)])
    pool = new_pool({"law": TeacherConfig(server=server.url), "code": TeacherConfig(model=str(saved_v4))})
    scored = pool.score(rollouts)
    local = {"law": Teacher("law", model), "code": Teacher("code", load_model(TeacherConfig(model=str(saved_v4)), "teacher"))}
    assert [item.rollout for item in scored] == rollouts
    for item in scored:
        teacher = local[item.rollout.prompt.domain]
        expected = teacher.signal(item.rollout, teacher.hidden([item.rollout], 1000)[0], TOP_K, K, len(tokenizer))
        assert torch.equal(item.signal.token_TK, expected.token_TK)
        assert torch.allclose(item.signal.logprob_TK, expected.logprob_TK, atol=1e-5)
    assert (pool.num_loads, pool.library.weights.names()) == (1, [next(iter(pool.library.bases))])
    assert (pool.is_remote("law"), pool.is_remote("code")) == (True, False)


def test_two_domains_on_one_server_share_one_teacher(server, new_pool):
    pool = new_pool({"law": TeacherConfig(server=server.url), "code": TeacherConfig(server=server.url)})
    assert len(pool.remote) == 1


def test_a_rollout_longer_than_the_servers_context_is_refused_at_start_up(server, new_pool):
    with pytest.raises(ValueError, match="the teacher of law reads 127 positions and the domain's longest rollout can have 128"):
        new_pool({"law": TeacherConfig(server=server.url)}).require_context({"law": 128})


@pytest.mark.slow
def test_a_server_killed_while_it_scores_ends_in_a_named_failure(new_server_process, saved_qwen3_moe, new_pool, random_rollouts):
    """A real process, killed while requests run."""
    process, url = new_server_process(str(saved_qwen3_moe), 20)
    pool = new_pool({"law": TeacherConfig(server=url)}, retries=1, max_connections=2)

    def kill() -> None:
        assert process.stdout.readline() == "hanging\n"
        process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(TeacherFailure, match=r"the teacher of law .* did not answer /v1/completions in 2 attempts"):
        pool.score(random_rollouts([("law", 10, 10)] * 6))
    killer.join()
    assert process.wait(10) == -signal.SIGKILL


# Whole runs

RUN = [
    "domain=[tools]", "domains.tools.prompts.rows=8", "domains.tools.held_out.rows=8", "rollout.prompts_per_step=4", "rollout.max_new_tokens=6",
    "rollout.decode_width=4", "num_steps=2", "optim.warmup_steps=0", "optim.lr=1e-3", "logger=none", "teachers.signal=top_k", "teachers.top_k=6",
    "evaluation.every=1", "evaluation.max_new_tokens=4",
]  # fmt: skip


def records(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_on_a_server_is_the_run_on_the_same_teacher_held_here(device, server, model, tokenizer, saved_v4, tmp_path):
    save_model(tmp_path / "teacher", model, tokenizer, model.state_dict())
    for name, teacher in {"local": f"model={tmp_path / 'teacher'}", "remote": "model=null"}.items():
        settings = [f"student.model={saved_v4}", f"domains.tools.teacher.{teacher}", f"run_dir={tmp_path / name}"]
        settings += [f"domains.tools.teacher.server={server.url}"] * (name == "remote")
        distill(load_config("distill", [*RUN, *settings]))
    local, remote = records(tmp_path / "local"), records(tmp_path / "remote")
    assert len(remote) == 3
    for ours, theirs in zip(local[1:], remote[1:], strict=True):
        assert theirs["step/loss"] == pytest.approx(ours["step/loss"], rel=1e-5)
        assert theirs["evaluation/tools/accuracy"] == ours["evaluation/tools/accuracy"]
        assert "evaluation/tools/kl_per_token" in ours
        assert "evaluation/tools/kl_per_token" not in theirs


def test_an_evaluation_refuses_a_teacher_that_it_cannot_sample_from():
    with pytest.raises(ValueError, match=r"that of tools is a server: set domains\.tools\.teacher\.server=null and teacher\.model"):
        load_config("evaluate", ["domain=[tools]", "domains.tools.teacher.server=http://host:8000"])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("teachers.timeout_seconds=0", r"teachers\.timeout_seconds must be above 0 and finite, not 0"),
        ("teachers.timeout_seconds=inf", r"teachers\.timeout_seconds must be above 0 and finite, not inf"),
        ("teachers.probe_tolerance=nan", r"teachers\.probe_tolerance must be above 0 and finite, not nan"),
        ("teachers.retries=-1", r"teachers\.retries must be at least 0, not -1"),
        ("teachers.max_connections=0", r"teachers\.max_connections must be at least 1, not 0"),
    ],
)
def test_a_setting_of_requests_that_is_out_of_range_is_refused(override, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_config("distill", [override])
