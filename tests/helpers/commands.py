"""Calls of the command line in the test process, with checks of success or failure."""

from __future__ import annotations

from click.testing import CliRunner, Result

from tpeft_deploy.cli import main

BASE = "tests.helpers.nets:conv_net"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def succeed(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def fail(*arguments: object, code: int = 1) -> str:
    """Stderr of a command that fails as it should: one line, no traceback, nothing but a reason on stdout."""
    result = call(*arguments)
    assert result.exit_code == code, result.output
    assert ("reason" in result.stdout) if (code, arguments[0]) == (1, "inspect") else not result.stdout
    lines = result.stderr.splitlines()
    if code == 1:
        assert len(lines) == 1, lines
        assert lines[0].startswith("Error: ")
        assert "unexpected" not in lines[0]
    return lines[-1]
