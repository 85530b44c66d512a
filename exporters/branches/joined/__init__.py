"""Fewer and larger operators for branches that share an activation, on a GPU."""
