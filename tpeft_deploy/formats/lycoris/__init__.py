"""Readers of LyCORIS checkpoints."""
