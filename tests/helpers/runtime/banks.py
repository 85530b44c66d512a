from __future__ import annotations

from tpeft_deploy import Bundle
from tpeft_deploy.bundle import fit
from tpeft_deploy.runtime.adapters.bank import Bank, Layout


def all_tasks(bundle: Bundle, device: str = "cpu") -> tuple[Bank, dict[str, int]]:
    """A bank with every task of a bundle, and the row of each."""
    layout = Layout.of(bundle)
    tasks = sorted(bundle.tasks)
    content = {task: fit.named(bundle.manifest, bundle.fill(bundle.adapter(task))) for task in tasks}
    shapes = layout.widest({name: row.shape for name, row in own.items()} for own in content.values())
    bank = Bank.allocate(layout, shapes, len(tasks) + 1, device)
    rows = {"base": 0, **{task: row for row, task in enumerate(tasks, 1)}}
    for task, own in content.items():
        bank.write(rows[task], own)
    return bank, rows
