"""What there is to show of each result, rendered in a terminal, on a page or in a notebook."""
