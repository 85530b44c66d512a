"""Attention layers under the names of diffusers' attention processors, which held the LoRA before 0.22."""

__all__ = ["INNER", "NAMES", "RULES", "UNLESS"]

NAMES = frozenset[str]()  # any base with attention layers
UNLESS = frozenset[str]()

RULES = (
    (r"(?P<owner>.+)\.to_(?P<which>[qkv])$", "{owner}.processor.to_{which}"),
    (r"(?P<owner>.+)\.to_out\.0$", "{owner}.processor.to_out"),
    (r"(?P<owner>.+)\.(?P<which>[qkv])_proj$", "{owner}.to_{which}"),
    (r"(?P<owner>.+)\.out_proj$", "{owner}.to_out"),
)

INNER: tuple[tuple[str, str], ...] = ()
