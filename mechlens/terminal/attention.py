"""Attention patterns in a terminal: what each token attends to most, or all of it for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mechlens.show.terminal import print_rows

if TYPE_CHECKING:
    from mechlens.results import AttentionPatterns

MAX_POSITIONS = 64
"""Of a longer text the last ones are shown."""


def print_attention(found: AttentionPatterns) -> None:
    """Print for each token and head the token that is attended to most, with its position and attention."""
    from mechlens.results import head_label
    from mechlens.text.display import turns, visible_token

    tokens = [visible_token(token, longest=16) for token in found.token_strings]
    for start, role in turns(found.token_strings).items():
        tokens[start] = f"{role}: {tokens[start]}"
    values, places = found.patterns.max(-1)
    n_pos = len(tokens)
    rows = []
    for dest in range(max(0, n_pos - MAX_POSITIONS), n_pos):
        cells = [
            f"{value:.2f} {tokens[src]} ({src})"
            for value, src in zip(values[:, dest].tolist(), places[:, dest].tolist(), strict=True)
        ]
        rows.append((str(dest), tokens[dest], *cells))
    left_out = f", the last {MAX_POSITIONS} of {n_pos} tokens" if n_pos > MAX_POSITIONS else ""
    print_rows(
        f"Attention of {found.model.name}: what each token attends to most{left_out}",
        ("pos", "token", *(head_label(*head) for head in found.heads)),
        rows,
    )


def attention_json(found: AttentionPatterns) -> dict[str, Any]:
    """The tokens, and each head's pattern by attending and attended position."""
    from mechlens.results import head_label

    return {
        "model": asdict(found.model),
        "tokens": list(found.token_strings),
        "patterns": {
            head_label(*head): pattern.tolist()
            for head, pattern in zip(found.heads, found.patterns, strict=True)
        },
    }
