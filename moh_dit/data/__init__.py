"""Images, labels and the embedded digits."""
