"""Isolated parsing of uploads, in child processes with limits on time, memory and files.

`reader` is the program of a child process and imports nothing of the server; `process` controls one child process from
the server; `pool` schedules uploads of all tenants on a few child processes.
"""
