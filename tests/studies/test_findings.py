"""Facts, the indirect object, circuits and features as figures that a card claims."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from mechlens.published import STUDIES, Published
from mechlens.results import Facts, load
from mechlens.studies import facts, findings
from mechlens.studies.facts import FACTS, read_facts
from mechlens.studies.heads import CARDS, known_figures
from mechlens.studies.indirect_object import (
    NAMES,
    IndirectObjectStudy,
    indirect_object,
    of_indirect_object,
    share_recovered,
)
from mechlens.studies.study import Measured, hold
from mechlens.text.prompts import text_tokens
from tests import hand_made
from tests.cli.test_cli import run
from tests.close import assert_close

SOME_FACTS = [
    ("verb", "The captain of the", " ship"),
    ("verb", "He went to the", " door"),
    ("pronoun", "said that", " he"),
    ("pronoun", "she looked at", " him"),
]
TEMPLATES = tuple(f"When{{a}} and{{b}} {verb},{{s}} said to" for verb in ("came", "went", "sat"))
PEOPLE = (" he", " she", " they", " it", " you")


def log_probs(model, tokens):
    with torch.no_grad():
        return model(tokens)[:, -1].double().log_softmax(-1)


def test_facts_are_read_off_every_layer_as_by_hand(bundled):
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
    with pytest.raises(ValueError, match="'verb' has one answer only, ' ship'"):
        read_facts(bundled, SOME_FACTS[:1])
    with pytest.raises(ValueError, match="tokens, not one"):
        read_facts(bundled, [*SOME_FACTS, ("verb", "He went to the", " Constantinople")])


def test_all_facts_are_different_questions():
    assert len(FACTS) >= 40
    assert len({prompt for _, prompt, _ in FACTS}) == len(FACTS)
    assert all(answer[0] == " " and answer[1].isalpha() for *_, answer in FACTS)


def test_the_indirect_object_is_the_difference_of_two_logits(bundled):
    found = indirect_object(bundled, n_prompts=12, templates=TEMPLATES, names=PEOPLE, seed=3)
    assert found.template.tolist() == [0, 1, 2] * 4
    for at in range(12):
        text = bundled.tokenizer.decode(found.tokens[at, 1:])
        assert text.count(found.subjects[at]) == 2
        assert text.count(found.objects[at]) == 1
        read = log_probs(bundled, found.tokens[at : at + 1])[0]
        io, s = (
            int(bundled.to_tokens(name, prepend_bos=False)[0, 0])
            for name in (found.objects[at], found.subjects[at])
        )
        assert float(found.logit_diff[at]) == pytest.approx(float(read[io] - read[s]), abs=1e-4)
        assert float(found.rank[at]) == 1 + int((read > read[io]).sum())
        at_role = {name: int(found.tokens[at, where[at]]) for name, where in found.roles.items()}
        assert (at_role["IO"], at_role["S1"], at_role["S2"]) == (io, s, s)
        assert found.roles["S1"][at] < found.roles["S2"][at] < found.roles["END"][at]
        # the same prompt, but for who speaks
        other = found.tokens[at].clone()
        other[found.roles["S2"][at]] = io
        assert torch.equal(other, found.corrupted[at])
    # as often the first name as the second
    assert int((found.roles["IO"] < found.roles["S1"]).sum()) == 6


def test_names_of_several_tokens_are_left_out(bundled):
    found = indirect_object(bundled, n_prompts=4, templates=TEMPLATES, names=(*PEOPLE, " Ozymandias"))
    assert " Ozymandias" not in found.subjects + found.objects
    with pytest.raises(ValueError, match="only 0 are one token of this model, and 4 are needed"):
        indirect_object(bundled, names=[" Ozymandias", " Constantinople"])
    with pytest.raises(ValueError, match="n_prompts"):
        indirect_object(bundled, n_prompts=0, names=PEOPLE)
    with pytest.raises(ValueError, match="equally many tokens"):
        indirect_object(bundled, names=PEOPLE, templates=["{a}{b}{s}", "{a} and{b} and{s}"])


def study_by_hand():
    """Three layers of two heads, two prompts; position 2 holds the second subject, 4 is the last."""
    model = dataclasses.replace(hand_made.model(), n_layers=3, n_heads=2)
    task = hand_made.indirect_object(model)
    grid = dataclasses.replace(
        hand_made.patch_grid(n_prompts=2),
        model=model,
        clean=torch.tensor([2.0, 4.0]),
        corrupted=torch.tensor([-2.0, 0.0]),
        direction="denoising",
    )
    heads = torch.zeros(2, 3, 2)
    heads += grid.corrupted[:, None, None]
    heads[:, 1, 1] += torch.tensor([1.0, 3.0])
    heads[:, 2, 0] -= 1.0
    places = grid.corrupted[:, None, None].repeat(1, 3, 5)
    places[:, 0, 2] += 4.0
    places[:, 1, 2] += 3.0
    places[:, 2, 4] += 4.0
    return IndirectObjectStudy(
        (),
        task,
        dataclasses.replace(grid, values=heads, axes=("layer", "head"), heads=(0, 1), positions=()),
        dataclasses.replace(grid, values=places, axes=("layer", "pos"), heads=(), positions=tuple(range(5))),
    )


def test_what_heads_recover_and_where_the_answer_moves():
    study = study_by_hand()
    # of a difference of 4 between the two runs
    assert_close(share_recovered(study.heads)[:, 1, 1], torch.tensor([0.25, 0.75]))
    measured = of_indirect_object(study, [(2, 0)])
    values = {name: each.value for name, each in measured.items()}
    assert values["strongest head"] == "L1H1"
    assert values["L1H1"] == pytest.approx(0.5)
    assert values["L2H0"] == pytest.approx(-0.25)
    assert (values["logit_diff"], values["right"], values["first"]) == pytest.approx((0.5, 0.5, 0.5))
    assert (values["leaves S2"], values["arrives at END"]) == (2, 2)


def test_layers_are_counted_from_where_something_holds_to_the_end():
    assert facts._first(torch.tensor([False, True, False, True, True])) == 2
    assert facts._first(torch.tensor([True, True])) == -1
    assert facts._first(torch.tensor([True, False])) == "none"


def test_what_counts_as_reproduced():
    words = Published("head", "L1H2", "a card")
    assert hold(words, Measured("head", "L1H2")).verdict == "reproduced"
    assert hold(words, Measured("head", "L1H3")).verdict == "not reproduced"
    assert hold(words, Measured("head", 1.0)).verdict == "not reproduced"
    counted = Published("share", 0.70, "a card")
    assert hold(counted, Measured("share", 0.72, 0.03)).verdict == "reproduced"
    found = hold(counted, Measured("share", 0.74, 0.03))
    assert (found.verdict, found.low, found.high) == (
        "not reproduced",
        pytest.approx(0.67),
        pytest.approx(0.73),
    )
    assert hold(counted, Measured("share", math.nan, 0.03)).verdict == "not reproduced"
    layer = Published("layer", 20, "a card")
    assert hold(layer, Measured("layer", 20)).verdict == "reproduced"
    assert hold(layer, Measured("layer", 21)).verdict == "not reproduced"
    found = hold(layer, Measured("layer", 21, 1))
    assert (found.verdict, found.low, found.high) == ("reproduced", 19, 21)
    drawn = Published("mean", 0.0, "a card", sequences=100)
    samples = torch.tensor([-1.0, 1.0]).repeat(50)
    assert hold(drawn, Measured("mean", 0.0, samples=samples)).verdict == "reproduced"
    # 2.6 / sqrt(50) is what 99% of such means stay within
    assert hold(dataclasses.replace(drawn, value=0.5), Measured("mean", 0.0, samples=samples)).verdict == (
        "not reproduced"
    )
    assert hold(drawn, Measured("mean", 0.0, samples=samples[:19])).verdict == "not judged"


def test_every_figure_on_a_card_belongs_to_a_study_and_has_a_value():
    for card in CARDS.glob("*.json"):
        figures = json.loads(card.read_text())["figures"]
        assert {each["study"] for each in figures} <= set(STUDIES)
        assert all(each["what"] and each["value"] == each["value"] for each in figures)


def test_a_plan_takes_what_the_card_has_figures_of():
    smollm2 = dataclasses.replace(
        hand_made.model(),
        name="smollm2-135m",
        n_layers=30,
        n_heads=9,
        d_model=576,
        d_vocab=49152,
        revision=None,
    )
    with_card = {each.study for each in known_figures(smollm2)}
    assert with_card == {"heads", "facts", "induction-circuits", "indirect-object", "features"}
    assert findings.planned(smollm2) == [name for name in STUDIES if name in with_card]
    assert findings.planned(hand_made.model()) == ["heads"]
    assert findings.planned(smollm2, ["features", "heads"]) == ["heads", "features"]
    with pytest.raises(ValueError, match="there is no study 'head': it is one of heads, logit-lens"):
        findings.planned(smollm2, ["head"])


def test_features_need_raw_weights_and_say_so_first(bundled):
    with pytest.raises(ValueError, match="'features' needs raw weights: give raw="):
        findings.reproduce_findings(bundled, ["heads", "features"])


def test_results_are_saved_and_loaded(bundled, tmp_path):
    found = read_facts(bundled, SOME_FACTS)
    assert load(found.save(tmp_path / "facts.safetensors")) == found
    assert isinstance(found, Facts)
    task = indirect_object(bundled, n_prompts=3, templates=TEMPLATES, names=PEOPLE)
    assert load(task.save(tmp_path / "task.safetensors")) == task
    assert list(task.to_dataframe()["indirect_object"]) == list(task.objects)


def test_24_names_are_asked_for():
    assert len(set(NAMES)) == 24
    assert all(name.startswith(" ") for name in NAMES)


@pytest.mark.parametrize("name", [name for name in STUDIES if name not in ("facts", "indirect-object")])
def test_a_study_by_name_is_written_and_shown(capsys, name, tmp_path):
    """Of the bundled model, which has no figures of most of them."""
    code, _, err = run(capsys, "reproduce", name, "--out", tmp_path / "out", "--batch", 2, "--n-seeds", 1)
    assert code == 0, err
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<section") >= 1


def test_a_study_that_does_not_fit_the_model_is_one_line(capsys, tmp_path):
    code, _, err = run(capsys, "reproduce", "facts", "--out", tmp_path / "out")
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert "the target ' Paris' is 3 tokens, not one" in err
    code, _, err = run(capsys, "reproduce", "fact", "--out", tmp_path / "out")
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert "STUDY must be one of heads, logit-lens" in err
