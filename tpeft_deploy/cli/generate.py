"""`generate`: continue prompts with a bundle's language model, each on its task."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click
import msgspec

from tpeft_deploy.cli.completion import task_names
from tpeft_deploy.cli.console import json_option, provider_option
from tpeft_deploy.cli.progress_display import stages
from tpeft_deploy.cli.tool import Command, note
from tpeft_deploy.errors import InputError
from tpeft_deploy.progress import Progress, Stage, silent

if TYPE_CHECKING:
    from tpeft_deploy.bundle.directory import Bundle
    from tpeft_deploy.runtime.generation.handle import Generated, GenerationRequest, Handle
    from tpeft_deploy.runtime.generation.sampling import Token
    from tpeft_deploy.runtime.text.images import ImageFile
    from tpeft_deploy.runtime.text.model_text import ModelText

__all__ = ["generate"]

_MOST_AT_ONCE = 256  # sequences handed to the runtime, which lets a bounded number wait
_NEW_TOKENS = 128
_SOURCE = "input_ids"  # input of an encoder of text


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    """A line of --prompts."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tokens: list[int] | None = None
    task: str | None = None
    max_new_tokens: int | None = None
    images: list[str] = []


class _Runtime(Protocol):
    async def start(self, request: GenerationRequest) -> list[Handle]: ...


@click.command(cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--task", shell_complete=task_names, help="Task of all prompts; the base by default.")
@click.option(
    "--tasks",
    shell_complete=task_names,
    help="Tasks, separated by commas: one per prompt, or several for one prompt.",
)
@click.option("--prompt", help="Text to continue; - reads it from stdin.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help='A JSON Lines file: per line a text, or {"prompt" | "messages" | "tokens", "task", "max_new_tokens", '
    '"images"}.',
)
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Image of the prompt, in the place of its next image token; may be repeated.",
)
@click.option("--chat", is_flag=True, help="Make a message of each prompt, by the model's chat template.")
@click.option("--max-new-tokens", type=click.IntRange(1), help=f"Tokens to generate at most; {_NEW_TOKENS} by default.")
@click.option("--temperature", type=float, help="Divisor of the logits; 0 takes the most probable tokens.")
@click.option("--top-k", type=int, help="Number of most probable tokens to choose from.")
@click.option("--top-p", type=float, help="Probability mass of the tokens to choose from.")
@click.option("--min-p", type=float, help="Smallest probability, relative to the most probable token's.")
@click.option("--repetition-penalty", type=float, help="Divisor of the logits of tokens that occurred.")
@click.option("--seed", type=int, help="Seed of the random numbers.")
@click.option("--stop", multiple=True, help="Text that ends a sequence, and is left out; may be repeated.")
@provider_option
@json_option
def generate(
    bundle: Path,
    task: str | None,
    tasks: str | None,
    prompt: str | None,
    prompts: Path | None,
    images: tuple[Path, ...],
    chat: bool,
    max_new_tokens: int | None,
    stop: tuple[str, ...],
    provider: str,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue prompts with the language model of BUNDLE; of an encoder-decoder, prompts are texts for the encoder.

    The text of one prompt is written to stdout as it comes.  Sampling is by the model's defaults where no option
    says otherwise.
    """
    from tpeft_deploy.bundle.directory import Bundle
    from tpeft_deploy.runtime import Runtime
    from tpeft_deploy.runtime.text.images import with_images
    from tpeft_deploy.runtime.text.model_text import ModelText

    if (prompt is None) == (prompts is None):
        raise click.UsageError("Give one of --prompt and --prompts.")
    if task is not None and tasks is not None:
        raise click.UsageError("--task and --tasks exclude each other.")
    if images and prompt is None:
        raise click.UsageError("--image belongs to --prompt; the lines of --prompts have images.")
    lines = _with_tasks(_lines(prompt, prompts, [str(image) for image in images]), task, tasks)
    opened = Bundle.open(bundle)
    decoding = _decoding(opened)
    text = ModelText.open(decoding) if decoding.manifest.text else None
    changes = {**sampling, "stop_strings": list(stop) or None}
    encoded = _reads_text(opened)
    requests = [_request(line, text, chat, max_new_tokens, changes, encoded=encoded) for line in lines]
    requests = [
        with_images(request, opened, _contents(line.images)) for request, line in zip(requests, lines, strict=True)
    ]
    alone = len(requests) == 1 and not as_json and text is not None
    display = nullcontext(silent) if alone else stages()
    with Runtime(bundle, provider=provider, preload=False, own_copy=False) as runtime, display as progress:
        served: Any = runtime
        results = asyncio.run(_run(served, requests, _write if alone else None, progress))
        note(f"provider: {runtime.provider} ({runtime.provider_reason})")
    _show(bundle, runtime.provider, requests, results, as_json)


def _contents(paths: Sequence[str]) -> list[ImageFile]:
    from tpeft_deploy.runtime.text.images import ImageFile

    found = []
    for path in paths:
        doing = f"read image {path}"
        try:
            found.append(ImageFile(Path(path).read_bytes(), doing))
        except OSError as error:
            raise InputError(doing, expected="an image file", got=str(error)) from error
    return found


def _decoding(bundle: Bundle) -> Bundle:
    """The component with a decoder; the bundle where none has one."""
    return next((own for own in bundle.components.values() if own.manifest.decoder is not None), bundle)


def _reads_text(bundle: Bundle) -> bool:
    """Whether an encoder reads the tokens of prompts, and the decoder begins with a token of the model."""
    ports = _decoding(bundle).manifest.decoder
    if ports is None or not ports.memory:
        return False
    return _SOURCE in [port.name for port in bundle.components[ports.source].manifest.inputs]


def _lines(prompt: str | None, path: Path | None, images: list[str]) -> list[_Line]:
    if path is None:
        return [_Line(sys.stdin.read() if prompt == "-" else prompt, images=images)]
    doing = f"read prompts {path}"
    try:
        texts = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(doing, expected="a JSON Lines file", got=str(error)) from error
    lines = []
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            found = msgspec.json.decode(text, type=str | _Line)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise InputError(f"{doing}, line {number}", problem=str(error)) from error
        line = _Line(found) if isinstance(found, str) else found
        if sum(part is not None for part in (line.prompt, line.messages, line.tokens)) != 1:
            raise InputError(f"{doing}, line {number}", expected="one of prompt, messages and tokens", got=text[:80])
        lines.append(line)
    if not lines:
        raise InputError(doing, expected="at least one prompt", got="none")
    return lines


def _with_tasks(lines: list[_Line], task: str | None, tasks: str | None) -> list[_Line]:
    names = tasks.split(",") if tasks is not None else [task] * len(lines)
    if len(lines) == 1:
        lines = lines * len(names)
    if len(names) != len(lines):
        raise click.UsageError(f"--tasks names {len(names)} tasks for {len(lines)} prompts.")
    return [
        msgspec.structs.replace(line, task=name or line.task or "base") for line, name in zip(lines, names, strict=True)
    ]


def _request(
    line: _Line, text: ModelText | None, chat: bool, most: int | None, changes: dict[str, Any], *, encoded: bool
) -> GenerationRequest:
    from tpeft_deploy.runtime.generation.handle import GenerationRequest
    from tpeft_deploy.runtime.generation.sampling import Sampling

    if text is None and line.tokens is None:
        raise InputError(
            "read a prompt",
            problem="the bundle has no tokenizer",
            fix="Give tokens in --prompts, or export a directory with a tokenizer.",
        )
    content: object = line.prompt
    if line.images:
        content = [*({"type": "image"} for _ in line.images), {"type": "text", "text": line.prompt}]
    messages = [{"role": "user", "content": content}] if chat and line.prompt is not None else line.messages
    tokens = line.tokens if line.tokens is not None else []
    if text is not None and line.tokens is None:
        tokens = text.chat(messages) if messages is not None else text.encode(line.prompt or "")
    default = _NEW_TOKENS if text is None else min(text.facts.max_new_tokens or _NEW_TOKENS, _NEW_TOKENS)
    before = [] if encoded or messages is not None else tokens  # an answer begins a text
    return GenerationRequest(
        () if encoded else tokens,
        most or line.max_new_tokens or default,
        Sampling(**{k: v for k, v in changes.items() if v is not None}) if text is None else text.sampling(**changes),
        task=line.task,
        text=None if text is None else text.detokeniser(before),
        inputs={_SOURCE: tokens} if encoded else None,
    )


async def _run(
    runtime: _Runtime,
    requests: Sequence[GenerationRequest],
    on_token: Callable[[Token], None] | None,
    progress: Progress,
) -> list[Generated]:
    """Run requests together; the first error ends all."""
    room = asyncio.Semaphore(_MOST_AT_ONCE)
    handles: list[Handle] = []
    done = 0

    async def run(request: GenerationRequest) -> Generated:
        nonlocal done
        async with room:
            [handle] = await runtime.start(request)
            handles.append(handle)
            if on_token is not None:
                async for token in handle:
                    on_token(token)
            result = await asyncio.wrap_future(handle.future)
        done += 1
        progress(Stage("generate", done, len(requests)))
        return result

    if on_token is None:
        progress(Stage("generate", 0, len(requests)))
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run(request)) for request in requests]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        for handle in handles:
            handle.cancel()
    return [task.result() for task in tasks]


def _write(token: Token) -> None:
    click.echo(token.text, nl=False)


def _read(request: GenerationRequest) -> Sequence[int]:
    """Tokens of the prompt as it was given."""
    given: Any = request.inputs
    tokens: Sequence[int] = request.prompt if given is None or _SOURCE not in given else given[_SOURCE]
    return tokens


def _show(
    bundle: Path, provider: str, requests: Sequence[GenerationRequest], results: Sequence[Generated], as_json: bool
) -> None:
    rows: list[dict[str, Any]] = [
        {
            "task": request.task,
            "text": result.text if request.text is not None else None,
            "tokens": [token.id for token in result.tokens],
            "finish_reason": result.reason,
            "prompt_tokens": len(_read(request)),
        }
        for request, result in zip(requests, results, strict=True)
    ]
    if as_json:
        click.echo(json.dumps({"path": str(bundle), "provider": provider, "results": rows}, indent=1))
        return
    for number, row in enumerate(rows, 1):
        shown = row["text"] if row["text"] is not None else " ".join(map(str, row["tokens"]))
        if len(rows) > 1:
            click.echo(f"--- {number}, {row['task']}\n{shown}")
        else:
            click.echo("" if row["text"] is not None else shown)  # the text is there already
