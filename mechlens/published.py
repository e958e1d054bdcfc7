"""The published figures that a reproduction is held against: claim, value, source.

No figure here is ever a result. A model's own card (`card.json` beside the bundled model's weights)
has the same form.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

ARTICLE = 'the article "How one can Interpret GPT2-Small"'
OLSSON = "Olsson et al. 2022, arXiv:2209.11895"
OTHERS = "measured by others on GPT-2 small"
LENS_POST = 'nostalgebraist 2020, "interpreting GPT: the logit lens"'
FEATURES_POST = 'Badger, "Language Model Features"'
STUDIES = ("heads", "logit-lens", "facts", "induction-circuits", "indirect-object", "features")
"""In the order in which `mechlens reproduce` makes them."""
GPT2_SMALL = ("gpt2", "gpt2-small", "openai-community/gpt2")


@dataclasses.dataclass(frozen=True)
class Published:
    """One published figure.

    `what` names the measurement. In the study `heads` it is an estimate of `RepeatedTokenPerformance`
    (`second_half_accuracy`), `score` for the head score `kind` of `head`, or a claim: `highest_head` by
    `kind`, `heads_above` the `threshold` by `kind`, `at_least` and `at_most` a `threshold` for the estimate
    `kind`, and `induction_circuit`, a clear induction head in a layer after a clear previous-token head. In
    the other studies it is the name that the study gives it.
    """

    what: str
    value: float | str
    source: str
    head: tuple[int, int] | None = None
    kind: str | None = None
    threshold: float | None = None
    """What the measured number must reach (or, for `at_most` and the like, must not exceed)."""
    sequences: int = 1
    """How many sequences or other draws the published figure is the mean of."""
    interval: tuple[float, float] | None = None
    """Where the figure's mean lies, with a confidence of 95%, over those draws."""
    study: str = "heads"
    """Which study measures it: one of `STUDIES`."""


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

LOGIT_LENS = (
    Published("final_guess_enters", "well before the last layer", LENS_POST, threshold=0.75),
    Published("kl_falls", "smoothly", LENS_POST, threshold=0.9),
    Published("largest_fall", "no jump between layers", LENS_POST, threshold=0.5),
    Published("input_is_apart", "far apart", LENS_POST, threshold=1.5),
    Published("rare_copy_enters", "only in the last layers", LENS_POST, threshold=0.75),
    Published("repetition_noticed", "in the upper half", LENS_POST, threshold=0.5),
    Published("rare_inputs_kept", "better than common ones", LENS_POST, threshold=0.0),
)
"""What the post saw in GPT-2 in words; `studies.logit_lens` says how each is measured and what would do."""

COMPOSITION_GPT2 = (
    Published("k_top1_keys", 0.2283, ARTICLE),
    Published("k_top1_queries", 0.2283, ARTICLE),
)
"""The K-composition circuit of 4.11 and 5.5 of GPT-2 small, over its vocabulary; the article does not say
over which axis the maximum is taken, so both are held against its one figure."""

MLP_PATCHING = (
    Published("mlps_small_elsewhere", "no large loss difference", ARTICLE, threshold=0.1),
    Published("mlps_first_stands_out", "except at the first token", ARTICLE, threshold=2.0),
    Published("mlps_first_of_copy_stands_out", "except at the first token", ARTICLE, threshold=2.0),
)
"""What the article saw in GPT-2 small when it replaced MLP outputs of the second copy by those of the first,
in words; `studies.mlp_patching` says how each is measured. Large is more than a tenth of the clean loss, and
what stands out is at least twice the largest of the others."""

FEATURES = (
    Published("layers_agree", "4 of 4 in blocks 2, 4 and 8 of GPT-2", FEATURES_POST, threshold=0.5),
    Published("layers_agree_beyond_chance", "yes", FEATURES_POST),
    Published("untrained_layers_do_not", "0 of 4 in GPT-2", FEATURES_POST),
    Published("agreement_is_learned", "yes, in GPT-2", FEATURES_POST),
    Published("untrained_is_like_trained", "identical in Llama 7b", FEATURES_POST, threshold=0.5),
    Published("embeddings_make_it_so", "not said", FEATURES_POST),
    Published("sizes_agree", "identical in Llama 7b, 13b and 30b", FEATURES_POST, threshold=0.5),
    Published("id_is_number", "tokens 0, 1, 2 of features 0, 1, 2 in Llama 7b", FEATURES_POST),
    Published("gradient_differs", "4 of 4 differ in GPT-2", FEATURES_POST, threshold=0.5),
    Published("found_resemble_real", "more than related words, in Llama 7b", FEATURES_POST),
    Published("last_is_sum", "the same inputs in GPT-2", FEATURES_POST, threshold=1.0),
    Published("later_tokens_agree_less", "yes, in Llama 7b", FEATURES_POST),
    Published("one_word_repeated", "5 times the same in Llama's block 1", FEATURES_POST, threshold=0.5),
    Published("alone_as_the_first", "identical in Llama 13b's block 32", FEATURES_POST, threshold=0.5),
)
"""What the post says of features; `studies.feature_search` says how each is measured."""


@dataclasses.dataclass(frozen=True)
class PublishedTokens:
    """What the post's searches found for features 0 to 3 of one block."""

    models: tuple[str, ...]
    n_layers: int
    search: str
    """`complete`, `greedy`, `softmax` (gradient descent with that prior), `l1` or `cosine`."""
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


def read_card(path: Path) -> tuple[Published, ...]:
    """The figures that a model's card claims for it; none where there is no card.

    Raises:
        ValueError: the file is no card.
    """
    if not path.is_file():
        return ()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["figures"]
        return tuple(
            Published(
                **{
                    **entry,
                    **{name: tuple(entry[name]) for name in ("head", "interval") if entry.get(name)},
                }
            )
            for entry in entries
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no model card of mechlens: {error}") from error
