"""Readers of FLoRA checkpoints."""
