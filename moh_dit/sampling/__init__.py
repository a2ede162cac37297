"""Grids for people, exact sets for evaluation."""
