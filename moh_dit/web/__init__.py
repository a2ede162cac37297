"""Serve a web page that samples images from one model."""
