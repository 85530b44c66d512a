"""Limits of tenants: quotas, budgets and fair scheduling."""
