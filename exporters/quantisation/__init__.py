"""Quantisation by choice: which weights, their few bits, the graphs that use them, and the distance from the base."""
