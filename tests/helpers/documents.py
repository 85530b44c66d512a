"""Blocks of code of pages, and a reader who follows them: Python in one session, commands one after another."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml

from tests.helpers.commands import succeed
from tests.helpers.server.processes import server
from tpeft_deploy.cli import main

__all__ = ["Block", "Reader", "blocks", "check", "indented", "reading"]

_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n\n?)?```(?P<language>\w+)(?: title=\"(?P<title>[^\"\n]+)\")?\n"
    r"(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)

_COMMANDS = ("tpeft-deploy", "pip", "make", "export", "curl", "docker", "kubectl", "helm", "opentelemetry-instrument")


@dataclass(frozen=True)
class Block:
    """A block of a page.

    Args:
        language: language of the block.
        text: lines of the block.
        title: file that the block is, if it has one.
        reason: why it cannot run here, as the comment before it says; None for a block that runs.
    """

    language: str
    text: str
    title: str | None = None
    reason: str | None = None


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page in order."""
    return [Block(m["language"], m["text"], m["title"], m["reason"]) for m in _BLOCK.finditer(page)]


def indented(page: str) -> list[Block]:
    """Return the blocks without a fence in order: commands, where they begin with one, else text."""
    plain = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    found = []
    for lines in re.findall(r"(?<=\n\n)((?:    [^\n]*\n|\n(?=    ))+)", plain):
        text = textwrap.dedent(lines).strip("\n") + "\n"
        command = re.match(rf"(?:{'|'.join(_COMMANDS)})\b", text.removeprefix(".venv/bin/"))
        found.append(Block("sh" if command else "text", text))
    return found


def check(block: Block) -> None:
    """Check what a block says without doing it: its syntax, and the options of `tpeft-deploy`.

    Raises:
        AssertionError: a language without a check.
        Exception: the syntax is wrong, or an option is unknown.
    """
    if block.language == "python":
        compile(block.text, "<page>", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "yaml":
        list(yaml.safe_load_all(block.text))
    elif block.language == "sh":
        done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
        assert not done.stderr, done.stderr
        for words in re.findall(
            r"(?:^|[\s(]|bin/)tpeft-deploy ([^&>|)\n]*)", block.text.replace("\\\n", " "), re.MULTILINE
        ):
            _check_options(shlex.split(words, comments=True))
    else:
        assert block.language in {"text", "nginx", "haproxy"}, f"nothing checks {block.language}"


def _check_options(words: list[str]) -> None:
    """Parse a command of `tpeft-deploy` as click does, without calling it; files need not exist."""
    command: click.Command = main
    while isinstance(command, click.Group) and words and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    assert not isinstance(command, click.Group) or not words or words[0].startswith("-"), f"no command {words[0]!r}"
    command.make_parser(click.Context(command)).parse_args(list(words))


class Reader:
    """Follows the blocks of a page in a directory.

    Args:
        place: working directory.
        names: namespace of the Python session.
        values: text of a page -> what stands there on this machine.
        open: closes what was started.
    """

    def __init__(self, place: Path, values: Mapping[str, str], open: ExitStack) -> None:
        self.place = place
        self.names: dict[str, Any] = {"__name__": "__page__"}
        self.printed = ""
        self.values, self._open = dict(values), open

    def follow(self, block: Block) -> None:
        """Do what a block says."""
        text = self._here(block.text)
        if block.title is not None:
            (self.place / block.title).write_text(text)
        elif block.language == "python":
            self._python(text)
        elif block.language == "sh":
            for line in text.replace("\\\n", " ").splitlines():
                self._command(line.partition(" # ")[0].strip())
        else:
            raise AssertionError(f"nobody can run a block of {block.language}: mark it with its reason")

    def _python(self, text: str) -> None:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of libraries, which a reader sees once
            exec(compile(text, "<page>", "exec"), self.names)
        self.printed += printed.getvalue()

    def _command(self, line: str) -> None:
        assigned = re.fullmatch(r"export (\w+)=(?:\$\((.+)\)|(\S+))", line)
        if assigned and assigned[2]:
            os.environ[assigned[1]] = succeed(*shlex.split(assigned[2])[1:]).strip()
        elif assigned:
            os.environ[assigned[1]] = assigned[3].strip("'\"")
        elif line.startswith("tpeft-deploy serve "):
            self._serve(shlex.split(line.removesuffix("&"))[2:])
        elif line.startswith("tpeft-deploy "):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.printed += succeed(*shlex.split(line)[1:])
        elif line:
            done = subprocess.run(["sh", "-ec", line], capture_output=True, text=True, check=False, timeout=100)
            assert done.returncode == 0, done.stderr
            self.printed += done.stdout

    def _serve(self, words: list[str]) -> None:
        """Start a server in place of the one of a page, on a free port."""
        port = words[words.index("--port") + 1] if "--port" in words else "8080"
        state = words[words.index("--state") + 1] if "--state" in words else "tpeft-state"
        arguments = [self.place / words[0], "--port", 0, "--state", self.place / state, "--provider", "cpu"]
        _, url = self._open.enter_context(server(*arguments))
        self.values[f"localhost:{port}"] = url.removeprefix("http://")

    def _here(self, text: str) -> str:
        for shown, own in self.values.items():
            text = text.replace(shown, own)
        return text


@contextlib.contextmanager
def reading(place: Path, values: Mapping[str, str] = {}) -> Iterator[Reader]:
    """A reader in a directory; what it starts ends with the context, and modules and variables are as before."""
    before, modules, path = dict(os.environ), set(sys.modules), list(sys.path)
    with ExitStack() as open, contextlib.chdir(place):
        sys.path.insert(0, str(place))
        try:
            yield Reader(place, values, open)
        finally:
            sys.path[:] = path
            os.environ.clear()
            os.environ.update(before)
            for name in set(sys.modules) - modules:
                if getattr(sys.modules[name], "__file__", None) and str(place) in str(sys.modules[name].__file__):
                    del sys.modules[name]
