# Written by .ci/unasync.py from asynchronous/inference.py; change that file, then run `make client`.
"""The blocking client: inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import overload

from tpeft_deploy.client import inference
from tpeft_deploy.client.blocking.connection import ServerConnection
from tpeft_deploy.client.exchange import Budget
from tpeft_deploy.client.inference import BundleInfo, InferArguments, Outputs
from tpeft_deploy.tucker import Array

__all__ = ["InferenceCalls"]


class InferenceCalls(ServerConnection):
    """Inference on tensors."""

    @overload
    def infer(
        self,
        inputs: Mapping[str, object],
        task: str = "base",
        *,
        component: str | None = None,
        outputs: Sequence[str] | None = None,
        timeout: float | None = None,
        priority: int = 0,
    ) -> dict[str, Array]: ...

    @overload
    def infer(
        self,
        inputs: Mapping[str, object],
        *,
        tasks: Sequence[str],
        component: str | None = None,
        outputs: Sequence[str] | None = None,
        timeout: float | None = None,
        priority: int = 0,
    ) -> Outputs: ...

    def infer(
        self,
        inputs: Mapping[str, object],
        task: str | None = None,
        *,
        tasks: Sequence[str] | None = None,
        component: str | None = None,
        outputs: Sequence[str] | None = None,
        timeout: float | None = None,
        priority: int = 0,
    ) -> dict[str, Array] | Outputs:
        """Run a batch on the server.

        Args:
            inputs: input name -> array with the model's dtype, which is sent unconverted; bfloat16 as uint16.
            task: task of all rows, `name` or `name@version` (default "base", unless `tasks` is given).
            tasks: one task per row, instead of `task`.
            component: component to run, in a bundle with several; also in the task's name, `name/component`.
            outputs: names of the outputs to return (default all).
            timeout: seconds for the call (default the client's); the server gets the time left and stops at its end.
            priority: priority among the tenant's requests (default 0); lower values are served first.

        Returns:
            Output name -> writable array; its elements are `bytes` objects for BYTES.  With `tasks`, an output with
            rows of different sizes is a list of arrays, one per row.

        Raises:
            InputError: inputs, tasks or outputs do not fit the model.
            NotFound: the task or component does not exist, or the key may not see it.
            QuotaExceeded, QueueFull, Unavailable: the server has no capacity, after all retries.
            DeadlineExceeded: no answer within the timeout.
        """
        arguments = InferArguments(inputs, task, tasks, outputs, priority, component)
        budget = self._budget(timeout)
        bundle = self._bundle_info(budget, arguments.component_of_bundle) if arguments.needs_bundle else None
        return self._do(inference.infer(arguments, bundle), budget)

    def _bundle_info(self, budget: Budget, component: str) -> BundleInfo:
        if component not in self._bundles:
            name = self._do(inference.bundle_name(), budget)
            self._bundles[component] = self._do(inference.bundle_info(name, component), budget)
        return self._bundles[component]
