"""The V2 protocol over gRPC: its messages, their tensors, and the server that answers its calls."""
