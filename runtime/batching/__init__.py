"""Dynamic batching: policy, collation, workers, dispatch."""
