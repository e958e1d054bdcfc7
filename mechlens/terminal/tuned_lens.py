"""A tuned lens in a terminal: what its translators gain at each row."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mechlens.show.terminal import print_rows

if TYPE_CHECKING:
    from mechlens.results import TunedLens

_ABOUT = (
    *("steps", "batch_tokens", "length", "train_tokens", "held_out_tokens", "learning_rate", "seed"),
    "prepend_bos",
)


def print_tuned_lens(found: TunedLens) -> None:
    """Print each row's KL from the model on the tokens held out, with and without its translator."""
    table = found.to_dataframe().iloc[::-1].to_dict("records")
    print_rows(
        f"Tuned lens of {found.model.name}, steps: {found.steps:,}; KL(final || row) on "
        f"{found.held_out_tokens:,} tokens held out, nats",
        ("row", "plain", "tuned"),
        [(row["row"], f"{row['kl_plain']:.3f}", f"{row['kl_tuned']:.3f}") for row in table],
    )


def tuned_lens_json(found: TunedLens) -> dict[str, Any]:
    """How it was trained, and the KLs of each row."""
    return {
        "model": asdict(found.model),
        **{name: getattr(found, name) for name in _ABOUT},
        "rows": found.to_dataframe().to_dict("records"),
    }
