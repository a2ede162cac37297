"""Compute metrics from arrays."""
