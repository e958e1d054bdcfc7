"""Recovering the input: linear maps from the residual stream to the embedding of the current token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechlens.arguments import check_counts, check_reals, whole_number
from mechlens.errors import ArgumentError
from mechlens.measures.bases import Basis, by_basis, make_bases
from mechlens.measures.linear_maps import Fit, Moments, nearest
from mechlens.measures.map_comparison import compare_maps
from mechlens.measures.statistics import bootstrap_interval
from mechlens.models.protocol import LensModel, describe
from mechlens.models.run.forward import parts, watch
from mechlens.models.weights.access import direct_unembedding
from mechlens.progress import progress_bar
from mechlens.results import InputProbe
from mechlens.text.corpus import Corpus, token_windows
from mechlens.text.tokens import all_bos, own_bos_token_id

BASES = ("pca", "nmf")
ELEMENTS = 64
"""Elements of a basis by default, if the model is wide enough."""


def probe_input(
    model: LensModel,
    corpus: Corpus | Int[Tensor, "window pos"],
    *,
    per_layer: bool = True,
    bases: Sequence[str] | Mapping[str, int] = BASES,
    train_tokens: int = 65536,
    held_out_tokens: int = 8192,
    ridge: float = 1e-6,
    null_draws: int = 100,
    seed: int = 0,
) -> InputProbe:
    """Fit linear maps from each layer's residual stream back to the embedding of the current token.

    A map `x @ M + b` is the least-squares prediction of the token's row of `W_E` from the stream `x` at its
    position. There is one map per row (the embedding and each layer), and a shared one, fitted to all rows
    together. A token is recovered if its embedding is the nearest to `x @ M + b`. BOS positions are left out.

    The result compares each map, read as logits, with `W_E` and `W_U`. It also compares the directions of
    the stream that the map reads with those that matter in `W_E`; see `InputProbe` for the definitions. Each
    number is given alongside its value for random maps with the same singular values.

    Args:
        corpus: a path, or several as `Path`s, to `.txt`, `.jsonl` or `.jsonl.gz` files or folders of them; an
            iterable of texts (a single text in a list); token ids `[window, pos]`; or the windows of
            `token_windows`, which sets their length and BOS. The first windows are for training, the next
            ones are held out.
        per_layer: whether to fit a map for each row as well as the shared one.
        bases: bases of `W_E` in which to recover the token, besides the standard one: `pca`, `nmf`, both or
            none. A mapping such as `{"pca": 16}` sets the number of elements of each; the default is 64, or
            `d_model` if that is less.
        train_tokens: positions to fit on, rounded up to whole windows.
        held_out_tokens: positions to evaluate on, likewise.
        ridge: added to the diagonal of the stream's covariance, in units of its mean variance; 0 takes the
            minimum-norm solution.
        null_draws: random maps for each null, at least 2.
        seed: for the random maps, the factorization and the bootstrap.

    Returns:
        Accuracy, R², similarities and weights per row, with their nulls, and the maps.

    Raises:
        ArgumentError: an argument is out of range, or `train_tokens` is not above `d_model + 1`.
        ValueError: the corpus is too short.

    Example:
        >>> text = mechlens.sample_tokens(model, batch=32, seq_len=16)
        >>> options = {"bases": (), "train_tokens": 300, "held_out_tokens": 50, "null_draws": 2}
        >>> mechlens.probe_input(model, text, **options).maps
        ('per_layer', 'shared')

    References: Hubinger and nostalgebraist, comments on "interpreting GPT: the logit lens", 2020. The
    definitions of similarity, weight and their nulls are ours.
    Cost: one forward pass over the corpus; float64 moments of `d_model x (d_model + targets)` per row; one
    product of the held-out positions with `W_E` per row and map; two QR decompositions per random map; and
    for `nmf` up to 600 iterations on the 8192 most frequent tokens.
    """
    info, W_E = describe(model), model.W_E
    d_vocab, d_model = W_E.shape
    sizes = _sizes(bases, min(d_model, d_vocab))
    _check_numbers(ridge, null_draws)
    bos = own_bos_token_id(model.tokenizer)
    windows = token_windows(model, corpus)
    train = _first(windows, "train_tokens", train_tokens, bos)
    held_out = _first(windows, "held_out_tokens", held_out_tokens, bos)
    n_train, n_held_out = (int(_counted(tokens, bos).sum()) for tokens in (train, held_out))
    if n_train <= d_model + 1:
        needs = f"more than {d_model + 1} (d_model + 1)"
        raise ArgumentError("train_tokens", needs, n_train, "use many times that for a map that generalizes")
    counts = train[_counted(train, bos)].bincount(minlength=d_vocab)
    # mps has no float64, which the moments need
    place = W_E.device if W_E.device.type != "mps" else torch.device("cpu")
    with torch.no_grad():
        W_E = W_E.detach().to(place).float()
        made, converged = make_bases(W_E, sizes, counts, seed)
        with progress_bar(total=len(train) + len(held_out), desc="input probe", progress=None) as bar:
            probe = _Probe(model, made, bos, bar)
            fits = probe.fit(train, per_layer, ridge)
            recovered = probe.recover(held_out, fits, n_held_out, seed)
        W_U = direct_unembedding(model).to(place).T
        compared = compare_maps(W_E, W_U, made, fits, null_draws, seed)
    return InputProbe(
        model=info,
        rows=tuple(probe.rows),
        maps=("per_layer", "shared") if per_layer else ("shared",),
        chance=float((held_out[_counted(held_out, bos)] == counts.argmax()).float().mean()),
        fits=tuple(fits),
        explained={basis.name: basis.explained for basis in made},
        nmf_converged=converged,
        train_tokens=n_train,
        held_out_tokens=n_held_out,
        length=train.shape[1],
        ridge=float(ridge),
        null_draws=null_draws,
        seed=seed,
        prepend_bos=all_bos(model.tokenizer, torch.cat([train, held_out])[:, 0]),
        **{name: _narrow(values) for name, values in (_parts_of(made, fits) | recovered | compared).items()},
    )


def _parts_of(made: Sequence[Basis], fits: Mapping[str, Fit]) -> dict[str, dict[str, Tensor]]:
    """The maps and the bases, by result field and basis."""
    means = torch.cat([basis.mean for basis in made])
    return {
        "weights": by_basis(made, torch.stack([fit.M for fit in fits.values()])),
        "biases": by_basis(made, torch.stack([fit.b + means for fit in fits.values()])),
        "directions": {basis.name: basis.directions for basis in made},
        "importance": {basis.name: basis.importance for basis in made},
    }


def _check_numbers(ridge: float, null_draws: int) -> None:
    check_reals(ridge=ridge)
    if not ridge >= 0:
        raise ArgumentError("ridge", "at least 0", ridge)
    whole_number("null_draws", null_draws, least=2)


def _sizes(bases: Sequence[str] | Mapping[str, int], most: int) -> dict[str, int]:
    """Elements of each basis."""
    given = bases if isinstance(bases, Mapping) else dict.fromkeys(bases, min(ELEMENTS, most))
    if isinstance(bases, str) or not set(given) <= set(BASES) or len(given) < len(bases):
        raise ArgumentError("bases", f"a list of {' and '.join(BASES)}, each once", bases)
    for name, size in given.items():
        whole_number(f"elements of {name}", size, least=1)
        if size > most:
            raise ArgumentError(f"elements of {name}", f"at most {most} for this model", size)
    return dict(given)


def _first(windows: Iterator[Tensor], name: str, count: int, bos: int | None) -> Int[Tensor, "window pos"]:
    """Enough windows for `count` positions, not counting BOS."""
    check_counts(**{name: count})
    kept: list[Tensor] = []
    have = 0
    while have < count:
        window = next(windows, None)
        if window is None:
            left = " left after the training windows" if name == "held_out_tokens" else ""
            raise ValueError(
                f"the corpus has only {have} tokens{left}, but {name} is {count}: give more text or ask for "
                "fewer"
            )
        kept.append(window)
        have += int(_counted(window, bos).sum())
    return torch.stack(kept)


def _counted(tokens: Int[Tensor, "..."], bos: int | None) -> Bool[Tensor, "..."]:
    return torch.ones_like(tokens, dtype=torch.bool) if bos is None else tokens != bos


def _narrow(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float().cpu() for name, value in values.items()}


@dataclasses.dataclass
class _Reading:
    """The positions of some windows, without BOS."""

    window: Int[Tensor, " n"]
    """Which window each position is in."""
    ids: Int[Tensor, " n"]
    targets: Float[Tensor, "n target"]
    """Each token's coefficients in all bases, concatenated, in float64."""


class _Probe:
    """Reads a model's residual stream, and fits and evaluates maps on it."""

    def __init__(self, model: LensModel, made: Sequence[Basis], bos: int | None, bar: Any) -> None:
        self.model, self.made, self.bos, self.bar = model, made, bos, bar
        self.place = made[0].coefficients.device
        self.rows = {"embed": "blocks.0.hook_resid_pre"}
        self.rows |= {str(layer): f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)}

    def read(
        self,
        windows: Int[Tensor, "window pos"],
        reader: Callable[[str, Float[Tensor, "n d_model"], _Reading], None],
    ) -> None:
        """Call `reader(row, stream, reading)` with every row's stream, without BOS positions, in float64."""
        done = 0
        for tokens in parts(windows):
            counted = _counted(tokens, self.bos)
            ids = tokens[counted].to(self.place)
            targets = torch.cat([basis.coefficients[ids] for basis in self.made], 1).double()
            reading = _Reading((done + counted.nonzero()[:, 0]).to(self.place), ids, targets)

            def serve(activation: Tensor, row: str, reading: _Reading, counted: Tensor) -> None:
                reader(row, activation.to(self.place)[counted.to(self.place)].double(), reading)

            readers = {
                hook: partial(serve, row=row, reading=reading, counted=counted)
                for row, hook in self.rows.items()
            }
            watch(self.model, tokens, readers)
            done += len(tokens)
            self.bar.update(len(tokens))

    def fit(self, train: Int[Tensor, "window pos"], per_layer: bool, ridge: float) -> dict[str, Fit]:
        """The fits by name: each row, if `per_layer`, and `shared`."""
        targets = sum(basis.coefficients.shape[1] for basis in self.made)
        names = [*(self.rows if per_layer else ()), "shared"]
        moments = {name: Moments(self.model.cfg.d_model, targets, self.place) for name in names}

        def add(row: str, stream: Tensor, reading: _Reading) -> None:
            moments[row if per_layer else "shared"].add(stream, reading.targets)

        self.read(train, add)
        for row in self.rows if per_layer else ():
            moments["shared"].merge(moments[row])
        return {name: moment.fit(ridge) for name, moment in moments.items()}

    def recover(
        self, held_out: Int[Tensor, "window pos"], fits: Mapping[str, Fit], n_held_out: int, seed: int
    ) -> dict[str, dict[str, Tensor]]:
        """How well the maps recover held-out tokens, by result field and basis."""
        index, n_maps = list(self.rows), 1 if len(fits) == 1 else 2
        shape = n_maps, len(index)
        hits = {
            basis.name: torch.zeros(*shape, len(held_out), dtype=torch.float32, device=self.place)
            for basis in self.made
        }
        errors = torch.zeros(*shape, len(fits["shared"].b), dtype=torch.double, device=self.place)

        def measure(row: str, stream: Tensor, reading: _Reading) -> None:
            r = index.index(row)
            for m, name in enumerate((row, "shared")[-n_maps:]):
                guess = stream @ fits[name].M + fits[name].b
                errors[m, r] += (guess - reading.targets).pow(2).sum(0)
                for basis, some in zip(self.made, by_basis(self.made, guess).values(), strict=True):
                    found = nearest(some.float(), basis.coefficients, reading.ids)
                    hits[basis.name][m, r].index_add_(0, reading.window, found.float())

        self.read(held_out, measure)
        ids = held_out[_counted(held_out, self.bos)].to(self.place)
        per_window = _counted(held_out, self.bos).sum(1)
        fields: dict[str, dict[str, Tensor]] = {
            name: {} for name in ("accuracy", "accuracy_interval", "r2", "element_r2")
        }
        for basis, missed in zip(self.made, by_basis(self.made, errors).values(), strict=True):
            mean = basis.coefficients[ids].double().mean(0)
            each = [(basis.coefficients[some].double() - mean).pow(2).sum(0) for some in ids.split(4096)]
            squares, hit = torch.stack(each).sum(0), hits[basis.name]
            windows = hit.movedim(-1, 0).cpu() / per_window[:, None, None]
            fields["accuracy"][basis.name] = hit.sum(-1) / n_held_out
            fields["accuracy_interval"][basis.name] = torch.stack(bootstrap_interval(windows, seed=seed), -1)
            fields["r2"][basis.name] = 1 - missed.sum(-1) / squares.sum()
            fields["element_r2"][basis.name] = torch.where(squares > 0, 1 - missed / squares, torch.nan)
        return fields
