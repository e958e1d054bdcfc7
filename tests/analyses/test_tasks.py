"""Tasks: prompts built for a tokenizer, and the model's performance compared with full runs."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

import mechlens
from mechlens.analyses.patching import LogitDiff, Patching
from mechlens.analyses.tasks import Task, load_task
from mechlens.results import head_label, load
from mechlens.show.section import section
from mechlens.text.task_library import BUILT_IN
from mechlens.text.task_prompts import TaskPrompt
from mechlens.text.tokens import target_id
from tests.close import assert_close
from tests.counting import positions_run
from tests.shared import needs_smollm2

ROWS = [
    {
        "clean": "The sea is",
        "corrupted": "The old is",
        "answer": " the",
        "wrong": [" a", " in"],
        "role_N": "sea",
    },
    {
        "clean": "The old sea is",
        "corrupted": "The old man is",
        "answer": " a",
        "wrong": " the",
        "role_N": "sea",
    },
    {
        "clean": "The man is",
        "corrupted": "The sea is",
        "answer": [" a", " in"],
        "wrong": " the",
        "role_N": "man",
    },
]


def log_probs(model, text):
    """Log probabilities of every next token, from the model's own logits."""
    with torch.inference_mode():
        return model(text, prepend_bos=True)[0, -1].double().log_softmax(-1)


def test_performance_matches_full_runs(bundled):
    found = Task.from_file(ROWS, bundled).performance()
    for at, row in enumerate(ROWS):
        right, wrong = (
            [target_id(bundled, each) for each in ([row[name]] if isinstance(row[name], str) else row[name])]
            for name in ("answer", "wrong")
        )
        clean, corrupted = log_probs(bundled, row["clean"]), log_probs(bundled, row["corrupted"])
        # float32 logits of about 20, here and in the model's own run
        difference = clean[right].exp().sum().log() - clean[wrong].exp().sum().log()
        assert float(found.logit_diff[at]) == pytest.approx(float(difference), abs=1e-4)
        other = corrupted[right].exp().sum().log() - corrupted[wrong].exp().sum().log()
        assert float(found.corrupted_logit_diff[at]) == pytest.approx(float(other), abs=1e-4)
        assert int(found.rank[at]) == 1 + int((clean > clean[right].max()).sum())
        assert bool(found.right[at]) == bool(clean[right].max() > clean[wrong].max())
    assert found.chance == pytest.approx((1 / 3 + 1 / 2 + 2 / 3) / 3)
    mean, low, high = found.estimates["logit_diff"]
    assert low <= mean <= high
    assert mean == pytest.approx(float(found.logit_diff.mean()))


def answer_difference(logits, prompt):
    """The log-sum-exp of the right answers' logits minus that of the wrong ones."""
    high, low = (sum(math.exp(float(logits[id])) for id in some) for some in (prompt.answers, prompt.wrong))
    return math.log(high) - math.log(low)


def test_patches_by_role_match_full_runs_with_a_hook(bundled):
    rows = [
        *ROWS,
        {"clean": "The man is", "corrupted": "The sea is", "answer": " a", "wrong": " the", "role_N": "man"},
        {"clean": "A sea is", "corrupted": "A man is", "answer": " the", "wrong": " a", "role_N": "sea"},
    ]
    task = Task.from_file(rows, bundled)
    assert len(task.groups) > 1
    found = task.grid("resid_pre", layers=[1, 3])
    assert (found.roles, found.layers, found.into) == (("N", "END"), (1, 3), "corrupted")
    for at, prompt in enumerate(task.encoded):
        cache = bundled.run_with_cache(prompt.clean)[1]
        for row, layer in enumerate(found.layers):
            for column, role in enumerate(found.roles):
                name, position = f"blocks.{layer}.hook_resid_pre", prompt.roles[role]

                def restore(stream, hook, position=position, name=name, cache=cache):
                    stream[:, position] = cache[name][:, position]
                    return stream

                logits = bundled.run_with_hooks(prompt.corrupted, fwd_hooks=[(name, restore)])[0, -1].detach()
                # float32 logits of about 10
                assert float(found.values[at, row, column]) == pytest.approx(
                    answer_difference(logits, prompt), abs=1e-4
                )
    assert torch.allclose(found.clean, task.performance().logit_diff, atol=1e-4)
    assert torch.allclose(found.effect, (found.values - found.corrupted[:, None, None]).mean(0))
    noised = task.grid("resid_pre", layers=[1, 3], into="clean", roles=["END"])
    way = found.corrupted.mean() - found.clean.mean()
    assert torch.allclose(noised.recovered, noised.effect / way, rtol=1e-3)


@pytest.mark.parametrize(
    ("over", "roles", "axes", "shape"),
    [
        (("role", "head", "layer"), None, ("layer", "head", "role"), (2, 6, 2)),
        (("layer", "head"), None, ("layer", "head"), (2, 6)),
        (("layer", "head"), ["N"], ("layer", "head"), (2, 6)),
        ("role", None, ("role",), (2,)),
        ((), ["END", "N"], (), ()),
    ],
)
def test_patches_by_other_axes_match_full_runs_with_a_hook(bundled, over, roles, axes, shape):
    task, layers = Task.from_file(ROWS[:2], bundled), (1, 3)
    found = task.grid("z", over=over, layers=layers, roles=roles)
    assert found.axes == axes
    assert found.heads == (tuple(itertools.product(layers, range(6))) if "head" in axes else ())
    assert found.roles == (tuple(roles) if roles else ("N", "END") if "role" in axes else ())
    assert found.values.shape == (2, *shape)
    assert found.changes.shape == found.values.shape
    assert found.effect.shape == found.recovered.shape == found.standard_error.shape == shape
    table = found.to_dataframe()
    assert list(table.columns) == [
        *axes,
        *(["label"] if "head" in axes else []),
        "effect",
        "standard_error",
        "recovered",
    ]
    for at, prompt in enumerate(task.encoded):
        cache = bundled.run_with_cache(prompt.clean)[1]
        for cell, row in enumerate(table.to_dict("records")):
            cell_layers = [row["layer"]] if "layer" in row else layers
            every = [prompt.roles[role] for role in found.roles] or range(prompt.clean.shape[1])
            positions = [prompt.roles[row["role"]]] if "role" in row else every
            heads = [row["head"]] if "head" in row else range(6)

            def restore(z, hook, positions=positions, heads=heads, cache=cache):
                for position, head in itertools.product(positions, heads):
                    z[:, position, head] = cache[hook.name][:, position, head]
                return z

            hooks = [(f"blocks.{layer}.attn.hook_z", restore) for layer in cell_layers]
            logits = bundled.run_with_hooks(prompt.corrupted, fwd_hooks=hooks)[0, -1].detach()
            # float32 logits of about 10
            assert float(found.values[at].flatten()[cell]) == pytest.approx(
                answer_difference(logits, prompt), abs=1e-4
            )
    best = found.summary(3)
    assert best["effect"].abs().max() == pytest.approx(float(found.effect.abs().max()))
    if "head" in axes:
        assert set(best["label"]) <= {head_label(layer, head) for layer, head in found.heads}


def test_prompts_with_different_numbers_of_answers_run_together(tiny_model):
    prompts = [
        TaskPrompt("abcd", "abed", ("x",), ("y", "z", "v")),
        TaskPrompt("abce", "abee", ("x", "u"), ("w",)),
    ]
    task = Task(tiny_model, prompts)
    found = task.grid("resid_pre", layers=[0])
    for at, prompt in enumerate(task.encoded):
        for name, tokens in (("clean", prompt.clean), ("corrupted", prompt.corrupted)):
            with torch.inference_mode():
                logits = tiny_model(tokens)[0, -1]
            # float32 logits of about 1
            assert float(getattr(found, name)[at]) == pytest.approx(
                answer_difference(logits, prompt), abs=1e-5
            )


def test_a_grid_of_several_answers_runs_only_what_a_patch_can_change(bundled):
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(4)]
    task = Task.from_file(ROWS[:1], bundled)
    (prompt,) = task.encoded
    other = Patching(
        bundled, prompt.clean, prompt.corrupted, metric=LogitDiff(prompt.answers[0], prompt.wrong[0])
    )
    assert task.note  # measured now, so that its runs are not counted
    several = positions_run(bundled, names, lambda: task.grid("resid_pre"))
    assert several == positions_run(
        bundled, names, lambda: other.grid("resid_pre", positions=[prompt.roles["N"], prompt.roles["END"]])
    )


def test_an_axis_that_a_task_does_not_have_is_refused(bundled):
    task = Task.from_file(ROWS[:1], bundled)
    with pytest.raises(ValueError, match="unknown axis 'pos': choose from layer, head, role"):
        task.grid("z", over=("layer", "pos"))
    with pytest.raises(ValueError, match=r"heads are for the sites .*, but site is 'resid_pre'"):
        task.grid("resid_pre", over=("layer", "head", "role"))


def test_a_role_that_a_prompt_lacks_is_refused(bundled):
    lacking = [ROWS[1], {name: value for name, value in ROWS[1].items() if name != "role_N"}]
    with pytest.raises(ValueError, match="prompt 1 has no role 'N': 'The old sea is'"):
        Task.from_file(lacking, bundled).grid("resid_pre", roles=["N"])
    with pytest.raises(ValueError, match="unknown role 'S9': choose from N, END"):
        Task.from_file(ROWS[1:2], bundled).grid("resid_pre", roles=["S9"])


def test_prompts_of_one_length_run_together_and_roles_are_the_last_token_of_their_word(bundled):
    task = Task.from_file(ROWS, bundled)
    assert sorted(at for group in task.groups for at in group.index) == [0, 1, 2]
    for group in task.groups:
        for at, row in zip(group.index, group.tokens, strict=True):
            roles = task.encoded[at].roles
            before = bundled.to_string(row[1 : roles["N"] + 1])
            assert before.endswith(ROWS[at]["role_N"])
            assert ROWS[at]["clean"].startswith(before)
            assert roles["END"] == len(row) - 1


def test_a_task_comes_from_csv_and_jsonl(bundled, tmp_path):
    lines = tmp_path / "mine.jsonl"
    lines.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    table = tmp_path / "mine.csv"
    table.write_text(
        'clean,corrupted,answer,wrong,role_S2\n"The sea, the sea is","The sea, the man is", the, a,sea#2\n',
        "utf-8",
    )
    assert Task.from_file(lines, bundled).prompts == Task.from_file(ROWS, bundled).prompts
    (prompt,) = Task.from_file(table, bundled).prompts
    assert prompt.roles == {"S2": len("The sea, the sea")}
    assert Task.from_file(table, bundled).name == "mine.csv"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corrupted": "The old man is"}, "same number of tokens, got 4 and 5"),
        ({"answer": "two words"}, "the target 'two words' is .* tokens, not one"),
        ({"answer": " a"}, "an answer that is both right and wrong"),
        ({"wrong": ""}, "row 1 has no wrong"),
        ({"role_N": "ship"}, "row 1: there is no occurrence 1 of 'ship' in 'The sea is'"),
        ({"role_N": "sea#2"}, "row 1: there is no occurrence 2 of 'sea'"),
    ],
)
def test_an_invalid_row_is_refused_before_anything_runs(bundled, change, message):
    with pytest.raises(ValueError, match=message):
        Task.from_file([ROWS[0] | change], bundled)


def test_an_invalid_task_is_refused(bundled, monkeypatch):
    with pytest.raises(ValueError, match=r"name must be one of ioi, greater-than, .*, got 'ioy'"):
        load_task("ioy", bundled)
    with pytest.raises(ValueError, match="counterfactual must be one of name, got 'swap'"):
        load_task("gender", bundled, counterfactual="swap")
    with pytest.raises(ValueError, match="at least one prompt"):
        Task(bundled, [])
    with pytest.raises(ValueError, match=r"a \.csv or \.jsonl file, got 'mine.txt'"):
        Task.from_file("mine.txt", bundled)
    monkeypatch.setattr("mechlens.text.task_library._pieces", lambda model, text: ("174", "2"))
    with pytest.raises(ValueError, match=r"this one reads 1742 as \['174', '2'\]"):
        load_task("greater-than", bundled)
    with pytest.raises(
        ValueError, match=r"at least 10 argument names that are one token of this model, but only \d"
    ):
        load_task("docstring", bundled)


def test_a_single_prompt_shows_neither_ability_nor_spread(bundled):
    task = Task.from_file(ROWS[1:2], bundled, name="mine")
    found, grid = task.performance(), task.grid("resid_pre", layers=[0])
    assert not found.able
    assert found.note == grid.note == "a single prompt does not show whether the model can do the task mine"
    assert bool(grid.standard_error.isnan().all())
    assert found.note[1:] in section(found).text


def test_clean_and_corrupted_runs_with_equal_metrics_are_refused(bundled):
    same = [ROWS[1] | {"corrupted": ROWS[1]["clean"]}] * 2
    assert bool(Task.from_file(same, bundled).grid("resid_pre", layers=[0]).recovered.isnan().all())


def test_only_a_few_prompts_logits_are_in_memory_at_once(bundled, monkeypatch):
    whole = Task.from_file(ROWS, bundled).performance()
    monkeypatch.setattr("mechlens.analyses.tasks.performance.TOGETHER", 1)
    assert_close(Task.from_file(ROWS, bundled).performance().logit_diff, whole.logit_diff)


@pytest.mark.parametrize(
    ("line", "message"), [("{", "line 2 is not JSON"), ("[1]", r"line 2 must be an object .* got \[1\]")]
)
def test_an_invalid_line_is_named(bundled, tmp_path, line, message):
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{json.dumps(ROWS[0])}\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Task.from_file(path, bundled)


def test_a_word_may_contain_a_number_sign(bundled):
    row = ROWS[1] | {"clean": "The C# sea is", "corrupted": "The C# man is", "role_N": "C#"}
    assert Task.from_file([row], bundled).prompts[0].roles == {"N": len("The C#")}


def test_a_task_that_the_model_cannot_do_says_so(bundled):
    texts = TaskPrompt("The sea is", "The old is", (" zz",), (" the",))
    with pytest.raises(ValueError, match="not one"):
        Task(bundled, [texts])
    hard = [TaskPrompt("The sea is", "The old is", ("z",), (" the",))] * 4
    found = Task(bundled, hard, name="hard").performance()
    assert not found.able
    assert found.note.startswith("the model cannot do the task hard: accuracy 0.00")


def test_performance_can_be_saved_and_loaded(bundled, tmp_path):
    found = load_task("agreement", bundled, n=6).performance()
    assert load(found.save(tmp_path / "task.safetensors")) == found


def test_edges_of_the_induction_task_name_the_bundled_models_induction_heads(bundled):
    task = load_task("induction", bundled, n=24)
    assert len(task.groups) == 1, "all prompts have one length"
    assert len({each.roles["END"] - each.roles["FIRST"] for each in task.encoded}) == 5
    found = task.performance()
    mean, *_ = found.estimates["logit_diff"]
    corrupted, *_ = found.estimates["corrupted_logit_diff"]
    assert found.able
    assert mean > 3 > -3 > corrupted
    heads = [each for each in task.edges().top_nodes(6) if not each.endswith("mlp")]
    known = mechlens.detect_heads(mechlens.score_heads(bundled))
    assert len(heads) >= 4
    assert set(heads[:4]) <= set(known)
    by_head = task.grid("z", over=("layer", "head", "role"), roles=["END"])
    assert set(by_head.summary(6)["label"]) == set(known)
    grid = task.grid("resid_pre", roles=["NEXT", "END"])
    # the answer is at NEXT until the induction heads of the last layer move it to END
    assert float(grid.recovered[0, 0]) > 0.9
    assert abs(float(grid.recovered[0, 1])) < 0.1


def test_the_seed_decides_the_prompts(bundled):
    first, again, other = (load_task("agreement", bundled, n=8, seed=seed).prompts for seed in (0, 0, 1))
    assert first == again != other


@pytest.fixture(scope="module")
def smollm2(load_once):
    return load_once("smollm2-135m")


@needs_smollm2
@pytest.mark.parametrize("name", BUILT_IN)
def test_the_real_model_does_every_built_in_task(smollm2, name):
    found = load_task(name, smollm2, n=32).performance()
    assert found.able, found.note
    mean, *_ = found.estimates["logit_diff"]
    corrupted, *_ = found.estimates["corrupted_logit_diff"]
    assert mean > 0.5 > -0.5 > corrupted


@needs_smollm2
def test_roles_of_the_indirect_object_are_its_names(smollm2):
    task = load_task("ioi", smollm2, n=12, counterfactual="other-names")
    for prompt, found in zip(task.prompts, task.encoded, strict=True):
        word = {role: smollm2.to_string(found.clean[0, position]) for role, position in found.roles.items()}
        assert (word["IO"], word["S1"], word["S2"]) == (*prompt.answers, *prompt.wrong, *prompt.wrong)
        assert not {word["IO"], word["S1"]} & {f" {each}" for each in prompt.corrupted.split()}
