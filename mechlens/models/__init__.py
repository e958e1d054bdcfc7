"""Loading and running models: the only place that knows TransformerLens and its versions."""
