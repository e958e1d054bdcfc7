"""The section on a tuned lens."""

from __future__ import annotations

import mechlens
from mechlens.results import TunedLens
from mechlens.show.section import Figure, Section, Table, joined

_TERMS = {
    "Tuned lens": (
        "A logit lens with an affine map for each row, trained so that the row predicts what the model does."
    ),
    "KL(final || row)": (
        "Kullback-Leibler divergence of the model's own distribution from the row's: 0 if they are equal."
    ),
    "Nat": "Unit of information with the natural logarithm: 0.69 nats are one bit.",
}


def tuned_lens_section(lens: TunedLens, *, title: str = "", text: str = "") -> Section:
    """How far each row is from the model on held-out tokens, with and without its translator."""
    said = f"From the checkpoint {lens.source}: its KL on held-out tokens is not known."
    figures = []
    if lens.is_measured:
        said = (
            f"{lens.steps:,} steps of {lens.batch_tokens:,} tokens; KL(final || row) is a mean over "
            f"{lens.held_out_tokens:,} held-out tokens."
        )
        caption = "Distance of each row from the model's own prediction; lower is better."
        figures = [Figure(lambda: mechlens.plot_tuned_lens(lens), caption, f"{lens.title}: KL by row.")]
    table = Table.of(lens.summary(), lens.columns, "KL(final || row) of each row", folded=True)
    return Section(title or lens.title, joined(text, said), [*figures, table], _TERMS)


SECTIONS = {TunedLens: tuned_lens_section}
