import os
import re
import tomllib
from pathlib import Path

import tpeft_deploy

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_listed_packages_are_the_packages_on_disk() -> None:
    rooms = {"tpeft_deploy": "tpeft_deploy", "exporters": "tpeft_deploy.exporters", "runtime": "tpeft_deploy.runtime"}
    found = set()
    for folder, name in rooms.items():
        for directory, folders, files in os.walk(ROOT / folder):
            folders[:] = [f for f in folders if f != "__pycache__"]
            if "__init__.py" in files:
                inner = Path(directory).relative_to(ROOT / folder).parts
                found.add(".".join([name, *inner]))
    assert sorted(found) == sorted(PROJECT["tool"]["setuptools"]["packages"])


def test_the_links_make_a_bare_checkout_importable() -> None:
    for name in ("exporters", "runtime"):
        assert os.readlink(ROOT / "tpeft_deploy" / name) == f"../{name}"


def test_versions_agree() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == PROJECT["project"]["version"] == tpeft_deploy.__version__


def test_the_extras_are_the_promised_ones_and_never_both_runtimes() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert {"cpu", "gpu", "export", "train", "server", "examples"} <= set(extras)
    for name, packages in [*extras.items(), ("base", PROJECT["project"]["dependencies"])]:
        runtimes = {re.split(r"[\[ ><=]", package)[0] for package in packages if package.startswith("onnxruntime")}
        assert len(runtimes) <= (name in ("cpu", "gpu", "openvino"))


def test_the_claimed_pythons_begin_with_the_required_one_and_are_those_that_a_release_tries() -> None:
    claimed = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))
    assert PROJECT["project"]["requires-python"] == f">= {claimed[0]}"
    assert "project['classifiers']" in (ROOT / ".ci" / "release.sh").read_text()


def test_constraints_pin_everything_exactly() -> None:
    lines = [li for li in (ROOT / "constraints.txt").read_text().splitlines() if li and not li.startswith("#")]
    assert "torch==2.13.0" in lines
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[^=]+", line) for line in lines)
