"""Sample labelled grids to look at and exact sets for evaluation."""
