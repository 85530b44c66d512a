"""Limits of tenants: what each may hold, and what one may not take from the others."""
