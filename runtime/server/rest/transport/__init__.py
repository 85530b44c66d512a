"""HTTP connections: listener, seats, compression."""
