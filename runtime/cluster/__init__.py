"""Several machines: one ingress, many replicas of the runtime, and the policy that chooses among them."""
