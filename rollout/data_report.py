"""What a run's data holds, for a person to look at: counts per domain, and prompts as the models will read them.

Student and teacher read the same ids: the tokenizer is one (teachers/compatibility.py refuses another), and a prompt is rendered once, with the
student's chat template and the domain's settings. So one line of ids stands for both.
"""

from dataclasses import astuple, dataclass

from transformers import PreTrainedTokenizerBase

from rollout.chat import encode_answer
from rollout.prompts import DomainPrompts

HEADER = ("data", "rows read", "used", "too long", "held out", "twice in domain", "in other domain", "= held-out", "13-gram of held-out")
"""Of the table: the domain, then the fields of `DomainReport` in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainReport:
    """Rows of one domain, over all its sources.

    read, used: rows of the data (the first `rows` where that is set), and those that prompts are drawn from; the difference is left out.
    dropped_too_long, dropped_held_out: rows left out, by reason.
    duplicates_within: rows equal to an earlier one of the domain; duplicates_across: rows equal to one of another domain.
    held_out_equal, held_out_13_gram: rows equal to a held-out prompt of any domain; rows that only share 13 words with one (rollout/overlap.py).
    """

    read: int
    used: int
    dropped_too_long: int
    dropped_held_out: int
    duplicates_within: int
    duplicates_across: int
    held_out_equal: int
    held_out_13_gram: int


def data_report(prompts: dict[str, DomainPrompts]) -> dict[str, DomainReport]:
    """Counts of prompts that `load_prompts` has read, by domain. Duplicates and overlaps are of all rows that are not too long."""
    reports = {}
    for name, domain in prompts.items():
        equal = sum(row.is_equal for row in domain.overlap.held_out)
        reports[name] = DomainReport(
            read=domain.num_rows + domain.num_dropped,
            used=domain.num_rows,
            dropped_too_long=domain.dropped["too_long"],
            dropped_held_out=domain.dropped["held_out"],
            duplicates_within=domain.overlap.duplicates_within,
            duplicates_across=domain.overlap.duplicates_across,
            held_out_equal=equal,
            held_out_13_gram=len(domain.overlap.held_out) - equal,
        )
    return reports


def report_table(reports: dict[str, DomainReport]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table, one row per domain."""
    return list(HEADER), [[name, *map(str, astuple(report))] for name, report in reports.items()]


def show_prompts(prompts: dict[str, DomainPrompts], tokenizer: PreTrainedTokenizerBase, count: int) -> str:
    """The first `count` rows in use of every source, as text with special tokens and as ids; with the reference answer as a completion where there is one.

    Each row is a block of lines with an empty one behind it.
    """
    blocks = []
    for name, domain in prompts.items():
        for source, rows in domain.sources.items():
            for row in rows[:count]:
                lines = [f"{name}/{source}:{row['index']}, {len(row['tokens'])} tokens, the same for student and teacher"]
                lines += _text_and_ids("prompt", row["tokens"], tokenizer)
                if row["answer"] is not None:
                    lines += _text_and_ids("answer", encode_answer(row["answer"], tokenizer), tokenizer)
                blocks.append("".join(f"{line}\n" for line in [*lines, ""]))
    return "".join(blocks)


def _text_and_ids(name: str, tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    text = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return [f"  {name} text: {text}", f"  {name} ids:  {' '.join(map(str, tokens))}"]
