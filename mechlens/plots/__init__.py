"""A result in, a figure out: one file per analysis."""
