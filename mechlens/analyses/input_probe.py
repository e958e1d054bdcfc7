"""Reading the input back: linear maps from the residual stream to the embedding of the token read there."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechlens.arguments import check_counts, generator_of, whole_number
from mechlens.measures.statistics import bootstrap_interval, rank_correlation
from mechlens.measures.unembedding import Unembedding
from mechlens.models.protocol import LensModel, describe
from mechlens.models.run.forward import parts, watch
from mechlens.models.weights.access import direct_unembedding
from mechlens.progress import progress_bar
from mechlens.results import InputProbe
from mechlens.text.corpus import Source, token_windows
from mechlens.text.tokens import all_bos, own_bos_token_id

BASES = ("pca", "nmf")
COMPONENTS = 64
"""Elements of a basis, where nothing else is asked for and the model is wide enough."""
NMF_TOKENS = 8192
"""The tokens, most frequent first, that a non-negative factorisation is fitted to."""
_NMF_ITERATIONS = 600


def probe_input(
    model: LensModel,
    corpus: Source | Int[Tensor, "window pos"],
    *,
    per_layer: bool = True,
    bases: Sequence[str] = BASES,
    n_components: int | None = None,
    train_tokens: int = 65536,
    held_out_tokens: int = 8192,
    length: int | None = None,
    ridge: float = 1e-6,
    null_draws: int = 100,
    seed: int = 0,
    prepend_bos: bool | None = None,
    progress: bool | None = None,
) -> InputProbe:
    """Fit linear maps from each layer's residual stream back to the embedding of the token read there.

    A map `x @ M + b` is the least-squares fit, with intercept and a small ridge, of the token's row of
    `W_E` (as the model has it: processing centres its rows) to the stream x at its position. Beside the
    maps of single rows stands a shared one, fitted to the streams of all rows together. The first windows
    of the corpus train, those after them are held out; positions that hold BOS count in neither.

    - Accuracy: the token whose embedding is nearest to `x @ M + b` is the token that was read.
    - Similarity: read as logits the map is `M @ E.T`, `[d_model, d_vocab]`, with `E = W_E` less its mean
      over the vocabulary, which adds the same to all logits. Its cosine is
      `tr(M.T E.T E) / (|M E.T| |E|)`, Frobenius norms, and likewise with `W_U` (with the final norm's scale
      in it, less its mean over the vocabulary) for E as the other side. Each stands beside random maps
      `U diag(s) V.T`: M's own singular values s, and U, V uniform among orthogonal matrices.
    - In another basis of `W_E` a token's coefficients c are the target, so the nearest coefficients decode,
      and the map is read as logits by `M @ C.T`. `pca`: the eigenvectors of the covariance of `W_E`. `nmf`:
      `W_E` has signs, so `[max(W_E, 0), max(-W_E, 0)] = C H`, C and H not negative, each row of H of norm 1;
      an element is the direction of `H[:, :d_model] - H[:, d_model:]`.
    - Weight: where in the stream the map to the embedding reads. Of a unit direction g (a coordinate, a
      principal axis, an element of `nmf`) it is `var(x . g) |g M|^2`, as a share of all elements. Its rank
      correlation with the importance of g in `W_E` is negative where the map leans on what the embedding
      cares little about.

    Args:
        corpus: a path, or several as `Path`s, to `.txt`, `.jsonl` or `.jsonl.gz` files or folders of them; an
            iterable of texts (a single text in a list); or token ids `[window, pos]`.
        per_layer: fit a map for each row as well as the shared one.
        bases: `pca`, `nmf`, both or none, beside the coordinates of `W_E` themselves.
        n_components: elements of each basis; None is 64, or `d_model` if that is less.
        train_tokens: positions to fit to; whole windows, so somewhat more.
        held_out_tokens: likewise, of the windows after them.
        length: tokens in a window, see `token_windows`.
        ridge: added to the diagonal of the stream's covariance, in units of its mean variance; with 0 the
            solution of least norm is taken.
        null_draws: how many random maps each null has.
        seed: of the random maps, the factorisation and the bootstrap.
        prepend_bos: None prepends BOS where the tokenizer has one.
        progress: show a bar; None shows one in a terminal and in Jupyter.

    Returns:
        Accuracy, R², similarities and weights per row, beside their nulls; and the maps.

    Raises:
        ValueError: no more training positions than `d_model`; a corpus that ends before the held-out
            windows do; an unknown basis; `n_components`, `ridge`, `null_draws` or a number of tokens out of
            range; and as `token_windows`.

    Source: Hubinger and nostalgebraist, comments on "interpreting GPT: the logit lens", 2020. Non-negative
        factorisation: Lee and Seung 1999; of a matrix with signs, by its two halves: Kim and Tidor 2003.
        The definitions of similarity, weight and their nulls are ours.
    Cost: one forward pass over the corpus; float64 moments of `d_model x (d_model + targets)` per row; one
        product of the held-out positions with `W_E` per row and map; two QR decompositions of `[d_model,
        d_model]` per random map. `nmf` is fitted to the 8192 tokens that are most frequent in the training
        windows, in at most 600 iterations: about a minute for a random `[50257, 768]` on two cores.
    """
    info = describe(model)
    d_vocab, d_model = model.W_E.shape
    k = min(COMPONENTS, d_model, d_vocab) if n_components is None else n_components
    _check(bases, k, min(d_model, d_vocab), ridge, null_draws)
    bos = own_bos_token_id(model.tokenizer)
    train, held_out = _split(
        token_windows(model, corpus, length=length, prepend_bos=prepend_bos),
        {"train_tokens": train_tokens, "held_out_tokens": held_out_tokens},
        bos,
    )
    n_train, n_held_out = (int(_counted(tokens, bos).sum()) for tokens in (train, held_out))
    if n_train <= d_model + 1:
        raise ValueError(
            f"{n_train} training positions cannot fix a map from {d_model} dimensions: train_tokens must be "
            f"more than {d_model + 1}, and many times that for a map that holds on other text"
        )
    counts = train[_counted(train, bos)].bincount(minlength=d_vocab)
    # mps has no float64, which the moments need
    place = model.W_E.device if model.W_E.device.type != "mps" else torch.device("cpu")
    rows = {"embed": "blocks.0.hook_resid_pre"}
    rows |= {str(layer): f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)}
    with torch.no_grad():
        W_E = model.W_E.detach().to(place).float()
        made, converged = _make_bases(W_E, bases, k, counts, seed)
        with progress_bar(total=len(train) + len(held_out), desc="input probe", progress=progress) as bar:
            fits = _fit(model, train, rows, made, per_layer, ridge, bos, bar)
            recovered = _recover(model, held_out, rows, made, fits, bos, bar)
        W_U = direct_unembedding(model).to(place).T
        compared = _compare(W_E, W_U, made, fits, null_draws, seed)

    per_window = _counted(held_out, bos).sum(1)
    means = torch.cat([basis.mean for basis in made])
    accuracy, interval, r2, element_r2 = {}, {}, {}, {}
    for name, hits in recovered.hits.items():
        accuracy[name] = hits.sum(-1) / n_held_out
        windows = hits.movedim(-1, 0).cpu() / per_window[:, None, None]
        interval[name] = torch.stack(bootstrap_interval(windows, seed=seed), -1)
        errors, squares = recovered.errors[name], recovered.squares[name]
        r2[name] = 1 - errors.sum(-1) / squares.sum()
        element_r2[name] = torch.where(squares > 0, 1 - errors / squares, torch.nan)
    return InputProbe(
        model=info,
        rows=tuple(rows),
        maps=("per_layer", "shared") if per_layer else ("shared",),
        accuracy=_narrow(accuracy),
        accuracy_interval=_narrow(interval),
        chance=float((held_out[_counted(held_out, bos)] == counts.argmax()).float().mean()),
        r2=_narrow(r2),
        element_r2=_narrow(element_r2),
        fits=tuple(fits),
        weights=_narrow(_apart(made, torch.stack([fit.M for fit in fits.values()]))),
        biases=_narrow(_apart(made, torch.stack([fit.b + means for fit in fits.values()]))),
        directions=_narrow({basis.name: basis.directions for basis in made}),
        importance=_narrow({basis.name: basis.importance for basis in made}),
        explained={basis.name: basis.explained for basis in made},
        nmf_converged=converged,
        train_tokens=n_train,
        held_out_tokens=n_held_out,
        length=train.shape[1],
        ridge=float(ridge),
        null_draws=null_draws,
        seed=seed,
        prepend_bos=all_bos(model.tokenizer, torch.cat([train, held_out])[:, 0]),
        **{name: _narrow(values) for name, values in compared.items()},
    )


def _check(bases: Sequence[str], k: int, most: int, ridge: float, null_draws: int) -> None:
    unknown = [basis for basis in bases if basis not in BASES]
    if unknown or isinstance(bases, str) or len(set(bases)) < len(bases):
        raise ValueError(f"bases must be a sequence of {' and '.join(BASES)}, each once, but is {bases!r}")
    if not 1 <= k <= most:
        raise ValueError(f"n_components must lie between 1 and {most} for this model, but is {k}")
    if not (ridge >= 0 and math.isfinite(ridge)):
        raise ValueError(f"ridge must be 0 or more, and finite, but is {ridge}")
    whole_number("null_draws", null_draws, least=2)


def _split(
    windows: Any, wanted: Mapping[str, int], bos: int | None
) -> tuple[Int[Tensor, "train pos"], Int[Tensor, "held_out pos"]]:
    """The first windows, and those after them, until each part has as many positions as are wanted."""
    taken: list[Tensor] = []
    for name, count in wanted.items():
        check_counts(**{name: count})
        kept: list[Tensor] = []
        have = 0
        while have < count:
            window = next(windows, None)
            if window is None:
                before = f" after {sum(len(part) for part in taken)} windows for training" if taken else ""
                raise ValueError(
                    f"the corpus has only {have} tokens{before}, but {name} is {count}: give a longer one or "
                    "ask for fewer"
                )
            kept.append(window)
            have += int(_counted(window, bos).sum())
        taken.append(torch.stack(kept))
    return taken[0], taken[1]


def _counted(tokens: Int[Tensor, "..."], bos: int | None) -> Bool[Tensor, "..."]:
    return torch.ones_like(tokens, dtype=torch.bool) if bos is None else tokens != bos


def _narrow(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float().cpu() for name, value in values.items()}


def _apart(made: Sequence[_Basis], joined: Tensor) -> dict[str, Tensor]:
    """By basis, what stands side by side in the last axis."""
    sizes = [basis.coefficients.shape[1] for basis in made]
    return dict(zip((basis.name for basis in made), joined.split(sizes, dim=-1), strict=True))


# -- bases of the embedding ------------------------------------------------------------------------


@dataclasses.dataclass
class _Basis:
    name: str
    coefficients: Float[Tensor, "d_vocab element"]
    """Of every token, in float32; less their mean over the vocabulary, which no nearest token depends on."""
    mean: Float[Tensor, " element"]
    directions: Float[Tensor, "element d_model"]
    importance: Float[Tensor, " element"]
    explained: float


def _make_bases(
    W_E: Float[Tensor, "d_vocab d_model"], names: Sequence[str], k: int, counts: Tensor, seed: int
) -> tuple[list[_Basis], bool | None]:
    covariance = _product(W_E, W_E)
    variance = covariance.diagonal()
    coordinates = torch.eye(W_E.shape[1], dtype=torch.double, device=W_E.device)
    made = [_basis("embedding", W_E, coordinates, variance / variance.sum(), 1.0)]
    converged = None
    for name in names:
        if name == "pca":
            values, vectors = torch.linalg.eigh(covariance)
            axes = vectors.flip(-1).T[:k]
            # an axis has no sign of its own
            axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
            importance = values.flip(-1).clamp(min=0)[:k] / variance.sum()
            made.append(_basis(name, W_E @ axes.float().T, axes, importance, float(importance.sum())))
        else:
            C, H, converged = _factorise(W_E, k, counts, seed)
            signed = (H[:, : W_E.shape[1]] - H[:, W_E.shape[1] :]).double()
            left = (W_E - C @ signed.float()).double().pow(2).sum() / W_E.double().pow(2).sum()
            squares = C.double().pow(2).sum(0)
            directions = torch.nn.functional.normalize(signed, dim=1)
            made.append(_basis(name, C, directions, squares / squares.sum(), 1 - float(left)))
    return made, converged


def _basis(name: str, C: Tensor, directions: Tensor, importance: Tensor, explained: float) -> _Basis:
    mean = C.double().mean(0)
    return _Basis(name, (C - mean).float(), mean, directions, importance, explained)


def _factorise(
    W_E: Float[Tensor, "d_vocab d_model"], k: int, counts: Int[Tensor, " d_vocab"], seed: int
) -> tuple[Float[Tensor, "d_vocab element"], Float[Tensor, "element two_d_model"], bool]:
    """Non-negative factors of the embedding's positive and negative parts, the largest element first."""
    from sklearn.decomposition import NMF
    from sklearn.exceptions import ConvergenceWarning

    halves = torch.cat([W_E.clamp(min=0), (-W_E).clamp(min=0)], 1).cpu().numpy()
    often = counts.argsort(descending=True, stable=True)[:NMF_TOKENS].numpy()
    # a tenth of the tolerance costs twice the time and explains a thousandth more
    method = NMF(k, init="nndsvda", random_state=seed, max_iter=_NMF_ITERATIONS, tol=1e-3)
    with warnings.catch_warnings():
        # said in the result instead
        warnings.simplefilter("ignore", ConvergenceWarning)
        method.fit(halves[often])
        converged = method.n_iter_ < _NMF_ITERATIONS
        C = torch.from_numpy(method.transform(halves)).to(W_E)
    H = torch.from_numpy(method.components_).to(W_E)
    norms = H.norm(dim=1)
    C, H = C * norms, H / norms.where(norms > 0, 1)[:, None]
    order = C.pow(2).sum(0).argsort(descending=True, stable=True)
    return C[:, order], H[order], converged


def _product(a: Float[Tensor, "n i"], b: Float[Tensor, "n j"]) -> Float[Tensor, "i j"]:
    """`a.T @ b` of centred columns, in float64, without a whole copy of either in it."""
    mean_a, mean_b = (x.sum(0, dtype=torch.double) / len(x) for x in (a, b))
    total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.double, device=a.device)
    for some_a, some_b in zip(a.split(4096), b.split(4096), strict=True):
        total += (some_a - mean_a).T @ (some_b - mean_b)
    return total


# -- the fits --------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Fit:
    """A map and the covariance of the streams that it was fitted to, in float64."""

    M: Float[Tensor, "d_model target"]
    b: Float[Tensor, " target"]
    covariance: Float[Tensor, "d_model d_model"]


class _Moments:
    """Sums over positions from which a least-squares fit follows, in float64."""

    def __init__(self, d_model: int, targets: int, place: torch.device) -> None:
        self.n = 0
        self.x, self.y = (torch.zeros(size, dtype=torch.double, device=place) for size in (d_model, targets))
        self.xx = torch.zeros(d_model, d_model, dtype=torch.double, device=place)
        self.xy = torch.zeros(d_model, targets, dtype=torch.double, device=place)

    def add(self, X: Float[Tensor, "n d_model"], Y: Float[Tensor, "n target"]) -> None:
        self.n += len(X)
        self.x += X.sum(0)
        self.y += Y.sum(0)
        self.xx.addmm_(X.T, X)
        self.xy.addmm_(X.T, Y)

    def merge(self, other: _Moments) -> None:
        self.n += other.n
        for own, more in ((self.x, other.x), (self.y, other.y), (self.xx, other.xx), (self.xy, other.xy)):
            own += more

    def fit(self, ridge: float) -> _Fit:
        x, y = self.x / self.n, self.y / self.n
        covariance = self.xx / self.n - x.outer(x)
        values, Q = torch.linalg.eigh(covariance)
        # not in directions where only float32's rounding varies: a centred stream has one
        real = values > len(values) * torch.finfo(torch.float32).eps ** 2 * values[-1]
        inverse = (1 / (values + ridge * values.mean())).where(real, 0)
        M = Q @ (inverse[:, None] * (Q.T @ (self.xy / self.n - x.outer(y))))
        return _Fit(M, y - x @ M, covariance)


@dataclasses.dataclass
class _Reading:
    """The counted positions of some windows."""

    window: Int[Tensor, " n"]
    """Which window each is in."""
    ids: Int[Tensor, " n"]
    targets: Float[Tensor, "n target"]
    """Coefficients of each token in all bases, side by side, in float64."""


def _read(
    model: LensModel,
    windows: Int[Tensor, "window pos"],
    rows: Mapping[str, str],
    made: Sequence[_Basis],
    bos: int | None,
    bar: Any,
    reader: Callable[[str, Float[Tensor, "n d_model"], _Reading], None],
) -> None:
    """Hand the stream of every row at the counted positions to `reader(row, stream, reading)`, in float64."""
    place = made[0].coefficients.device
    done = 0
    for tokens in parts(windows):
        counted = _counted(tokens, bos)
        ids = tokens[counted].to(place)
        targets = torch.cat([basis.coefficients[ids] for basis in made], 1).double()
        reading = _Reading((done + counted.nonzero()[:, 0]).to(place), ids, targets)

        def serve(activation: Tensor, row: str, reading: _Reading, counted: Tensor) -> None:
            reader(row, activation.to(place)[counted.to(place)].double(), reading)

        readers = {
            hook: partial(serve, row=row, reading=reading, counted=counted) for row, hook in rows.items()
        }
        watch(model, tokens, readers)
        done += len(tokens)
        bar.update(len(tokens))


def _fit(
    model: LensModel,
    train: Int[Tensor, "window pos"],
    rows: Mapping[str, str],
    made: Sequence[_Basis],
    per_layer: bool,
    ridge: float,
    bos: int | None,
    bar: Any,
) -> dict[str, _Fit]:
    """By name of the fit: the rows, where they have maps of their own, and `shared`."""
    d_model, place = model.cfg.d_model, made[0].coefficients.device
    targets = sum(basis.coefficients.shape[1] for basis in made)
    names = [*(rows if per_layer else ()), "shared"]
    moments = {name: _Moments(d_model, targets, place) for name in names}

    def add(row: str, stream: Tensor, reading: _Reading) -> None:
        moments[row if per_layer else "shared"].add(stream, reading.targets)

    _read(model, train, rows, made, bos, bar, add)
    for row in rows if per_layer else ():
        moments["shared"].merge(moments[row])
    return {name: moment.fit(ridge) for name, moment in moments.items()}


# -- held-out text ---------------------------------------------------------------------------------


@dataclasses.dataclass
class _Recovered:
    """What the maps make of held-out text, by basis."""

    hits: dict[str, Float[Tensor, "map row window"]]
    errors: dict[str, Float[Tensor, "map row element"]]
    """Sum of squared errors."""
    squares: dict[str, Float[Tensor, " element"]]
    """Sum of squares about the held-out mean."""


def _recover(
    model: LensModel,
    held_out: Int[Tensor, "window pos"],
    rows: Mapping[str, str],
    made: Sequence[_Basis],
    fits: Mapping[str, _Fit],
    bos: int | None,
    bar: Any,
) -> _Recovered:
    place, index = made[0].coefficients.device, list(rows)
    targets = len(fits["shared"].b)
    n_maps = 1 if len(fits) == 1 else 2
    hits = {
        basis.name: torch.zeros(n_maps, len(rows), len(held_out), dtype=torch.float32, device=place)
        for basis in made
    }
    errors = torch.zeros(n_maps, len(rows), targets, dtype=torch.double, device=place)
    ids = held_out[_counted(held_out, bos)].to(place)
    squares = {}
    for basis in made:
        mean = basis.coefficients[ids].double().mean(0)
        apart = [(basis.coefficients[some].double() - mean).pow(2).sum(0) for some in ids.split(4096)]
        squares[basis.name] = torch.stack(apart).sum(0)

    def measure(row: str, stream: Tensor, reading: _Reading) -> None:
        r = index.index(row)
        for m, name in enumerate((row, "shared")[-n_maps:]):
            guess = stream @ fits[name].M + fits[name].b
            errors[m, r] += (guess - reading.targets).pow(2).sum(0)
            for basis, part in zip(made, _apart(made, guess).values(), strict=True):
                nearest = _nearest(part.float(), basis.coefficients, reading.ids)
                hits[basis.name][m, r].index_add_(0, reading.window, nearest.float())

    _read(model, held_out, rows, made, bos, bar, measure)
    return _Recovered(hits, _apart(made, errors), squares)


def _nearest(
    guesses: Float[Tensor, "n element"], C: Float[Tensor, "d_vocab element"], ids: Int[Tensor, " n"]
) -> Bool[Tensor, " n"]:
    """Whether no row of C is nearer to a guess than that of its token."""
    # |c|^2 / 2 - g . c is half the squared distance, up to what is the same for all
    return Unembedding(C.T, -C.pow(2).sum(1) / 2).log_prob(guesses, ids)[1]


# -- what the maps are like ------------------------------------------------------------------------


_COMPARED = ("similarity", "unembedding_similarity", "weight_correlation")


def _compare(
    W_E: Float[Tensor, "d_vocab d_model"],
    W_U: Float[Tensor, "other_vocab d_model"],
    made: Sequence[_Basis],
    fits: Mapping[str, _Fit],
    draws: int,
    seed: int,
) -> dict[str, dict[str, Tensor]]:
    """By field of the result and basis: weights, what is in `_COMPARED`, and the nulls of that."""
    generator = generator_of(seed)
    maps = _apart(made, torch.stack([fit.M for fit in fits.values()]))
    covariances = torch.stack([fit.covariance for fit in fits.values()])
    looks = [_Look(basis, maps, covariances, W_E, W_U) for basis in made]
    found = {"weight": {look.basis.name: look.weight for look in looks}}
    measured = {look.basis.name: look.measured() for look in looks}
    drawn: dict[str, list[Tensor]] = {look.basis.name: [] for look in looks}
    for _ in range(draws):
        U = _orthogonal(W_E.shape[1], generator)
        for look in looks:
            V = _orthogonal(len(look.basis.mean), generator)
            drawn[look.basis.name].append(look.random(U.to(W_E.device), V.to(W_E.device)))
    nulls = {name: _mean_and_range(torch.stack(some)) for name, some in drawn.items()}
    for place, field in enumerate(_COMPARED):
        found[field] = {name: values[place] for name, values in measured.items()}
        found[f"{field}_null"] = {name: values[place] for name, values in nulls.items()}
    return found


class _Look:
    """What is measured of all maps in one basis, and of random ones with the same singular values."""

    def __init__(
        self,
        basis: _Basis,
        maps: Mapping[str, Float[Tensor, "fit d_model _"]],
        covariances: Float[Tensor, "fit d_model d_model"],
        W_E: Float[Tensor, "d_vocab d_model"],
        W_U: Float[Tensor, "other_vocab d_model"],
    ) -> None:
        self.basis, self.M = basis, maps[basis.name]
        self.cosines = [_Cosine(basis.coefficients, W_E)]
        if len(W_U) == len(W_E):
            self.cosines.append(_Cosine(basis.coefficients, W_U))
        self.singular = torch.linalg.svdvals(self.M)
        self.strength = torch.linalg.svdvals(maps["embedding"]).pow(2)
        D = basis.directions
        self.variance = ((D @ covariances) * D).sum(-1)
        weight = self.variance * (D @ maps["embedding"]).pow(2).sum(-1)
        self.weight = weight / weight.sum(-1, keepdim=True)

    def measured(self) -> Float[Tensor, "3 fit"]:
        return self._joined([cosine(self.M) for cosine in self.cosines], self.weight)

    def random(
        self, U: Float[Tensor, "d_model d_model"], V: Float[Tensor, "element element"]
    ) -> Float[Tensor, "3 fit"]:
        # |g U diag(s) V.T|^2 does not depend on V
        weight = self.variance * (self.strength @ (self.basis.directions @ U).pow(2).T)
        return self._joined([cosine.of_factors(U, self.singular, V) for cosine in self.cosines], weight)

    def _joined(self, cosines: list[Tensor], weight: Tensor) -> Tensor:
        correlation = rank_correlation(weight, self.basis.importance.expand_as(weight))
        absent = [torch.full_like(correlation, torch.nan)] * (2 - len(cosines))
        return torch.stack([*cosines, *absent, correlation])


class _Cosine:
    """The cosine of `M C.T` with a matrix `A.T`, both `[d_model, d_vocab]`, without either of them.

    `C.T` stands for the coefficients of all tokens; columns of C and A count from their mean.
    """

    def __init__(self, C: Float[Tensor, "d_vocab element"], A: Float[Tensor, "d_vocab d_model"]) -> None:
        self.cross, self.gram = _product(A, C), _product(C, C)
        mean = A.sum(0, dtype=torch.double) / len(A)
        self.norm = torch.stack([(some - mean).pow(2).sum() for some in A.split(4096)]).sum().sqrt()

    def __call__(self, M: Float[Tensor, "fit d_model element"]) -> Float[Tensor, " fit"]:
        both = (M * self.cross).sum((1, 2))
        return both / (((M @ self.gram) * M).sum((1, 2)).sqrt() * self.norm)

    def of_factors(
        self,
        U: Float[Tensor, "d_model d_model"],
        singular: Float[Tensor, "fit element"],
        V: Float[Tensor, "element element"],
    ) -> Float[Tensor, " fit"]:
        """The same of `M = U diag(singular) V.T`, without a product for each fit."""
        both = singular @ (U[:, : len(V)] * (self.cross @ V)).sum(0)
        return both / ((singular.pow(2) @ (V * (self.gram @ V)).sum(0)).sqrt() * self.norm)


def _orthogonal(n: int, generator: torch.Generator) -> Float[Tensor, "n n"]:
    """Uniform among the orthogonal matrices; the signs make it so (Mezzadri 2007)."""
    Q, R = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.double))
    return Q * R.diagonal().sign()


def _mean_and_range(draws: Float[Tensor, "draw measure fit"]) -> Float[Tensor, "measure fit 3"]:
    ends = draws.quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype, device=draws.device), dim=0)
    return torch.stack([draws.mean(0), *ends], -1)
