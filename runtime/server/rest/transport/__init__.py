"""HTTP connections: listener, compression, disconnects."""
