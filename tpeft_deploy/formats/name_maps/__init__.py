"""Other names of a base's modules, as tables: one file for each scheme of names that adapters are written in.

A table has

    NAMES       module names, one of which a base of this scheme has; empty for any base
    UNLESS      module names that it does not have
    RULES       pairs of a pattern of the base's own name and the template of the other one, the first that matches
    INNER       further patterns and templates, for the end of a name whose beginning a rule of RULES gave

A template may name the pattern's groups, and what `places` counts in a UNet.
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
    """The constants above, as a module of Python has them."""

    @property
    def NAMES(self) -> Set[str]:  # noqa: N802 - a constant of the module
        """Module names, one of which a base must have."""

    @property
    def UNLESS(self) -> Set[str]:  # noqa: N802
        """Module names, none of which a base may have."""

    @property
    def RULES(self) -> Rules:  # noqa: N802
        """Patterns and templates of beginnings."""

    @property
    def INNER(self) -> Rules:  # noqa: N802
        """Patterns and templates of ends."""


TABLES: tuple[Table, ...] = (sgm_unet, diffusers_processors, clip_text)


def other_names(modules: Set[str]) -> Mapping[str, Set[str]]:
    """Names that adapters may give to modules -> the modules; several where a name does not tell.

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
    """For each layer of a UNet's blocks: its number, counted over all blocks of its side, and its place beside others.

    A downsampler has a number of its own; an upsampler has that of the last layer of its block, behind the attention.
    """
    found: dict[str, dict[str, int]] = {}
    for side, first in (("down_blocks", 1), ("up_blocks", 0)):  # the convolution of the input is number 0
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
