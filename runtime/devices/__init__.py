"""Several devices in one process: placement of tasks, and residency on each."""
