"""Uploads read apart: in child processes with limits on time, memory and files.

`reader` is the child's program and imports nothing of the server; `process` is one child as the server sees it;
`pool` shares a few of them among tenants.
"""
