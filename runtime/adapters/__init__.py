"""Adapter versions and their residency on disk, in memory and in the bank."""
