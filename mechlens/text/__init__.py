"""Token sequences: prompts, batches and corpora."""
