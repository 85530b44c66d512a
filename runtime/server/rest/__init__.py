"""The V2 protocol over HTTP, and the registry's and the administration's own routes."""
