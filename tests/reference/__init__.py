"""Slow, literal implementations, with which the fast ones are compared. They import nothing from mechlens."""
