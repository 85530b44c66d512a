"""The V2 protocol, as REST and gRPC share it."""
