"""The V2 protocol over HTTP, and the routes of the registry and of the administration."""
