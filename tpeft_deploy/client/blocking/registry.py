# Written by .ci/unasync.py from asynchronous/registry.py; change that file, then run `make client`.
"""The blocking client: tasks and their versions."""

from __future__ import annotations

import os

from tpeft_deploy.client import calls
from tpeft_deploy.client.answers import Document
from tpeft_deploy.client.blocking.connection import ServerConnection

__all__ = ["RegistryCalls"]


class RegistryCalls(ServerConnection):
    """Tasks, versions and aliases."""

    def tasks(self) -> list[Document]:
        """List the tasks that the key may see, with their versions and aliases."""
        return self._do(calls.tasks(self._tenant))

    def task(self, name: str) -> Document:
        """Return a task with its versions and aliases; "etag" is its entity tag, for the conditions of changes.

        Args:
            name: name of the task.

        Raises:
            NotFound: the task does not exist, or the key may not see it.
        """
        return self._do(calls.task(name, self._tenant))

    def register(
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        alias: str = "current",
        timeout: float | None = None,
        if_match: str | None = None,
        if_none_match: bool = False,
    ) -> Document:
        """Upload an adapter as a new version of a task; the version is checked and ready when this returns.

        Args:
            name: name of the task; created when it does not exist.
            path: a .safetensors file, or a directory that PEFT saved; the upload is streamed.
            alias: alias that points to the new version afterwards (default "current").
            timeout: seconds for upload and check (default the client's).
            if_match: entity tag that the task must have; "*": it must exist (default no condition).
            if_none_match: whether the task must not exist yet (default False).

        Returns:
            The task afterwards.

        Raises:
            FormatError: the files are pickles or no adapter; nothing was sent.
            InputError: the adapter does not fit the server's base.
            Conflict, QuotaExceeded, TooLarge: the server refuses the adapter.
            PreconditionFailed: the task was changed, deleted or made meanwhile; nothing was changed.
        """
        call = calls.register(name, path, alias, self._tenant, if_match, if_none_match)
        return self._do(call, self._budget(timeout))

    def point(
        self,
        name: str,
        alias: str,
        version: int | str,
        *,
        expected: int | str | None = None,
        if_match: str | None = None,
    ) -> Document:
        """Point an alias of a task to a version; in-flight requests finish on the earlier one.

        Args:
            name: name of the task.
            alias: alias to change; created when it does not exist.
            version: number or alias of the version to point to.
            expected: number of the version that the alias must point to now (default any).
            if_match: entity tag that the task must have (default no condition).

        Returns:
            The task afterwards.

        Raises:
            NotFound: the task or version does not exist.
            Conflict: the alias does not point to `expected`.
            PreconditionFailed: the task was changed meanwhile; nothing was changed.
        """
        return self._do(calls.point(name, alias, version, self._tenant, expected, if_match))

    def rollback(
        self,
        name: str,
        alias: str = "current",
        *,
        expected: int | str | None = None,
        if_match: str | None = None,
    ) -> Document:
        """Point an alias to its previous version; a second rollback undoes the first.

        Args:
            name: name of the task.
            alias: alias to change (default "current").
            expected: number of the version that the alias must point to now (default any).
            if_match: entity tag that the task must have (default no condition).

        Returns:
            The task afterwards.

        Raises:
            NotFound: the task or alias does not exist.
            Conflict: the alias does not point to `expected`, or has no previous version.
            PreconditionFailed: the task was changed meanwhile; nothing was changed.
        """
        return self._do(calls.rollback(name, alias, self._tenant, expected, if_match))

    def history(self, name: str, alias: str = "current", limit: int = 100) -> list[Document]:
        """List the versions that an alias pointed to, with time and key of each change, newest first.

        Args:
            name: name of the task.
            alias: alias to list (default "current").
            limit: maximum number of entries (default and largest 100).

        Raises:
            NotFound: the task or alias does not exist.
        """
        return self._do(calls.history(name, alias, limit, self._tenant))

    def delete(self, name: str, version: int | str | None = None, *, if_match: str | None = None) -> str | None:
        """Delete a task, or one version of it.

        Args:
            name: name of the task.
            version: number of the version to delete (default the whole task).
            if_match: entity tag that the task must have (default no condition).

        Returns:
            The entity tag of the task after one version was deleted; None after the whole task was.

        Raises:
            NotFound: the task or version does not exist.
            Conflict: an alias points to the version.
            PreconditionFailed: the task was changed meanwhile; nothing was changed.
        """
        return self._do(calls.delete(name, version, self._tenant, if_match))

    def publish(self, name: str, tenant: str | None = None, *, if_match: str | None = None) -> Document:
        """Share a task with all tenants; needs an admin's key.

        Args:
            name: name of the task.
            tenant: tenant that has the task (default the client's).
            if_match: entity tag that the task must have (default no condition).

        Returns:
            The shared task.

        Raises:
            NotFound: the task does not exist.
            Conflict: another tenant has a task of that name, or it was shared before.
            PreconditionFailed: the task was changed meanwhile; nothing was changed.
        """
        return self._do(calls.publish(name, self._tenant if tenant is None else tenant, if_match))

    def pin(self, name: str, folded: bool = False) -> Document:
        """Pin a task's current version to the device.

        Args:
            name: name of the task.
            folded: use a separate session with merged weights instead of the shared bank (default False).

        Returns:
            The task afterwards.

        Raises:
            NotFound: the task does not exist.
            QuotaExceeded: the tenant's pins are used up.
            Conflict: the task is a shared one, or cannot have a separate session and is pinned without it.
        """
        return self._do(calls.pin(name, folded, self._tenant))

    def unpin(self, name: str) -> None:
        """Allow a task to be evicted from the device again.

        Args:
            name: name of the task.
        """
        return self._do(calls.unpin(name, self._tenant))
