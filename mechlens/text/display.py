"""How tokens, numbers and turns of a conversation are shown."""

from __future__ import annotations

import re
from collections.abc import Sequence

MINUS = "\N{MINUS SIGN}"
ABSENT = "—"
"""Shown in place of a missing value."""
_ROLES = ("system", "developer", "user", "assistant", "model", "tool")
_INSTRUCTIONS = {"[INST]": "user", "[/INST]": "assistant"}
_SPECIAL = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
_VISIBLE = {" ": "·", "\n": "⏎", "\r": "␍", "\t": "⇥"}


def visible_token(token: str, *, longest: int | None = None) -> str:
    """Show a token so that nothing in it is invisible.

    A space becomes `·`, a newline `⏎`, a carriage return `␍`, a tab `⇥`, an empty token `∅`. Anything else
    that does not print (control characters, zero-width and bidirectional marks, lone surrogates) becomes its
    Python escape. Markup is not escaped.

    Args:
        longest: cut after this many characters, with an ellipsis; None shows all.
    """
    shown = (_VISIBLE.get(c) or (c if c.isprintable() else repr(c)[1:-1]) for c in token)
    text = "".join(shown) or "∅"
    return text if longest is None or len(text) <= longest else text[:longest] + "…"


def turns(tokens: Sequence[str]) -> dict[int, str]:
    """Positions at which a turn of a conversation begins, with its role.

    A turn begins with a special token that names a role (`<|user|>`), or that is followed by a role and a
    newline or another special token (`<|im_start|>user`).
    """
    found: dict[int, str] = {}
    for at, token in enumerate(tokens):
        if not _SPECIAL.fullmatch(token):
            continue
        inner = token.strip("<|>")
        if token in _INSTRUCTIONS or inner in _ROLES:
            found[at] = _INSTRUCTIONS.get(token, inner)
            continue
        name = ""
        for following in tokens[at + 1 : at + 5]:
            if following.startswith("\n") or _SPECIAL.fullmatch(following):
                if name.strip() in _ROLES:
                    found[at] = name.strip()
                break
            name += following
    return found


def number(value: float, digits: int = 3, *, signed: bool = False) -> str:
    """A number with `digits` decimals and a real minus sign, but none before what rounds to 0; `not measured`
    for nan."""
    if value != value:
        return "not measured"
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", MINUS)


def count(n: int, noun: str) -> str:
    """A count with its noun: `1 prompt`, `1,234 prompts`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
