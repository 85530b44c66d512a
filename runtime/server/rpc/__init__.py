"""V2 protocol over gRPC: message and tensor codecs, and the server."""
