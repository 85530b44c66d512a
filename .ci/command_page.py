"""Print docs/command-line.md, from what the commands say of themselves."""

import re
import sys
from collections.abc import Iterator

import click

from tpeft_deploy.cli import main

HEAD = """# Command line

Written by `make command-line`; `tpeft-deploy COMMAND --help` prints the same. Tables and answers go to stdout, progress
and remarks to stderr: a bar with the time left on a terminal, otherwise a line every few seconds of commands that take
long. `NO_COLOR` and `TERM=dumb` are followed. Exit codes: 0 success, 1 failure, 2 wrong usage; a failure is one line
that begins with `Error: `.

Every command takes:

| option | use |
|---|---|
"""

COMPLETION = """
## Completion in the shell

`tpeft-deploy completion` prints a script that completes commands, options, files, and the tasks of a bundle that was
named before:

    echo 'eval "$(tpeft-deploy completion bash)"' >> ~/.bashrc
    echo 'eval "$(tpeft-deploy completion zsh)"' >> ~/.zshrc
    tpeft-deploy completion fish > ~/.config/fish/completions/tpeft-deploy.fish
"""


def page() -> str:
    """The whole page."""
    common = [parameter for parameter in main.params if parameter.name in ("quiet", "debug")]
    text = HEAD + "".join(row for option in common for row in _row(option, click.Context(main)))
    text += "| `-h`, `--help` | Show the options of a command. |\n"
    for path, command in _commands(main, "tpeft-deploy"):
        text += _section(path, command)
    return text + COMPLETION


def _commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    for name, command in sorted(group.commands.items()):
        yield f"{path} {name}", command
        if isinstance(command, click.Group):
            yield from _commands(command, f"{path} {name}")


def _section(path: str, command: click.Command) -> str:
    context = click.Context(command, info_name=path)
    usage = " ".join(command.collect_usage_pieces(context))
    text = f"\n## {path}\n\n    {path} {usage}\n\n{_help(command.help or '')}\n"
    rows = [
        row
        for parameter in command.params
        if isinstance(parameter, click.Option) and parameter.name not in ("quiet", "debug")
        for row in _row(parameter, context)
    ]
    return text + (f"\n| option | use |\n|---|---|\n{''.join(rows)}" if rows else "")


def _help(text: str) -> str:
    """Help as paragraphs; what click must not rewrap, after its mark, is a block of code."""
    paragraphs = []
    for part in re.split(r"\n\s*\n", text.strip()):
        lines = part.split("\n")
        if lines[0].strip() == "\b":
            paragraphs.append("\n".join(f"    {line.strip()}" for line in lines[1:]))
        else:
            paragraphs.append(_escaped(" ".join(part.split())))
    return "\n\n".join(paragraphs)


def _row(parameter: click.Parameter, context: click.Context) -> Iterator[str]:
    record = parameter.get_help_record(context)
    if record is not None:
        option, said = record
        yield f"| `{option.replace('|', chr(92) + '|')}` | {_escaped(said)} |\n"


def _escaped(text: str) -> str:
    return " ".join(re.sub(r"(?<!`)([<>|*])", r"\\\1", text).split())


if __name__ == "__main__":
    sys.stdout.write(page())
