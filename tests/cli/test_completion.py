from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from tests.helpers.commands import fail, succeed
from tpeft_deploy import Bundle
from tpeft_deploy.cli import main


def completed(*words: str) -> list[str]:
    """What a shell offers for the last of the words."""
    return [
        item.value for item in ShellComplete(main, {}, "tpeft-deploy", "").get_completions([*words[:-1]], words[-1])
    ]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_scripts_are_click_s_and_what_their_shell_reads(shell: str) -> None:
    script = succeed("completion", shell)
    assert f"_TPEFT_DEPLOY_COMPLETE={shell}_complete" in script
    program = shutil.which(shell)
    if program is not None:
        done = subprocess.run([program, "-n"], input=script, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr


def test_another_shell_is_refused() -> None:
    assert "'bash', 'zsh', 'fish'" in fail("completion", "tcsh", code=2)


def test_commands_and_options() -> None:
    assert completed("do") == ["doctor"]
    assert completed("export", "bun") == ["bundle"]
    assert "--provider" in completed("run", "--p")


def test_tasks_of_the_bundle(conv_bundle: Bundle, tmp_path: Path) -> None:
    path = str(conv_bundle.path)
    assert completed("run", path, "--task", "") == ["partial", "plain", "two", "wide"]
    assert completed("adapter", "remove", path, "p") == ["partial", "plain"]
    assert completed("generate", path, "--tasks", "two,w") == ["two,wide"]
    assert completed("verify", path, "--task", "x") == []
    assert completed("verify", str(tmp_path / "missing"), "--task", "") == []
    assert completed("verify", "--task", "") == []
