"""Print the coverage of each package and the least covered files; fail where a package is below its floor.

    python -m pytest --cov --cov-report= && python .ci/coverage_report.py [FLOOR]

FLOOR: least percentage of lines and branches of each package; 90 by default.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

PACKAGES = ("exporters", "runtime", "tpeft_deploy")
FLOOR = 90.0


def percent(summary: dict[str, int]) -> float:
    """Lines and branches that ran, of all."""
    ran = summary["covered_lines"] + summary["covered_branches"]
    return 100 * ran / max(summary["num_statements"] + summary["num_branches"], 1)


def measured() -> dict[str, dict[str, int]]:
    """The summary of each file, by its path in the checkout."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "coverage.json"
        subprocess.run([sys.executable, "-m", "coverage", "json", "-q", "-o", str(out)], check=True)
        return {
            name: file["summary"]
            for name, file in json.loads(out.read_text())["files"].items()
            if file["summary"]["num_statements"]
        }


def main() -> int:
    floor = float(sys.argv[1]) if len(sys.argv) > 1 else FLOOR
    files = measured()
    totals: dict[str, dict[str, int]] = {name: defaultdict(int) for name in PACKAGES}
    for name, summary in files.items():
        for key, value in summary.items():
            if isinstance(value, int):
                totals[Path(name).parts[0]][key] += value
    for name, summary in sorted(files.items(), key=lambda pair: percent(pair[1]))[:20]:
        print(f"{percent(summary):6.1f} %  {name}, {summary['missing_lines']} lines")
    print()
    for name, total in totals.items():
        print(f"{percent(total):6.1f} %  {name}, {total['num_statements']} lines, {total['num_branches']} branches")
    low = [name for name, total in totals.items() if percent(total) < floor]
    if low:
        print(f"coverage below {floor:g} %: {', '.join(low)}", file=sys.stderr)
    return len(low) > 0


if __name__ == "__main__":
    sys.exit(main())
