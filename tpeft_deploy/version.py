"""Version of the package, without importing it."""

__all__ = ["__version__"]

__version__ = "0.1.0"
