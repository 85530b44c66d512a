"""What `tpeft-deploy formats` says is what the readers are."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner
from peft import PeftType

from tpeft_deploy.cli import main
from tpeft_deploy.formats import FORMATS, catalogue
from tpeft_deploy.formats.lycoris import refusals as lycoris_refusals
from tpeft_deploy.formats.peft.refusals import READ_TYPES

PAGE = Path(__file__).parent.parent.parent / "docs" / "formats.md"
STORED = {"low-rank", "dense", "gain", "override"}


def test_every_format_describes_itself() -> None:
    abouts = dict(catalogue.abouts())
    assert {*abouts, lycoris_refusals.read_refusals.name} == set(FORMATS)
    for name, about in abouts.items():
        assert about.library, name
        assert about.method, name
        assert about.layers, name
        assert about.base in ("yes", "no") or about.base.startswith("for "), name
        assert set(about.stored.split(", ")) <= STORED, name


def test_every_type_of_peft_is_read_or_refused_once() -> None:
    types = [kind for _, about in catalogue.abouts() for kind in about.types]
    assert len(types) == len(set(types))
    assert set(types) == READ_TYPES
    refused = {entry["what"].removeprefix("peft_type ") for entry in catalogue.document()["refused"]}
    assert not refused & READ_TYPES
    assert {kind.value for kind in PeftType} <= READ_TYPES | refused


def test_every_refusal_has_a_reason_and_a_way_out() -> None:
    for entry in catalogue.document()["refused"]:
        assert entry["reason"]
        assert entry["instead"].endswith(".")


def test_the_page_is_what_the_readers_say() -> None:
    assert PAGE.read_text() == catalogue.markdown(), "run `make formats`"


def test_the_command() -> None:
    shown = CliRunner().invoke(main, ["formats", "--json"])
    assert json.loads(shown.stdout) == catalogue.document()
    assert CliRunner().invoke(main, ["formats", "--markdown"]).stdout == catalogue.markdown()
    table = CliRunner().invoke(main, ["formats"]).stdout
    assert "peft-lora" in table
    assert "changes no weight" in table
