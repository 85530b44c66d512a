"""Writers of adapter files."""
