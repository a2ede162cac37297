"""Other people's checkpoints: what is in a file, how its weights are called, which model it is."""
