from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
from click.testing import CliRunner, Result
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import tpeft_deploy.runtime
from tests.helpers.runtime.decoders import FakeDecoder, FakeVersions, alone
from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.bundle.text_files import TextFacts
from tpeft_deploy.cli import main
from tpeft_deploy.errors import UnknownTask
from tpeft_deploy.runtime.generation.handle import GenerationRequest, Handle
from tpeft_deploy.runtime.generation.loop import Generator
from tpeft_deploy.runtime.generation.sampling import Sampling
from tpeft_deploy.runtime.text.model_text import ModelText

START = [3]
LETTERS = "abcdefghijklmnopqrstuvwxyz.,!?ĠABCDEFGH"  # and one token that stops
TEMPLATE = "{% for m in messages %}{{ m.role }}.{{ m.content }}.{% endfor %}"


def made_text() -> ModelText:
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate([*LETTERS, "</s>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    return ModelText(tokenizer.to_str(), TextFacts(templates={"default": TEMPLATE}, stop_tokens=(39,)))


class FakeRuntime:
    provider, provider_reason = "cpu", "a test"

    def __init__(self, _path: Path, **options: Any) -> None:
        assert options["provider"] == "auto"
        self._generator = Generator(FakeDecoder(3), FakeVersions())
        self.requests: list[GenerationRequest] = []

    async def start(self, request: GenerationRequest) -> list[Handle]:
        if request.inputs is not None:  # the bundle of an encoder-decoder
            request = replace(request, prompt=START)
        if request.task not in ("base", "one", "two"):
            raise UnknownTask("generate", got=repr(request.task))
        return self._generator.submit_choices(request)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._generator.close()


@pytest.fixture(autouse=True)
def _faked(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"bundle": with_text(), "encoder-decoder": encoder_decoder()}
    monkeypatch.setattr(Bundle, "open", lambda path: found.get(path.name) or without_text())
    monkeypatch.setattr(ModelText, "open", lambda _bundle: made_text())
    monkeypatch.setattr(tpeft_deploy.runtime, "Runtime", FakeRuntime)


def without_text() -> Any:
    return SimpleNamespace(manifest=SimpleNamespace(text={}, decoder=None), components={})


def with_text() -> Any:
    return SimpleNamespace(manifest=SimpleNamespace(text={"tokenizer.json": None}, decoder=None), components={})


def encoder_decoder() -> Any:
    encoder = SimpleNamespace(decoder=None, inputs=(SimpleNamespace(name="input_ids"),))
    decoder = SimpleNamespace(decoder=SimpleNamespace(memory=("cross.0.key",), source="encoder"), text={"a": None})
    parts = {"encoder": SimpleNamespace(manifest=encoder), "decoder": SimpleNamespace(manifest=decoder)}
    return SimpleNamespace(manifest=SimpleNamespace(text={}), components=parts)


def run(*args: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, ["generate", *map(str, args)], input=stdin)


def expected(prompt: str, task: str = "base", most: int = 128, **sampling: Any) -> tuple[list[int], str]:
    text = made_text()
    how = Sampling(stop_tokens=[39], **sampling)
    tokens = [token.id for token in alone(GenerationRequest(text.encode(prompt), most, how, task))]
    return tokens, text.decode(tokens)


def test_the_text_of_one_prompt_is_written_as_it_comes() -> None:
    result = run("bundle", "--prompt", "hello", "--task", "one", "--max-new-tokens", 12)
    assert result.exit_code == 0, result.output
    assert result.stdout == expected("hello", "one", 12)[1] + "\n"
    assert "provider: cpu (a test)" in result.stderr


def test_a_prompt_is_read_from_stdin_and_sampled_as_asked() -> None:
    args = ["--temperature", 0.7, "--top-p", 0.9, "--top-k", 9, "--min-p", 0.01, "--seed", 5, "--max-new-tokens", 9]
    result = run("bundle", "--prompt", "-", *args, "--repetition-penalty", 1.1, stdin="hi")
    how: dict[str, Any] = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 9,
        "min_p": 0.01,
        "seed": 5,
        "repetition_penalty": 1.1,
    }
    assert result.stdout == expected("hi", most=9, **how)[1] + "\n"


def test_many_prompts_each_on_its_task_give_one_document(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '"abc"\n\n{"prompt": "de", "task": "two", "max_new_tokens": 5}\n'
        '{"messages": [{"role": "user", "content": "x"}], "task": "one"}\n{"tokens": [1, 2]}\n'
    )
    result = run("bundle", "--prompts", file, "--json", "--max-new-tokens", 20)
    document = json.loads(result.stdout)
    assert (document["provider"], document["path"]) == ("cpu", "bundle")
    wanted = [("abc", "base"), ("de", "two"), ("user.x.", "one"), ("bc", "base")]
    for (prompt, task), row in zip(wanted, document["results"], strict=True):
        tokens, text = expected(prompt, task, 20)
        reason = "stop" if tokens[-1] == 39 else "length"
        number = len(made_text().encode(prompt))
        assert row == {
            "task": task,
            "text": text,
            "tokens": tokens,
            "finish_reason": reason,
            "prompt_tokens": number,
        }


def test_one_prompt_is_answered_by_several_tasks_side_by_side() -> None:
    result = run("bundle", "--prompt", "abc", "--chat", "--tasks", "one,two", "--max-new-tokens", 7)
    texts = [expected("user.abc.", task, 7)[1] for task in ("one", "two")]
    assert result.stdout == f"--- 1, one\n{texts[0]}\n--- 2, two\n{texts[1]}\n"


def test_an_encoder_decoder_reads_prompts_with_its_encoder(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"hello"\n{"tokens": [1, 2]}\n')
    result = run("encoder-decoder", "--prompts", file, "--json", "--max-new-tokens", 12)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["results"]
    for row, source in zip(rows, (made_text().encode("hello"), [1, 2]), strict=True):
        how, inputs = Sampling(stop_tokens=[39]), {"input_ids": source}
        tokens = [token.id for token in alone(GenerationRequest(START, 12, how, "base", inputs=inputs))]
        assert (row["tokens"], row["prompt_tokens"]) == (tokens, len(source))
        assert row["text"] == made_text().decode(tokens)


def test_a_stop_text_ends_the_text_before_it() -> None:
    whole = expected("hello", most=30)[1]
    result = run("bundle", "--prompt", "hello", "--max-new-tokens", 30, "--stop", whole[5:7], "--stop", "zzzz")
    assert result.stdout == whole[: whole.index(whole[5:7])] + "\n"


def test_a_bundle_without_text_takes_and_gives_tokens(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"tokens": [1, 2]}\n')
    result = run("other", "--prompts", file, "--max-new-tokens", 4)
    how = GenerationRequest([1, 2], 4, Sampling(), "base")
    assert result.stdout == " ".join(str(token.id) for token in alone(how)) + "\n"
    result = run("other", "--prompt", "text")
    assert result.exit_code == 1
    assert "the bundle has no tokenizer" in result.stderr


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        ([], 2, "Give one of --prompt and --prompts"),
        (["--prompt", "a", "--prompts", "b"], 2, "Give one of --prompt and --prompts"),
        (["--prompt", "a", "--task", "one", "--tasks", "one,two"], 2, "exclude each other"),
        (["--prompt", "a", "--task", "three"], 1, "'three'"),
        (["--prompt", "a", "--tasks", "one,three"], 1, "'three'"),
        (["--prompt", "a", "--temperature", "-1"], 1, "temperature"),
        (["--prompt", "a", "--max-new-tokens", "900"], 1, "expected at most 129 tokens"),
        (["--prompt", ""], 1, "a list of at least one token"),
        (["--prompts", "gone.jsonl"], 1, "read prompts gone.jsonl"),
    ],
)
def test_what_does_not_fit_is_said_on_one_line(args: list[str], code: int, said: str) -> None:
    result = run("bundle", *args)
    assert result.exit_code == code
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("{}", "line 1: expected one of prompt, messages and tokens"),
        ('"a"\n{"prompt": 3}', "line 2"),
        ("oops", "line 1"),
        ('{"prompt": "a", "more": ' + "[" * 5000, "line 1"),
        ('{"prompts": "a"}', "unknown field"),
        ("\n", "at least one prompt"),
        ('"a"\n"b"\n"c"', "2 tasks for 3 prompts"),
    ],
)
def test_lines_that_are_no_prompts_are_refused(tmp_path: Path, lines: str, said: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(lines)
    result = run("bundle", "--prompts", file, *(["--tasks", "one,two"] if "c" in lines else []))
    assert result.exit_code in (1, 2)
    assert said in result.stderr
