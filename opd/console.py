"""What a person sees: a progress bar with time left on a terminal, plain lines in a log file, tables at the end of both."""

import sys
import textwrap
import time

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

MARKED = 0.5
"""Share of the highest divergence of a completion from which a token is marked."""
PLAIN_LINE_SECONDS = 10.0
"""At most one plain line of a task in so many seconds."""


class ProgressDisplay:
    """Several tasks, each with a number of steps and a short text."""

    def __init__(self, visible: bool = True):
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=not sys.stdout.isatty(), quiet=not visible)
        self.is_terminal = self.console.is_terminal and visible
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), *times, TextColumn("{task.fields[text]}"))
        self.progress = Progress(*columns, console=self.console) if self.is_terminal else None
        self.tasks: dict[str, int] = {}
        self.last_line: dict[str, float] = {}
        self.begun: dict[str, tuple[float, int]] = {}
        self.finished: set[str] = set()

    def __enter__(self) -> "ProgressDisplay":
        if self.progress is not None:
            self.progress.start()
        return self

    def __exit__(self, *_exception) -> None:
        if self.progress is not None:
            self.progress.stop()

    def say(self, line: str) -> None:
        """Print one line, above the bars where there are any."""
        self.console.print(line, markup=False)

    def update(self, task: str, done: int, total: int, text: str = "") -> None:
        """Show that `done` of `total` steps of a task are finished."""
        if self.progress is not None:
            if task not in self.tasks:
                self.tasks[task] = self.progress.add_task(task, total=total, text=text)
            self.progress.update(self.tasks[task], completed=done, total=total, text=text)
            return
        now = time.monotonic()
        first_time, first_done = self.begun.setdefault(task, (now, done)) if done else (now, 0)
        recent = now - self.last_line.get(task, -PLAIN_LINE_SECONDS) < PLAIN_LINE_SECONDS
        if recent and not (done == total and task not in self.finished):
            return
        if done == total:
            self.finished.add(task)
        self.last_line[task] = now
        left = (now - first_time) / (done - first_done) * (total - done) if done > first_done > 0 else None
        remaining = "" if left is None or done == total else f", about {left:.0f} s left"
        self.say(f"{task}: {done}/{total}{remaining}{'  ' + text if text else ''}")


def print_table(title: str, header: list[str], rows: list[list[str]], caption: str | None = None) -> None:
    """A table; in a log file as wide as it has to be, on a terminal wrapped to fit."""
    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 200)
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # never markup: a cell may be what a model wrote
    console.print(table)


def visible(text: str) -> str:
    """Text as it can stand in one line: what moves the cursor or colours the terminal is written out."""
    return "".join(character if character.isprintable() else character.encode("unicode_escape").decode() for character in text)


def print_tokens(label: str, pieces: list[str], kl: list[float | None]) -> None:
    """A completion, each token coloured by its divergence against the highest; where there is no colour the worst ones stand in marks."""
    console = Console(file=sys.stdout, highlight=False, markup=False)
    highest = max((value for value in kl if value is not None), default=0.0)
    text = Text(label)
    for piece, value in zip(pieces, kl, strict=True):
        share = 0.0 if value is None or highest <= 0 else max(0.0, value) / highest
        shown = visible(piece)
        text.append(shown if console.is_terminal or share < MARKED else f"\u00bb{shown}\u00ab", style=_heat(share))
    console.print(text, soft_wrap=True)


def _heat(share: float) -> str:
    return "white on red" if share > 0.75 else "red" if share > MARKED else "yellow" if share > 0.25 else ""


def print_line(text: str) -> None:
    """Text as it is, however long its lines."""
    Console(file=sys.stdout, highlight=False, markup=False).print(text, soft_wrap=True)


def print_definition(name: str, facts: str, text: str) -> None:
    """A name with what is known of it on one line, and a paragraph under it."""
    console = Console(file=sys.stdout, highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    console.print(Text.assemble((name, "bold"), facts), soft_wrap=True)
    console.print(textwrap.fill(text, console.width - 1, initial_indent="    ", subsequent_indent="    "), soft_wrap=True)


def headline(metrics: dict[str, float]) -> str:
    """The figures of a step that a person watching wants to see."""
    accuracies = [value for name, value in metrics.items() if name.startswith("domain/") and name.endswith("/accuracy")]
    parts = [f"loss {metrics['step/loss']:.4f}"] if "step/loss" in metrics else []
    return ", ".join(parts + ([f"lowest accuracy {min(accuracies):.2f}"] if accuracies else []))
