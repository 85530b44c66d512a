"""Metrics, statistics, traces and logs."""
