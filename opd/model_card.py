"""The model card of an export: README.md of the folder that is handed on, written from the facts (opd/model_card_facts.py), in Hugging Face's format.

`opd export` writes it with what `opd evaluate RUN` found of those weights, else with what the run itself has measured; `opd evaluate` of an exported folder
puts its results in their place, which changes this file alone, so that export.json, whose sha256 it is not in, stays true. What was not measured or is not
stated is said to be so. A domain is named as a regression where its intervals say that the student is worse than its teacher, or than the model it began with.

A card is refreshed only where all but its results would be written as it stands. The run may be gone, another run of that name may lie there, it may have gone
on, or someone has edited the card: none of that may cost facts that are known, so such a card is left alone, and a warning says so.
"""

import logging
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from opd.model_card_facts import CardFacts, is_hub_id, licence_of, licences, licences_of, public_text, read_facts, scored_by, shown_name, sources
from rollout.files import read_json, replace_text

CARD = "README.md"
NOT_MEASURED = "Not measured. `opd evaluate student.model=FOLDER 'domain=[...]'` of this folder fills this in."
DIVERGENCES = {"reverse_kl": "KL(student || teacher_d)", "forward_kl": "KL(teacher_d || student)", "jsd": "JSD(student, teacher_d)"}
SIGNALS = {
    "hidden_states": "over the whole vocabulary",
    "top_k": "over the teacher's likeliest tokens, with all others as one",
    "sampled_token": "estimated from the sampled token",
}
MADE = {
    "specialize": "Supervised fine-tuning on reference answers, and GRPO on its own where grpo.num_steps says so.",
    "merge": "Arithmetic on the weights of its teachers, without training.",
}

LOG = logging.getLogger(__name__)


def write_card(folder: Path, record: dict[str, Any], evaluation: dict[str, Any] | None = None) -> None:
    """Write the card into an exported model's folder. record: export.json. evaluation: what opd/comparison.py defines."""
    replace_text(folder / CARD, _card_of(folder, record, evaluation))


def refresh_card(model: str, evaluation: dict[str, Any]) -> Path | None:
    """Put results into the card of an exported folder that was evaluated; returns the card, or None where the model is no export."""
    folder = Path(model)
    if folder.name != "student" or not (folder.parent / "export.json").is_file():
        return None
    card, record = folder / CARD, read_json(folder.parent / "export.json")
    text = _card_of(folder, record, evaluation)
    if card.is_file() and _without_results(card.read_text()) != _without_results(text):
        why = "it was edited, or the run that it describes is not here or has gone on"
        LOG.warning("%s stays as it is (%s): the results are in evaluation.json, and a new export makes a new card", card, why)
        return None
    try:
        replace_text(card, text)
    except OSError as error:
        LOG.warning("%s stays as it is, it cannot be written (%s): the results are in evaluation.json", card, error.strerror)
        return None
    return card


def _card_of(folder: Path, record: dict[str, Any], evaluation: dict[str, Any] | None) -> str:
    sizes = {name: (folder / name).stat().st_size for name in record["sha256"] if (folder / name).is_file()}
    return model_card(record, read_facts(record["source"]), evaluation, sizes)


def _without_results(text: str) -> str:
    """A card without what an evaluation changes in it: its metadata's results, and two sections."""
    front, _, rest = text.removeprefix("---\n").partition("\n---\n")
    metadata = yaml.safe_load(front) or {}
    kept = {name: value for name, value in metadata.items() if name not in ("model-index", "model_name")}
    return f"{kept}{re.sub(r'(?ms)^## (?:Results|Known regressions and limits)$.*?(?=^## )', '', rest)}"


def model_card(record: dict[str, Any], facts: CardFacts, evaluation: dict[str, Any] | None, sizes: dict[str, int] | None = None) -> str:
    """The text of a card. record: export.json. sizes: of the files, in bytes."""
    sections = [
        ("", [f"# {_title(record, facts)}", _what(record)]),
        ("How it was made", _making(facts)),
        ("Teachers", _teachers(facts)),
        ("Data", _data(facts)),
        ("Results", _results(facts, evaluation)),
        ("Known regressions and limits", _regressions(facts, evaluation)),
        ("Files", _table(["file", "sha256", "bytes"], [[name, digest, (sizes or {}).get(name, "-")] for name, digest in record["sha256"].items()])),
        ("Settings", _settings(facts)),
    ]
    text = "\n\n".join("\n".join(([f"## {title}", ""] if title else []) + lines) for title, lines in sections)
    return f"---\n{_metadata(record, facts, evaluation).to_yaml()}\n---\n\n{text}\n"


def _metadata(record: dict[str, Any], facts: CardFacts, evaluation: dict[str, Any] | None) -> ModelCardData:
    base = facts.base.get("model")
    results = []
    for name, domain in (evaluation or {}).get("domains", {}).items():
        if domain.get("student") is not None and domain["student"]["accuracy"] is not None:  # a result without a value makes the card invalid
            place = {"task_type": "text-generation", "dataset_type": f"opd-{name}", "dataset_name": name}  # the type groups the results
            results.append(EvalResult(**place, metric_type="accuracy", metric_value=domain["student"]["accuracy"]))
    stated = licences(facts)
    [licence] = stated if len(stated) == 1 else [None]
    given = {"license": licence if licence and " " not in licence else None, "base_model": base if is_hub_id(base) else None}
    given["datasets"] = list(dict.fromkeys(cfg["path"] for _, _, cfg in sources(facts) if is_hub_id(cfg.get("path"))))
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["distillation", record["family"]] + (["mxfp4"] if record["format"] == "fp4" else []),
        model_name=_title(record, facts) if results else None,
        eval_results=results or None,
        **{name: value for name, value in given.items() if value},
    )


def _title(record: dict[str, Any], facts: CardFacts) -> str:
    return _escaped(f"{facts.run.name if facts.run is not None else shown_name(record['source'])} ({record['family']})")


def _what(record: dict[str, Any]) -> str:
    layout = {
        "fp4": "routed experts packed in MXFP4 (DeepSeek-V4's released layout), the rest in " + record["dtype"],
        "plain": f"all weights in {record['dtype']}, as transformers writes them",
    }[record["format"]]
    verified = f"{record['verified']['tensors']} tensors and the logits of {record['verified']['probe_tokens']} tokens were equal when it was loaded again"
    how = "`AutoModelForCausalLM.from_pretrained(FOLDER)` of transformers loads it"
    return f"A {record['family']} model: {layout}. {how}; {verified}. Written by `opd export`."


def _making(facts: CardFacts) -> list[str]:
    if facts.run is None:
        return ["Not known: the model does not lie in the folder of a run."]
    begun = shown_name(facts.base["model"]) if facts.base.get("model") else "a new model"
    rows = [["command", f"opd {facts.command}"], ["began with", begun], ["seed", facts.config.get("seed")]]
    if facts.base.get("model"):
        first = (facts.starts[0].get("student") if facts.starts else None) or {}
        licence = licence_of(facts.base["model"], facts.base.get("revision")) or "not stated"
        digest, revision = first.get("hash") or "not recorded", facts.base.get("revision") or "-"
        rows[2:2] = [["its revision", revision], ["hash of its weights", digest], ["its licence", licence]]
    if facts.merged is not None:
        chosen = ", ".join(f"{name} {value:g}" for name, value in facts.merged["chosen"].items() if value is not None)
        rows.append(["merged by", f"{facts.merged['kind']}, {chosen}"])
    if facts.command != "merge":
        steps = "not known: the run was taken up again after this was written" if facts.step is None else f"{facts.step} of {facts.steps}"
        rows += [["steps", steps], ["completion tokens trained on", f"{facts.tokens:,}" if facts.tokens else "not recorded"]]
        rows += [["routed experts trained under", facts.config.get("quant", {}).get("experts", "not recorded")]]
    if facts.lineage is not None:
        rows.append(["branched from", f"{shown_name(facts.lineage['from'])}, after step {facts.lineage['step']}"])
    if facts.starts:
        last = facts.starts[-1]
        commit = last["git"]["commit"] + (" with changes" if last["git"]["diff"] else "") if last["git"] else "not a repository"
        devices = ", ".join(last["hardware"]["devices"]) or last["hardware"]["cpu"]
        rows += [["code", f"{commit}, sha256 {last['code'][:12]}"], ["hardware", f"{last['ranks']} ranks, {devices}"]]
        rows.append(["versions", ", ".join(f"{name} {number}" for name, number in last["versions"].items())])
    else:
        rows.append(["code, versions, hardware", "not recorded"])
    made = _objective(facts) if facts.command == "distill" else MADE.get(facts.command, "")
    return [made, "", *_table(["", ""], rows)]


def _objective(facts: CardFacts) -> str:
    """What a distillation minimised, in one line, as its settings say."""
    loss, signal = facts.config.get("loss", {}), facts.config.get("teachers", {}).get("signal", "hidden_states")
    if loss.get("constant_penalty"):
        return "A control in which no teacher speaks (loss.constant_penalty)."
    kind = loss.get("kind", "reverse_kl")
    answers = "answers that another student gave" if facts.config.get("rollout", {}).get("replay") else "the student's own answers"
    line = f"Distillation: L = sum_d w_d / N_d sum_t {DIVERGENCES.get(kind, kind)}, {SIGNALS.get(signal, signal)}, on {answers}"
    standard = {"kind": "reverse_kl", "temperature": 1.0, "smoothing": 0.0, "cap": None, "policy_gradient": False}
    changed = [f"loss.{name}={loss[name]}" for name, value in standard.items() if name != "kind" and loss.get(name, value) != value]
    beta = [f"loss.beta={loss.get('beta')}"] * (kind == "jsd")
    warmup = facts.config.get("warmup", {})
    before = f" Before it: {warmup.get('steps')} updates on the teachers' own answers." if warmup.get("kind", "none") != "none" else ""
    return f"{line}{''.join(f', {each}' for each in beta + changed)}.{before}"


def _teachers(facts: CardFacts) -> list[str]:
    scored = scored_by(facts)
    if not scored:
        return ["None." if facts.command == "specialize" else "Not recorded."]
    rows = []
    for name, teacher, steps in scored:
        model = shown_name(teacher.get("model") or teacher.get("server"))
        if teacher.get("adapter"):
            model = f"{shown_name(teacher['adapter'])} on {model}"
        digest = (teacher.get("adapter_hash") or teacher.get("hash") or "not recorded")[:16]
        licence = " and ".join(each or "not stated" for each in licences_of(teacher))
        rows.append([name, model, teacher.get("adapter_revision") or teacher.get("revision") or "-", digest, licence, steps])
    differ = "Of what this model was made from the licences are not all the same: what it may be used for is for who hands it on to settle."
    return _table(["domain", "teacher", "revision", "hash of the weights", "licence", "steps"], rows) + (["", differ] if len(licences(facts)) > 1 else [])


def _data(facts: CardFacts) -> list[str]:
    rows = []
    recorded = facts.starts[-1]["data"] if facts.starts else {}
    for name, source, cfg in sources(facts):
        found = recorded.get(name, {}).get(source, {})
        known = [found.get("rows", "not recorded"), (found.get("sha256") or "not recorded")[:16]]
        rows.append([name, shown_name(cfg.get("path")), cfg.get("revision") or "-", *known, facts.config["domains"][name]["prompts"].get("share")])
    for name, domain in facts.config.get("domains", {}).items():
        held_out = domain.get("held_out", {})
        place = shown_name(held_out.get("path")) if held_out.get("path") else "none"
        rows.append([f"{name}, held out", place, held_out.get("revision") or "-", held_out.get("rows") or "all", "-", "-"])
    return _table(["domain", "data", "revision", "rows", "sha256 of the rows", "share"], rows) if rows else ["Not recorded."]


def _results(facts: CardFacts, evaluation: dict[str, Any] | None) -> list[str]:
    if evaluation is not None and evaluation["domains"]:
        rows = [
            [name, *(_accuracy(domain.get(role)) for role in ("base", "teacher", "student")), _interval(domain["recovery"]), _floor(domain), _kl(domain)]
            for name, domain in evaluation["domains"].items()
        ]
        note = "Held-out prompts, temperature 1, 95 % intervals; recovery is this model's accuracy over its teacher's; floor is what the KL guarantees of it."
        before = "before" if _is_before(facts, evaluation) else _base_name(evaluation)
        return [*_table(["domain", before, "teacher", "this model", "recovery", "floor", "KL to the teacher (nats per token)"], rows), "", note]
    measured = [record for record in facts.records if any(name.startswith("evaluation/") for name in record)]
    if not measured or (measured[-1]["step"] == 0 and facts.step != 0):  # what is of step 0 is of the model that it began with
        return [NOT_MEASURED]
    last = measured[-1]
    names = sorted({name.split("/")[1] for name in last if name.startswith("evaluation/")})
    rows = [[name, _figure(last, name, "accuracy"), _figure(last, name, "kl_per_token")] for name in names]
    when = f"after step {last['step']}" + ("" if last["step"] == facts.step else f", and these weights are those after step {facts.step}")
    note = "Measured by the run itself while it trained, on as many held-out prompts as evaluation.prompts says; not by an evaluation of this folder."
    return [*_table(["domain", "accuracy", "KL to the teacher (nats per token)"], rows), "", f"{note} It was {when}."]


def _regressions(facts: CardFacts, evaluation: dict[str, Any] | None) -> list[str]:
    found = ["Whether it is worse than its teachers or than what it began with was not measured."]
    if evaluation is not None:
        before = "the model it began with" if _is_before(facts, evaluation) else _base_name(evaluation)
        found = regressions(evaluation, before) + _unmeasured(facts, evaluation)
    last = facts.records[-1] if facts.records else {}
    cut = {name.split("/")[1]: value for name, value in last.items() if name.startswith("domain/") and name.endswith("/truncated")}
    found += [f"{name}: {value:.1%} of the last step's answers did not end." for name, value in cut.items() if value > 0.01]
    if last.get("alarms/active"):
        found.append(f"Alarms that were active after step {last['step']}: {int(last['alarms/active'])}.")
    for span in facts.spans:
        found += [f"{name}: its teacher failed, and training went on without it from step {drop['step']}." for name, drop in span["dropped"].items()]
    if len(facts.spans) > 1:
        found.append(f"The teachers or domains were changed during training, at step {', '.join(str(span['from_step']) for span in facts.spans[1:])}.")
    if facts.step is not None and facts.steps is not None and facts.step < facts.steps:
        found.append(f"These are the weights after step {facts.step} of {facts.steps}.")
    return [f"- {_escaped(line)}" for line in found] or ["None is known: no domain is worse than its teacher, or than before, beyond the intervals."]


def _is_before(facts: CardFacts, evaluation: dict[str, Any]) -> bool:
    """Whether the base of an evaluation is the model that this one began with: by its hash, and by its name where no hash is known."""
    base, began = evaluation.get("base"), (facts.starts[0].get("student") if facts.starts else None) or {}
    if base is None:
        return True  # of a version that did not record it, or there is none
    if base["hash"] and began.get("hash"):
        return base["hash"] == began["hash"]
    return base["model"] == facts.base.get("model")


def _base_name(evaluation: dict[str, Any]) -> str:
    return shown_name(evaluation["base"]["model"])


def regressions(evaluation: dict[str, Any], before: str = "the model it began with") -> list[str]:
    """A sentence for each domain in which the student is worse than its teacher, or than the base, beyond the 95 % intervals. before: the base, in words."""
    found = []
    for name, domain in evaluation["domains"].items():
        recovery, difference = domain["recovery"], domain["difference"]
        if isinstance(recovery, dict) and recovery["high"] < 1:
            found.append(f"{name}: it recovers {recovery['value']:.3f} [{recovery['low']:.3f}, {recovery['high']:.3f}] of its teacher's accuracy.")
        if difference is not None and difference["high"] < 0:
            found.append(f"{name}: its accuracy is {-difference['value']:.3f} below that of {before}.")
        if recovery == "not graded":
            found.append(f"{name}: its answers are not graded, so that only the KL says how near it came.")
        if domain["student"].get("truncated", 0) > 0.01:
            found.append(f"{name}: {domain['student']['truncated']:.1%} of its answers in the evaluation did not end.")
    return found


def _unmeasured(facts: CardFacts, evaluation: dict[str, Any]) -> list[str]:
    """A sentence for each comparison that the evaluation does not have."""
    found, missing = [], [name for name in facts.config.get("domains", {}) if name not in evaluation["domains"]]
    if missing:
        found.append(f"Not evaluated: {', '.join(missing)}.")
    for name, domain in evaluation["domains"].items():
        if domain["recovery"] is None:
            found.append(f"{name}: its recovery is undefined, its teacher having an accuracy near 0.")
        if domain["difference"] is None and domain["recovery"] != "not graded":
            found.append(f"{name}: it was not compared with the model it began with (base.model).")
    return found


def _settings(facts: CardFacts) -> list[str]:
    if not facts.config:
        return ["Not known."]
    text = yaml.safe_dump(_portable(facts.config), sort_keys=False, allow_unicode=True).replace("```", "'''")
    return ["<details><summary>the run's resolved settings</summary>", "", "```yaml", text.rstrip("\n"), "```", "", "</details>"]


def _portable(value: Any, key: str = "", upload_text: bool | None = None) -> Any:
    """Settings without paths of this machine, and without system prompts unless the run may upload text."""
    if isinstance(value, dict):
        allowed = value["logger"].get("upload_text", False) if "logger" in value else upload_text
        return {name: _portable(inner, name, allowed) for name, inner in value.items()}
    if isinstance(value, list):
        return [_portable(inner, key, upload_text) for inner in value]
    if key == "system_prompt" and value is not None and not upload_text:
        return "(left out: logger.upload_text=false)"
    if key == "command" and value is not None:
        return "(left out: what a run calls on an alarm may hold keys)"
    if isinstance(value, str):
        return shown_name(value) if value.startswith(("/", "~")) else public_text(value)
    return value


def _table(header: list[str], rows: list[list[Any]]) -> list[str]:
    lines = [[_escaped(str(cell)) for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *lines)]


def _escaped(text: str) -> str:
    """Text of data or settings, so that it ends neither its cell nor its line, and opens no tag."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'").replace("](", "]\\(")


def _accuracy(found: dict[str, Any] | None) -> str:
    return "not measured" if found is None or found.get("accuracy") is None else f"{found['accuracy']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _interval(found: dict[str, float] | str | None) -> str:
    return found or "not known" if not isinstance(found, dict) else f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _floor(domain: dict[str, Any]) -> str:
    return "not known" if domain.get("certificate") is None else f"{domain['certificate']['low']:.3f}"


def _kl(domain: dict[str, Any]) -> str:
    found = domain.get("kl", {}).get("student")
    return "not measured" if found is None else f"{found['per_token']['value']:.4g}"


def _figure(last: dict[str, float], name: str, figure: str) -> str:
    value = last.get(f"evaluation/{name}/{figure}")
    if value is None:
        return "not measured"
    return f"{value:.3f} [{last[f'evaluation/{name}/{figure}_low']:.3f}, {last[f'evaluation/{name}/{figure}_high']:.3f}]"
