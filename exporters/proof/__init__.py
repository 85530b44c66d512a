"""Proofs that an exported bundle computes what the training library computes."""
