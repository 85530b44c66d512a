"""What importing pulls in, proved in fresh processes; and which way imports run."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "onnx", "onnxruntime", "onnxscript", "onnx_ir", "transformers", "peft", "sklearn", "matplotlib"}


def imported_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}}, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    return set(done.stderr.split()) & HEAVY


@pytest.mark.parametrize(
    "code",
    [
        "import tpeft_deploy",
        "from tpeft_deploy import Adapter, Bundle, TuckerDelta, load_adapter",
        "from tpeft_deploy import AsyncClient, Client",
        "import tpeft_deploy.cli",
        "from click.testing import CliRunner; from tpeft_deploy.cli import main; CliRunner().invoke(main, ['--help'])",
    ],
)
def test_the_root_and_the_command_line_import_nothing_heavy(code: str) -> None:
    assert imported_by(code) == set()


def test_the_runtime_imports_onnxruntime_and_neither_torch_nor_onnx() -> None:
    assert imported_by("import tpeft_deploy.runtime") == {"onnxruntime"}


def test_running_a_bundle_imports_neither_torch_nor_onnx(conv_bundle: object) -> None:
    path = getattr(conv_bundle, "path")  # noqa: B009
    code = f"""
import numpy
from tpeft_deploy import Runtime
runtime = Runtime({str(path)!r}, provider="cpu")
runtime.run({{"pixels": numpy.zeros((2, 1, 12, 14), "float32")}}, tasks=["two", "base"])
"""
    assert imported_by(code) == {"onnxruntime"}


def test_text_needs_neither_torch_nor_transformers() -> None:
    code = """
from tokenizers import Tokenizer, models
from tpeft_deploy.bundle.text_files import TextFacts
from tpeft_deploy.runtime.text.model_text import ModelText
made = Tokenizer(models.WordLevel({"fox": 0, "a": 1}, unk_token="a"))
text = ModelText(made.to_str(), TextFacts(templates={"default": "{{ messages[0].content }}"}))
assert text.chat([{"role": "user", "content": "fox"}]) == [0]
assert text.detokeniser()().push(0) == "fox"
"""
    assert imported_by(code) == {"onnxruntime"}


def test_these_tests_can_fail() -> None:
    assert imported_by("from tpeft_deploy import export_folded") >= {"torch", "onnxscript", "onnxruntime"}


ALLOWED = {
    "errors": set[str](),
    "files": set[str](),
    "installed": set[str](),
    "html": set[str](),
    "progress": set[str](),
    "labels": set[str](),
    "tucker": {"errors"},
    "client": {"errors", "tucker"},
    "algebra": {"tucker", "errors"},
    "adapter": {"labels", "tucker", "errors"},
    "ties": {"adapter", "algebra", "errors", "tucker"},
    "composition": {"adapter", "algebra", "errors", "tucker"},
    "formats": {"adapter", "algebra", "labels", "tucker", "errors", "files"},
    "bundle": {"adapter", "algebra", "errors", "files", "formats", "labels", "ties", "tucker"},
    "training": {"errors", "tucker", "adapter"},
    "exporters": {
        *{"adapter", "bundle", "errors", "files", "formats", "html", "progress", "ties", "training", "tucker"},
        *{"labels", "version"},
    },
    "runtime": {
        *{"adapter", "bundle", "composition", "errors", "files", "formats", "html", "labels", "progress", "ties"},
        *{"installed", "tucker"},
    },
}


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_run_one_way(room: str) -> None:
    place = ROOT / "tpeft_deploy" / room
    files = [place.with_suffix(".py")] if place.with_suffix(".py").is_file() else sorted(place.resolve().rglob("*.py"))
    assert files
    for file in files:
        found = {name.split(".")[1] for name in _modules(file) if name.startswith("tpeft_deploy.")} - {room}
        assert found <= ALLOWED[room], f"{file} imports {sorted(found - ALLOWED[room])}"


def _modules(file: Path, *, nested: bool = True) -> set[str]:
    names: set[str] = set()
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file} has a relative import"
            if node.module == "tpeft_deploy":
                names |= {f"tpeft_deploy.{a.name}" for a in node.names if a.name != "__version__"}
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
    return names


def test_nothing_but_the_command_line_and_the_cluster_imports_the_server() -> None:
    server = "tpeft_deploy.runtime.server"
    for room in (ROOT / "tpeft_deploy", ROOT / "runtime", ROOT / "exporters"):
        for file in sorted(room.rglob("*.py")):
            inside = file.relative_to(room).parts
            if inside[0] == "server" or not any(name.startswith(server) for name in _modules(file)):
                continue
            if inside[0] == "cluster":
                continue
            assert inside[0] == "cli", f"{file} imports the server"
            assert not any(name.startswith(server) for name in _modules(file, nested=False)), f"{file}, at its top"


def test_nothing_but_the_command_line_imports_the_cluster() -> None:
    cluster = "tpeft_deploy.runtime.cluster"
    for room in (ROOT / "tpeft_deploy", ROOT / "runtime", ROOT / "exporters"):
        for file in sorted(room.rglob("*.py")):
            inside = file.relative_to(room).parts
            if inside[0] != "cluster" and any(name.startswith(cluster) for name in _modules(file)):
                assert inside[0] == "cli", f"{file} imports the cluster"
                assert not any(name.startswith(cluster) for name in _modules(file, nested=False)), f"{file}, at its top"


def test_the_order_and_the_quotas_of_the_server_need_neither_torch_nor_onnx() -> None:
    code = "import tpeft_deploy.runtime.server.tenancy.fair_order, tpeft_deploy.runtime.server.tenancy.quotas"
    assert imported_by(code) == {"onnxruntime"}


FULL = {"tpeft_deploy/cli"}


def _library() -> list[Path]:
    found = [f for room in ("exporters", "runtime", "tpeft_deploy") for f in sorted((ROOT / room).rglob("*.py"))]
    linked = {ROOT / "tpeft_deploy" / "exporters", ROOT / "tpeft_deploy" / "runtime"}
    return [f for f in found if not linked & set(f.parents) and not f.name.endswith("_pb2.py")]


def test_no_module_has_more_than_400_lines() -> None:
    assert not {str(f.relative_to(ROOT)) for f in _library() if len(f.read_text().splitlines()) > 400}


def test_no_folder_has_more_than_15_modules() -> None:
    sizes = Counter(str(f.parent.relative_to(ROOT)) for f in _library() if f.name != "__init__.py")
    assert {folder for folder, size in sizes.items() if size > 15} <= FULL


def test_no_modules_import_each_other_in_a_circle() -> None:
    names = {_dotted(file): file for file in _library()}
    graph = {name: (_taken(file) & names.keys()) - {name} for name, file in names.items()}
    assert len(graph) > 250
    assert any(graph.values())
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def _dotted(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "tpeft_deploy" else ("tpeft_deploy", *parts))


def _taken(file: Path) -> set[str]:
    """Modules that a module imports at its top, by whole names; a name of a package may be a module of it."""
    found: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{a.name}" for a in node.names}
            modules = {n for n in inner if _is_module(n)}
            found |= modules | ({node.module} if modules != inner else set())
    return found


def _is_module(name: str) -> bool:
    place = ROOT.joinpath(*name.split("."))
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()
