"""Run the notebooks of docs/notebooks and compare their texts with the committed ones: `make notebooks`.

Words must be equal; numbers may differ by a tenth, as processors round sums of a training in different orders. Pictures
are not compared. `make notebooks ARGS=--write` puts the new outputs in place of the old.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_TOLERANCE = 0.1


def main() -> None:
    """Run the notebooks named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the new outputs")
    parser.add_argument("names", nargs="*", help="notebooks (default: all)")
    arguments = parser.parse_args()
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm's, which an editor with widgets does not show
    failed = []
    for path in sorted(FOLDER.glob("*.ipynb")):
        if arguments.names and path.stem not in arguments.names:
            continue
        notebook = nbformat.read(path, as_version=4)
        before = _texts(notebook)
        begun = time.monotonic()
        _execute(notebook)
        print(f"{path.stem}: {time.monotonic() - begun:.0f} s", flush=True)
        if arguments.write:
            _shrink(notebook)
            nbformat.write(notebook, path)
        elif problem := _difference(before, _texts(notebook)):
            failed.append(f"{path.stem}: {problem}")
    if failed:
        sys.exit("\n".join(failed))


def _execute(notebook: nbformat.NotebookNode) -> None:
    """Run all cells in an empty directory; a cell that raises ends the program with its traceback."""
    with tempfile.TemporaryDirectory() as place:
        where = {"metadata": {"path": place}}
        NotebookClient(notebook, timeout=300, startup_timeout=300, record_timing=False, resources=where).execute()
    notebook.metadata.language_info = {"name": "python"}  # the patch version of Python is no part of the page


def _shrink(notebook: nbformat.NotebookNode) -> None:
    """Give pictures a palette of 256 colours: half the bytes and less."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                file = io.BytesIO()
                picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
                picture.convert("RGB").quantize(256).save(file, "PNG", optimize=True)
                output.data["image/png"] = base64.b64encode(file.getvalue()).decode()


def _texts(notebook: nbformat.NotebookNode) -> list[str]:
    """What each cell of code printed; a notebook writes nothing to stderr."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            streams = [output for output in cell.outputs if output.output_type == "stream"]
            errors = [output.text for output in streams if output.name != "stdout"]
            if errors:
                sys.exit(f"a cell wrote to stderr: {errors[0]}")
            found.append("".join(output.text for output in streams))
    return found


def _difference(before: list[str], after: list[str]) -> str | None:
    """The first difference that is more than rounding, or None."""
    for old, new in zip(before, after, strict=True):
        numbers = [[float(n) for n in _NUMBER.findall(text)] for text in (old, new)]
        same_words = _NUMBER.sub("0", old) == _NUMBER.sub("0", new)
        if not same_words or any(abs(a - b) > _TOLERANCE * max(a, b) for a, b in zip(*numbers, strict=True)):
            return f"printed\n{new}\nand not\n{old}"
    return None


if __name__ == "__main__":
    main()
