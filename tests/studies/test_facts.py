"""Facts, read from each layer."""

from __future__ import annotations

import pytest
import torch

from mechlens.results import load
from mechlens.studies import facts
from mechlens.studies.facts import FACTS, read_facts
from mechlens.text.prompts import text_tokens
from tests.close import assert_close

SOME_FACTS = [
    ("verb", "The captain of the", " ship"),
    ("verb", "He went to the", " door"),
    ("pronoun", "said that", " he"),
    ("pronoun", "she looked at", " him"),
]


def test_facts_are_read_from_every_layer_as_by_hand(bundled):
    found = read_facts(bundled, SOME_FACTS)
    assert found.others == (" door", " ship", " him", " he")
    for at, (_, prompt, answer) in enumerate(SOME_FACTS):
        tokens = text_tokens(bundled, prompt)
        target = int(bundled.to_tokens(answer, prepend_bos=False)[0, 0])
        _, cache = bundled.run_with_cache(tokens)
        rows = [cache["blocks.0.hook_resid_pre"]]
        rows += [cache[f"blocks.{layer}.hook_resid_post"] for layer in range(bundled.cfg.n_layers)]
        for row, residual in enumerate(rows):
            with torch.no_grad():
                expected = bundled.unembed(bundled.ln_final(residual))[0, -1].log_softmax(-1)
            assert float(found.log_prob[at, row]) == pytest.approx(float(expected[target]), abs=1e-4)
            assert float(found.rank[at, row]) == 1 + int((expected > expected[target]).sum())
        assert found.guesses[at] == bundled.tokenizer.decode([int(expected.argmax())])


def test_shares_of_facts_and_their_null(bundled):
    found = read_facts(bundled, SOME_FACTS)
    last = found.rank[:, -1]
    assert_close(found.share(10)[-1], (last <= 10).float().mean())
    assert_close(found.share(10, null=True)[-1], (found.other_rank[:, -1] <= 10).float().mean())
    assert torch.equal(found.known, last == 1)
    table = found.to_dataframe()
    assert list(table["layer"].unique()) == [-1, 0, 1, 2, 3]
    row = table[(table["fact"] == 2) & (table["layer"] == 3)].iloc[0]
    assert (row["prompt"], row["answer"], row["rank"]) == ("said that", " he", float(last[2]))


def test_facts_that_cannot_be_read_are_refused(bundled):
    with pytest.raises(ValueError, match="at least one"):
        read_facts(bundled, [])
    with pytest.raises(ValueError, match="'verb' needs two different answers"):
        read_facts(bundled, SOME_FACTS[:1])
    with pytest.raises(ValueError, match="tokens, not one"):
        read_facts(bundled, [*SOME_FACTS, ("verb", "He went to the", " Constantinople")])


def test_all_facts_are_different_questions():
    assert len(FACTS) >= 40
    assert len({prompt for _, prompt, _ in FACTS}) == len(FACTS)
    assert all(answer[0] == " " and answer[1].isalpha() for *_, answer in FACTS)


def test_layers_count_from_where_something_stays_true():
    assert facts._first(torch.tensor([False, True, False, True, True])) == 2
    assert facts._first(torch.tensor([True, True])) == -1
    assert facts._first(torch.tensor([True, False])) == "none"


def test_facts_are_saved_and_loaded(bundled, tmp_path):
    found = read_facts(bundled, SOME_FACTS)
    assert load(found.save(tmp_path / "facts.safetensors")) == found
