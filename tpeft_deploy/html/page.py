"""Layout of the HTML reports: one self-contained file, light and dark, with fixed colours for the forms."""

from __future__ import annotations

from html import escape

__all__ = ["COLOURS", "FORM_COLOURS", "document", "scientific", "tiles"]

FORM_COLOURS = {
    "base": "#94a3b8",
    "folded": "#2563eb",
    "factored": "#0891b2",
    "factored.cpu": "#0e7490",
    "factored.cuda": "#7dd3fc",
    "banked": "#059669",
    "banked.cpu": "#166534",
    "banked.cuda": "#65a30d",
    "mixed rows": "#d97706",
    "padded": "#db2777",
}

# CSS variables of the page, and of SVG files, in both themes.
COLOURS = """
:root { color-scheme: light dark; --paper: #f8fafc; --card: #fff; --ink: #0f172a; --soft: #64748b; --line: #e2e8f0;
  --good: #047857; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) { :root { --paper: #0b1120; --card: #131c31; --ink: #e2e8f0; --soft: #94a3b8;
  --line: #2b3852; --good: #34d399; --bad: #f87171; } }
"""

_STYLE = """\
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 48px 20px 64px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 8px; }
h2 { font-size: 18px; letter-spacing: -0.01em; margin: 0 0 4px; }
p { margin: 0 0 16px; } .soft { color: var(--soft); } .soft.small { font-size: 14px; }
.tiles, .thirds { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); }
.thirds { grid-template-columns: repeat(auto-fit, minmax(290px, 1fr)); }
.tile, section { background: var(--card); border: 1px solid var(--line); border-radius: 14px; }
.tile { padding: 16px 20px; } .tile b { display: block; font-size: 26px; letter-spacing: -0.02em; }
.tile span { color: var(--soft); font-size: 14px; }
section { padding: 22px 24px; margin-top: 16px; min-width: 0; }
.thirds section { margin-top: 0; } .thirds { margin-top: 16px; }
svg { display: block; width: 100%; height: auto; } svg text { font-family: inherit !important; }
.wide { overflow-x: auto; margin-top: 12px; } .wide svg { min-width: 640px; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 15px; }
th, td { padding: 8px 10px; text-align: right; border-top: 1px solid var(--line); white-space: nowrap; }
thead th { border-top: 0; color: var(--soft); font-weight: 500; } th:first-child { text-align: left; }
tbody th { font-weight: 600; }
.good { color: var(--good); } .bad { color: var(--bad); }
sup { font-size: 0.65em; line-height: 0; }
pre { margin: 8px 0 0; overflow-x: auto; font: 14px/1.6 ui-monospace, SFMono-Regular, Menlo, monospace; }
footer { margin-top: 24px; color: var(--soft); font-size: 14px; }
"""


def document(title: str, body: str, *, style: str = "") -> str:
    """Render a page.

    Args:
        title: plain text; escaped here.
        body: HTML; names in it must be escaped.
        style: additional CSS rules.
    """
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{COLOURS}{_STYLE}{style}</style></head><body><main>
{body}
</main></body></html>
"""


def tiles(values: dict[str, str]) -> str:
    """Render a row of figures; keys are the captions, values HTML."""
    items = "".join(f'<div class="tile"><b>{value}</b><span>{text}</span></div>' for value, text in values.items())
    return f'<div class="tiles">{items}</div>'


def scientific(value: float) -> str:
    """Format a number as HTML, e.g. 2.0 · 10<sup>-7</sup>."""
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits} · 10<sup>{int(exponent)}</sup>"
