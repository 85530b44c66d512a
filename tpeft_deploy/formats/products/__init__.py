"""Matrix products that several formats share."""
