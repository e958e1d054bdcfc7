"""Induction circuits: in a model written by hand, in a shuffled copy of it, and in the bundled one."""

from __future__ import annotations

import json
import math
import re

import jaxtyping
import pytest
import torch

from mechlens.measures.attention import induction_score
from mechlens.models.load import load_model
from mechlens.report import induction_circuits_section
from mechlens.results import InductionCircuits, load
from mechlens.studies.induction_circuits import (
    find_induction_circuits,
    reproduce_composition_circuit,
    strongest,
)
from mechlens.terminal import induction_circuits_json, print_induction_circuits, print_json

V, SEQ_LEN = 48, 12
P, D_HEAD = 2 * SEQ_LEN, 48
OPTIONS = {"seq_len": SEQ_LEN, "batch": 4}


def write_circuit(directory, *, shuffled=False, cut="", n_heads=2, back=1, sharpness=30.0):
    """Two layers of attention alone: L0H0 attends to the token before and writes it beside the token, L1H0
    attends where that is its own token, and copies the token there. The other heads are faint noise.

    The stream holds the token, the position, the token before, and what is said of the next.

    Args:
        cut: `writes` or `compares`: what L0H0 or L1H0 does not, because its weights for it are zeros.
        sharpness: of L0H0's attention, the score where it attends.
        back: how many tokens before it L0H0 attends to.
        n_heads: in each layer. Of more than 2, L0H1 does for the last third of the tokens what L0H0 else
            does, and writes what nobody reads besides.
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
    # position j is found by the query of j + 1
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
def test_a_circuit_that_was_written_is_found(by_hand, how, tmp_path):
    found = find_induction_circuits(by_hand, how=how, **OPTIONS)
    assert found.labels == (("L0H0", "L1H0"),)
    assert found.verdicts == ("circuit",)
    said = {name: float(values[0]) for name, values in found.evidence.items()}
    # a token that comes twice within a copy shares its attention
    assert said["induction_score"] > 0.7
    # all positions but the first attend to the one before
    assert said["previous_token_score"] == pytest.approx(1, abs=1e-4)
    assert said["k_top1_keys"] == said["k_top1_queries"] == said["ov_top1"] == 1
    # weights of the identity: every eigenvalue is positive
    assert said["ov_copying"] == pytest.approx(1, abs=1e-4)
    # ||I|| / (||I|| ||I||), of rank V; random matrices of these shapes have about 1 / sqrt(d_model)
    assert said["k_score"] == pytest.approx(V**-0.5, abs=1e-4)
    assert said["k_z"] > 10
    assert (said["k_rank"], said["n_earlier"]) == (1, 2)
    # without the token before, the keys say nothing
    assert said["score_path"] < 0.25
    assert said["score_removed"] < 0.25
    assert said["loss_path"] == pytest.approx(said["loss_removed"], abs=1e-3), "there is no other way"
    assert said["loss_path"] > 1
    assert "attends as a circuit does" in found.reasons[0]
    # what is with the head stands beside what is without it, whichever is more
    clean = found.clean_loss
    assert found.reasons[0].endswith(
        f"in the keys the induction score is {said['score_path']:.2f} instead of "
        f"{said['induction_score']:.2f}, and the loss {clean + said['loss_path']:.2f} nats instead of "
        f"{clean:.2f}; without it at all they are {said['score_removed']:.2f} and "
        f"{clean + said['loss_removed']:.2f}"
    )
    assert load(found.save(tmp_path / "found.safetensors")) == found
    table = found.to_dataframe()
    assert table.loc[0, ["previous", "induction", "verdict"]].tolist() == ["L0H0", "L1H0", "circuit"]


def test_a_shuffled_copy_has_none(shuffled):
    found = find_induction_circuits(shuffled, **OPTIONS)
    assert found.pairs == ()
    assert "no head has an induction score of 0.4" in found.note
    assert len(found.to_dataframe()) == 0
    judged = find_induction_circuits(shuffled, pairs=[("L0H0", "1.0")], **OPTIONS)
    assert judged.verdicts == ("no circuit",)
    assert float(judged.evidence["k_top1_keys"][0]) < 0.2
    assert "does not attend" in judged.reasons[0]


@pytest.mark.parametrize(("n_heads", "verdict"), [(4, "in part"), (8, "circuit")])
def test_a_pair_composes_only_above_most_earlier_heads(tmp_path, n_heads, verdict, capsys):
    """The second of two heads that compose far over chance: of 8 it is in the upper quarter, of 4 not."""
    model = load_model(write_circuit(tmp_path, n_heads=n_heads))
    found = find_induction_circuits(model, pairs=[("0.0", "1.0"), ("0.1", "1.0")], **OPTIONS)
    assert found.evidence["k_rank"].tolist() == [1, 2]
    assert found.evidence["n_earlier"].tolist() == [n_heads] * 2
    assert float(found.evidence["k_z"].min()) > 3
    assert found.verdicts == ("circuit", verdict)
    rule = "at least 3 standard deviations over chance and among the highest 25% of all earlier heads' (the"
    assert rule in induction_circuits_section(found).terms["Verdict"]
    print_induction_circuits(found)
    assert rule in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("cut", ["writes", "compares"])
def test_a_head_of_zeros_is_no_evidence(tmp_path, cut, capsys):
    """All entries of its circuits tie."""
    model = load_model(write_circuit(tmp_path, cut=cut))
    found = find_induction_circuits(model, pairs=[("0.0", "1.0")], **OPTIONS)
    said = {name: float(values[0]) for name, values in found.evidence.items()}
    assert math.isnan(said["k_score"])
    assert math.isnan(said["k_rank"])
    assert said["k_top1_keys"] == said["k_top1_queries"] == 0
    assert found.verdicts == ("no circuit",)
    head = "L0H0" if cut == "writes" else "L1H0"
    assert f"; {head} {cut} nothing, its weights are zero; " in found.reasons[0]
    rank = found.to_dataframe()["k_rank"]
    assert (str(rank.dtype), rank.isna().tolist()) == ("Int64", [True])
    print_json(induction_circuits_json(found))
    assert '"k_rank": null' in capsys.readouterr().out
    table = induction_circuits_section(found).parts[0]
    assert table.rows[0][3:6] == ["undefined"] * 3
    print_induction_circuits(found)
    assert "undefined" in capsys.readouterr().out


def test_the_scores_of_a_pair_are_those_of_its_own_runs(by_hand):
    """Against runs with hooks: the key input is written by hand for this model, which has no norms."""
    found = find_induction_circuits(by_hand, how="zero", **OPTIONS)
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

    score = torch.stack([induction_score(p, SEQ_LEN) for p in _with_bos(kept["pattern"])]).mean()
    assert float(found.evidence["score_removed"][0]) == pytest.approx(float(score), abs=1e-5)
    assert found.clean_loss == pytest.approx(float(loss(clean)), abs=1e-4)
    expected = float(loss(logits) - loss(clean))
    assert float(found.evidence["loss_removed"][0]) == pytest.approx(expected, abs=1e-4)


def _with_bos(patterns):
    """`induction_score` is of sequences that begin with BOS, which these have not."""
    return torch.nn.functional.pad(patterns, (1, 0, 1, 0))


def test_the_bundled_models_own_circuit(bundled):
    found = find_induction_circuits(bundled, batch=2, per_head=1, threshold=0.83)
    assert found.labels[0] == ("L1H2", "L3H5")
    assert len(found.pairs) >= 2
    assert {pair[:2] for pair in found.pairs} == {(1, 2)}, "its one previous-token head"
    assert set(found.verdicts) == {"circuit"}
    for name, at_least in (("k_z", 10), ("k_top1_keys", 0.1), ("loss_path", 0.1)):
        assert float(found.evidence[name].min()) > at_least
    assert bool((found.evidence["k_rank"] == 1).all())
    assert float(found.evidence["score_path"].max()) < 0.05
    assert found.relative_position == 49


def test_the_article_is_held_against_gpt2_only(by_hand):
    study = reproduce_composition_circuit(by_hand, **OPTIONS)
    assert [c.verdict for c in study.comparisons] == ["not judged"] * 2
    assert [c.measured for c in study.comparisons] == [1.0, 1.0]
    assert set(study.results) == {"circuits", "composition"}
    assert strongest(study.circuits) == 0
    none = InductionCircuits(**{**vars(study.circuits), "pairs": (), "verdicts": (), "reasons": ()})
    assert strongest(none) is None


def test_a_note_names_the_null_that_decided(by_hand, tmp_path):
    found = find_induction_circuits(by_hand, threshold=0.999, **OPTIONS)
    assert re.search(r"the highest is L1H0 with 0\.\d{3}$", found.note), "the score alone is too low"
    # a head that attends as far back whatever the tokens are, and so as much where nothing is repeated
    fixed = load_model(write_circuit(tmp_path / "fixed", back=SEQ_LEN - 1))
    found = find_induction_circuits(fixed, **OPTIONS)
    assert re.search(r"the highest is L0H0 with 1\.000, but its null is (0\.[5-9]|1\.0)", found.note)
    # one that attends to the token before, but not enough, although the induction head makes do with it
    faint = load_model(write_circuit(tmp_path / "faint", sharpness=1.5))
    found = find_induction_circuits(faint, **OPTIONS)
    said = r"no head before the induction heads L1H0 .*; the highest is L0H0 with 0\.[23]\d{2}$"
    assert re.search(said, found.note), found.note


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"how": "half"}, "how must be mean, zero or resample"),
        ({"per_head": 0}, "per_head must be at least 1"),
        ({"threshold": 1.5}, "threshold must lie between 0 and 1"),
        ({"seq_len": 1}, "seq_len must be at least 2"),
        ({"seq_len": 13}, "the largest seq_len that fits is 12"),
        ({"pairs": [("L1H0", "L0H0")]}, "earlier"),
        ({"pairs": [("L0H5", "L1H0")]}, "there is no head"),
        ({"pairs": [("L0H0", "L2H0")]}, "there is no head"),
        ({"pairs": [("first", "L1H0")]}, "a head is written L5H5"),
        ({"pairs": []}, r"pairs must be one or several different ones, but are \[\]"),
        ({"pairs": [("0.0", "1.0"), ((0, 0), (1, 0))]}, "pairs must be one or several different ones"),
    ],
)
def test_what_cannot_be_is_refused(by_hand, options, message):
    with pytest.raises(ValueError, match=message):
        find_induction_circuits(by_hand, **(OPTIONS | options))


@pytest.mark.parametrize(
    ("pairs", "shown"),
    [
        (("0.0", "1.0"), "'0.0'"),
        (((0, 0), (1, 0)), r"\(0, 0\)"),
        ([("0.0", "0.1", "1.0")], r"\('0.0', '0.1', '1.0'\)"),
        (["0.0,1.0"], "'0.0,1.0'"),
    ],
)
def test_what_is_no_list_of_pairs_is_refused_before_any_run(by_hand, pairs, shown):
    runs = []
    handle = by_hand.register_forward_pre_hook(lambda *_: runs.append(1))
    # as users have it, without the tests' own check of types
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=f"pairs is a list of pairs .* but there is {shown} in it"):
            find_induction_circuits(by_hand, pairs=pairs, **OPTIONS)
        with pytest.raises(ValueError, match="there is no head L9H0"):
            find_induction_circuits(by_hand, pairs=[("0.0", "9.0")], **OPTIONS)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
        handle.remove()
    assert not runs
