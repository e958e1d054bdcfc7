"""Token sequences: prompts, batches, corpora; knows no model."""
