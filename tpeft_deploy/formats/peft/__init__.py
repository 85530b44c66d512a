"""Readers of PEFT checkpoints."""
