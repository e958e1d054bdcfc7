"""Loading and running models: the only package that depends on TransformerLens and its versions."""
