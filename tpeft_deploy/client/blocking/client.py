# Written by .ci/unasync.py from asynchronous/client.py; change that file, then run `make client`.
"""The blocking client: all its calls."""

from __future__ import annotations

from tpeft_deploy.client.blocking.admin import AdminCalls
from tpeft_deploy.client.blocking.inference import InferenceCalls
from tpeft_deploy.client.blocking.registry import RegistryCalls
from tpeft_deploy.client.blocking.status import StatusCalls
from tpeft_deploy.client.blocking.text import TextCalls

__all__ = ["Client"]


class Client(InferenceCalls, TextCalls, RegistryCalls, StatusCalls, AdminCalls):
    """Blocking client of a server; safe to use from several threads.

    Use `with`, or `client.close()`.  Error statuses are raised as errors of `tpeft_deploy.errors` with the
    server's text: InputError (400), Unauthenticated (401), Forbidden (403), NotFound (404), Conflict (409), TooLarge
    (413), QuotaExceeded (429, with `retry_after`), Unsupported (501), QueueFull or Unavailable (503, or no connection),
    DeadlineExceeded (504, or no answer within the timeout), InsufficientStorage (507), else ServerError.

    Calls that read or infer are retried when the server has no capacity now (429 with a time, 503), after the time
    that the server names and within the timeout.  Every call is retried when the connection cannot be opened; calls
    that change the server are retried in no other case.

    Args:
        url: URL of the server, `http://HOST:PORT` or `https://HOST`.
        key: API key; by default the value of the environment variable TPEFT_KEY.  None in both: no key is sent.
        timeout: seconds per call, retries included (default 30); None: no limit.
        retries: maximum number of retries per call (default 3).
        verify: trusted certificates: httpx's default (True, default), a PEM file (a path), or an SSL context; False
            disables the check.
        tenant: tenant that an admin's calls are about; by default the tenant of the key.
        transport: httpx transport to use instead of the network.

    Raises:
        InputError: the URL is not an HTTP URL, or the key has characters that cannot be sent.
    """
