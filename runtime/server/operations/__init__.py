"""What the server's operations are made of."""
