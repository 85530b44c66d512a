"""Progress of commands on stderr: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from tpeft_deploy.cli.tool import is_quiet
from tpeft_deploy.progress import Progress, Stage, silent

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["PlainLines", "stages"]

_LINES_EVERY = 5.0  # seconds
_SHORT = 2.0  # seconds; a command that takes less writes no lines


class _Clock:
    """The current stage, and an estimate of the time that it and its siblings will take.

    Args:
        now: function that returns the time in seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.begin = now()
        self.stage = "starting"
        self._series = self._since = self.begin  # begin of the stages that are counted together, and of this one

    def enter(self, stage: str) -> None:
        now = self._now()
        before, self.stage = self.stage, stage
        if _total(before) != _total(stage) or _done(stage) < _done(before):
            self._series = self._since = now
        elif _done(before) != _done(stage):
            self._since = now

    def seconds(self) -> float:
        """Seconds since the begin."""
        return self._now() - self.begin

    def left(self) -> float | None:
        """Seconds that the counted stages will still take; None before a quarter of them has ended."""
        done, total = _done(self.stage), _total(self.stage)
        if not done or 4 * done < total:
            return None
        expected = (self._since - self._series) / done * (total - done)
        return max(expected - (self._now() - self._since), 0.0)


class PlainLines:
    """Lines of progress for stderr that is not a terminal: each stage once, and none in the first seconds.

    Args:
        write: function that prints a line.
        now: function that returns the time in seconds.
        short: seconds before the first line.
    """

    def __init__(
        self, write: Callable[[str], None], now: Callable[[], float] = time.monotonic, *, short: float = _SHORT
    ) -> None:
        self._write, self._clock, self._short = write, _Clock(now), short
        self._lock = threading.Lock()
        self._shown: str | None = None

    def enter(self, stage: str) -> None:
        """Begin a stage, which the next tick shows."""
        with self._lock:
            self._clock.enter(stage)

    def tick(self) -> None:
        """Print the current stage, unless that was done or the command has only begun."""
        with self._lock:
            stage, seconds, left = self._clock.stage, self._clock.seconds(), self._clock.left()
        if seconds < self._short or stage == self._shown:
            return
        self._shown = stage
        count = f", {_done(stage) + 1} of {_total(stage)}" if _total(stage) else ""
        remaining = "" if left is None else f", about {_time(left)} left"
        self._write(f"[{_time(seconds)}] {stage}{count}{remaining}")


@contextmanager
def stages() -> Iterator[Progress]:
    """Show progress on stderr, unless --quiet is given; yield a function to call at the start of each stage.

    A `Stage` fills a bar and is shown with the time left; for a plain string, a stage of unknown length, the bar
    pulses.  Where stderr is not a terminal, or a dumb one, a line is printed at most every few seconds.
    """
    if is_quiet():
        yield silent
        return
    from rich.console import Console

    console = Console(stderr=True)
    with _bar(console) if console.is_terminal and not console.is_dumb_terminal else _lines() as show:
        yield show


@contextmanager
def _lines() -> Iterator[Progress]:
    lines = PlainLines(lambda line: click.echo(line, err=True), short=_SHORT)
    ended = threading.Event()

    def work() -> None:
        wait = _SHORT
        while not ended.wait(wait):
            lines.tick()
            wait = _LINES_EVERY

    thread = threading.Thread(target=work, name="tpeft-progress", daemon=True)
    thread.start()
    try:
        yield lines.enter
    finally:
        ended.set()
        thread.join()


@contextmanager
def _bar(console: Console) -> Iterator[Progress]:
    from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
    from rich.text import Text

    clock = _Clock(time.monotonic)

    class Left(ProgressColumn):
        """Time that the counted stages will take."""

        def render(self, task: Task) -> Text:
            left = clock.left()
            return Text("" if left is None else f"about {_time(left)} left")

    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}"),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        Left(),
    )
    with Progress(*columns, console=console, transient=True) as display:
        current = display.add_task("starting", total=None, count="")

        def show(stage: str) -> None:
            clock.enter(stage)
            if isinstance(stage, Stage):
                count = f"{min(stage.done + 1, stage.total)} of {stage.total}"
                display.update(current, description=stage, completed=stage.done, total=stage.total, count=count)
            else:
                display.tasks[0].total = None  # update(total=None) means no change
                display.update(current, description=stage, completed=0, count="")

        yield show


def _done(stage: str) -> int:
    return stage.done if isinstance(stage, Stage) else 0


def _total(stage: str) -> int:
    return stage.total if isinstance(stage, Stage) else 0


def _time(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole} s" if whole < 100 else f"{whole // 60} min {whole % 60:02d} s"
