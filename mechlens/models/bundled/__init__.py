"""The small model that ships with mechlens: weights, tokenizer and model card."""
