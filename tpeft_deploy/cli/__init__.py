"""The command line, `tpeft-deploy`: a command parses its options, calls one function, and prints the result.

Commands import large packages inside their functions, so that `--help` and usage errors stay fast.
"""

import click

from tpeft_deploy.cli.adapter import adapter
from tpeft_deploy.cli.bench import bench
from tpeft_deploy.cli.cluster import cluster
from tpeft_deploy.cli.completion import completion
from tpeft_deploy.cli.convert import convert
from tpeft_deploy.cli.doctor import doctor
from tpeft_deploy.cli.export import export
from tpeft_deploy.cli.formats import formats
from tpeft_deploy.cli.generate import generate
from tpeft_deploy.cli.inspect import inspect
from tpeft_deploy.cli.keys import keys
from tpeft_deploy.cli.quickstart import quickstart
from tpeft_deploy.cli.run import run
from tpeft_deploy.cli.serve import health, serve
from tpeft_deploy.cli.tool import Tool
from tpeft_deploy.cli.verify import verify
from tpeft_deploy.cli.version import version_option

__all__ = ["main"]


@click.group(cls=Tool, context_settings={"help_option_names": ["-h", "--help"]})
@version_option
def main() -> None:
    """Deploy tensor adapters: one base model, many tasks, with ONNX Runtime.

    Every command that prints a table takes --json; progress and logs go to stderr; --quiet
    leaves out progress and remarks.
    Exit codes: 0 success, 1 failure, 2 usage error.
    """


for command in (
    inspect,
    formats,
    convert,
    export,
    adapter,
    verify,
    run,
    generate,
    bench,
    serve,
    health,
    cluster,
    keys,
    quickstart,
    doctor,
    completion,
):
    main.add_command(command)
