"""One file per question: takes a model and tokens, returns a result."""
