# Written by .ci/unasync.py from asynchronous/__init__.py; change that file, then run `make client`.
"""The blocking client."""

from tpeft_deploy.client.blocking.client import Client

__all__ = ["Client"]
