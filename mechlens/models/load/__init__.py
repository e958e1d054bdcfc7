"""From a name or a directory to a model on one of TransformerLens's engines."""
