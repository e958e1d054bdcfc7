"""Slow, literal implementations that the fast ones are held against. They import nothing of mechlens."""
