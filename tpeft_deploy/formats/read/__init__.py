"""Reading of checkpoint files and module names."""
