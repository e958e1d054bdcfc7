"""Induction circuits in a handwritten model, in a shuffled copy of it, and in the bundled one."""

from __future__ import annotations

import json
import math
import re

import jaxtyping
import pytest
import torch
from safetensors.torch import load_file

from mechlens.analyses.circuits import induction
from mechlens.analyses.circuits.induction import find_induction_circuits
from mechlens.analyses.circuits.ov import full_OV
from mechlens.models.load.loading import load_model
from mechlens.models.protocol import engine_of
from mechlens.results import load
from mechlens.results.induction_circuits import COUNTED, VERDICT_RULE
from mechlens.show.induction_circuits import induction_circuits_section
from mechlens.text.prompts import RepeatedTokens
from tests.counting import positions_run
from tests.reference import heads as reference
from tests.tiny_models import tiny_hf_model, write_tiny_model, write_tokenizer

V, SEQ_LEN = 48, 12
P, D_HEAD = 2 * SEQ_LEN, 48
ON = RepeatedTokens(SEQ_LEN, batch=4, seeds=[0])


def write_circuit(directory, *, shuffled=False, cut="", n_heads=2, back=1, sharpness=30.0):
    """Two attention-only layers. L0H0 attends to the previous token and writes it next to the current one.
    L1H0 attends where its own token was written, and copies the token there. The other heads are faint noise.

    The stream has subspaces for the token, the position, the previous token and the prediction.

    Args:
        cut: `writes` or `compares`: zeros the weights with which L0H0 writes or L1H0 compares.
        sharpness: L0H0's attention score where it attends.
        back: how many tokens back L0H0 attends.
        n_heads: per layer. If more than 2, L0H1 replaces L0H0 for the last third of the tokens, and also
            writes something that no head reads.
    """
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(0)
    d_model = 3 * V + P
    token, place, before, out = (
        slice(0, V),
        slice(V, V + P),
        slice(V + P, 2 * V + P),
        slice(2 * V + P, None),
    )
    config = {
        "n_layers": 2,
        "d_model": d_model,
        "n_ctx": P,
        "d_head": D_HEAD,
        "n_heads": n_heads,
        "d_vocab": V,
        "attn_only": True,
        "act_fn": None,
        "normalization_type": None,
    }
    weights = {
        "embed.W_E": torch.zeros(V, d_model),
        "pos_embed.W_pos": torch.zeros(P, d_model),
        "unembed.W_U": torch.zeros(d_model, V),
        "unembed.b_U": torch.zeros(V),
    }
    weights["embed.W_E"][:, token] = torch.eye(V)
    weights["pos_embed.W_pos"][:, place] = torch.eye(P)
    weights["unembed.W_U"][out] = 20 * torch.eye(V)
    for layer in range(2):
        name = f"blocks.{layer}.attn."
        for part, shape in (("Q", (d_model, D_HEAD)), ("K", (d_model, D_HEAD)), ("V", (d_model, D_HEAD))):
            weights[f"{name}W_{part}"] = 1e-3 * torch.randn(n_heads, *shape, generator=draw)
            weights[f"{name}W_{part}"][0] = 0
            weights[f"{name}b_{part}"] = torch.zeros(n_heads, D_HEAD)
        weights[f"{name}W_O"] = 1e-3 * torch.randn(n_heads, D_HEAD, d_model, generator=draw)
        weights[f"{name}W_O"][0] = 0
        weights[f"{name}b_O"] = torch.zeros(d_model)
    strong = 30.0 * D_HEAD**0.5  # 30 after the division by sqrt(d_head)
    first, second = ("blocks.0.attn.", "blocks.1.attn.")
    weights[f"{first}W_Q"][0, place, :P] = sharpness * D_HEAD**0.5 * torch.eye(P)
    # the query at j + 1 finds position j
    weights[f"{first}W_K"][0, place, :P] = torch.eye(P).roll(back, 1)
    weights[f"{first}W_V"][0, token] = torch.eye(V)
    weights[f"{first}W_O"][0, :, before] = torch.eye(V)
    weights[f"{second}W_Q"][0, token] = strong * torch.eye(V)
    weights[f"{second}W_K"][0, before] = torch.eye(V)
    weights[f"{second}W_V"][0, token] = torch.eye(V)
    weights[f"{second}W_O"][0, :, out] = torch.eye(V)
    if n_heads > 2:
        for part in "QKVO":
            weights[f"{first}W_{part}"][1] = weights[f"{first}W_{part}"][0]
        some = slice(V - V // 3, V)
        weights[f"{first}W_O"][0, some] = 0
        weights[f"{first}W_O"][1, : some.start] = 0
        weights[f"{first}W_O"][1, some, place] = torch.eye(P)[: V // 3]
    if cut:
        weights[f"{first}W_O" if cut == "writes" else f"{second}W_K"][0] = 0
    if shuffled:
        weights = {
            name: value.flatten()[torch.randperm(value.numel(), generator=draw)].view(value.shape)
            if ".W_" in name and "blocks" in name
            else value
            for name, value in weights.items()
        }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in weights.items()}, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    return load_model(write_circuit(tmp_path_factory.mktemp("circuit")))


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory):
    return load_model(write_circuit(tmp_path_factory.mktemp("shuffled"), shuffled=True))


@pytest.mark.parametrize("how", ["mean", "zero", "resample"])
def test_a_handwritten_circuit_is_found(by_hand, how, tmp_path):
    found = find_induction_circuits(by_hand, ON, how=how)
    assert found.labels == (("L0H0", "L1H0"),)
    assert found.verdicts == ("circuit",)
    said = found.evidence(0)
    # a token that occurs twice within a copy splits the attention
    assert said["induction_score"] > 0.7
    # all positions but the first attend to the previous one
    assert said["previous_token_score"] == pytest.approx(1, abs=1e-4)
    assert said["k_top1_keys"] == said["k_top1_queries"] == said["ov_top1"] == 1
    # identity weights: every eigenvalue is positive
    assert said["ov_copying"] == pytest.approx(1, abs=1e-4)
    # ||I|| / (||I|| ||I||) with rank V; random matrices of these shapes have about 1 / sqrt(d_model)
    assert said["k_score"] == pytest.approx(V**-0.5, abs=1e-4)
    assert said["k_z"] > 10
    assert (said["k_rank"], said["n_earlier"]) == (1, 2)
    # without the previous token, the keys have no information
    assert said["score_path"] < 0.25
    assert said["score_removed"] < 0.25
    assert said["loss_path"] == pytest.approx(said["loss_removed"], abs=1e-3), "there is no other way"
    assert said["loss_path"] > 1
    assert found.reasons[0].startswith("behavior: yes (")
    clean = found.clean_loss
    assert found.reasons[0].endswith(
        f"the loss {clean + said['loss_path']:.2f} nats instead of {clean:.2f}; ablated everywhere, "
        f"{said['score_removed']:.2f} and {clean + said['loss_removed']:.2f})"
    )
    assert load(found.save(tmp_path / "found.safetensors")) == found
    table = found.to_dataframe()
    assert table.loc[0, ["previous", "induction", "verdict"]].tolist() == ["L0H0", "L1H0", "circuit"]


def test_a_shuffled_copy_has_no_circuit(shuffled):
    found = find_induction_circuits(shuffled, ON)
    assert found.pairs == ()
    assert "no head has an induction score of at least 0.4" in found.note
    assert len(found.to_dataframe()) == 0
    judged = find_induction_circuits(shuffled, ON, pairs=[("L0H0", "1.0")])
    assert judged.verdicts == ("no circuit",)
    assert judged.evidence(0)["k_top1_keys"] < 0.2
    assert "behavior: no (" in judged.reasons[0]


@pytest.mark.parametrize(("n_heads", "verdict"), [(4, "in part"), (8, "circuit")])
def test_a_pair_composes_only_if_it_ranks_above_most_earlier_heads(tmp_path, n_heads, verdict):
    """The second of two heads that compose far above chance is in the top quarter of 8 heads, not of 4."""
    model = load_model(write_circuit(tmp_path, n_heads=n_heads))
    found = find_induction_circuits(model, ON, pairs=[("0.0", "1.0"), ("0.1", "1.0")])
    assert found.k_rank.tolist() == [1, 2]
    assert found.n_earlier.tolist() == [n_heads] * 2
    assert float(found.k_z.min()) > 3
    assert found.verdicts == ("circuit", verdict)
    assert VERDICT_RULE in induction_circuits_section(found).text


@pytest.mark.parametrize("cut", ["writes", "compares"])
def test_a_head_of_zeros_is_no_evidence(tmp_path, cut):
    """All entries of its circuits are tied."""
    model = load_model(write_circuit(tmp_path, cut=cut))
    found = find_induction_circuits(model, ON, pairs=[("0.0", "1.0")])
    said = found.evidence(0)
    assert math.isnan(said["k_score"])
    assert math.isnan(said["k_rank"])
    assert said["k_top1_keys"] == said["k_top1_queries"] == 0
    assert found.verdicts == ("no circuit",)
    head = "L0H0" if cut == "writes" else "L1H0"
    assert f"weights: no ({head} {cut} nothing, because its weights are zero); " in found.reasons[0]
    rank = found.to_dataframe()["k_rank"]
    assert (str(rank.dtype), rank.isna().tolist()) == ("Int64", [True])
    table = induction_circuits_section(found).parts[0]
    assert [cell.text for cell in table.cells()[0][3:6]] == ["—"] * 3


def test_the_scores_of_a_pair_match_separate_runs(by_hand):
    """Compared with hooked runs; the key input is computed by hand, as this model has no norms."""
    found = find_induction_circuits(by_hand, ON, how="zero")
    kept = {}

    def removed(z, hook):
        z = z.clone()
        z[:, :, 0] = 0
        return z

    with torch.no_grad():
        by_hand.run_with_hooks(
            found.tokens,
            fwd_hooks=[
                ("blocks.0.attn.hook_z", removed),
                ("blocks.1.attn.hook_pattern", lambda a, hook: kept.__setitem__("pattern", a[:, 0].clone())),
            ],
        )
        logits = by_hand.run_with_hooks(found.tokens, fwd_hooks=[("blocks.0.attn.hook_z", removed)])
        clean = by_hand(found.tokens)

    def loss(logits):
        log_probs = logits.double().log_softmax(-1)[:, SEQ_LEN:-1]
        return -log_probs.gather(2, found.tokens[:, SEQ_LEN + 1 :, None]).mean()

    score = sum(reference.induction(p, SEQ_LEN, bos=0) for p in kept["pattern"]) / len(kept["pattern"])
    assert found.evidence(0)["score_removed"] == pytest.approx(score, abs=1e-5)
    assert found.clean_loss == pytest.approx(float(loss(clean)), abs=1e-4)
    expected = float(loss(logits) - loss(clean))
    assert found.evidence(0)["loss_removed"] == pytest.approx(expected, abs=1e-4)


def test_the_bundled_models_own_circuit(bundled):
    found = find_induction_circuits(bundled, RepeatedTokens(batch=2, seeds=[0]), per_head=1, threshold=0.83)
    assert found.labels[0] == ("L1H2", "L3H5")
    assert len(found.pairs) >= 2
    assert {pair[:2] for pair in found.pairs} == {(1, 2)}, "its one previous-token head"
    assert set(found.verdicts) == {"circuit"}
    for name, at_least in (("k_z", 10), ("k_top1_keys", 0.1), ("loss_path", 0.1)):
        assert float(getattr(found, name).min()) > at_least
    assert bool((found.k_rank == 1).all())
    assert float(found.score_path.max()) < 0.05
    assert found.relative_position == 49


# -- a sample of the vocabulary ----------------------------------------------------------------------


def hits_by_hand(directory):
    """Whether each token's entry with itself exceeds all others, from full float64 matrices of the file's
    weights: for L0H0 and L1H0 by query and by key, and for L1H0's OV by source."""
    file = load_file(directory / "model.safetensors")
    weights = {name: value.double() for name, value in file.items()}
    W_E, (first, second) = weights["embed.W_E"], ("blocks.0.attn.W_", "blocks.1.attn.W_")
    brought = W_E @ weights[f"{first}V"][0] @ weights[f"{first}O"][0] @ weights[f"{second}K"][0]
    composed = W_E @ weights[f"{second}Q"][0] @ brought.T
    copied = W_E @ weights[f"{second}V"][0] @ weights[f"{second}O"][0] @ weights["unembed.W_U"]

    def hits(matrix):
        return torch.tensor(
            [
                all(row[token] > other for at, other in enumerate(row) if at != token)
                for token, row in enumerate(matrix.tolist())
            ]
        )

    return {"k_top1_keys": hits(composed), "k_top1_queries": hits(composed.T), "ov_top1": hits(copied)}


def test_intervals_of_sampled_accuracies_cover_the_full_accuracies(tmp_path):
    directory = write_circuit(tmp_path, n_heads=4)
    model, by_hand = load_model(directory), hits_by_hand(directory)
    pairs = [("0.0", "1.0"), ("0.1", "1.0")]
    complete = find_induction_circuits(
        model, RepeatedTokens(4, batch=1, seeds=[0]), pairs=pairs, n_tokens=None
    )
    assert complete.counted == "Top-1 accuracies are counted over all 48 tokens."
    for name, hits in by_hand.items():
        share = float(hits.double().mean())
        assert float(getattr(complete, name)[0]) == pytest.approx(share), name
        assert complete.intervals[name][:, 0].tolist() == pytest.approx([share, share])
    # L0H0 writes two thirds of the tokens
    assert complete.evidence(0)["k_top1_keys"] == pytest.approx(2 / 3)
    covered, differs = [], []
    for seed in range(12):
        on = RepeatedTokens(4, batch=1, seeds=[seed])
        found = find_induction_circuits(model, on, pairs=pairs, n_tokens=20)
        drawn = torch.randperm(V, generator=torch.Generator().manual_seed(seed))[:20]
        for name, hits in by_hand.items():
            (low, high), share = found.intervals[name][:, 0].tolist(), float(getattr(found, name)[0])
            assert share == pytest.approx(float(hits[drawn].double().mean())), (name, seed)
            assert low <= share <= high
            assert 0.1 < high - low < 0.5, "of 20 tokens something is known"
            covered.append(low <= float(getattr(complete, name)[0]) <= high)
            differs.append(share != float(getattr(complete, name)[0]))
        if seed == complete.seed:
            assert found.verdicts == complete.verdicts, "no verdict hangs on a sample"
    # 95%, and slightly more because the sample is nearly half of the vocabulary
    assert sum(covered) >= 35
    assert any(differs)
    off = max(float((found.intervals[name] - getattr(found, name)).abs().max()) for name in COUNTED)
    assert f"of 20 of 48 tokens: with 95% confidence, each is within {off:.3f} of" in found.counted
    assert found.counted in induction_circuits_section(found).text
    row = found.to_dataframe().iloc[0]
    assert [row["ov_top1_low"], row["ov_top1_high"]] == pytest.approx(
        found.intervals["ov_top1"][:, 0].tolist()
    )


def test_work_that_pairs_share_is_done_once(tmp_path, monkeypatch):
    """12 pairs of 4 previous-token heads and 3 induction heads in a 6-layer model."""
    write_tiny_model(tmp_path, "llama", num_hidden_layers=6)
    model = load_model(tmp_path)
    asked = []

    def noted(model, head):
        asked.append(head)
        return full_OV(model, head)

    monkeypatch.setattr(induction, "full_OV", noted)
    pairs = [((0, a), (5, b)) for a in range(4) for b in range(3)]
    options = {"on": RepeatedTokens(8, batch=2, seeds=[0]), "how": "zero"}
    *before, at, enters = [f"blocks.{layer}.attn.hook_z" for layer in (0, 1, 4, 5)] + [
        "blocks.5.hook_resid_pre"
    ]
    names = [*before, at, enters]
    seen = [
        positions_run(model, names, lambda some=some: find_induction_circuits(model, pairs=some, **options))
        for some in (pairs[:1], pairs)
    ]
    assert asked == [(5, 0), (5, 0), (5, 1), (5, 2)], "OV once for each head"
    once = 2 * 17
    more = {name: (seen[1][name] - seen[0][name]) / once for name in names}
    if engine_of(model) == "HookedTransformer":
        # three more senders run from their layer on; eleven more pairs only in the receivers' layer: up to
        # the key, up to the pattern, and to the end
        assert more == {**dict.fromkeys(before, 3), at: 3 + 11, enters: 3 + 3 * 11}
    else:
        # full runs; rotations are read from runs up to the layer
        assert more[at] == 3 + 11


# -- heads that share their keys ---------------------------------------------------------------------


def test_when_heads_share_a_key_only_the_receiver_sees_the_patch(tmp_path):
    """Compared with the same model with key and value weights repeated for every head."""
    write_tiny_model(tmp_path / "grouped", "llama", num_hidden_layers=3)
    apart = tiny_hf_model("llama", num_hidden_layers=3, num_key_value_heads=4)
    grouped = tiny_hf_model("llama", num_hidden_layers=3).state_dict()
    d_head = 8
    apart.load_state_dict(
        {
            name: value.view(-1, d_head, value.shape[1]).repeat_interleave(2, 0).flatten(0, 1)
            if "k_proj" in name or "v_proj" in name
            else value
            for name, value in grouped.items()
        }
    )
    apart.save_pretrained(tmp_path / "apart")
    write_tokenizer(tmp_path / "apart", bos_is_eos=False)
    options = {
        "pairs": [((0, 1), (2, head)) for head in range(4)],
        "on": RepeatedTokens(12, batch=3, seeds=[0]),
    }
    shared, alone = (
        find_induction_circuits(load_model(tmp_path / name), **options) for name in ("grouped", "apart")
    )
    for name in ("score_path", "loss_path", "loss_path_error", "score_removed", "loss_removed"):
        # float32 through three layers, summed in a different order
        torch.testing.assert_close(
            getattr(shared, name), getattr(alone, name), atol=2e-5, rtol=0, msg=lambda m, name=name: name + m
        )
    losses = shared.loss_path
    assert (losses[0::2] - losses[1::2]).abs().min() > 1e-3, "two heads of one group are not the same"


# -- with a user's hook ------------------------------------------------------------------------------


def test_with_a_users_hook_pairs_are_judged_in_full_runs(tmp_path):
    """Compared with runs of single sequences. The hook acts in the middle, on the first row of each batch."""
    write_tiny_model(tmp_path, "llama", num_hidden_layers=4)
    model = load_model(tmp_path)

    def own(activation, hook):
        activation = activation.clone()
        activation[0, 4:] *= -1
        return activation

    model.add_hook("blocks.1.hook_resid_pre", own, is_permanent=True)
    found = find_induction_circuits(
        model, RepeatedTokens(12, batch=3, seeds=[0]), pairs=[((0, 1), (2, 3))], how="zero"
    )

    def zero(z, hook):
        z = z.clone()
        z[:, :, 1] = 0
        return z

    losses = []
    for row in found.tokens.split(1):
        for hooks in ([], [("blocks.0.attn.hook_z", zero)]):
            with torch.no_grad():
                log_probs = model.run_with_hooks(row, fwd_hooks=hooks)[0].log_softmax(-1)
            losses.append(-log_probs[13:-1].gather(1, row[0, 14:, None]).mean())
    losses = torch.stack(losses).view(-1, 2).mean(0)
    # float32
    assert found.clean_loss == pytest.approx(float(losses[0]), abs=1e-5)
    removed = float(losses[1] - losses[0])
    assert found.evidence(0)["loss_removed"] == pytest.approx(removed, abs=2e-5)


def test_a_note_names_the_null_that_decided(by_hand, tmp_path):
    found = find_induction_circuits(by_hand, ON, threshold=0.999)
    assert re.search(r"the highest is L1H0 with 0\.\d{3}$", found.note), "the score alone is too low"
    # a head that attends equally far back on any tokens, so equally where nothing repeats
    fixed = load_model(write_circuit(tmp_path / "fixed", back=SEQ_LEN - 1))
    found = find_induction_circuits(fixed, ON)
    assert re.search(r"the highest is L0H0 with 1\.000, but its null is (0\.[5-9]|1\.0)", found.note)
    # a head that attends too little to the previous token, although enough for the induction head
    faint = load_model(write_circuit(tmp_path / "faint", sharpness=1.5))
    found = find_induction_circuits(faint, ON)
    said = r"no head before the induction heads L1H0 .*; the highest is L0H0 with 0\.[23]\d{2}$"
    assert re.search(said, found.note), found.note


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"how": "half"}, "how must be one of mean, zero, resample"),
        ({"per_head": 0}, "per_head must be at least 1"),
        ({"threshold": 1.5}, "threshold must be between 0 and 1"),
        ({"on": RepeatedTokens(1, seeds=[0])}, "seq_len must be at least 2"),
        ({"on": RepeatedTokens(5)}, "seeds must be a single seed"),
        ({"on": RepeatedTokens(5, jitter=1, seeds=[0])}, "jitter must be 0"),
        ({"on": RepeatedTokens(13, seeds=[0])}, "the largest seq_len that fits is 12"),
        ({"pairs": [("L1H0", "L0H0")]}, "earlier"),
        ({"pairs": [("L0H5", "L1H0")]}, "out of range"),
        ({"pairs": [("L0H0", "L2H0")]}, "out of range"),
        ({"pairs": [("first", "L1H0")]}, "a head is written L5H5"),
        ({"pairs": []}, "pairs must be one or several different pairs"),
        ({"pairs": [("0.0", "1.0"), ((0, 0), (1, 0))]}, "pairs must be one or several different pairs"),
    ],
)
def test_impossible_arguments_are_refused(by_hand, options, message):
    with pytest.raises(ValueError, match=message):
        find_induction_circuits(by_hand, **({"on": ON} | options))


@pytest.mark.parametrize(
    ("pairs", "shown"),
    [
        (("0.0", "1.0"), "'0.0'"),
        (((0, 0), (1, 0)), r"\(0, 0\)"),
        ([("0.0", "0.1", "1.0")], r"\('0.0', '0.1', '1.0'\)"),
        (["0.0,1.0"], "'0.0,1.0'"),
    ],
)
def test_an_invalid_list_of_pairs_is_refused_before_any_run(by_hand, pairs, shown):
    runs = []
    handle = by_hand.register_forward_pre_hook(lambda *_: runs.append(1))
    # as for users, without the tests' type checks
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=f"pairs must be a list of .* got {shown} in it"):
            find_induction_circuits(by_hand, ON, pairs=pairs)
        with pytest.raises(ValueError, match="head L9H0 is out of range"):
            find_induction_circuits(by_hand, ON, pairs=[("0.0", "9.0")])
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
        handle.remove()
    assert not runs
