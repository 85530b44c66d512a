"""Pins of an ingress: kept on the replicas that an adapter belongs to, as these come and go."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from tpeft_deploy.errors import TpeftError, UnknownTask
from tpeft_deploy.runtime.cluster.affinity import ReplicaTable
from tpeft_deploy.runtime.cluster.calls import ReplicaLost
from tpeft_deploy.runtime.cluster.remote.tasks import RemoteTasks

__all__ = ["RemotePins"]

_log = logging.getLogger("tpeft_deploy.cluster")
_COPIES = 2  # so that a replica that dies leaves one that has it


class RemotePins:
    """Pinned tasks; belongs to one event loop, except for `all`.

    Args:
        tasks: tasks of the ingress.
        table: figures of the replicas.
        control: calls a method of a replica: takes a name, the replica, the method and keyword arguments.
    """

    def __init__(
        self, tasks: RemoteTasks, table: ReplicaTable, control: Callable[..., Coroutine[Any, Any, Any]]
    ) -> None:
        self._tasks = tasks
        self._table = table
        self._control = control
        self._pins: dict[str, bool] = {}
        self._placed: dict[tuple[str, str], bool] = {}  # replica and name there -> folded
        self._turn = asyncio.Lock()

    def all(self) -> dict[str, bool]:
        """Return the pinned keys, and whether each is to have a separate session."""
        return dict(self._pins)

    async def pin(self, key: str, *, folded: bool) -> None:
        """Pin a task where it belongs.

        Raises:
            TpeftError: as `Runtime.pin`.
        """
        async with self._turn:
            await self._place(self._tasks.name(key), folded=folded)
            self._pins[key] = folded

    async def drop(self, key: str, name: str) -> None:
        """Unpin a task.

        Args:
            key: key of the task.
            name: name of its adapter on the replicas.
        """
        async with self._turn:
            self._pins.pop(key, None)
            if name in self._names():  # another key stands for the same adapter
                return
            for replica, own in [*self._placed]:
                if own == name:
                    del self._placed[replica, own]
                    with suppress(UnknownTask, ReplicaLost):
                        await self._control(name, replica, "unpin")

    async def settle(self) -> None:
        """Pin on replicas that came what belongs there."""
        async with self._turn:
            here = set(self._table.replicas)
            self._placed = {at: folded for at, folded in self._placed.items() if at[0] in here}
            for name, folded in self._names().items():
                try:
                    await self._place(name, folded=folded)
                except TpeftError as error:
                    _log.warning("cannot pin an adapter again: %s", error)

    def _names(self) -> dict[str, bool]:
        names: dict[str, bool] = {}
        for key, folded in self._pins.items():
            with suppress(UnknownTask):
                name = self._tasks.name(key)
                names[name] = names.get(name, False) or folded
        return names

    async def _place(self, name: str, *, folded: bool) -> None:
        for replica in self._table.preferred(self._tasks.digest(name), _COPIES):
            if self._placed.get((replica, name)) != folded:
                await self._control(name, replica, "pin", folded=folded)
                self._placed[replica, name] = folded
