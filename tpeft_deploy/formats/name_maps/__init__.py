"""Alternative names of a base's modules, as tables: one file for each naming scheme of adapters.

A table has

    NAMES       module names; a base of this scheme has one of them; empty for any base
    UNLESS      module names; a base of this scheme has none of them
    RULES       pairs of a pattern of the base's name and a template of the alternative name; the first match applies
    INNER       further pairs for the rest of a name after a match of RULES

A template may use the pattern's groups, and the counts from `places` in a UNet.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Set
from typing import Protocol

from tpeft_deploy.formats.name_maps import clip_text, diffusers_processors, sgm_unet

__all__ = ["TABLES", "other_names"]

Rules = tuple[tuple[str, str], ...]


class Table(Protocol):
    """Protocol of a module with the constants above."""

    @property
    def NAMES(self) -> Set[str]:  # noqa: N802 - a constant of the module
        """Module names; a base must have one of them."""

    @property
    def UNLESS(self) -> Set[str]:  # noqa: N802
        """Module names; a base may have none of them."""

    @property
    def RULES(self) -> Rules:  # noqa: N802
        """Patterns and templates of the first part of a name."""

    @property
    def INNER(self) -> Rules:  # noqa: N802
        """Patterns and templates of the rest of a name."""


TABLES: tuple[Table, ...] = (sgm_unet, diffusers_processors, clip_text)


def other_names(modules: Set[str]) -> Mapping[str, Set[str]]:
    """Map alternative names to the base's modules; to several if a name is ambiguous.

    Args:
        modules: names of all modules of a base.
    """
    found: dict[str, set[str]] = defaultdict(set)
    counts = _places(modules)
    for table in TABLES:
        if (table.NAMES and not table.NAMES & modules) or table.UNLESS & modules:
            continue
        for module in modules:
            other = _other(table, module, counts)
            if other is not None and other not in modules:
                found[other].add(module)
    return found


def _other(table: Table, module: str, counts: Mapping[str, Mapping[str, int]]) -> str | None:
    for pattern, template in table.RULES:
        match = re.match(pattern, module)
        if match is None:
            continue
        end = module[match.end() :]
        for inner, replacement in table.INNER:
            end = re.sub(inner, replacement, end)
        return template.format(**match.groupdict(), **counts.get(match[0], {})) + end
    return None


def _places(modules: Set[str]) -> dict[str, dict[str, int]]:
    """For each layer of a UNet's blocks: its number over all blocks of its side, and its position within the number.

    A downsampler has a separate number; an upsampler has that of the last layer of its block, after the attention.
    """
    found: dict[str, dict[str, int]] = {}
    for side, first in (("down_blocks", 1), ("up_blocks", 0)):  # the input convolution is number 0
        number = first
        for block in _numbered(modules, side):
            for layer in _numbered(modules, f"{block}.resnets"):
                index = layer.rpartition(".")[2]
                found[layer] = found[f"{block}.attentions.{index}"] = {"number": number}
                number += 1
            if f"{block}.downsamplers.0" in modules:
                found[f"{block}.downsamplers.0.conv"] = {"number": number}
                number += 1
            place = 2 if f"{block}.attentions" in modules else 1
            found[f"{block}.upsamplers.0.conv"] = {"number": number - 1, "place": place}
    return found


def _numbered(modules: Set[str], name: str) -> list[str]:
    found: list[str] = []
    while f"{name}.{len(found)}" in modules:
        found.append(f"{name}.{len(found)}")
    return found
