"""Base, teacher and student beside each other: what `opd evaluate` writes and prints.

Recovery is the student's accuracy over its teacher's, with the interval of a ratio of two samples. The difference of student and base is paired: both
answer the same prompts with the same random numbers, so its interval comes from the variance of the differences prompt by prompt, which is smaller than
the sum of two variances wherever the two find the same prompts hard; where nearly all differences are alike, from their number (opd/intervals.py). Over all
domains every prompt counts once; it is no mean of the domains' means.

    evaluation.json (schema version 1)
    {"schema": 1, "domains": {NAME: {
        "base", "teacher", "student": {"accuracy", "low", "high", "greedy", "prompts", "truncated", "samples", "pass": {K: {"value", "low", "high"}}},
        "dropped_prompts", "recovery": {"value", "low", "high"} | "not graded" | "no teacher" | null,
        "difference": {"value", "low", "high"} | null, "gap_closed": {"value", "low", "high"} | null,
        "certificate": {"floor", "low", "share", "holds"} | null,
        "kl": {"base", "student": {"per_token": {"value", "low", "high"}, "per_sequence": {...}}}}},
     "difference": {"value", "low", "high"} | null, "min_recovery": number | null, "not_graded": [NAME, ...],
     "base": {"model", "revision", "hash"} | null,
     "lm_eval": as opd/harness_tasks.py says; not there where no tasks were asked for}
    A domain with a perturbation also has
        "perturbed": {"rate", "base", "teacher", "student": {"accuracy", "low", "high", "truncated", "replaced"}}

base: which model that is, with the hash of its weights (teachers/fingerprint.py).
difference: accuracy of the student less that of the base at temperature 1; null without a base or a grader.
pass: of each k of pass_k, the chance that one of k completions scores 1 (opd/intervals.py); not there where none was asked for.
gap_closed: of the teacher's lead over the base, how much the student has, both paired; null where there may be no lead. It and recovery need a teacher, which
    domains of `retention` have not.
recovery: null where it is undefined, since the teacher may be right on none.
base, teacher: not there where there is none. kl: likewise; null in none of its parts.
certificate: what the student's divergence says of its accuracy (opd/certificate.py); null without a grader or a divergence.
perturbed: the same prompts, where each sampled token of the domain's alphabet is replaced with probability `rate` (rollout/perturbation.py); an
    addition to schema 1, which a reader that does not know it may pass over. Every other figure is of completions without it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from opd.certificate import certify
from opd.console import print_table
from opd.intervals import Interval, mean_of_differences, pass_at, ratio, ratio_of_sums, unseen


@dataclass(frozen=True, slots=True, kw_only=True)
class PerturbedResult:
    """One model on one domain's held-out prompts, under an environment that replaces tokens.

    rate: chance of a token of the alphabet to be replaced. accuracy: at temperature 1.
    truncated: share of the completions that hit max_new_tokens. replaced: tokens that were replaced, per completion.
    """

    rate: float
    accuracy: Interval
    truncated: float
    replaced: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainResult:
    """One model on one domain's held-out prompts.

    truncated: share of the completions at temperature 1 that hit max_new_tokens. samples: completions of each prompt at temperature 1.
    scores: of each prompt at temperature 1, a mean over its samples, in the order of the prompts; right: how many of them score 1; accuracy: mean score;
        greedy: at temperature 0; None where the domain has no grader.
    kl_per_token, kl_per_sequence: from the domain's teacher, in nats; None where it was not asked for.
    perturbed: what the domain's perturbation leaves of its accuracy; None where it has none.
    """

    prompts: int
    truncated: float
    scores: tuple[float, ...] | None
    accuracy: Interval | None
    greedy: Interval | None
    kl_per_token: Interval | None
    kl_per_sequence: Interval | None
    perturbed: PerturbedResult | None = None
    samples: int = 1
    right: tuple[int, ...] | None = None


def comparison(
    base: dict[str, DomainResult], teacher: dict[str, DomainResult], student: dict[str, DomainResult], dropped: dict[str, int], pass_k: Sequence[int] = ()
) -> dict:
    """The record that `opd evaluate` writes (module docstring); `base` may be empty, and `teacher` lack domains. dropped: held-out prompts too long to be
    used.
    """
    domains, recoveries = {}, {}
    for name, result in student.items():
        roles = {"base": base.get(name), "teacher": teacher.get(name), "student": result}
        record = {role: _accuracy_record(found, pass_k) for role, found in roles.items() if found is not None}
        is_recovered = result.accuracy is not None and name in teacher
        recovery = ratio(result.accuracy, teacher[name].accuracy) if is_recovered else None
        record["dropped_prompts"] = dropped[name]
        record["difference"] = _difference_record(base, {name: result})
        record["gap_closed"] = _gap_record(**roles)
        record["certificate"] = _certificate_record(result, teacher.get(name))
        record["recovery"] = "not graded" if result.accuracy is None else "no teacher" if name not in teacher else recovery and asdict(recovery)
        if is_recovered:
            recoveries[name] = None if recovery is None else recovery.value
        kl = {role: found for role, found in roles.items() if role != "teacher" and found is not None and found.kl_per_token is not None}
        if kl:
            record["kl"] = {role: {"per_token": asdict(r.kl_per_token), "per_sequence": asdict(r.kl_per_sequence)} for role, r in kl.items()}
        if result.perturbed is not None:
            record["perturbed"] = _perturbed_record(roles)
        domains[name] = record
    unknown = not recoveries or None in recoveries.values()
    return {
        "schema": 1,
        "domains": domains,
        "difference": _difference_record(base, student),
        "min_recovery": None if unknown else min(recoveries.values()),
        "not_graded": [name for name, result in student.items() if result.accuracy is None],
    }


def paired_difference(ours: list[float], theirs: list[float]) -> Interval:
    """Mean of ours less theirs, prompt by prompt, with the interval of that mean, which is never of no width."""
    return mean_of_differences([one - other for one, other in zip(ours, theirs, strict=True)])


def _difference_record(base: dict[str, DomainResult], student: dict[str, DomainResult]) -> dict | None:
    """Student less base over all prompts of the domains in which both are graded."""
    pairs = [(result.scores, base[name].scores) for name, result in student.items() if name in base and result.scores is not None]
    if not pairs:
        return None
    ours, theirs = ([score for scores in column for score in scores] for column in zip(*pairs, strict=True))
    return asdict(paired_difference(ours, theirs))


def require_certificates(record: dict) -> None:
    """Raises ValueError for a domain whose accuracy contradicts its certificate."""
    for name, domain in record["domains"].items():
        if domain["certificate"] is not None and not domain["certificate"]["holds"]:
            found, kl = domain["student"]["accuracy"], domain["kl"]["student"]["per_sequence"]["value"]
            raise ValueError(
                f"{name}: no student can have an accuracy of {found:.3f} at {kl:.4g} nats per completion from a teacher with "
                f"{domain['teacher']['accuracy']:.3f}, so that one of the three figures is wrong, which is a bug of opd's: please report it"
            )


def _gap_record(base: DomainResult | None, teacher: DomainResult | None, student: DomainResult) -> dict | None:
    """(student - base) / (teacher - base), prompt by prompt; None where the teacher may not be better than the base: there is no gap then. Five prompts of
    which the teacher answers all and the base none do not suffice. The interval is no narrower than what gains of prompts unseen may change
    (opd/intervals.py); the lead that they are held against stays as it was found.
    """
    if base is None or teacher is None or student.scores is None:
        return None
    if paired_difference(teacher.scores, base.scores).low <= 0:
        return None
    gains = [(one - zero, best - zero) for one, best, zero in zip(student.scores, teacher.scores, base.scores, strict=True)]
    below, above = sum(lead for _, lead in gains), sum(gain for gain, _ in gains)
    squares = sum(lead**2 for _, lead in gains), sum(gain**2 for gain, _ in gains), sum(gain * lead for gain, lead in gains)
    found, least = ratio_of_sums(len(gains), below, above, *squares), unseen(len(gains)) * len(gains) / below
    return asdict(Interval(found.value, min(found.low, found.value - least), max(found.high, found.value + least)))


def _certificate_record(student: DomainResult, teacher: DomainResult | None) -> dict | None:
    if teacher is None or student.accuracy is None or student.kl_per_sequence is None:
        return None
    return asdict(certify(student.accuracy, teacher.accuracy, student.prompts, student.kl_per_sequence))


def _accuracy_record(result: DomainResult, pass_k: Sequence[int]) -> dict:
    counts = {"prompts": result.prompts, "truncated": result.truncated, "samples": result.samples}
    if pass_k and result.right is not None:
        counts["pass"] = {str(k): asdict(pass_at(result.right, result.samples, k)) for k in pass_k}
    if result.accuracy is None:
        return {"accuracy": None, "low": None, "high": None, "greedy": None, **counts}
    accuracy = result.accuracy
    return {"accuracy": accuracy.value, "low": accuracy.low, "high": accuracy.high, "greedy": result.greedy.value, **counts}


def _perturbed_record(roles: dict[str, DomainResult | None]) -> dict:
    found = {role: result.perturbed for role, result in roles.items() if result is not None}
    figures = {
        role: {"accuracy": p.accuracy.value, "low": p.accuracy.low, "high": p.accuracy.high, "truncated": p.truncated, "replaced": p.replaced}
        for role, p in found.items()
    }
    return {"rate": found["student"].rate, **figures}


def print_comparison(record: dict) -> None:
    """The table of a comparison: per domain accuracy of base, teacher and student, recovery, and KL to the teacher. Below it accuracy under
    perturbation beside that without, for domains that have one; the difference of student and base, where there is one; and the domains with many
    completions that were cut.
    """
    roles = ("base", "teacher", "student")
    rows = []
    for name, domain in record["domains"].items():
        recovery, kl = domain["recovery"], domain.get("kl", {}).get("student")
        graded = [domain[role] for role in roles if role in domain and domain[role]["accuracy"] is not None]
        greedy = " ".join(f"{found['greedy']:.3f}" for found in graded)
        recovered = recovery if isinstance(recovery, str) else _interval_cell(recovery)
        divergence = "" if kl is None else _interval_cell(kl["per_sequence"])
        floor = "" if domain.get("certificate") is None else f"{domain['certificate']['floor']:.3f}, {domain['certificate']['low']:.3f}"
        rows.append([name, *(_accuracy_cell(domain.get(role)) for role in roles), recovered, greedy, divergence, floor])
    cut = [name for name, domain in record["domains"].items() if domain["student"]["truncated"] > 0.01]
    prompts = sorted({domain["student"]["prompts"] for domain in record["domains"].values()})
    caption = (
        f"{' to '.join(map(str, dict.fromkeys([prompts[0], prompts[-1]])))} held-out prompts per domain; accuracy at temperature 1 "
        "with its 95 % interval; KL(student || teacher) in nats per completion; floor: accuracy that it guarantees, and at its upper end"
    )
    print_table("", ["domain", *roles, "recovery", "greedy: " + " ".join(roles), "KL to teacher", "floor"], rows, caption)
    _print_perturbed(record["domains"])
    _print_closed(record["domains"])
    if record.get("difference") is not None:
        found = {"all": record} | record["domains"]
        cells = [f"{name} {_interval_cell(part['difference'], '+')}" for name, part in found.items() if part.get("difference") is not None]
        print(f"student less base, accuracy on the same prompts: {'; '.join(cells)}")
    if cut:
        print(f"more than 1 % of the student's completions were cut at max_new_tokens in {', '.join(cut)}: raise evaluation.max_new_tokens")


def _print_closed(domains: dict[str, dict]) -> None:
    """The part of the teacher's lead that the student has, and pass@k, of the domains that have them."""
    closed = [f"{name} {_interval_cell(domain['gap_closed'])}" for name, domain in domains.items() if domain.get("gap_closed") is not None]
    if closed:
        print(f"gap closed, of the teacher's lead over the base: {'; '.join(closed)}")
    for role in ("base", "teacher", "student"):
        found = {name: domain[role].get("pass", {}) for name, domain in domains.items() if role in domain}
        cells = [f"{name} {', '.join(f'pass@{k} ' + _interval_cell(value) for k, value in own.items())}" for name, own in found.items() if own]
        if cells:
            print(f"{role}: {'; '.join(cells)}")


def _print_perturbed(domains: dict[str, dict]) -> None:
    """Accuracy without and with perturbation, side by side, of the domains that have one."""
    roles, rows = ("base", "teacher", "student"), []
    for name, domain in domains.items():
        perturbed = domain.get("perturbed")
        if perturbed is not None:
            cells = [_accuracy_cell(part.get(role)) for role in roles for part in (domain, perturbed)]
            rows.append([name, f"{perturbed['rate']:g}", *cells, f"{perturbed['student']['replaced']:.2f}"])
    if rows:
        caption = "accuracy at temperature 1; perturbed: an environment replaces each sampled token of the domain's alphabet by another, with this probability"
        titles = [title for role in roles for title in (role, f"{role}, perturbed")]
        print_table("", ["domain", "probability", *titles, "replaced per answer"], rows, caption)
    cut = [name for name, domain in domains.items() if "perturbed" in domain and domain["perturbed"]["student"]["truncated"] > 0.01]
    if cut:
        print(f"more than 1 % of the student's perturbed completions were cut at max_new_tokens in {', '.join(cut)}: raise evaluation.max_new_tokens")


def _accuracy_cell(record: dict | None) -> str:
    return "" if record is None or record["accuracy"] is None else _interval_cell(record | {"value": record["accuracy"]})


def _interval_cell(record: dict | None, sign: str = "") -> str:
    return "undefined" if record is None else f"{record['value']:{sign}.3f} [{record['low']:{sign}.3f}, {record['high']:{sign}.3f}]"
