"""Indirect-object identification: prompts, logits, and what heads and positions recover."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mechlens.results import load
from mechlens.studies.indirect_object import NAMES, IndirectObjectStudy, indirect_object, share_recovered
from tests import examples
from tests.close import assert_close

TEMPLATES = tuple(f"When{{a}} and{{b}} {verb},{{s}} said to" for verb in ("came", "went", "sat"))
PEOPLE = (" he", " she", " they", " it", " you")


def log_probs(model, tokens):
    with torch.no_grad():
        return model(tokens)[:, -1].double().log_softmax(-1)


def test_the_task_measures_the_difference_of_two_logits(bundled):
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
        # the same prompt, except for the subject
        other = found.tokens[at].clone()
        other[found.roles["S2"][at]] = io
        assert torch.equal(other, found.corrupted[at])
    # equally often the first and the second name
    assert int((found.roles["IO"] < found.roles["S1"]).sum()) == 6


def test_names_of_several_tokens_are_left_out(bundled):
    found = indirect_object(bundled, n_prompts=4, templates=TEMPLATES, names=(*PEOPLE, " Ozymandias"))
    assert " Ozymandias" not in found.subjects + found.objects
    with pytest.raises(
        ValueError, match="at least 4 names that are one token of this model, but only 0 of 2"
    ):
        indirect_object(bundled, names=[" Ozymandias", " Constantinople"])
    with pytest.raises(ValueError, match="n_prompts"):
        indirect_object(bundled, n_prompts=0, names=PEOPLE)
    with pytest.raises(ValueError, match="same number of tokens"):
        indirect_object(bundled, names=PEOPLE, templates=["{a}{b}{s}", "{a} and{b} and{s}"])


def study_by_hand():
    """Three layers with two heads, two prompts; position 2 is the second subject, position 4 the last."""
    model = dataclasses.replace(examples.model(), n_layers=3, n_heads=2)
    task = examples.indirect_object(model)
    grid = dataclasses.replace(
        examples.patch_grid(n_prompts=2),
        model=model,
        clean=torch.tensor([2.0, 4.0]),
        corrupted=torch.tensor([-2.0, 0.0]),
        into="corrupted",
    )
    every = tuple((layer, head) for layer in range(3) for head in range(2))
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
        dataclasses.replace(grid, values=heads, axes=("layer", "head"), heads=every, positions=()),
        dataclasses.replace(grid, values=places, axes=("layer", "pos"), heads=(), positions=tuple(range(5))),
    )


def test_what_heads_recover_and_which_position_has_the_answer():
    study = study_by_hand()
    # out of a difference of 4 between the runs
    assert_close(share_recovered(study.indirect_object_heads)[:, 1, 1], torch.tensor([0.25, 0.75]))
    measured = study.quantities()
    values = {name: each.value for name, each in measured.items()}
    assert values["strongest head"] == "L1H1"
    assert values["L1H1"] == pytest.approx(0.5)
    assert values["L2H0"] == pytest.approx(-0.25)
    assert (values["logit_diff"], values["right"], values["first"]) == pytest.approx((0.5, 0.5, 0.5))
    assert (values["leaves S2"], values["arrives at END"]) == (2, 2)


def test_the_task_is_saved_and_loaded(bundled, tmp_path):
    task = indirect_object(bundled, n_prompts=3, templates=TEMPLATES, names=PEOPLE)
    assert load(task.save(tmp_path / "task.safetensors")) == task
    assert list(task.to_dataframe()["indirect_object"]) == list(task.objects)


def test_there_are_24_names_that_begin_with_a_space():
    assert len(set(NAMES)) == 24
    assert all(name.startswith(" ") for name in NAMES)
