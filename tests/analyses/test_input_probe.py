"""Maps back to the input compared with least squares on full activations, and on purpose-built models."""

from __future__ import annotations

import pytest
import torch

from mechlens.analyses.input_probe import probe_input
from mechlens.measures.statistics import bootstrap_interval
from mechlens.models.load.loading import load_model
from mechlens.models.weights.access import direct_unembedding
from mechlens.results import InputProbe
from mechlens.text.corpus import token_windows
from mechlens.text.tokens import own_bos_token_id
from tests import examples
from tests.close import assert_same
from tests.reference import input_probe as reference
from tests.shared import SHARED, needs_shared
from tests.tiny_models import write_toy

N_TRAIN, N_HELD_OUT, LENGTH = 60, 20, 12


def windows(count=N_TRAIN + N_HELD_OUT):
    """More than 32 different tokens, so that the streams have full rank."""
    return torch.randint(0, 60, (count, LENGTH), generator=torch.Generator().manual_seed(1))


def sizes(tokens, bos):
    """The number of positions in the first 60 windows and in the rest, without BOS."""
    counted = tokens != (-1 if bos is None else bos)
    return {"train_tokens": int(counted[:N_TRAIN].sum()), "held_out_tokens": int(counted[N_TRAIN:].sum())}


def probe(model, **options):
    tokens = windows()
    plain = {"bases": {"pca": 6}, "ridge": 0, "null_draws": 3}
    return probe_input(model, tokens, **(plain | sizes(tokens, own_bos_token_id(model.tokenizer)) | options))


def split(model):
    """Streams by row, and tokens, of the same training and held-out windows."""
    tokens, bos = windows(), own_bos_token_id(model.tokenizer)
    found = []
    for part in (tokens[:N_TRAIN], tokens[N_TRAIN:]):
        keep = part != (-1 if bos is None else bos)
        found.append((reference.residuals(model, part, keep), part[keep]))
    return found


def test_maps_and_what_they_recover_equal_the_slow_reference(tiny_model):
    result = probe(tiny_model)
    (train, train_ids), (held_out, ids) = split(tiny_model)
    W_E = tiny_model.W_E.detach().double()
    W_U = reference.unembedding(tiny_model)
    principal = torch.linalg.svd(W_E - W_E.mean(0)).Vh[:6]
    # the sign of an axis is arbitrary
    flips = (principal * result.directions["pca"].double()).sum(1).sign()
    # the eigenvalues differ by a few percent, so float32 determines the axes to about 1e-5
    assert torch.allclose(principal * flips[:, None], result.directions["pca"].double(), atol=1e-4)
    assert result.rows == ("embed", "0", "1")
    assert result.fits == ("embed", "0", "1", "shared")
    coefficients = {"embedding": W_E, "pca": (W_E) @ result.directions["pca"].double().T}
    streams = [*train, torch.cat(train)]
    targets = [train_ids] * len(train) + [train_ids.repeat(len(train))]
    for basis, C in coefficients.items():
        for f, (X, its_ids) in enumerate(zip(streams, targets, strict=True)):
            M, b = reference.fit(X, C[its_ids])
            # saved in float32; the condition number of the streams' covariance is about 1e4
            assert torch.allclose(result.weights[basis][f].double(), M, rtol=1e-4, atol=1e-4)
            assert torch.allclose(result.biases[basis][f].double(), b, rtol=1e-4, atol=1e-4)
            for name, A in (("similarity", W_E), ("unembedding_similarity", W_U)):
                measured = float(getattr(result, name)[basis][f])
                assert measured == pytest.approx(float(reference.cosine(M, C, A)), abs=1e-5)
            read_by = [(0, f)] if f < len(train) else [(1, row) for row in range(len(train))]
            for m, row in read_by:
                guesses = held_out[row] @ M + b
                # a token whose two nearest embeddings differ only by rounding may go either way
                one = 1.5 / len(ids)
                expected = float(reference.accuracy(guesses, C, ids))
                assert float(result.accuracy[basis][m, row]) == pytest.approx(expected, abs=one)
                elements, whole = reference.r2(guesses, C[ids])
                # no worse than the maps above
                assert torch.allclose(result.element_r2[basis][m, row].double(), elements, atol=1e-4)
                assert float(result.r2[basis][m, row]) == pytest.approx(float(whole), abs=1e-4)
    assert float(result.chance) == pytest.approx(float((ids == train_ids.mode().values).double().mean()))


def test_the_embedding_row_maps_to_itself(tiny_directories):
    """With raw weights and no positions in the stream, the map of `embed` is the identity."""
    for kind in ("gpt_neox", "llama"):
        result = probe(load_model(tiny_directories / kind, processing=False))
        # a float64 solution with condition number about 1e2, stored in float32
        assert torch.allclose(result.weights["embedding"][0], torch.eye(32), atol=1e-5)
        assert result.accuracy["embedding"][0, 0] == 1
        assert result.r2["embedding"][0, 0] == pytest.approx(1, abs=1e-6)
        assert result.similarity["embedding"][0] == pytest.approx(1, abs=1e-6)
        # random maps with the identity's singular values read all directions equally
        null, own = result.weight_correlation_null["pca"][0], result.weight_correlation["pca"][0]
        assert torch.allclose(null, own.expand(3))
        # and none is near the embedding: the cosine of random maps in 32 dimensions spreads by about 1 / 32
        assert result.similarity_null["embedding"][0].abs().max() < 4 / 32


def test_the_ridge_is_in_units_of_the_mean_variance(tiny_bos_model):
    result = probe(tiny_bos_model, ridge=0.1)
    (train, ids), _ = split(tiny_bos_model)
    M, b = reference.fit_ridge(train[1], tiny_bos_model.W_E.detach().double()[ids], 0.1)
    # float32
    assert torch.allclose(result.weights["embedding"][1].double(), M, atol=1e-6)
    assert torch.allclose(result.biases["embedding"][1].double(), b, atol=1e-6)


def test_weights_and_their_correlation_with_importance(tiny_model):
    from scipy.stats import spearmanr

    result = probe(tiny_model, bases={"nmf": 6, "pca": 6})
    (train, _), _ = split(tiny_model)
    for basis in ("embedding", "pca", "nmf"):
        for f, X in enumerate([*train, torch.cat(train)]):
            M = result.weights["embedding"][f].double()
            along = [
                float((X @ g).var(correction=0) * (g @ M).pow(2).sum())
                for g in result.directions[basis].double()
            ]
            expected = torch.tensor(along) / sum(along)
            # float32 maps and directions
            assert torch.allclose(result.weight[basis][f], expected, rtol=1e-3, atol=1e-6)
            correlation = spearmanr(result.weight[basis][f], result.importance[basis]).statistic
            assert float(result.weight_correlation[basis][f]) == pytest.approx(correlation, abs=1e-6)
    variances = tiny_model.W_E.detach().var(0)
    assert torch.allclose(result.importance["embedding"], variances / variances.sum(), atol=1e-6)
    spread = torch.linalg.svdvals(tiny_model.W_E.detach() - tiny_model.W_E.detach().mean(0)).pow(2)
    assert torch.allclose(result.importance["pca"], (spread / spread.sum())[:6], atol=1e-5)
    assert result.explained["pca"] == pytest.approx(float(result.importance["pca"].sum()), abs=1e-6)


def test_nulls_are_random_maps_with_the_same_singular_values(tiny_bos_model):
    from scipy.stats import ortho_group

    draws = 200
    result = probe(tiny_bos_model, null_draws=draws)
    W_E, W_U = tiny_bos_model.W_E.detach(), direct_unembedding(tiny_bos_model).T
    axes = result.directions["pca"].double()
    for basis, C in (("embedding", W_E), ("pca", W_E @ axes.float().T)):
        seeds = iter(range(10_000))
        random = [
            reference.random_map(
                result.weights[basis][1],
                lambda n: torch.from_numpy(ortho_group.rvs(n, random_state=next(seeds))),  # noqa: B023  # called at once
            )
            for _ in range(draws)
        ]
        for name, A in (("similarity", W_E), ("unembedding_similarity", W_U)):
            expected = torch.stack([reference.cosine(M, C, A) for M in random])
            mean, low, high = getattr(result, f"{name}_null")[basis][1].tolist()
            spread = float(expected.std())
            # one standard error between two means of 200 draws is 0.1 spreads
            assert mean == pytest.approx(float(expected.mean()), abs=0.4 * spread)
            # and 0.27 for their ends
            assert low == pytest.approx(float(expected.quantile(0.025)), abs=0.9 * spread)
            assert high == pytest.approx(float(expected.quantile(0.975)), abs=0.9 * spread)


def test_non_negative_parts_are_found(tmp_path):
    """Embeddings made of 4 parts with separate coordinates and amounts."""
    draw = torch.Generator().manual_seed(0)
    parts = torch.zeros(4, 32)
    for part in range(4):
        parts[part, 8 * part : 8 * part + 8] = torch.randn(8, generator=draw)
    parts = torch.nn.functional.normalize(parts, dim=1)
    amounts = torch.rand(64, 4, generator=draw) * torch.tensor([1.0, 2.0, 4.0, 8.0])
    # some token has each part alone, which makes the solution unique
    amounts[:4] = 8 * torch.eye(4)
    model = toy(tmp_path, W_E=amounts @ parts)
    result = probe(model, bases={"nmf": 4})
    order = amounts.pow(2).sum(0).argsort(descending=True)
    # within the factorization's tolerance
    assert torch.allclose(result.directions["nmf"], parts[order], atol=0.02)
    shares = amounts.pow(2).sum(0) / amounts.pow(2).sum()
    assert torch.allclose(result.importance["nmf"], shares[order], atol=0.02)
    assert result.explained["nmf"] == pytest.approx(1, abs=1e-3)
    assert result.nmf_converged
    # so the amounts are a linear function of the stream, which is the embedding
    assert result.r2["nmf"][0, 0] > 0.999
    assert result.accuracy["nmf"][0, 0] == 1


def toy(directory, **weights):
    """An attention-only model without norms and positions, whose layers add only the given outputs."""
    from safetensors.torch import load_file, save_file

    own = write_toy(directory, normalization_type=None)
    silent = {name: torch.zeros_like(own[name]) for name in own if "b_" in name or "W_O" in name}
    silent["pos_embed.W_pos"] = torch.zeros(32, 32)
    given = {PLACES[name]: value.contiguous() for name, value in weights.items()}
    path = directory / "model.safetensors"
    save_file(load_file(path) | silent | given, path)
    return load_model(directory, processing=False)


PLACES = {"W_E": "embed.W_E", "W_V": "blocks.0.attn.W_V", "W_O": "blocks.0.attn.W_O"}


def test_a_map_that_relies_on_unimportant_directions_of_the_embedding(tmp_path):
    """Here the hypothesis is true: layer 0 reverses the coordinates, so small ones become large.

    Inputs are single tokens, so each head attends to the token itself.
    """
    W_E = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 32)
    turned = torch.eye(32).flip(0)
    # the 4 heads write 8 coordinates each
    values = (turned - torch.eye(32)).reshape(32, 4, 8).permute(1, 0, 2)
    model = toy(tmp_path, W_E=W_E, W_V=values, W_O=torch.eye(32).reshape(4, 8, 32))
    one = windows()[:, :1].repeat(5, 1)
    result = probe_input(model, one, bases=(), ridge=0, train_tokens=300, held_out_tokens=50, null_draws=100)
    # float32 numbers up to 100
    assert torch.allclose(result.weights["embedding"][1], turned, atol=1e-4)
    # training tokens are drawn unevenly, so neighbors in importance may swap
    assert result.weight_correlation["embedding"][0] > 0.99
    assert result.weight_correlation["embedding"][1] < -0.99
    assert result.accuracy["embedding"][0].tolist() == [1, 1, 1]


def test_a_shared_map_without_maps_per_layer(tiny_bos_model):
    both, alone = probe(tiny_bos_model), probe(tiny_bos_model, per_layer=False)
    assert alone.maps == alone.fits == ("shared",)
    for basis in ("embedding", "pca"):
        # summed in a different order
        assert torch.allclose(alone.weights[basis][0], both.weights[basis][-1], atol=1e-5)
        assert torch.equal(alone.accuracy[basis][0], both.accuracy[basis][1])
        assert torch.allclose(alone.similarity[basis], both.similarity[basis][-1:], atol=1e-5)


def test_a_seed_is_reproducible_and_leaves_the_callers_random_state(tiny_bos_model):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = probe(tiny_bos_model, bases={"pca": 6, "nmf": 6}, seed=3)
    assert torch.equal(torch.rand(1), expected)
    assert_same(probe(tiny_bos_model, bases={"pca": 6, "nmf": 6}, seed=3), first)
    other = probe(tiny_bos_model, bases={"pca": 6, "nmf": 6}, seed=4)
    assert not torch.equal(other.similarity_null["pca"], first.similarity_null["pca"])


def test_positions_with_bos_do_not_count(tiny_bos_model):
    """Windows of text begin with BOS, which the result records but does not count."""
    text = ["abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123" * 20]
    options = {"train_tokens": 240, "held_out_tokens": 80, "bases": (), "null_draws": 2}
    result = probe_input(tiny_bos_model, token_windows(tiny_bos_model, text, length=9), **options)
    assert (result.train_tokens, result.held_out_tokens) == (240, 80)
    assert result.length == 9
    assert result.prepend_bos
    plain = token_windows(tiny_bos_model, text, length=9, prepend_bos=False)
    without = probe_input(tiny_bos_model, plain, **options)
    assert (without.train_tokens, without.held_out_tokens) == (243, 81)
    assert not without.prepend_bos


def test_intervals_are_over_the_accuracies_of_windows(tiny_model):
    """Computed from each held-out window on its own."""
    result = probe(tiny_model)
    W_E = tiny_model.W_E.detach()
    bos = own_bos_token_id(tiny_model.tokenizer)
    per_window = []
    for window in windows()[N_TRAIN:]:
        keep = window[None] != (-1 if bos is None else bos)
        stream = reference.residuals(tiny_model, window[None], keep)[2]
        guesses = stream @ result.weights["embedding"][2].double() + result.biases["embedding"][2].double()
        per_window.append(reference.accuracy(guesses, W_E, window[keep[0]]))
    low, high = bootstrap_interval(torch.stack(per_window), seed=0)
    # in a window, one token whose two nearest embeddings differ only by rounding may go either way
    assert torch.allclose(
        result.accuracy_interval["embedding"][0, 2].double(), torch.stack([low, high]), atol=1 / 120
    )
    one = probe(tiny_model, held_out_tokens=1)
    assert one.accuracy_interval["embedding"].isnan().all()
    assert not one.accuracy["embedding"].isnan().any()


def test_the_unembedding_includes_the_final_norms_scale(tiny_directories):
    """With raw weights, `W_U` has neither that scale nor the centering."""
    model = load_model(tiny_directories / "gpt2", processing=False)
    result = probe(model, bases=())
    scale = model.ln_final.w.detach()
    W_U = scale[:, None] * model.W_U.detach()
    W_U = W_U - W_U.mean(0)
    for fit in range(4):
        expected = reference.cosine(result.weights["embedding"][fit], model.W_E.detach(), W_U.T)
        # float32 maps
        assert float(result.unembedding_similarity["embedding"][fit]) == pytest.approx(
            float(expected), abs=1e-5
        )


def test_a_probe_can_be_saved_and_makes_a_table(tiny_bos_model, tmp_path):
    result = probe(tiny_bos_model)
    assert InputProbe.load(result.save(tmp_path / "probe.safetensors")) == result
    made = examples.input_probe()
    table = made.to_dataframe()
    assert len(table) == 2 * 2 * 2
    row = table[(table.basis == "embedding") & (table.kind == "per_layer") & (table.row == "0")].iloc[0]
    assert (row.accuracy, row.accuracy_low, row.accuracy_high, row.chance) == (0.5, 0.375, 0.625, 0.0625)
    assert (row.similarity, row.similarity_null, row.similarity_null_low) == (0.5, 0.0, -0.25)
    shared = table[(table.basis == "embedding") & (table.kind == "shared")]
    assert shared.similarity.tolist() == [0.0, 0.0]
    assert shared.weight_correlation.tolist() == [-0.5, -0.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bases": ("pca", "ica")}, r"bases must be a list of pca and nmf, each once, got \('pca', 'ica'\)"),
        ({"bases": "pca"}, "a list of pca and nmf"),
        ({"bases": ("pca", "pca")}, "each once"),
        ({"bases": {"pca": 0}}, "elements of pca must be at least 1, got 0"),
        ({"bases": {"pca": 33}}, "elements of pca must be at most 32 for this model, got 33"),
        ({"ridge": -1}, "ridge must be at least 0, got -1"),
        ({"ridge": float("nan")}, "ridge must be a finite number"),
        ({"null_draws": 1}, "null_draws must be at least 2, got 1"),
        ({"train_tokens": 0}, "train_tokens must be at least 1"),
        ({"held_out_tokens": 0}, "held_out_tokens must be at least 1"),
        ({"train_tokens": 5}, r"train_tokens must be more than 33 \(d_model \+ 1\), got"),
        ({"train_tokens": 2000}, r"only \d+ tokens, but train_tokens is 2000"),
        ({"held_out_tokens": 400}, r"left after the training windows, but held_out_tokens is 400"),
    ],
)
def test_a_wrong_argument_is_an_error_that_names_it(tiny_bos_model, options, message):
    with pytest.raises(ValueError, match=message):
        probe(tiny_bos_model, **options)


@needs_shared
def test_the_bundled_model_keeps_its_input_but_rotates_it_away_from_the_embedding(bundled):
    books = SHARED / "corpus" / "books-validation.jsonl.gz"
    result = probe_input(bundled, books, bases=(), train_tokens=16384, held_out_tokens=1024, null_draws=20)
    own = result.accuracy["embedding"][0]
    assert own[0] == 1
    assert own.min() > 0.5 > result.chance
    similarity, null = result.similarity["embedding"][:-1], result.similarity_null["embedding"][:-1]
    assert (similarity.diff() < 0).all()
    assert (similarity > null[:, 2]).all()
