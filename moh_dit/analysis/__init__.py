"""Measure head load, estimate the cost of a configuration, and report on runs."""
