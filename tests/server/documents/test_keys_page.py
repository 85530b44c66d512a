"""docs/keys.md, followed as printed by an operator and a tenant."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.helpers.documents import blocks, reading
from tpeft_deploy import Bundle
from tpeft_deploy.runtime.server.tenancy.quotas import Quota

PAGE = (Path(__file__).parents[3] / "docs" / "keys.md").read_text()


def test_an_operator_follows_the_page(talking: Bundle, tmp_path: Path) -> None:
    shutil.copytree(talking.path, tmp_path / "bundle")
    with reading(tmp_path) as reader:
        found = blocks(PAGE)
        for block in found:
            if "KEY_ID" in block.text:  # as the reader has it from the list
                [reader.values["KEY_ID"]] = re.findall(r"^(\S+) +acme ", reader.printed, re.MULTILINE)
            reader.follow(block)
        listed = reader.names["operator"].keys()
        keys = {record["id"]: record for record in listed}
        assert keys[reader.values["KEY_ID"]]["revoked"]
        assert keys[reader.names["made"]["id"]]["revoked"]
        answers = reader.names["answers"]
        reader.names["operator"].close()
    assert [answer.status_code for answer in answers] == [200, 429]
    assert 0 < int(answers[1].headers["retry-after"]) <= 100


def test_the_table_has_every_quota() -> None:
    table = PAGE.partition("## Quotas\n")[2].partition("\n\nA tenant without")[0]
    assert {name for line in table.splitlines()[3:] for name in re.findall(r"`(\w+)`", line.split("|")[1])} == set(
        Quota.__dataclass_fields__
    )
