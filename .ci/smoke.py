"""Train, export and run one adapter with the installed wheel, through the command line, outside the checkout."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model

import tpeft_deploy
from tpeft_deploy.training import TuckerConfig

FACTORY = """
import torch


def base():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 4))
    return Wrapped(module), {"pixels": torch.randn(2, 3, 8, 8)}


class Wrapped(torch.nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, pixels):
        return {"logits": self.body(pixels)}
"""


def command(*arguments: str) -> str:
    tool = Path(sys.executable).with_name("tpeft-deploy")
    return subprocess.run([str(tool), *arguments], check=True, text=True, stdout=subprocess.PIPE).stdout


def main() -> None:
    assert "site-packages" in tpeft_deploy.__file__, tpeft_deploy.__file__
    Path("smoke_base.py").write_text(FACTORY)
    sys.path.insert(0, "")
    import smoke_base

    module, inputs = smoke_base.base()
    model = get_peft_model(module, TuckerConfig(ranks=4, target_modules=["body.0", "body.2"], init_weights=False))
    model.save_pretrained("adapter")
    with torch.no_grad():
        expected = model.eval()(**inputs)["logits"].numpy()

    command("export", "bundle", "smoke_base:base", "--out", "bundle", "--adapter", "task=adapter")
    np.savez("in.npz", pixels=inputs["pixels"].numpy())
    command("run", "bundle", "--input", "in.npz", "--output", "out.npz", "--task", "task", "--provider", "cpu")
    got = np.load("out.npz")["logits"]
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert error <= 1e-5, error
    listed = json.loads(command("adapter", "list", "bundle", "--json"))
    assert [task["task"] for task in listed["tasks"]] == ["task"], listed
    print(f"smoke: relative error {error:.1e}")


if __name__ == "__main__":
    main()
