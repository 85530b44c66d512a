from __future__ import annotations

import pytest

from tests.helpers.commands import call
from tpeft_deploy.cli.progress_display import PlainLines, stages
from tpeft_deploy.cli.tool import note
from tpeft_deploy.progress import Stage, Steps


class Clock:
    """Seconds that the test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_show_each_stage_once_with_the_time_left() -> None:
    written: list[str] = []
    clock = Clock()
    lines = PlainLines(written.append, clock)
    lines.enter("load the base")
    lines.tick()
    assert not written  # a command has two seconds
    clock.now = 2
    lines.tick()
    lines.tick()
    for position, at in enumerate((4.0, 14.0, 24.0)):
        clock.now = at
        lines.enter(Stage(f"check {position}", position, 4))
        lines.tick()
    clock.now = 130
    lines.enter("write the report")
    lines.tick()
    assert written == [
        "[2 s] load the base",
        "[4 s] check 0, 1 of 4",
        "[14 s] check 1, 2 of 4, about 30 s left",
        "[24 s] check 2, 3 of 4, about 20 s left",
        "[2 min 10 s] write the report",
    ]


def test_the_time_left_runs_down_within_a_stage() -> None:
    written: list[str] = []
    clock = Clock()
    lines = PlainLines(written.append, clock)
    lines.enter(Stage("check a", 0, 2))
    clock.now = 10
    lines.enter(Stage("check b", 1, 2))
    clock.now = 16
    lines.tick()
    clock.now = 40
    lines.enter(Stage("check b, again", 1, 2))
    lines.tick()
    assert written == ["[16 s] check b, 2 of 2, about 4 s left", "[40 s] check b, again, 2 of 2, about 0 s left"]


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_bar_where_the_terminal_draws_one(
    term: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("NO_COLOR", "1")
    with stages() as begin:
        for stage in (Stage("fold [two]", 1, 3), "trace the base", Stage("fold three", 2, 3)):
            begin(stage)
    shown = capsys.readouterr().err
    assert ("3 of 3 fold three" in shown) == (term == "xterm")
    assert "\x1b[3" not in shown  # no colours
    assert term == "xterm" or not shown


def test_steps_count_stages_and_not_their_parts() -> None:
    told: list[Stage] = []

    def take(stage: str) -> None:
        assert isinstance(stage, Stage)
        told.append(stage)

    steps = Steps(take, 2)
    steps("load")
    steps("export")
    steps.part("export: trace")
    steps("one too many")
    assert [(str(s), s.done, s.total) for s in told] == [
        ("load", 0, 2),
        ("export", 1, 2),
        ("export: trace", 1, 2),
        ("one too many", 1, 2),
    ]


def test_quiet_leaves_out_remarks_and_keeps_errors() -> None:
    note("outside of a command it is printed")
    for arguments in (["health", "--port", "1", "--quiet"], ["-q", "health", "--port", "1"]):
        result = call(*arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: check whether 127.0.0.1:1 is live")
