"""Base models to which adapters are matched."""
