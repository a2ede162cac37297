"""Command line, errors, atomic files and other helpers without knowledge of models."""
