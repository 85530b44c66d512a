"""Low rank."""
