"""Circuits from weights alone: what heads read, compare and write, as products of thin matrices.

Vectors are rows, as in TransformerLens: `OV = W_V @ W_O` is [source, destination] and `QK = W_Q @ W_K.T` is
[query, key]. The thin factors are never multiplied out: for GPT-2, a circuit over the vocabulary would take
10 GB.

Every circuit includes the learned scale of the norms on its path and, for LayerNorm, the subtraction of the
mean. This includes the learned scale of a norm between attention and the stream (Gemma-2). Weights that
write to the stream are centered if only LayerNorm reads it, and `W_U` is centered over the vocabulary unless
the logits have a soft-cap. So `processing=True`, `processing=False` and a partly processed model give the
same circuit.

A circuit leaves out all biases (of queries, keys, values, norms and logits), the division by norms' scales,
the attention scale, soft-caps, attention windows, constants that multiply the logits (Cohere, Granite), and
ALiBi biases.

A rotary model rotates queries and keys by their positions. Its QK circuits are defined only for two positions
a known distance apart (`relative_position`), or for the dimensions of a head that are not rotated
(`rotary="unrotated"`).
"""
