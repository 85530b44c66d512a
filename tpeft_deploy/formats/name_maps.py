"""Alternative names of a base's modules: a table for each naming scheme of adapters."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Set
from typing import NamedTuple

__all__ = ["TABLES", "other_names"]

Rules = tuple[tuple[str, str], ...]


class Table(NamedTuple):
    """Alternative names of one naming scheme.

    Args:
        rules: pairs of a pattern of the base's name and a template of the alternative name; the first match applies.
        inner: further pairs for the rest of a name after a match of `rules`.
        names: module names; a base of this scheme has one of them; empty for any base.
        unless: module names; a base of this scheme has none of them.

    A template may use the pattern's groups, and the counts from `_places` in a UNet.
    """

    rules: Rules
    inner: Rules = ()
    names: frozenset[str] = frozenset()
    unless: frozenset[str] = frozenset()


# Map diffusers' names of a UNet to those of Stable Diffusion's original code (LDM, SGM), used by kohya and ComfyUI.
_SGM_UNET = Table(
    names=frozenset({"down_blocks.0.resnets.0"}),
    rules=(
        (r"conv_in$", "input_blocks.0.0"),
        (r"time_embedding\.linear_1$", "time_embed.0"),
        (r"time_embedding\.linear_2$", "time_embed.2"),
        (r"add_embedding\.linear_1$", "label_emb.0.0"),
        (r"add_embedding\.linear_2$", "label_emb.0.2"),
        (r"down_blocks\.\d+\.resnets\.\d+", "input_blocks.{number}.0"),
        (r"down_blocks\.\d+\.attentions\.\d+", "input_blocks.{number}.1"),
        (r"down_blocks\.\d+\.downsamplers\.0\.conv$", "input_blocks.{number}.0.op"),
        (r"mid_block\.resnets\.0", "middle_block.0"),
        (r"mid_block\.attentions\.0", "middle_block.1"),
        (r"mid_block\.resnets\.1", "middle_block.2"),
        (r"up_blocks\.\d+\.resnets\.\d+", "output_blocks.{number}.0"),
        (r"up_blocks\.\d+\.attentions\.\d+", "output_blocks.{number}.1"),
        (r"up_blocks\.\d+\.upsamplers\.0\.conv$", "output_blocks.{number}.{place}.conv"),
        (r"conv_norm_out$", "out.0"),
        (r"conv_out$", "out.2"),
    ),
    inner=(
        (r"^\.norm1$", ".in_layers.0"),
        (r"^\.conv1$", ".in_layers.2"),
        (r"^\.time_emb_proj$", ".emb_layers.1"),
        (r"^\.norm2$", ".out_layers.0"),
        (r"^\.conv2$", ".out_layers.3"),
        (r"^\.conv_shortcut$", ".skip_connection"),
    ),
)

# Attention layers under the names of diffusers' attention processors, which held the LoRA before 0.22.
_DIFFUSERS_PROCESSORS = Table(
    rules=(
        (r"(?P<owner>.+)\.to_(?P<which>[qkv])$", "{owner}.processor.to_{which}"),
        (r"(?P<owner>.+)\.to_out\.0$", "{owner}.processor.to_out"),
        (r"(?P<owner>.+)\.(?P<which>[qkv])_proj$", "{owner}.to_{which}"),
        (r"(?P<owner>.+)\.out_proj$", "{owner}.to_out"),
    ),
)

# CLIP's text encoder: its layers were inside `text_model` before transformers 5.24, and are at the top since.
_CLIP_TEXT = Table(
    names=frozenset({"embeddings.token_embedding", "text_model.embeddings.token_embedding"}),
    rules=(
        (r"(?=(?:embeddings|encoder|final_layer_norm)\b)", "text_model."),
        (r"text_model\.(?=.)", ""),
    ),
    unless=frozenset({"vision_model"}),  # with a vision model the short names would be ambiguous
)

TABLES = (_SGM_UNET, _DIFFUSERS_PROCESSORS, _CLIP_TEXT)


def other_names(modules: Set[str]) -> Mapping[str, Set[str]]:
    """Map alternative names to the base's modules; to several if a name is ambiguous.

    Args:
        modules: names of all modules of a base.
    """
    found: dict[str, set[str]] = defaultdict(set)
    counts = _places(modules)
    for table in TABLES:
        if (table.names and not table.names & modules) or table.unless & modules:
            continue
        for module in modules:
            other = _other(table, module, counts)
            if other is not None and other not in modules:
                found[other].add(module)
    return found


def _other(table: Table, module: str, counts: Mapping[str, Mapping[str, int]]) -> str | None:
    for pattern, template in table.rules:
        match = re.match(pattern, module)
        if match is None:
            continue
        end = module[match.end() :]
        for inner, replacement in table.inner:
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
