"""Parts of the V2 protocol shared by REST and gRPC."""
