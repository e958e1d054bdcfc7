"""Features in a terminal: the tokens that excite them, as tables, or all of it for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mechlens.show.terminal import print_rows, tolerance

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from mechlens.results import (
        CompleteSearch,
        FeatureAlignment,
        FeatureExamples,
        GradientSearch,
        GreedySearch,
        Share,
    )

MAX_FEATURES = 32
"""Of more features the first ones are shown."""
MAX_PLACES = 16
"""Features, each in each layer, whose contexts are shown; of more the first ones."""
_LONGEST = 7
"""Characters of a token."""
_NAMED = 4
"""Of more selected activations the smallest is printed."""
_BEFORE, _AFTER = 32, 20
"""Characters of a context on either side of its strongest token."""


def print_complete_search(found: CompleteSearch) -> None:
    """Print the best tokens of each feature by layer, with as many features side by side as the terminal is
    wide; what is left out is said."""
    from rich.cells import cell_len, set_cell_size
    from rich.console import Console

    from mechlens.plots.features import NO_TOKEN, feature_noun, place_words, prefix_words
    from mechlens.text.display import visible_token

    noun, shown = feature_noun(found.site), found.features[:MAX_FEATURES]
    ids, values = found.ids[:, : len(shown)].tolist(), found.activations[:, : len(shown)].tolist()
    excites = found.excites[:, : len(shown)].tolist()
    tokens = [
        [
            [
                visible_token(found.strings[str(each)], longest=_LONGEST) if excited else NO_TOKEN
                for each, excited in zip(best, some, strict=True)
            ]
            for best, some in zip(row, excited_row, strict=True)
        ]
        for row, excited_row in zip(ids, excites, strict=True)
    ]
    numbers = [[[_number(value) for value in best] for best in row] for row in values]
    wide = max(cell_len(token) for row in tokens for best in row for token in best)
    long = max(len(number) for row in numbers for best in row for number in best)
    several = found.ids.shape[-1] > 1
    # a cell has a border and two blanks
    left = 10 + 7 * several
    cell = max(wide + 1 + long, len(f"{noun} {shown[-1]}")) + 3
    at_once = max(1, (Console().width - left) // cell)
    title = (
        f"Tokens that excite {noun}s of {place_words(found.site)} in {found.model.name} most, "
        f"{prefix_words(found)}"
    )
    for at in range(0, len(shown), at_once):
        columns = range(at, min(at + at_once, len(shown)))
        rows = [
            (
                str(layer) if rank == 0 else "",
                *([str(rank + 1)] if several else []),
                *(
                    f"{set_cell_size(tokens[i][j][rank], wide)} {numbers[i][j][rank]:>{long}}"
                    for j in columns
                ),
            )
            for i, layer in enumerate(found.layers)
            for rank in range(found.ids.shape[-1])
        ]
        heads = ("layer", *(["rank"] if several else []), *(f"{noun} {shown[j]}" for j in columns))
        print_rows(title if at == 0 else "", heads, rows)
    some = found.excites[:, : len(shown)]
    if not some.all():
        print(
            f"{NO_TOKEN}: no token excites the {noun} ({int((~some[..., 0]).sum())} of "
            f"{some[..., 0].numel()}), or no other one does."
        )
    if len(shown) < len(found.features):
        print(f"Shown: the first {len(shown)} of {len(found.features)} {noun}s. --json and --out have all.")


def complete_search_json(found: CompleteSearch) -> dict[str, Any]:
    """What was searched, and every token that was kept, at either end."""
    return {
        **_about(found),
        "layers": list(found.layers),
        "features": list(found.features),
        "vocabulary": found.vocabulary,
        "tokens": found.to_dataframe().to_dict("records"),
    }


def print_greedy_search(results: Sequence[GreedySearch]) -> None:
    """Print the inputs that were built for each feature, the best first, and the activation at each token."""
    from mechlens.plots.features import feature_noun, place_words, prefix_words

    first = results[0]
    several, summed = first.ids.shape[1] > 1, first.aggregate == "sum"
    rows = []
    for found in results:
        numbers, scores = found.activations.tolist(), found.scores.tolist()
        for i, feature in enumerate(found.features):
            for rank, tokens in enumerate(found.ids[i]):
                cells = [str(found.layer), str(feature)] if rank == 0 else ["", ""]
                cells += [str(rank + 1)] if several else []
                cells += [_tokens(found, tokens), " ".join(map(_number, numbers[i][rank]))]
                rows.append([*cells, _number(scores[i][rank])] if summed else cells)
    print_rows(
        f"Greedy search of {first.ids.shape[-1]} {_plural(first.ids.shape[-1], 'token')} that excite "
        f"{feature_noun(first.site)}s of {place_words(first.site)} in {first.model.name}, "
        f"{prefix_words(first)}",
        (
            "layer",
            feature_noun(first.site),
            *(["rank"] if several else []),
            "tokens",
            "activation at each",
            *(["sum"] if summed else []),
        ),
        rows,
    )


def greedy_search_json(results: Sequence[GreedySearch]) -> dict[str, Any]:
    """What was searched, and every token that was found."""
    first = results[0]
    return {
        **_about(first),
        "layers": [found.layer for found in results],
        "features": list(first.features),
        "aggregate": first.aggregate,
        "tokens": [row for found in results for row in found.to_dataframe().to_dict("records")],
    }


def print_gradient_search(found: GradientSearch, complete: CompleteSearch | None = None) -> None:
    """Print the best tokens by each decoding with their true activation, how far that is from the best token
    of all, and how much the found embeddings resemble real ones.

    Args:
        complete: the search that told the optimum, whose token is named.
    """
    from mechlens.plots.features import drawn_values, prefix_words
    from mechlens.text.display import visible_token

    name, _, true = drawn_values(found)
    rows, selected = [], len(found.selected)
    for way, ids in found.ids.items():
        best = found.best_ids(way)
        value = float(true[way][found.true_objectives[way].argmin()])
        equal = int((ids == best).all(-1).sum())
        cells: tuple[str, ...] = (_DECODINGS.get(way, way), _tokens(found, best), _number(value, 3))
        if selected > 1:
            each = found.best_activations(way).tolist()
            cells += (", ".join(map(_number, each)) if selected <= _NAMED else _number(min(each)),)
        rows.append((*cells, f"{equal} of {len(ids)} {_plural(len(ids), 'restart')}"))
    n_steps = found.objectives.shape[1] - 1
    print_rows(
        f"Gradient search in {found.model.name}, {_sought(found)}, {prefix_words(found)}; {n_steps} "
        f"{_plural(n_steps, 'step')} of {found.optimiser}{_prior(found)}",
        (
            "decoding",
            "best tokens",
            name,
            *(["each activation" if selected <= _NAMED else "smallest activation"] if selected > 1 else []),
            "found by",
        ),
        rows,
    )
    at = None
    if complete is not None:
        at = complete.layers.index(found.layer), complete.features.index(int(found.selected[0, 1]))
    if complete is not None and at is not None and not complete.excites[at][0]:
        print("No token excites it by itself.")
    elif found.optimum is not None:
        named, reached = "", False
        if complete is not None and at is not None:
            best_of_all = int(complete.ids[at][0])
            named = f" ({visible_token(complete.strings[str(best_of_all)])})"
            reached = found.best_ids().tolist() == [best_of_all]
        missed = found.optimum - found.best_activation()
        # as good as the best, but for the rounding of two ways to run a token
        reached = reached or missed <= 1e-4 * abs(found.optimum)
        print(
            f"The best of all tokens{named} has {found.optimum:.3f}: "
            + ("it was found." if reached else f"the search missed it by {missed:.3f}.")
        )
    cosine = float(found.nearest_cosine.mean())
    print(f"Cosine of the found embeddings to the nearest real one: {cosine:.3f} on average")
    print(f"(of a real one to the nearest other one: {found.token_cosine:.3f}).")


def gradient_search_json(found: GradientSearch) -> dict[str, Any]:
    """What was searched and how, the best tokens by decoding, and those of every restart."""
    names = ["objective", "constant", "prior", "prior_weight"]
    names += ["optimiser", "learning_rate", "isolated", "seed"]
    best = {}
    for way in found.ids:
        ids = found.best_ids(way)
        last = found.decoded_ids[way][found.true_objectives[way].argmin()]
        best[way] = {
            "ids": ids.tolist(),
            "tokens": [found.strings[str(token)] for token in ids.tolist()],
            "embedding_decodes_to": [found.strings[str(token)] for token in last.tolist()],
            "objective": float(found.true_objectives[way].min()),
            "activation": found.best_activation(way),
            "activations": found.best_activations(way).tolist(),
        }
    return {
        **_about(found),
        "layer": found.layer,
        "selected": found.selected.tolist(),
        **{name: getattr(found, name) for name in names},
        "target": None if found.target_ids is None else found.target_ids.tolist(),
        "steps": found.objectives.shape[1] - 1,
        "best": best,
        "optimum": found.optimum,
        "below_optimum": found.below_optimum,
        "nearest_cosine": float(found.nearest_cosine.mean()),
        "token_cosine": found.token_cosine,
        "restarts": found.to_dataframe().to_dict("records"),
    }


def print_feature_alignment(results: Mapping[str, FeatureAlignment]) -> None:
    """Print how often features have the same best token, and share their best ones, by what is compared; then
    how often a best token's id is the feature's own number, what is left out, and whether the layers of the
    first agree more than those of the others."""
    from mechlens.plots.feature_alignment import index_shares, index_verdict, left_out_words, result_names

    found = list(results.values())
    first, names = found[0], result_names(found, list(results))
    # in the title where they are the same of all, else in the rows
    sites = {site for each in found for site in (each.site, each.other_site)}
    where = f"{sites.pop()} of " if len(sites) == 1 else ""
    titles = {"same": f"The same best token, {where}{first.model.name}"}
    if first.top_k > 1:
        titles["overlap"] = f"The same tokens among the best {first.top_k}"
    for what, title in titles.items():
        print_rows(
            title,
            ("compared", "share", "95% interval", "chance", "verdict"),
            [(name, *_share(each.share(what))) for name, each in zip(names, found, strict=True)],
        )
    own = index_shares(found)
    if own:
        print_rows(
            f"The best token's id is the feature's own number (by chance 1 in {first.model.d_vocab:,})",
            ("features of", "share", "95% interval", "verdict"),
            [(name, *_share(share)[:2], index_verdict(share)) for name, share in own.items()],
        )
    counts = sorted({len(each.features) for each in found})
    nouns = f"Of {' or '.join(map(str, counts))} {_plural(counts[-1], 'feature')}"
    if counts == [1]:
        print(f"{nouns}: chance takes a second one, with another number.")
    else:
        print(f"{nouns}; chance is the same share of features with unlike numbers.")
    few = left_out_words(found)
    if few:
        print(few)
    if not any(each.within for each in found) and len(first.layers) == 1:
        several = ": give several with --layer" if first.model.n_layers > 1 else ""
        print(f"How layers agree with each other is left out, since there is but one{several}.")
    contrast = _contrast({name: each.share() for name, each in results.items() if each.within})
    if contrast:
        print(contrast)


def feature_alignment_json(results: Mapping[str, FeatureAlignment]) -> dict[str, Any]:
    """Every share by what is compared, with its pairs of layers, and how often an id is the feature's own."""
    from mechlens.plots.feature_alignment import index_shares, index_verdict, left_out

    first = next(iter(results.values()))
    return {
        "model": asdict(first.model),
        "site": first.site,
        "top_k": first.top_k,
        "comparisons": [
            {
                "compared": name,
                "model": found.model.name,
                "other": found.other.name,
                "site": found.site,
                "other_site": found.other_site,
                "features": len(found.features),
                **{what: _share_json(found.share(what)) for what in ("same", "overlap")},
                "pairs": found.to_dataframe().to_dict("records"),
            }
            for name, found in results.items()
        ],
        "is_index": {
            name: {**asdict(share), "verdict": index_verdict(share)}
            for name, share in index_shares(results.values()).items()
        },
        "left_out_by_layer": left_out(results.values()),
    }


def print_feature_examples(found: FeatureExamples) -> None:
    """Print each feature's contexts, the strongest first, around the token that excites it most."""
    from mechlens.plots.features import feature_noun, place_words

    noun = feature_noun(found.site)
    places = [(i, j) for i in range(len(found.layers)) for j in range(len(found.features))]
    peaks = found.peaks.tolist()
    for i, j in places[:MAX_PLACES]:
        place = f"{found.features[j]} of {place_words(found.site, found.layers[i])}"
        rows = [
            (_number(peak), _context(found, window, pos))
            for peak, window, pos in zip(
                peaks[i][j], found.windows[i, j].tolist(), found.positions[i, j].tolist(), strict=True
            )
            if window >= 0
        ]
        print_rows(
            f"{noun.capitalize()} {place} in {found.model.name}: the strongest of {found.read:,} "
            f"{_plural(found.read, 'context')} of {found.tokens.shape[1]} tokens"
            f"{', which begin with BOS' if found.prepend_bos else ''}",
            ("activation", "context"),
            rows,
        )
    if len(places) > MAX_PLACES:
        print(f"Shown: the first {MAX_PLACES} of {len(places)}. --json and --out have all.")


def feature_examples_json(found: FeatureExamples) -> dict[str, Any]:
    """What was read, and every context that was kept."""
    return {
        "model": asdict(found.model),
        "site": found.site,
        "layers": list(found.layers),
        "features": list(found.features),
        "prepend_bos": found.prepend_bos,
        "read": found.read,
        "length": found.tokens.shape[1],
        "contexts": found.to_dataframe().to_dict("records"),
    }


# -- steps -----------------------------------------------------------------------------------------

_DECODINGS = {"pinv": "pseudo-inverse", "nearest": "nearest embedding"}


def _about(found: CompleteSearch | GreedySearch | GradientSearch) -> dict[str, Any]:
    return {
        "model": asdict(found.model),
        "site": found.site,
        "prefix": found.prefix.tolist(),
        "prepend_bos": found.prepend_bos,
    }


def _tokens(found: GreedySearch | GradientSearch, ids: Int[Tensor, " pos"]) -> str:
    from mechlens.text.display import visible_token

    return " ".join(visible_token(found.strings[str(token)], longest=16) for token in ids.tolist())


def _sought(found: GradientSearch) -> str:
    from mechlens.plots.features import place_words, searched_words

    words = searched_words(found)
    if found.objective == "continuation":
        return words
    return f"{words} of {place_words(found.site, found.layer)}{' alone' if found.isolated else ''}"


def _prior(found: GradientSearch) -> str:
    if found.prior == "none":
        return ""
    return f", prior {found.prior}" + ("" if found.prior_weight is None else f" x {found.prior_weight:g}")


def _number(value: float, digits: int = 2) -> str:
    # never -0.00
    return f"{round(value, digits) + 0.0:.{digits}f}"


def _plural(count: int, noun: str) -> str:
    return noun if count == 1 else f"{noun}s"


def _share(share: Share) -> tuple[str, str, str, str]:
    value = "undefined" if share.value != share.value else f"{share.value:.3f}"
    chance = "" if share.chance != share.chance else f"{share.chance:.4f}"
    return value, tolerance(share.low, share.high, 3), chance, share.verdict


def _contrast(shares: Mapping[str, Share]) -> str:
    """How often layers agree, of the first beside each other one; empty where there is nothing to compare."""
    known = {name.removeprefix("layers, "): each for name, each in shares.items() if each.value == each.value}
    if len(known) < 2:
        return ""
    (name, first), *others = known.items()
    beside = [
        f"{other} {each.value:.3f} (the intervals "
        f"{'overlap' if each.low <= first.high and first.low <= each.high else 'do not overlap'})"
        for other, each in others
    ]
    return f"Layers have the same best token: {name} {first.value:.3f}, {', '.join(beside)}."


def _share_json(share: Share) -> dict[str, Any]:
    return {**asdict(share), "verdict": share.verdict}


def _context(found: FeatureExamples, window: int, pos: int) -> str:
    """Text around a token, with the token between marks."""
    from mechlens.text.display import visible_token

    tokens = [found.strings[str(token)] for token in found.tokens[window].tolist()]
    before, after = _readable("".join(tokens[:pos])), _readable("".join(tokens[pos + 1 :]))
    if len(before) > _BEFORE:
        before = "…" + before[-_BEFORE:]
    if len(after) > _AFTER:
        after = after[:_AFTER] + "…"
    return f"{before}«{visible_token(tokens[pos])}»{after}"


def _readable(text: str) -> str:
    """Line breaks and the like made visible; blanks stay blanks."""
    from mechlens.text.display import visible_token

    return " ".join(visible_token(part) if part else "" for part in text.split(" "))
