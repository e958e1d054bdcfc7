"""The heads of a task: in a model whose heads are known, and in a real one."""

from __future__ import annotations

import pytest
import torch

import mechlens
from mechlens.analyses.tasks import Task, load_task
from mechlens.show.section import section
from tests.close import assert_close
from tests.examples import task_heads as example
from tests.shared import needs_smollm2
from tests.written_models import ROWS, load_written


def test_a_head_that_copies_and_a_negative_one_attend_to_the_answer(tmp_path):
    rows = [row | {"role_first": "a"} for row in ROWS]
    task = Task.from_file(rows, load_written(tmp_path, "negative"), prepend_bos=False)
    found = task.heads(
        task.edges(), copying=mechlens.copy_scores(task.model, task.answer_ids, top_k=1), top=2
    )
    assert found.heads == ((0, 0), (0, 1))
    assert found.effect.tolist() == pytest.approx([-2, 1])
    assert found.scores["copies"].tolist() == [1, 0]
    assert found.scores["suppresses"].tolist() == [0, 1]
    assert found.roles == ("first", "END")
    assert_close(found.attention, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))


def test_attention_is_that_of_the_cached_patterns(bundled):
    task = load_task("agreement", bundled, n=5)
    found = task.heads(task.edges(), top=4)
    expected = torch.zeros(4, len(found.roles))
    for prompt in task.encoded:
        cache = bundled.run_with_cache(prompt.clean)[1]
        for at, (layer, head) in enumerate(found.heads):
            row = cache["pattern", layer][0, head, -1].detach()
            expected[at] += torch.stack([row[prompt.roles[role]] for role in found.roles]) / 5
    assert_close(found.attention, expected)


def test_a_kind_is_clear_above_its_null():
    assert example().kinds == ("copies, previous token", "")
    table = example().to_dataframe()
    assert list(table["attends"]) == ["IO", "END"]
    assert list(table["attention"]) == [0.75, 0.5]
    assert list(table["attention_IO"]) == [0.75, 0]
    made = section(example(note="the model cannot do it"))
    assert (
        "The effect is the estimated change in the logit difference if a head carries its value" in made.text
    )
    assert made.text.endswith("Note: the model cannot do it.")
    assert [cell.text for cell in made.parts[0].cells()[0]][-1] == "copies, previous token"


def test_copy_suppression_is_to_suppress_what_is_looked_up():
    clear, null = torch.tensor([1.0, 1.0]), torch.tensor([0.125, 0.125])
    unclear = torch.tensor([0.5, 0.5])
    scores = {"suppresses": clear, "attends_to_predicted": torch.tensor([0.75, 0.39])}
    nulls = {"suppresses": null, "attends_to_predicted": null}
    assert example(scores=scores, nulls=nulls).kinds == ("copy suppression", "suppresses")
    both = example(scores=scores, nulls=nulls | {"attends_to_predicted": unclear})
    assert both.kinds == ("suppresses", "suppresses")
    only = example(scores=scores | {"suppresses": torch.zeros(2)}, nulls=nulls)
    assert only.kinds == ("", "")


@needs_smollm2
def test_the_real_model_suppresses_the_subject_and_copies_the_object(load_once):
    task = load_task("ioi", load_once("smollm2-135m"), n=12)
    copying = mechlens.copy_scores(task.model, task.answer_ids)
    edges = task.edges(steps=5)
    table = task.heads(edges, copying=copying, top=15).to_dataframe().set_index("label")
    assert table.index[0] == "L23H3"
    assert table.loc["L23H3", ["attends", "kind"]].tolist() == ["S2", "suppresses"]
    assert table.loc["L23H0", ["attends", "kind"]].tolist() == ["IO", "copies"]
    every = task.heads(edges, copying=copying, top=270).to_dataframe()
    assert every.loc[every["kind"].str.contains("copy suppression"), "label"].tolist() == ["L24H4"]
