"""Published numbers: those of papers and posts, and those of model cards.

None is measured on the reader's machine. A model card (`card.json` beside the bundled model's weights, or in
`cards/`) has entries of the same kind.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from mechlens.models.load.loading import BUNDLED, BUNDLED_DIRECTORY
from mechlens.results import ModelInfo

ARTICLE = '"How one can Interpret GPT2-Small"'
OTHERS = "measured by others on GPT-2 small"
LENS_POST = 'nostalgebraist 2020, "interpreting GPT: the logit lens"'
FEATURES_POST = 'Badger, "Language Model Features"'
WANG = "Wang et al. 2022, arXiv:2211.00593"
HANNA = "Hanna et al. 2023, arXiv:2305.00586"
MIB = "Mueller et al. 2025, arXiv:2504.13151"
PATCHING_DEMO = "TransformerLens, Attribution_Patching_Demo.ipynb"
ATTRIBUTION_DEMO = "TransformerLens, Direct_Logit_Attribution_Demo.ipynb"
GPT2_SMALL = ("gpt2", "gpt2-small", "openai-community/gpt2")
CARDS = Path(__file__).parent / "cards"


@dataclasses.dataclass(frozen=True)
class Published:
    """One published number or name."""

    what: str
    """The quantity. In the study `heads`: an estimate of `RepeatedTokenPerformance` (`second_half_accuracy`);
    `score`, the score `kind` of `head`; `highest_head` by `kind`; `heads_above` the `threshold` by `kind`;
    `at_least` or `at_most` a `threshold` for the estimate `kind`; `induction_circuit`. In the other studies:
    one of the study's `quantities`."""
    value: float | str
    source: str
    head: tuple[int, int] | None = None
    kind: str | None = None
    threshold: float | None = None
    sequences: int = 1
    """Number of sequences or other draws whose mean is the value."""
    interval: tuple[float, float] | None = None
    """The 95% interval of the mean over those draws."""
    study: str = "heads"
    """The study that measures it."""


def _induction(head: tuple[int, int], value: float) -> Published:
    return Published("score", value, OTHERS, head=head, kind="induction_score", sequences=30)


REPEATED_TOKENS_GPT2 = (
    Published("first_half_log_prob", -13.898, ARTICLE),
    Published("second_half_log_prob", -0.644, ARTICLE),
    Published("first_half_accuracy", 0.0, ARTICLE),
    Published("second_half_accuracy", 0.93, ARTICLE),
    Published("score", 0.91, ARTICLE, head=(5, 5), kind="induction_diagonal_score", sequences=30),
    _induction((5, 5), 0.932),
    _induction((6, 9), 0.913),
    _induction((7, 10), 0.910),
    _induction((5, 1), 0.908),
    _induction((7, 2), 0.833),
    Published("highest_head", "L4H11", ARTICLE, kind="previous_token_score"),
    Published(
        "heads_above", "L5H1 L5H5 L6H9 L7H2 L7H10", OTHERS, kind="prefix_matching_score", threshold=0.35
    ),
)
"""GPT-2 small on BOS + 50 random tokens + the same 50; prefix matching on 25 random tokens x 4."""
COMPOSITION_GPT2 = tuple(
    Published(what, 0.2283, ARTICLE, study="composition") for what in ("k_top1_keys", "k_top1_queries")
)
"""The K-composition circuit of 4.11 and 5.5 of GPT-2 small over its vocabulary. The source gives one number
and does not say over which axis the maximum is taken, so both are compared with it."""


IOI_GPT2 = (
    Published("logit_diff", 3.56, WANG, sequences=100_000, study="ioi"),
    Published("right", 0.993, WANG, sequences=100_000, study="ioi"),
    Published("heads_alone", 0.87, WANG, study="ioi"),
    Published("copies", 0.95, WANG, study="ioi"),
    Published("suppresses", 0.98, WANG, study="ioi"),
    Published("cmd", 0.03, MIB, study="ioi"),
    Published("demo clean", 3.5519, PATCHING_DEMO, study="ioi"),
    Published("demo corrupted", -3.5519, PATCHING_DEMO, study="ioi"),
    *(
        Published(f"attribution of {head}", value, ATTRIBUTION_DEMO, study="ioi")
        for head, value in (
            *(("L9H9", 1.958), ("L9H6", 1.628), ("L10H7", -1.427)),
            *(("L11H1", -0.912), ("L11H10", -0.904), ("L10H0", 0.637)),
        )
    ),
)
"""GPT-2 small on the indirect object: the model, 26 heads alone as a share of it, its name movers and its
negative name movers, the CMD of edge attribution patching, eight prompts, and what heads add to Mary minus
John in one prompt."""
GREATER_THAN_GPT2 = (
    Published("probability_diff", 0.817, HANNA, study="greater-than"),
    Published("circuit_alone", 0.895, HANNA, study="greater-than"),
)
"""GPT-2 small on later years: the probability of later years minus that of earlier ones, and the share of it
that the published circuit has alone."""


@dataclasses.dataclass(frozen=True)
class PublishedTokens:
    """The inputs that the searches of "Language Model Features" found for features 0 to 3 of one block."""

    models: tuple[str, ...]
    n_layers: int
    search: str
    """`complete` (exhaustive), `greedy`, `softmax` (gradient descent with that prior), `l1` or `cosine`."""
    block: int
    """Counted from 1."""
    inputs: tuple[str, ...]


_MEDIUM = ("gpt2-medium", "openai-community/gpt2-medium")
_LONG = "rawdownloadcloneembedreportprint"
FEATURE_TOKENS = (
    PublishedTokens(GPT2_SMALL, 12, "complete", 1, ("Pwr", "Claud", "Peb", "View")),
    *(
        PublishedTokens(GPT2_SMALL, 12, "complete", block, ("ItemTracker", "watched", "Peb", "(@"))
        for block in (2, 4, 8)
    ),
    PublishedTokens(
        GPT2_SMALL,
        12,
        "greedy",
        1,
        ("Pwr Pwr ItemTracker ItemTracker", "Claud Lara Lara Lara", "Peb Peb Peb Peb", "View tnc tnc tnc"),
    ),
    PublishedTokens(
        GPT2_SMALL,
        12,
        "greedy",
        4,
        (
            "ItemTracker interf interf ItemTracker",
            "watched watched watched watched",
            "Peb Peb Peb Peb",
            '(@ "></ guiName "></',
        ),
    ),
    PublishedTokens(
        GPT2_SMALL,
        12,
        "greedy",
        8,
        (
            "ItemTracker interf interf interf",
            "watched watched watched watched",
            "Peb Peb Peb Peb",
            '(@ guiName "></ guiName',
        ),
    ),
    PublishedTokens(
        GPT2_SMALL,
        12,
        "greedy",
        12,
        (
            "ItemTracker interf interf interf",
            "hostages herpes herpes herpes",
            "Kenn Peb Peb Peb",
            f"(@ {_LONG} {_LONG} {_LONG}",
        ),
    ),
    PublishedTokens(GPT2_SMALL, 12, "softmax", 1, ("cris", "Cola", "Cass", "Holt")),
    PublishedTokens(GPT2_SMALL, 12, "softmax", 8, ("Geh", "20439", "expend", "assetsadobe")),
    PublishedTokens(GPT2_SMALL, 12, "l1", 1, ("for", "im", "G", "$")),
    PublishedTokens(GPT2_SMALL, 12, "cosine", 1, ("!", '"', "qu", "$")),
    PublishedTokens(_MEDIUM, 24, "complete", 1, ("Ender", "pmwiki", "Cass", "catentry")),
    *(
        PublishedTokens(_MEDIUM, 24, "complete", block, ("refres", "Flavoring", "carbohyd", "assetsadobe"))
        for block in (4, 8, 12)
    ),
)


GPT2_FIGURES = (*REPEATED_TOKENS_GPT2, *COMPOSITION_GPT2, *IOI_GPT2, *GREATER_THAN_GPT2)
_FIGURES: tuple[tuple[tuple[str, ...], tuple[Any, ...], tuple[Published, ...] | Path], ...] = (
    (GPT2_SMALL, (12, 12, 768, 50257, None), GPT2_FIGURES),
    ((BUNDLED,), (4, 6, 192, 2048, None), BUNDLED_DIRECTORY / "card.json"),
    (("smollm2-135m",), (30, 9, 576, 49152, None), CARDS / "smollm2-135m.json"),
)
"""Names and sizes (layers, heads, d_model, d_vocab, no revision) of models, and their figures or card."""


def figures_of(model: ModelInfo) -> tuple[Published, ...]:
    """What is published about a model, in all studies; nothing for an unknown model.

    The sizes must match too: a folder called `gpt2` may hold another model.
    """
    given = (model.n_layers, model.n_heads, model.d_model, model.d_vocab, model.revision)
    for names, sizes, figures in _FIGURES:
        if model.name in names and given == sizes:
            return read_card(figures) if isinstance(figures, Path) else figures
    return ()


def read_card(path: Path) -> tuple[Published, ...]:
    """The entries of a model card; nothing if the file does not exist.

    Raises:
        ValueError: the file is not a model card.
    """
    if not path.is_file():
        return ()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["figures"]
        pairs = ("head", "interval")
        return tuple(
            Published(**entry | {name: tuple(entry[name]) for name in pairs if entry.get(name)})
            for entry in entries
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a model card of mechlens: {error}") from error
