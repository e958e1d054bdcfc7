"""Circuits from weights alone: what heads read, compare and write, as products of thin matrices.

Vectors are rows, as in TransformerLens: `OV = W_V @ W_O` is [source, destination] and `QK = W_Q @ W_K.T` is
[query, key]. The thin factors are never multiplied out: GPT-2's circuit over its vocabulary would take 10 GB.

Every circuit includes the learned scale of the norms on its path and, for LayerNorm, the subtraction of the
mean. Weights that write to a stream that only LayerNorm reads have mean 0. `W_U` has mean 0 over the
vocabulary unless the logits have a soft-cap. The learned scale of a norm between attention and the stream
(Gemma-2) is included. So `processing=True`, `processing=False` and a partly processed model give the same
circuit.

A circuit leaves out all biases (of queries, keys, values, norms and logits), the division that norms do, the
attention scale, soft-caps, windows, constants that multiply the logits (Cohere, Granite), and ALiBi's bonus
for near keys.

A rotary model rotates queries and keys by their positions. Its QK circuits exist only for two positions a
known distance apart (`relative_position`), or for the dimensions of a head that are not rotated
(`rotary="unrotated"`).
"""
