"""A page to make images with: a queue in front of one model, served to a browser."""
