"""Every tutorial, followed as printed, and what its reader has at the end; of other pages, the syntax of each block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import yaml

from tests.helpers.documents import Block, Reader, blocks, check, indented, reading
from tests.helpers.server.postgres import Postgres
from tpeft_deploy import Bundle

ROOT = Path(__file__).parents[3]
PAGES = ROOT / "docs" / "tutorials"
OTHERS = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.parent != PAGES)]


def follow(name: str, place: Path, values: dict[str, str] | None = None) -> dict[str, Any]:
    """Names of the page's Python session, and what was printed as `printed`."""
    with reading(place, values or {}) as reader:
        for block in blocks((PAGES / f"{name}.md").read_text()):
            if block.reason is None:
                reader.follow(block)
        return reader.names | {"printed": reader.printed}


def test_every_tutorial_is_followed_here() -> None:
    here = {"train-export-serve", "your-model", "kohya", "styles", "heads", "many-machines"}
    assert {page.stem for page in PAGES.glob("*.md")} == here


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_every_block_can_run_or_says_why_not(page: Path) -> None:
    text = page.read_text()
    found = blocks(text)
    assert len(found) == text.count("\n```") / 2
    assert text.count("<!-- not run: ") == sum(block.reason is not None for block in found)
    assert {block.language for block in found} <= {"python", "sh"}
    for line in text.splitlines():  # blocks without a fence say what to install, and nothing else
        assert not line.startswith("    ") or line.startswith("    pip install ") or "```" in text.split(line)[0]


@pytest.mark.parametrize("page", OTHERS, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_of_other_pages_have_the_syntax_of_their_language(page: Path) -> None:
    text = page.read_text()
    found = blocks(text)
    assert len(found) == text.count("\n```") / 2, "a fence without a language"
    usage = page.name == "command-line.md"  # generated: how to use each command, with the names of options for options
    for block in found + ([] if usage else indented(text)):
        check(block)


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("python", "def f(:"),
        ("sh", "if true"),
        ("sh", "tpeft-deploy serve bundle --prot 8080"),
        ("sh", "export KEY=$(tpeft-deploy key create)"),
        ("json", "{'a': 1}"),
        ("yaml", "a: [1"),
        ("cobol", ""),
    ],
)
def test_a_check_of_a_block_can_fail(language: str, text: str) -> None:
    with pytest.raises((SyntaxError, ValueError, AssertionError, click.UsageError, yaml.YAMLError)):
        check(Block(language, text))


def test_commands_without_a_fence_are_found() -> None:
    page = "\nText:\n\n    tpeft-deploy doctor\n\n    tpeft-deploy doctor --json\n\n"
    page += "```sh\nx\n\n    y\n```\n\n    a + b\n\nEnd\n"
    commands, text = indented(page)
    assert (commands.language, commands.text.count("doctor")) == ("sh", 2)
    assert (text.language, text.text) == ("text", "a + b\n")


def test_train_export_serve(tmp_path: Path) -> None:
    names = follow("train-export-serve", tmp_path)
    assert names["bundle"].manifest.rows == "each"
    right = [float(line.split()[1].rstrip("%")) for line in names["printed"].splitlines() if line.endswith("% right")]
    assert len(right) == 3
    assert min(right) > 60
    served, mixed = names["answers"]["logits"], names["mixed"]["logits"]
    np.testing.assert_allclose(served, mixed, rtol=1e-4, atol=1e-4)


def test_your_model(tmp_path: Path) -> None:
    names = follow("your-model", tmp_path)
    difference = np.abs(names["got"][[0, 2]] - names["wanted"][[0, 2]]).max()
    assert difference < 1e-5
    assert np.abs(names["got"][1] - names["wanted"][1]).max() > 1000 * difference
    assert set(Bundle.open(tmp_path / "bundle").tasks) == {"news", "mail"}


def test_kohya(tmp_path: Path) -> None:
    names = follow("kohya", tmp_path)
    ink, pixel, blend, base = names["noise"]
    assert (tmp_path / "ink.onnx").is_file()
    assert (tmp_path / "ink-peft" / "adapter_config.json").is_file()
    assert len({row.tobytes() for row in (ink, pixel, blend, base)}) == 4


@pytest.mark.thorough
def test_styles(tmp_path: Path) -> None:
    names = follow("styles", tmp_path)
    texts, tokenizer, rows = names["texts"], names["tokenizer"], names["rows"]
    for style, row in list(zip(names["styles"], rows, strict=True))[1:3]:
        assert f"the train {tokenizer.decode(row)}" in f"{texts[style]} <end>", style
    assert names["said"][0].strip() == tokenizer.decode(rows[1], skip_special_tokens=True)


@pytest.mark.thorough
def test_heads(tmp_path: Path) -> None:
    names = follow("heads", tmp_path)
    assert [scores.shape[1] for scores in names["found"]["scores"]] == [2, 7, 3]
    assert names["difference"] < 1e-5
    assert names["bundle"].manifest.rows == "each"


@pytest.mark.thorough
def test_many_machines(tmp_path: Path, postgres: Postgres) -> None:
    (tmp_path / "store").mkdir()
    shown = "postgresql+psycopg://USER:PASSWORD@HOST/DATABASE"
    values = {shown: postgres.empty(), "file:///srv/tpeft-store": (tmp_path / "store").as_uri()}
    names = follow("many-machines", tmp_path, values)
    assert not np.abs(names["here"] - names["there"]).max()
    assert list((tmp_path / "store").rglob("*.safetensors"))


def test_a_reader_can_fail(tmp_path: Path) -> None:
    page = '```sh title="no"\nx\n```\n\n```sh\nfalse\n```\n\n<!-- not run: needs a GPU -->\n```python\nraise X\n```\n'
    file, command, skipped = blocks(page)
    assert (file.title, skipped.reason, command.reason) == ("no", "needs a GPU", None)
    with reading(tmp_path) as reader:
        assert isinstance(reader, Reader)
        with pytest.raises(AssertionError):
            reader.follow(command)
        with pytest.raises(NameError):
            reader.follow(skipped)
