"""Numbers of instructions of ten key paths, compared with stored ones."""
