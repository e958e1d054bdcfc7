"""Published findings, measured on any model: one file per study, each with its claims and its sections."""

STUDIES = {
    "heads": "induction heads on repeated random tokens",
    "logit-lens": 'the claims of "interpreting GPT: the logit lens"',
    "mlp-patching": "MLP outputs of the second copy replaced with those of the first",
    "composition": "the K-composition circuit of two heads",
    "facts": "at which layer the answers to 48 facts can be read",
    "induction-circuits": "pairs of a previous-token head and an induction head",
    "indirect-object": "which heads identify the indirect object",
    "ioi": "the circuit of the indirect object, how faithful it is, and whether other prompts give the same",
    "greater-than": "the circuit that finds a later year, and how faithful it is",
    "features": "whether layers share the maximally activating tokens of their residual dimensions",
    "feature-search": 'the claims of "Language Model Features"; needs minutes even for a small model',
}
"""What each study is about, by name, in the order in which `mechlens.reproduce` runs them."""
