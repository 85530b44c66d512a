"""The console: static files that a browser shows, which call the REST API with the key that is typed in."""

from __future__ import annotations
