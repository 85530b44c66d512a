"""The runtime as the operations of an ingress see it, over replicas."""
