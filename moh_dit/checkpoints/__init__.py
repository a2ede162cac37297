"""Open, convert and write checkpoints of this and other projects."""
