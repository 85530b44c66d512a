"""Train two adapters for one base, export them, and run a mixed batch.  Writes into the working directory."""

import numpy as np
import torch
from peft import get_peft_model

from tpeft_deploy import Runtime, export_bundle, export_folded, load_adapter
from tpeft_deploy.quickstart.model import digits
from tpeft_deploy.training import TuckerConfig


def train(model: torch.nn.Module, steps: int = 5) -> None:
    """Train the adapter; PEFT freezes all other parameters.  Replace this with your training loop."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        labels = torch.randint(0, 10, (16,))
        loss = torch.nn.functional.cross_entropy(model(pixels=torch.rand(16, 1, 16, 16))["logits"], labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()


# README begins
base, inputs = digits()  # any torch module, and example inputs by name
for task in ("rotated", "mirrored"):
    config = TuckerConfig(ranks=8, target_modules=["stem", "depthwise", "expand", "reduce"])
    model = get_peft_model(base, config)
    train(model)
    model.save_pretrained(f"adapters/{task}")
    base = model.unload()

adapters = {task: load_adapter(f"adapters/{task}") for task in ("rotated", "mirrored")}
export_folded(base, adapters["rotated"], "rotated.onnx", example_inputs=inputs)
export_bundle(base, adapters, "bundle", example_inputs=inputs)

runtime = Runtime("bundle", provider="auto")
pixels = np.random.rand(3, 1, 16, 16).astype(np.float32)
runtime.run({"pixels": pixels}, task="rotated")  # one task for the whole batch
answers = runtime.run({"pixels": pixels}, tasks=["rotated", "base", "mirrored"])  # one task per row
print(answers["logits"])
# README ends
