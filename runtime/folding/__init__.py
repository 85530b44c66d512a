"""Folding of hot adapters into base weights."""
