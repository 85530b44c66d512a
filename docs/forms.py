"""Draw docs/forms.svg, the diagram of the three forms.  Run it after a change: python docs/forms.py."""

from __future__ import annotations

from pathlib import Path

INK, PALE, BASE, BRANCH, BANK = "#1f2933", "#f5f7fa", "#cbd5e1", "#f6ad55", "#68b0e8"


def box(x: int, y: int, width: int, text: str, fill: str, height: int = 34) -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{INK}"/>'
        f'<text x="{x + width / 2}" y="{y + height / 2 + 5}" text-anchor="middle">{text}</text>'
    )


def arrow(*points: tuple[int, int]) -> str:
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-width="1.5" marker-end="url(#tip)"/>'


def title(x: int, name: str, *lines: str) -> str:
    text = f'<text x="{x}" y="40" class="name">{name}</text>'
    return text + "".join(f'<text x="{x}" y="{62 + 18 * i}" class="note">{line}</text>' for i, line in enumerate(lines))


def folded(x: int) -> list[str]:
    return [
        title(x, "folded", "one task, a plain ONNX model,", "as fast as the base"),
        arrow((x + 110, 118), (x + 110, 168)),
        box(x + 40, 172, 140, "W + dW", BASE),
        arrow((x + 110, 206), (x + 110, 312)),
    ]


def factored(x: int) -> list[str]:
    return [
        title(x, "factored", "factors are optional inputs:", "nothing fed computes the base"),
        arrow((x + 60, 118), (x + 60, 168)),
        arrow((x + 60, 134), (x + 190, 134), (x + 190, 148)),
        box(x, 172, 110, "W", BASE),
        box(x + 140, 152, 100, "down", BRANCH, 24),
        box(x + 140, 184, 100, "core", BRANCH, 24),
        box(x + 140, 216, 100, "up", BRANCH, 24),
        arrow((x + 60, 206), (x + 60, 268)),
        arrow((x + 190, 240), (x + 190, 280), (x + 76, 280)),
        '<circle cx="{0}" cy="280" r="11" fill="white" stroke="{1}"/>'.format(x + 60, INK),
        f'<text x="{x + 60}" y="285" text-anchor="middle">+</text>',
        arrow((x + 60, 292), (x + 60, 312)),
    ]


def banked(x: int) -> list[str]:
    shelves = [
        f'<rect x="{x + 132 + 6 * i}" y="{148 + 6 * i}" width="110" height="84" rx="6" fill="{BANK}" stroke="{INK}"/>'
        for i in range(3)
    ]
    return [
        title(x, "banked", "all tasks in one graph; row n of the", "batch takes adapter_index[n]"),
        arrow((x + 60, 118), (x + 60, 168)),
        arrow((x + 60, 134), (x + 190, 134), (x + 190, 144)),
        box(x, 172, 110, "W", BASE),
        *shelves,
        f'<text x="{x + 199}" y="196" text-anchor="middle">factors of</text>',
        f'<text x="{x + 199}" y="216" text-anchor="middle">every task</text>',
        f'<text x="{x + 282}" y="198" class="note">adapter</text>',
        f'<text x="{x + 282}" y="214" class="note">index</text>',
        arrow((x + 280, 202), (x + 260, 202)),
        arrow((x + 60, 206), (x + 60, 268)),
        arrow((x + 199, 244), (x + 199, 280), (x + 76, 280)),
        '<circle cx="{0}" cy="280" r="11" fill="white" stroke="{1}"/>'.format(x + 60, INK),
        f'<text x="{x + 60}" y="285" text-anchor="middle">+</text>',
        arrow((x + 60, 292), (x + 60, 312)),
    ]


def main() -> None:
    body = "\n".join([*folded(30), *factored(290), *banked(590)])
    svg = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 950 336" font-family="sans-serif" font-size="14">
<title>Three forms of one base with Tucker adapters: folded, factored, banked</title>
<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>
<style>text {{ fill: {INK} }} .name {{ font-size: 19px; font-weight: bold }} .note {{ font-size: 13px }}</style>
<rect width="950" height="336" rx="10" fill="{PALE}"/>
{body}
</svg>
"""
    Path(__file__).with_suffix(".svg").write_text(svg)


if __name__ == "__main__":
    main()
