"""Circuits of tasks: those of models written by hand are found, and all numbers are those of whole runs."""

from __future__ import annotations

import itertools

import pytest
import torch

import mechlens
from mechlens.analyses.tasks import Task, load_task
from mechlens.analyses.tasks.replaced import replacements
from mechlens.analyses.tasks.sets import ChosenSet, TaskRuns
from mechlens.models.run.edge_runs import EdgeRuns, Written, check_edges
from mechlens.models.run.graph import Graph
from tests.close import assert_close
from tests.reference.edges import edge_gradients, logits_with_replaced_edges, written
from tests.shared import BACKENDS, HAS_HOOKED
from tests.written_models import ROWS, load_written

CIRCUITS = {
    "mlp": ["embed->L0H0.v", "L0H0->L0.mlp", "L0.mlp->logits"],
    "negative": ["embed->L0H0.v", "L0H0->logits", "embed->L0H1.v", "L0H1->logits"],
    "backup": ["embed->L0H0.v", "L0H0->logits"],
}
KINDS = ["gpt2", "gpt_neox", "llama"]
needs_hooked = pytest.mark.skipif(not HAS_HOOKED, reason="the reference has inputs of HookedTransformer")


@pytest.fixture(scope="module")
def written_task(tmp_path_factory):
    found = {}

    def made(kind):
        if kind not in found:
            model = load_written(tmp_path_factory.mktemp(kind), kind)
            found[kind] = Task.from_file(ROWS, model, prepend_bos=False)
        return found[kind]

    return made


@pytest.fixture(scope="module")
def two_prompts():
    draw = torch.Generator().manual_seed(1)
    return torch.randint(5, 55, (3, 7), generator=draw), torch.randint(5, 55, (3, 7), generator=draw)


# -- circuits that are known -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CIRCUITS)
@pytest.mark.parametrize("steps", [None, 1, 5])
def test_a_circuit_that_was_written_is_found(written_task, kind, steps):
    """Every edge of it has a larger effect than any other edge: an area under the ROC curve of 1."""
    found = written_task(kind).edges(exact=None, steps=steps or 1)
    exact = dict(zip(found.exact_edges, found.exact.abs().tolist(), strict=True))
    if steps is not None:
        places = [edge.split("->") for edge in found.exact_edges]
        values = [found.effect[found.senders.index(u), found.receivers.index(r)] for u, r in places]
        exact = dict(zip(found.exact_edges, torch.stack(values).abs().tolist(), strict=True))
    assert len(exact) == found.n_edges
    inside = [size for edge, size in exact.items() if edge in CIRCUITS[kind]]
    outside = [size for edge, size in exact.items() if edge not in CIRCUITS[kind]]
    assert len(inside) == len(CIRCUITS[kind])
    assert min(inside) > 0.1
    assert max(outside) < 1e-5


@pytest.mark.parametrize("kind", CIRCUITS)
def test_the_circuit_is_faithful_and_a_random_one_is_not(written_task, kind):
    task = written_task(kind)
    found = task.circuit(CIRCUITS[kind], n_random=30)
    assert found.faithfulness[0] == pytest.approx(1, abs=1e-5)
    assert found.left[0] == pytest.approx(0, abs=1e-5)
    # of three edges, some are right by chance
    assert float(found.random_faithfulness.mean()) < 0.4
    # without any one of its edges it does not do the task, or twice as well without the negative head
    adds = found.to_dataframe().set_index("component")["adds"]
    assert all(abs(value) > 0.4 for value in adds)
    assert float(found.empty.mean()) == pytest.approx(-float(found.full.mean()), abs=1e-5)


def test_a_negative_head_raises_the_metric_when_it_is_replaced(written_task):
    found = written_task("negative").edges(exact=None)
    nodes = dict(zip(found.senders, found.nodes.tolist(), strict=True))
    assert nodes["L0H0"] == pytest.approx(-2, abs=1e-5)
    assert nodes["L0H1"] == pytest.approx(1, abs=1e-5)
    assert set(found.top(2)) == {"embed->L0H0.v", "L0H0->logits"}
    assert set(found.top(4, absolute=True)) == set(CIRCUITS["negative"])
    assert set(found.top(found.n_edges)[-2:]) == {"embed->L0H1.v", "L0H1->logits"}
    # of 0.5 and -0.5, L0H0 alone makes 1.5: the corrupted prompt's negative head is on its side
    assert written_task("negative").keep(["L0H0"]).faithfulness[0] == pytest.approx(2)


@pytest.mark.parametrize("kind", CIRCUITS)
def test_pruning_leaves_the_circuit(written_task, kind):
    task = written_task(kind)
    assert set(task.prune(0.05)) == set(CIRCUITS[kind])
    # nor does it add what it is not given
    some = [*CIRCUITS[kind][1:], "embed->L1H1.q"]
    assert set(task.prune(0.05, edges=some)) <= set(some)
    with pytest.raises(ValueError, match="threshold must be above 0, got 0"):
        task.prune(0)


def test_what_no_kept_component_reads_is_removed_without_a_run(written_task, monkeypatch):
    """Heads that share a key are all looked at before it is removed."""
    assert [Graph(1, 4, 2, True, True).readers_of(r) for r in (0, 4, 7, 8, 9)] == [
        [1],
        [1, 2],
        [3, 4],
        [5],
        [],
    ]
    runs = []
    values = TaskRuns.values
    monkeypatch.setattr(TaskRuns, "values", lambda self, sets, **given: runs.append(1) or values(self, sets))
    left = written_task("mlp").prune(0.05, edges=["embed->L0H0.v", "embed->L0H1.q", "embed->L0H1.v"])
    assert left == ()
    assert len(runs) == 1


def test_completeness_shows_a_backup(written_task):
    """A head that does the task only if another is gone: the circuit without it is faithful, not complete."""
    task = written_task("backup")
    half, whole = (task.circuit(heads, by="zero", n_random=4) for heads in (["L0H0"], ["L0H0", "L1H0"]))
    assert half.faithfulness[0] == whole.faithfulness[0] == pytest.approx(1, abs=1e-5)
    assert half.left[0] == pytest.approx(1, abs=1e-5)
    assert whole.left[0] == pytest.approx(0, abs=1e-5)
    # nor does either head alone add anything to both
    assert whole.to_dataframe()["adds"].abs().max() < 1e-5


# -- against whole runs ------------------------------------------------------------------------------


@needs_hooked
@pytest.mark.parametrize("kind", KINDS)
def test_runs_with_replaced_edges_are_those_of_a_literal_run(kind, load_once, tiny_directories, two_prompts):
    """Each edge alone, and random sets of few and of many, one by one and together; on both engines."""
    clean, other = two_prompts
    model = load_once(tiny_directories / kind, backend="hooked")
    graph, there = Graph.of(model), written(model, other)
    draw = torch.Generator().manual_seed(0)
    single = [torch.zeros_like(graph.possible) for _ in range(int(graph.possible.sum()))]
    for mask, (u, r) in zip(single, graph.possible.nonzero().tolist(), strict=True):
        mask[u, r] = True
    shares = (0.05, 0.3, 0.7, 0.95, 1.0)
    several = [(torch.rand(graph.possible.shape, generator=draw) < s) & graph.possible for s in shares]
    sets = torch.stack([*single, *several])
    expected = torch.stack(
        [
            logits_with_replaced_edges(
                model, clean, there, [tuple(edge.split("->")) for edge in graph.edge_names(mask)]
            )[:, -1]
            for mask in sets
        ]
    )
    for backend in BACKENDS:
        model = load_once(tiny_directories / kind, backend=backend)
        check_edges(model, clean)
        runs = EdgeRuns.of(model, clean, Written.of(model, other))
        together = runs.final(sets)
        alone = torch.cat([runs.final(mask[None]) for mask in sets])
        for final in (together, alone):
            assert_close(logits(model, final), expected)


def logits(model, final):
    with torch.no_grad():
        normed = model.ln_final(final)
        return normed @ model.W_U + model.b_U


@needs_hooked
@pytest.mark.parametrize("kind", KINDS)
def test_estimates_are_changes_times_gradients_by_hand(kind, load_once, tiny_directories):
    rows = [{"clean": "abcd", "corrupted": "dcba", "answer": "e", "wrong": "f"}] * 2
    rows[1] = rows[1] | {"clean": "bbca", "corrupted": "dcda"}
    model = load_once(tiny_directories / kind, backend="hooked")
    (group,) = Task.from_file(rows, model).groups
    prompt = Task.from_file(rows, model).encoded[0]
    right, wrong = prompt.answers[0], prompt.wrong[0]
    by = edge_gradients(model, group.tokens, lambda logits: logits[:, -1, right] - logits[:, -1, wrong])
    own, there = (written(model, tokens) for tokens in (group.tokens, group.corrupted))
    for backend in BACKENDS:
        found = Task.from_file(rows, load_once(tiny_directories / kind, backend=backend)).edges()
        largest = float(found.effect.abs().nan_to_num(0).max())
        for u, sender in enumerate(found.senders):
            readers = (~found.effect[u].isnan()).nonzero()[:, 0].tolist()
            read = [by[found.receivers[at]] for at in readers]
            hand = ((there[sender] - own[sender]) * torch.stack(read).sum(0)).sum(2).mean(0).detach()
            expected = [float(hand[-1]), float(hand[:-1].sum())]
            assert found.node_roles[u].tolist() == pytest.approx(expected, abs=1e-5 * max(1, largest))
        assert found.roles == ("END", "elsewhere")
        assert_close(found.node_roles.sum(1), found.nodes)
        for (u, sender), (r, receiver) in itertools.product(
            enumerate(found.senders), enumerate(found.receivers)
        ):
            if found.effect[u, r] == found.effect[u, r]:
                hand = ((there[sender] - own[sender]) * by[receiver]).sum((1, 2)).mean().detach()
                assert float(found.effect[u, r]) == pytest.approx(float(hand), abs=1e-5 * max(1, largest))


def test_a_position_with_two_roles_is_not_taken_from_elsewhere(bundled):
    row = {"clean": "He is", "corrupted": "They is", "answer": " a", "wrong": " the"}
    plain, named = (Task.from_file([row | more], bundled).edges() for more in ({}, {"role_V": "is"}))
    assert named.roles == ("V", "END", "elsewhere")
    assert_close(named.node_roles[:, 0], named.node_roles[:, 1])
    assert_close(named.node_roles[:, 1:], plain.node_roles)


@pytest.mark.parametrize("kind", KINDS)
def test_integrated_gradients_of_the_embedding_sum_to_the_difference(kind, load_once, tiny_directories):
    rows = [{"clean": "abcd", "corrupted": "dcba", "answer": "e", "wrong": "f"}]
    task = Task.from_file(rows, load_once(tiny_directories / kind))
    off = []
    for steps in (1, 4, 32):
        found = task.edges(steps=steps)
        off.append(abs(float(found.nodes[0] - (found.empty - found.full).mean())))
    size = abs(float((found.empty - found.full).mean()))
    # the midpoint rule's error falls with the square of the steps
    assert off[2] < 0.02 * size
    assert off[2] < off[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [*KINDS, "gemma2"])
def test_sets_of_components_are_whole_runs_with_hooks(kind, backend, load_once, tiny_directories):
    rows = [
        {"clean": "abcd", "corrupted": "dcba", "answer": "e", "wrong": "f"},
        {"clean": "abd", "corrupted": "dca", "answer": ["e", "g"], "wrong": "f"},
    ]
    model = load_once(tiny_directories / kind, backend=backend)
    task = Task.from_file(rows, model)
    chosen = ["L0H1", "L1.mlp", "L1H0"]
    every = [*Graph.of(model).senders[1:]]
    for kept, out in ((False, chosen), (True, [name for name in every if name not in chosen])):
        for by in ("resample", "zero"):
            found = (task.keep if kept else task.knock_out)(chosen, by=by)
            for at, prompt in enumerate(task.encoded):
                with torch.no_grad():
                    cache = model.run_with_cache(prompt.corrupted)[1]

                def replaced(value, hook, name, cache=cache, by=by):
                    there = torch.zeros_like(value) if by == "zero" else cache[hook.name]
                    head = name.partition("H")[2]
                    if not head:
                        return there.clone()
                    value = value.clone()
                    value[:, :, int(head)] = there[:, :, int(head)]
                    return value

                hooks = [
                    (
                        f"blocks.{name[1]}.{'hook_mlp_out' if name.endswith('mlp') else 'attn.hook_z'}",
                        lambda value, hook, name=name: replaced(value, hook, name),
                    )
                    for name in out
                ]
                with torch.no_grad():
                    row = model.run_with_hooks(prompt.clean, fwd_hooks=hooks)[0, -1].double()
                right, wrong = (row[list(ids)].logsumexp(0) for ids in (prompt.answers, prompt.wrong))
                assert float(found.values[at]) == pytest.approx(float(right - wrong), abs=1e-5)


def test_means_are_over_the_same_place_in_all_corrupted_prompts(bundled):
    """The place is the role before it and the distance to that role, in prompts of other lengths, too."""
    rows = [
        {"clean": "The sea is", "corrupted": "The man is", "answer": " a", "wrong": " the", "role_N": "sea"},
        {"clean": "A man of", "corrupted": "A sea of", "answer": " a", "wrong": " the", "role_N": "man"},
    ]
    rows.append(rows[0] | {"clean": "The old sea is", "corrupted": "The old man is"})
    task = Task.from_file(rows, bundled)
    caches = [bundled.run_with_cache(prompt.corrupted)[1] for prompt in task.encoded]
    at = [prompt.roles["N"] for prompt in task.encoded]
    name = "blocks.1.hook_mlp_out"
    with torch.no_grad():
        mean = torch.stack([cache[name][0, n] for cache, n in zip(caches, at, strict=True)]).mean(0)
    there = {
        group.index: replaced for group, replaced in zip(task.groups, replacements(task, "mean"), strict=True)
    }
    for index, written_there in there.items():
        for row, prompt in enumerate(index):
            assert_close(written_there.mlp_out[1][row, at[prompt]], mean)


# -- results -----------------------------------------------------------------------------------------


def test_the_probability_difference_is_that_of_whole_runs(bundled):
    task = load_task("agreement", bundled, n=4)
    found = task.keep(["L0", "L1", "L2", "L3"], metric="probability_diff")
    performance = task.performance()
    expected = performance.answer_log_prob.exp() - performance.wrong_log_prob.exp()
    assert_close(found.full, expected)
    assert_close(found.values, expected)


def test_a_curve_ends_at_the_whole_model_and_its_areas_are_trapezoids(bundled):
    task = load_task("agreement", bundled, n=4)
    effects = task.edges()
    found = task.curve(effects, shares=(0.01, 0.1, 1), n_random=2)
    assert found.sizes == (9, 90, 903)
    assert_close(found.values[-1], found.full)
    assert_close(found.random[:, -1], found.full.expand(2, -1))
    assert_close(found.values[1], task.keep(list(effects.top(90))).values)
    x, y = found.at, found.faithfulness.tolist()
    area = sum((x[i + 1] - x[i]) * (y[i] + y[i + 1]) / 2 for i in range(2))
    off = sum((x[i + 1] - x[i]) * (abs(1 - y[i]) + abs(1 - y[i + 1])) / 2 for i in range(2))
    assert found.cpr == pytest.approx(area, rel=1e-5)
    assert found.cmd == pytest.approx(off, rel=1e-5)
    nodes = task.curve(effects, shares=(0.1, 1), of_edges=False, n_random=0)
    assert nodes.sizes == (2, 28)
    assert_close(nodes.values[0], task.keep(list(effects.top_nodes(2))).values)


def test_a_curve_by_exact_effects_is_there_if_all_are_known(written_task):
    task = written_task("negative")
    effects = task.edges(exact=None)
    for absolute in (False, True):
        found = task.curve(effects, shares=(0.05, 0.1, 1), absolute=absolute, n_random=1)
        order = sorted(
            zip(effects.exact_edges, effects.exact.tolist(), strict=True),
            key=lambda each: -abs(each[1]) if absolute else each[1],
        )
        for size, values in zip(found.sizes, found.exact, strict=True):
            assert_close(values, task.keep([edge for edge, _ in order[:size]]).values)
        assert found.random.shape[0] == 1
    assert len(task.curve(effects, shares=(1,), of_edges=False).exact) == 0
    assert len(task.curve(task.edges(exact=5), shares=(1,)).exact) == 0


def test_random_sets_have_the_size_and_the_layers_of_the_circuit(bundled):
    graph = Graph.of(bundled)
    draw = torch.Generator().manual_seed(0)
    heads = ChosenSet.of(graph, ["L0H1", "L0H2", "L2.mlp"])
    drawn = [heads.random(draw).names for _ in range(20)]
    assert all(sorted(name[:2] for name in names) == ["L0", "L0", "L2"] for names in drawn)
    assert len(set(drawn)) > 5
    edges = ChosenSet.of(graph, ["embed->L1H1.q", "L0H1->L2.mlp", "L1H0->logits", "L2H0->logits"])
    for _ in range(20):
        names = edges.random(draw).names
        assert sorted(name.split("->")[1][:2] for name in names) == ["L1", "L2", "lo", "lo"]


@pytest.mark.parametrize(
    ("components", "message"),
    [
        (["L9H0"], "head L9H0 is out of range: the model has layers 0 to 3 with heads 0 to 5"),
        (["L4.mlp"], "L4.mlp is out of range: there are layers 0 to 3"),
        (
            ["L2H1->L1H0.q"],
            "L2H1->L1H0.q is not an edge of this model: L1H0.q does not read what L2H1 writes",
        ),
        (["L1H1->L1H0.q"], "is not an edge of this model"),
        (["L0H1->logit"], "an edge's receiver must be an input of a head"),
        (["head 3"], "each component must be a head as L9H6, an MLP as L5.mlp"),
        (["L0H1", "L0H1->logits"], "components must be all edges or all heads, MLPs and layers"),
        (3, "components must be a list"),
    ],
)
@pytest.mark.parametrize("kept", [True, False])
def test_what_is_no_component_is_refused_before_anything_runs(
    bundled, components, message, kept, monkeypatch
):
    task = load_task("agreement", bundled, n=2)
    monkeypatch.setattr("mechlens.models.run.forward.run", None)
    with pytest.raises((ValueError, TypeError), match=message.replace("(", r"\(")):
        (task.keep if kept else task.knock_out)(components)


def test_what_is_no_argument_is_refused(bundled):
    task = load_task("agreement", bundled, n=2)
    with pytest.raises(ValueError, match=r"unknown by 'median'.*choose from resample, mean, zero"):
        task.keep(["L0"], by="median")
    with pytest.raises(ValueError, match="metric must be one of logit_diff, probability_diff, got 'loss'"):
        task.edges(metric="loss")
    with pytest.raises(ValueError, match="each share must be between 0 and 1, got 2"):
        task.curve(task.edges(), shares=[2])
    with pytest.raises(ValueError, match="a single prompt has no halves"):
        load_task("agreement", bundled, n=1).halves()


def test_a_model_whose_heads_do_not_add_up_has_no_edges(load_once, tiny_directories):
    rows = [{"clean": "abcd", "corrupted": "dcba", "answer": "e", "wrong": "f"}]
    task = Task.from_file(rows, load_once(tiny_directories / "gemma2"))
    with pytest.raises(ValueError, match="has a norm between its attention and the stream"):
        task.edges()
    assert task.keep(["L0", "L1"]).faithfulness[0] == pytest.approx(1)


def test_a_hook_of_the_users_stays_and_no_edges_are_replaced_beside_it(load_once, tiny_directories):
    model = mechlens.load_model(str(tiny_directories / "gpt2"))
    rows = [{"clean": "abcd", "corrupted": "dcba", "answer": "e", "wrong": "f"}]
    task = Task.from_file(rows, model)
    calls = []
    model.hook_dict["blocks.0.hook_resid_post"].add_hook(lambda value, hook: calls.append(hook.name))
    with pytest.raises(ValueError, match=r"your hook at blocks\.0\."):
        task.edges()
    before = len(calls)
    task.knock_out(["L0H1"])
    assert len(calls) > before


def test_what_a_hook_of_the_users_changes_stays_changed(tiny_directories):
    model = mechlens.load_model(str(tiny_directories / "gpt2"))
    rows = [{"clean": "abcd", "corrupted": "dcba", "answer": "e", "wrong": "f"}]
    task = Task.from_file(rows, model)
    plain = task.knock_out(["L0H1"])
    for layer in range(2):
        model.hook_dict[f"blocks.{layer}.hook_resid_pre"].add_hook(lambda value, hook: value * 1.5)
    found = Task.from_file(rows, model).knock_out(["L0H1"])
    (prompt,) = task.encoded
    with torch.no_grad():
        row = model(prompt.clean)[0, -1]
    right, wrong = prompt.answers[0], prompt.wrong[0]
    assert float(found.full[0]) == pytest.approx(float(row[right] - row[wrong]), abs=1e-5)
    assert abs(float(found.values[0] - plain.values[0])) > 1e-3
