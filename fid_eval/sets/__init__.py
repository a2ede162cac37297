"""Open sets of images, statistics and features."""
