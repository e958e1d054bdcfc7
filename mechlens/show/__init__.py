"""What to show of each result, and how a terminal, a page and a notebook render it."""
