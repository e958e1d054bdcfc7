"""Load a model by name or from files, on one of TransformerLens's engines."""
