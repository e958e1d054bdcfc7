"""Several analyses that answer one larger question."""
