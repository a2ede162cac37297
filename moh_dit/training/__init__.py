"""The trainer: configuration, data order, averages, checkpoints, logs and the loop."""
