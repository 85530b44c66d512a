"""Logits of every form on the held-out digits, and the results computed from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tpeft_deploy.bundle.directory import BASE_TASK, Bundle
from tpeft_deploy.exporters.oracle.compare import relative_error
from tpeft_deploy.formats import canonical
from tpeft_deploy.quickstart.data import Digits, DigitTask
from tpeft_deploy.quickstart.measure import Logits, accuracy, majority, mixed_logits, session_logits, torch_logits
from tpeft_deploy.quickstart.results import BaseResult, TaskResult
from tpeft_deploy.quickstart.train import Trained, merged
from tpeft_deploy.runtime import Runtime
from tpeft_deploy.runtime.sessions.providers import Choice, open_session

__all__ = ["FORMS", "Answers", "base_result", "run_forms", "task_result"]

FORMS = ("folded", "factored", "banked")


@dataclass(frozen=True, eq=False)
class Answers:
    """Logits on one task's held-out images, (N, classes) each.

    Args:
        base: logits of the base without an adapter.
        torch: logits of the PEFT model.
        merged: logits of the torch model with the adapter merged, the reference of every form.
        forms: form -> logits of its export.
    """

    base: Logits
    torch: Logits
    merged: Logits
    forms: dict[str, Logits]


def run_forms(
    trained: Trained,
    bundle: Bundle,
    runtime: Runtime,
    choice: Choice,
    tests: Mapping[str, Digits],
    *,
    rows: int,
    on_stage: Callable[[str], None],
) -> dict[str, Answers]:
    """Run torch and every exported form.

    Args:
        trained: torch models.
        bundle: export of the models.
        runtime: runtime of the bundle.
        choice: execution provider of plain sessions.
        tests: task -> held-out images, `base` included.
        rows: number of rows of every task in one mixed batch.
        on_stage: function that is called with each stage as it begins.

    Returns:
        Task -> logits; `base` has only the banked form.
    """
    on_stage(f"run batches of {rows * len(tests)} rows that mix all tasks")
    banked = mixed_logits(runtime, {task: examples.pixels for task, examples in tests.items()}, rows)
    factored = open_session(bundle.path / "factored.onnx", choice)
    answers = {}
    for task, examples in tests.items():
        base = torch_logits(trained.base, examples.pixels)
        if task == BASE_TASK:
            answers[task] = Answers(base, base, base, {"banked": banked[task]})
            continue
        on_stage(f"run {task} in torch, folded and factored")
        adapted = trained.adapters[task]
        folded = open_session(bundle.path / "folded" / f"{task}.onnx", choice)
        forms = {
            "folded": session_logits(folded, examples.pixels),
            "factored": session_logits(factored, examples.pixels, bundle.factors(task)),
            "banked": banked[task],
        }
        plain = torch_logits(merged(adapted), examples.pixels)
        answers[task] = Answers(base, torch_logits(adapted, examples.pixels), plain, forms)
    return answers


def task_result(task: DigitTask, trained: Trained, bundle: Bundle, answers: Answers, test: Digits) -> TaskResult:
    """Compute the results of one task."""
    file = bundle.path / "adapters" / task.name / bundle.tasks[task.name] / canonical.FILE
    shares = {form: accuracy(answers.forms[form], test.labels) for form in FORMS}
    return TaskResult(
        task=task.name,
        classes=len(task.answers),
        base=accuracy(answers.base, test.labels) if task.shares_head else majority(test.labels),
        torch=accuracy(answers.torch, test.labels),
        **shares,
        errors={form: relative_error(answers.forms[form], answers.merged) for form in FORMS},
        adapter_bytes=file.stat().st_size,
        adapter_parameters=bundle.adapter(task.name).parameters,
        train_seconds=trained.seconds[task.name],
    )


def base_result(trained: Trained, answers: Answers, test: Digits) -> BaseResult:
    """Compute the results of the base."""
    weights = list(trained.base.state_dict().values())
    return BaseResult(
        torch=accuracy(answers.base, test.labels),
        banked=accuracy(answers.forms["banked"], test.labels),
        error=relative_error(answers.forms["banked"], answers.base),
        parameters=sum(weight.numel() for weight in weights),
        bytes=sum(weight.numel() * weight.element_size() for weight in weights),
        train_seconds=trained.seconds[BASE_TASK],
    )
