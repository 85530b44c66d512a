"""Orthogonal."""
