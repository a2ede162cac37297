"""Looking inside: head load, what a model costs, a report of runs."""
