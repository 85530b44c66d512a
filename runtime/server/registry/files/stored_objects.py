"""Objects of a store by URL, through fsspec."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tpeft_deploy.errors import MissingExtra, ServerError, Unavailable
from tpeft_deploy.files import new_file
from tpeft_deploy.runtime.server.registry.files.disk import storing
from tpeft_deploy.runtime.server.registry.files.guarded_calls import GuardedCalls

__all__ = ["StoredObjects", "open_objects"]

_CHUNK = 8 * 2**20
_BATCH = 1000  # objects that S3 removes in one request
_LIST_PARTS = 10  # a listing has many pages
_STAMPS = ("LastModified", "last_modified", "updated", "mtime", "created", "ETag", "etag", "size")


class StoredObjects:
    """Objects below one path of a file system of fsspec; each call has a deadline.

    Args:
        files: file system of fsspec, without a cache of listings.
        root: path in it.
        timeout: seconds that a call may take; a longer transfer has as many for each 8 MiB.
        secrets: texts that no log line may have.
        local: whether the file system is the machine's, where writes are not atomic by themselves.

    Every method raises `Unavailable` while the store does not answer.
    """

    def __init__(
        self, files: Any, root: str, timeout: float, secrets: Iterable[str] = (), *, local: bool = False
    ) -> None:
        self._files = files
        self._root = root.rstrip("/")
        self._secrets = sorted(filter(None, secrets), key=len, reverse=True)
        self._local = local
        self.calls = GuardedCalls(timeout, lambda: self._get("identity", 0, 64), self._hide)

    def get(self, name: str) -> bytes | None:
        """Return the bytes of an object, or None if there is none."""
        parts: list[bytes] = []
        while not parts or len(parts[-1]) == _CHUNK:
            start = len(parts) * _CHUNK
            try:
                if parts and self.size(name) == start:
                    break
                parts.append(self.calls.call("read an adapter", self._get, name, start, start + _CHUNK))
            except FileNotFoundError:
                return None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def size(self, name: str) -> int | None:
        """Return the size of an object, or None if there is none."""
        try:
            return int(self.calls.call("read an adapter", self._files.info, self._path(name))["size"])
        except FileNotFoundError:
            return None

    def put(self, name: str, data: bytes) -> None:
        """Write an object; readers see all of it or nothing."""
        try:
            self.calls.call("store an adapter", self._put, name, data, parts=1 + len(data) // _CHUNK)
        except FileNotFoundError:
            raise Unavailable(
                "store an adapter",
                expected="the bucket or folder of store_url",
                got="none",
                fix="The operator has to create it.",
            ) from None

    def any(self, folder: str) -> bool:
        """Whether there is an object below a folder."""
        try:
            return bool(self.calls.call("read the store", self._files.ls, self._path(folder), False))
        except FileNotFoundError:
            return False

    def listing(self, folder: str) -> dict[str, str]:
        """Return the names of the objects below a folder, each with a text that changes when it is written again."""
        try:
            found = self.calls.call("list the store", self._find, folder, parts=_LIST_PARTS)
        except FileNotFoundError:
            return {}
        return {
            str(path)[len(self._root) :].lstrip("/"): repr([str(about[key]) for key in _STAMPS if key in about])
            for path, about in found.items()
        }

    def remove(self, names: list[str]) -> None:
        """Remove objects; those that are gone already are skipped."""
        for first in range(0, len(names), _BATCH):
            self.calls.call("clean the store", self._remove, names[first : first + _BATCH])

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _get(self, name: str, start: int, end: int) -> bytes:
        return bytes(self._files.cat_file(self._path(name), start=start, end=end))

    def _put(self, name: str, data: bytes) -> None:
        if not self._local:
            self._files.pipe_file(self._path(name), data)
            return
        with storing("store an adapter"), new_file(Path(self._path(name)), 0o600) as temporary:
            temporary.write_bytes(data)

    def _find(self, folder: str) -> dict[str, dict[str, Any]]:
        self._files.invalidate_cache()
        return dict(self._files.find(self._path(folder), detail=True))

    def _remove(self, names: list[str]) -> None:
        try:
            self._files.rm([self._path(name) for name in names])
        except FileNotFoundError:  # of many, one is gone
            for name in names:
                with suppress(FileNotFoundError):
                    self._files.rm_file(self._path(name))

    def _hide(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text.splitlines()[0][:500] if text else ""


def open_objects(url: str, timeout: float) -> StoredObjects:
    """Open the store of a URL, without calling it.

    Args:
        url: URL with a scheme that fsspec knows; never shown, as it may have credentials.
        timeout: seconds that a call may take.

    Raises:
        MissingExtra: fsspec, or its driver for the scheme, is not installed.
        ServerError: the URL is not one of a store.
    """
    doing = "open the store of adapters"
    scheme, colon, rest = url.partition(":")
    if not colon or re.fullmatch(r"[a-z][a-z0-9+.-]+", scheme) is None:
        raise ServerError(
            doing, expected="a URL such as s3://bucket/folder or file:///folder", got="one without a scheme"
        )
    if not rest.startswith("//") and not rest.startswith(":"):
        url = f"{scheme}://{rest}"
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise MissingExtra(
            doing, expected="the package fsspec", got="none", fix="pip install 'tpeft-deploy[store]'"
        ) from None
    try:
        files, root = url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        raise MissingExtra(
            doing,
            expected=f"fsspec's driver for {scheme}:",
            got="none",
            fix=f"Install it next to the server; {error.name or scheme} is missing.",
        ) from None
    except Exception as error:  # drivers check their URLs by errors of any kind, with the URL in their texts
        raise ServerError(
            doing, expected=f"a URL that fsspec's driver for {scheme}: takes", got=f"a {type(error).__name__}"
        ) from None
    return StoredObjects(files, root, timeout, _secrets(url), local="file" in _protocols(files))


def _protocols(files: Any) -> tuple[str, ...]:
    return (files.protocol,) if isinstance(files.protocol, str) else tuple(files.protocol)


def _secrets(url: str) -> list[str]:
    parts = urlsplit(url)
    user = parts.netloc.rpartition("@")[0]
    values = [value for item in parts.query.split("&") for value in [item.partition("=")[2]] if len(value) > 3]
    return [url, user, *(part for part in user.split(":") if len(part) > 3), parts.query, *values]
