"""`mechlens features`: its output, files and errors."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shlex

import pandas as pd
import pytest

from mechlens.analyses.features import (
    Continue,
    Features,
    Match,
    Maximize,
    Optimizer,
    Prefix,
    Prior,
    feature_alignment,
    feature_examples,
    search_exhaustive,
    search_gradient,
    search_greedy,
)
from mechlens.models.load.loading import load_model
from mechlens.models.run.sampling import sample_tokens
from mechlens.models.weights.randomize import random_like
from mechlens.results import ExhaustiveSearch, FeatureAlignment, FeatureExamples, GradientSearch, GreedySearch
from mechlens.results.checkpoint import Checkpoint
from tests.cli.commands import refused, run
from tests.close import assert_same

COMMANDS = ("exhaustive", "greedy", "gradient", "alignment", "examples")
TEXT = "the cat sat on the mat and the dog sat on the cat " * 4


@pytest.fixture(scope="module")
def directory(tiny_directories):
    return tiny_directories / "gpt2"


@pytest.fixture(scope="module")
def model(directory):
    """Two layers, 32 features, 64 single-letter tokens, a context of 32."""
    return load_model(directory, processing=False)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_the_common_options(capsys, command):
    code, out, _ = run(capsys, "features", command, "--help")
    assert code == 0
    assert f"Example: mechlens features {command}" in out
    for option in ("--json", "--quiet", "--device", "--dtype", "--revision", "--out", "--model"):
        assert option in out, f"{command} has no {option}"


def test_the_group_lists_its_commands(capsys):
    code, out, _ = run(capsys, "features", "--help")
    assert code == 0
    for command in COMMANDS:
        assert re.search(rf"^\W*{command} +[A-Z]", out, re.MULTILINE)


BEFORE_LOADING = [
    (["bogus"], "No such command 'bogus'"),
    (["exhaustive", "--layer", "first"], "--layer must be a number, or a nonempty range"),
    (
        ["exhaustive", "--resume", "x.safetensors", "--out", "./x.safetensors"],
        "--out and --resume must be different files",
    ),
    (["exhaustive", "--site", "resid_pre"], "--site must be one of resid_post, attn_out, mlp_out"),
    (["exhaustive", "--out", "x.png"], "--out must be a .html, .csv or .safetensors file"),
    (["exhaustive", "-f", "0:65", "--out", "x.html"], "a page shows at most 64 features, got 65"),
    (["exhaustive", "--resume", "x.json"], "resume must be a .safetensors file"),
    (["greedy", "-l", "0:2", "--out", "x.safetensors"], "holds one result, but there are several: give one"),
    (["greedy", "-l", "0:2", "--resume", "x.safetensors"], "--resume saves the progress of one search"),
    (["gradient", "--objective", "l2"], "--objective must be one of constant, mean, min, l1, cosine"),
    (["gradient", "--objective", "l1"], "--objective l1 needs --target"),
    (["gradient", "--target", "a"], "--target has no effect with --objective constant"),
    *(
        (
            ["gradient", "--objective", "continuation", "--target", "a", *unused],
            f"{unused[0]} has no effect with --objective continuation: leave it out",
        )
        for unused in (["--feature", "3"], ["--position", "0"], ["--layer", "0"], ["--isolated"])
    ),
    (["gradient", "--objective", "mean", "--constant", "5"], "--constant must be None with how='mean'"),
    (["gradient", "--constant", "inf"], "--constant must be a finite number, got inf"),
    (["gradient", "--prior", "l2"], "--prior must be one of softmax, norm, nearest, got 'l2'"),
    (["gradient", "--prior-weight", "2"], "--prior-weight has no effect without --prior"),
    (["gradient", "--prior", "norm", "--prior-weight", "-1"], "--prior-weight must be at least 0, got -1.0"),
    (["gradient", "--optimizer", "LBFGS"], "--optimizer must be one of Adadelta"),
    (["gradient", "--learning-rate", "nan"], "--learning-rate must be a finite number, got nan"),
    (["gradient", "--learning-rate", "1e38"], "--learning-rate must be above 0 and at most 1e+06, got 1e+38"),
    (["gradient", "--restarts", "0"], "Invalid value for '--restarts'"),
    (["alignment", "--out", "x.safetensors"], "there are several: add --no-random and leave out --against"),
    (["alignment", "--no-random", "--layer", "3"], "one layer cannot be compared with itself"),
    (["examples", "nowhere.txt"], "corpus nowhere.txt does not exist"),
    (["examples", "/", "-f", "0:65", "--out", "x.html"], "at most 64 features, got 65"),
]
AFTER_LOADING = [
    (["exhaustive", "--layer", "2"], "layer 2 is out of range"),
    (["exhaustive", "--feature", "0:40"], "feature 32 is out of range"),
    (["exhaustive", "--top", "65"], "--top must be at most 64, the size of the vocabulary, got 65"),
    (["exhaustive", "--prefix", "a" * 32], "context"),
    (["greedy", "--beam", "65"], "--beam must be at most 64"),
    (["greedy", "--aggregate", "mean"], "--aggregate must be one of last, sum, got 'mean'"),
    (["greedy", "--tokens", "33"], "context of 32: search fewer"),
    (["gradient", "--layer", "2"], "layer 2 is out of range"),
    (["gradient", "--tokens", "2", "--position", "2"], "--position must be an index of [2 positions, 1 "),
    (["gradient", "--objective", "l1", "--target", "ab"], "as many tokens as are searched, 1, got 2"),
    (["alignment", "--layer", "0:3"], "layer 2 is out of range"),
    (["alignment", "--against", "./elsewhere"], "elsewhere"),
]


@pytest.mark.parametrize(("arguments", "message"), BEFORE_LOADING)
def test_a_wrong_argument_is_refused_before_the_model_is_loaded(
    capsys, arguments, message, monkeypatch, tmp_path
):
    # loading this missing model would fail first
    refused(capsys, ["features", *arguments, "--model", "./nowhere"], message, monkeypatch, tmp_path)


@pytest.mark.parametrize(("arguments", "message"), AFTER_LOADING)
def test_features_that_the_model_lacks_are_refused(
    capsys, arguments, message, monkeypatch, tmp_path, directory
):
    refused(capsys, ["features", *arguments, "--model", directory], message, monkeypatch, tmp_path)


def test_a_model_without_bos_or_mlps_or_tokenizer_is_refused(
    capsys, monkeypatch, tmp_path_factory, tmp_path, tiny_directories
):
    from tests.tiny_models import write_toy

    bos = ["features", "exhaustive", "--bos", "--model", tiny_directories / "qwen2"]
    refused(
        capsys,
        bos,
        "--bos must be False for this model, got True: it has no BOS token",
        monkeypatch,
        tmp_path,
    )
    toy = tmp_path_factory.mktemp("toy")
    write_toy(toy)
    message = "this model has no MLPs, so it has no post to search"
    given = ["features", "exhaustive", "--site", "post", "--model", toy]
    refused(capsys, given, message, monkeypatch, tmp_path)
    text = ["exhaustive", "--prefix", "a", "--model", toy]
    refused(capsys, ["features", *text], "this model has no tokenizer: pass token ids", monkeypatch, tmp_path)


def saved(capsys, tmp_path, directory, *arguments):
    path = tmp_path / "x.safetensors"
    code, out, err = run(capsys, "features", *arguments, "--model", directory, "--out", path, "--quiet")
    assert (code, out, err) == (0, "", "")
    return path


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], {"features": Features(indices=range(8))}),
        (
            ["--layer", 1, "--feature", "2:4", "--feature", -1, "--top", 3],
            {"features": Features([1], [2, 3, 31]), "top_k": 3},
        ),
        (
            ["--site", "post", "-l", "-2:", "--bos"],
            {"features": Features(indices=range(8), site="post"), "prefix": Prefix(prepend_bos=True)},
        ),
        (["--prefix", "ab", "-f", 3], {"features": Features(indices=[3]), "prefix": "ab"}),
        (["--prefix", "", "-f", 3], {"features": Features(indices=[3])}),
    ],
)
def test_every_option_of_exhaustive_reaches_the_analysis(
    capsys, tmp_path, directory, model, arguments, options
):
    path = saved(capsys, tmp_path, directory, "exhaustive", *arguments)
    assert_same(ExhaustiveSearch.load(path), search_exhaustive(model, **options))


def test_every_option_of_greedy_reaches_the_analysis(capsys, tmp_path, directory, model):
    path = saved(capsys, tmp_path, directory, "greedy", "--tokens", 1)
    assert_same(GreedySearch.load(path), search_greedy(model, Features(1, range(4)), n_tokens=1))
    path = saved(capsys, tmp_path, directory, "greedy", "--feature", 9)
    assert_same(GreedySearch.load(path), search_greedy(model, Features(1, [9]), n_tokens=4))
    arguments = ["-l", 0, "-f", 5, "--tokens", 2, "--aggregate", "sum", "--beam", 2, "--site", "mlp_out"]
    path = saved(capsys, tmp_path, directory, "greedy", *arguments, "--prefix", "a", "--bos")
    assert_same(
        GreedySearch.load(path),
        search_greedy(
            model,
            Features(0, [5], site="mlp_out"),
            n_tokens=2,
            aggregate="sum",
            beam=2,
            prefix=Prefix("a", prepend_bos=True),
        ),
    )


FEW = ["--restarts", 4, "--steps", 3]


@pytest.mark.parametrize(
    ("arguments", "objective", "options"),
    [
        (
            ["-l", 0, "--tokens", 2, "-f", "3:5", "--position", -1, "--prior", "norm", "--prior-weight", 0.5],
            Maximize(Features(0, [3, 4]), at=-1),
            {"n_tokens": 2, "prior": Prior("norm", 0.5)},
        ),
        (
            # steps too large to improve anything
            ["--tokens", 2, "--constant", 0.5, "--patience", 1, "--learning-rate", 100],
            Maximize(Features(1, 0), constant=0.5),
            {"n_tokens": 2, "optimizer": Optimizer(patience=1, learning_rate=100, steps=3, restarts=4)},
        ),
        (
            ["--objective", "mean", "--optimizer", "SGD", "--learning-rate", 0.5, "--seed", 3, "--isolated"],
            Maximize(Features(1, 0), how="mean", isolated=True),
            {"optimizer": Optimizer("SGD", learning_rate=0.5, steps=3, restarts=4), "seed": 3},
        ),
        (
            ["--objective", "cosine", "--target", "ab", "--tokens", 2, "--prefix", "c", "--bos"],
            Match(Features(1), "ab", "cosine"),
            {"n_tokens": 2, "prefix": Prefix("c", prepend_bos=True)},
        ),
        (["-l", 0, "-f", "3:6", "--objective", "min"], Maximize(Features(0, [3, 4, 5]), how="min"), {}),
        (
            ["--objective", "continuation", "--target", "ab", "--prior", "nearest"],
            Continue("ab"),
            {"prior": Prior("nearest")},
        ),
    ],
)
def test_every_option_of_gradient_reaches_the_analysis(
    capsys, tmp_path, directory, model, arguments, objective, options
):
    path = saved(capsys, tmp_path, directory, "gradient", *arguments, *FEW)
    options = {"n_tokens": 1, "optimizer": Optimizer(steps=3, restarts=4)} | options
    assert_same(GradientSearch.load(path), search_gradient(model, objective, **options))


def test_one_token_and_one_feature_are_compared_with_the_optimum(capsys, tmp_path, directory, model):
    features, prefix = Features(0, 7, site="mlp_out"), Prefix("a", prepend_bos=True)
    best = search_exhaustive(model, features, prefix=prefix)
    arguments = ["-l", 0, "-f", 7, "--site", "mlp_out", "--prefix", "a", "--bos"]
    found = GradientSearch.load(saved(capsys, tmp_path, directory, "gradient", *arguments, *FEW))
    assert found.optimum == float(best.activations[0, 0, 0])


def test_alignment_compares_layers_and_random_weights(capsys, directory, model):
    code, out, _ = run(
        capsys,
        "features",
        "alignment",
        "--model",
        directory,
        "--top",
        3,
        "--seed",
        2,
        "--feature",
        "0:16",
        "--json",
    )
    assert code == 0
    found = json.loads(out)

    def search(one):
        return search_exhaustive(one, Features(indices=range(16)), top_k=3)

    trained, drawn = search(model), search(random_like(model, 2))
    blocks = search(random_like(model, 2, keep_embeddings=True))
    expected = {
        "layers, trained": feature_alignment(trained),
        "layers, random weights": feature_alignment(drawn),
        "layers, random blocks": feature_alignment(blocks),
        "trained vs. random weights": feature_alignment(trained, drawn),
        "trained vs. random blocks": feature_alignment(trained, blocks),
    }
    assert [each["compared"] for each in found] == list(expected)
    for each, result in zip(found, expected.values(), strict=True):
        for what in ("same", "overlap"):
            share = result.share(what)
            assert each["shares"][what] == dataclasses.asdict(share) | {"verdict": share.verdict}


def test_alignment_with_another_model_compares_layer_with_layer(capsys, tmp_path, directory, model):
    from tests.tiny_models import write_tiny_model

    other = tmp_path / "deeper"
    write_tiny_model(other, "gpt2", seed=1, n_layer=3)
    arguments = ["features", "alignment", "--model", directory, "--against", other, "--no-random"]
    _, out, _ = run(capsys, *arguments, "--json")
    found = json.loads(out)
    assert [each["compared"] for each in found] == ["layers", "gpt2 vs. deeper"]
    options = {"top_k": 5}
    expected = feature_alignment(
        search_exhaustive(model, **options), search_exhaustive(load_model(other, processing=False), **options)
    )
    assert_same(found[1]["shares"]["same"]["value"], expected.share().value)
    path = tmp_path / "x.csv"
    code, _, _ = run(capsys, *arguments, "--out", path, "--quiet")
    assert code == 0
    table = pd.read_csv(path)
    assert table["compared"].value_counts().to_dict() == {"gpt2 vs. deeper": 6, "layers": 1}


def test_an_incomparable_model_is_refused(
    capsys, monkeypatch, tmp_path, tmp_path_factory, directory, tiny_directories
):
    from tests.tiny_models import write_tiny_model

    small = tmp_path_factory.mktemp("models") / "small"
    write_tiny_model(small, "gpt2", n_layer=1, n_inner=16)
    capsys.readouterr()
    for against, arguments, message in (
        (tiny_directories / "llama", [], "--against has another tokenizer"),
        (small, ["--layer", "1"], "layer of --against 1 is out of range"),
        (small, ["--feature", "17", "--site", "post"], "feature of --against 17 is out of range"),
    ):
        given = ["alignment", "--model", directory, "--against", against, *arguments]
        refused(capsys, ["features", *given], message, monkeypatch, tmp_path)


def test_alignment_can_be_saved(capsys, tmp_path, directory, model):
    path = saved(capsys, tmp_path, directory, "alignment", "--no-random", "--top", 2, "--site", "mlp_out")
    expected = feature_alignment(search_exhaustive(model, Features(site="mlp_out"), top_k=2))
    assert_same(FeatureAlignment.load(path), expected)


def test_alignment_of_one_layer_is_only_with_random_weights(capsys, directory):
    code, out, _ = run(capsys, "features", "alignment", "--model", directory, "--layer", 1, "--json")
    assert code == 0
    names = [each["compared"] for each in json.loads(out)]
    assert names == ["trained vs. random weights", "trained vs. random blocks"]


def test_every_option_of_examples_reaches_the_analysis(capsys, tmp_path, directory, model, corpus):
    path = saved(capsys, tmp_path, directory, "examples", corpus)
    expected = feature_examples(model, Features(1, range(4)), corpus)
    assert_same(FeatureExamples.load(path), expected)
    other = tmp_path / "other.txt"
    other.write_text(TEXT[::-1])
    path = saved(capsys, tmp_path, directory, "examples", corpus, other)
    expected = feature_examples(model, Features(1, range(4)), [corpus, other])
    assert_same(FeatureExamples.load(path), expected)
    arguments = ["-l", 0, "-f", 3, "--top", 2, "--length", 8, "--limit", 5, "--no-bos", "--site", "post"]
    path = saved(capsys, tmp_path, directory, "examples", corpus, *arguments)
    expected = feature_examples(
        model, Features(0, [3], site="post"), corpus, top_k=2, length=8, limit=5, prepend_bos=False
    )
    assert_same(FeatureExamples.load(path), expected)


def test_examples_without_files_use_text_from_the_model(capsys, tmp_path, directory, model):
    options = ["--length", 8, "--limit", 5, "--seed", 3]
    path = saved(capsys, tmp_path, directory, "examples", *options)
    written = sample_tokens(model, batch=5, seq_len=8, seed=3)
    expected = feature_examples(model, Features(1, range(4)), written)
    assert_same(FeatureExamples.load(path), expected)


def test_an_invalid_corpus_is_refused(capsys, tmp_path, directory, corpus):
    for arguments, message in (
        ([directory / "config.json"], "a corpus is a .txt"),
        ([corpus, "--length", 33], "do not fit into the model's context of 32"),
        ([corpus, "--length", 1], "have no room for text after BOS"),
    ):
        code, _, err = run(capsys, "features", "examples", *arguments, "--model", directory)
        assert code == 2
        assert message in err
        assert len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize("arguments", [["exhaustive"], ["greedy", "--tokens", 1], ["examples", "CORPUS"]])
def test_a_search_resumes_or_says_why_not(capsys, tmp_path, directory, corpus, arguments):
    file = tmp_path / "progress.safetensors"
    arguments = [corpus if each == "CORPUS" else each for each in arguments]
    arguments += ["--model", directory, "--resume", file]
    first = run(capsys, "features", *arguments)
    assert first[0] == 0
    assert file.is_file()
    assert run(capsys, "features", *arguments) == first
    code, _, err = run(capsys, "features", *arguments, "--feature", 9)
    assert code == 2
    assert "was begun with" in err or "features" in err
    assert len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize(
    "command",
    [
        ["exhaustive"],
        ["greedy", "--tokens", "3"],
        ["gradient", "--tokens", "2", "--restarts", "4", "--steps", "9"],
        ["examples", "CORPUS", "--length", "2"],
    ],
)
def test_ctrl_c_says_that_the_same_command_resumes(capsys, monkeypatch, tmp_path, directory, corpus, command):
    file, never = tmp_path / "progress.safetensors", tmp_path / "whole.safetensors"
    arguments = ["features", *[corpus if each == "CORPUS" else each for each in command], "-f", 3, "--json"]
    arguments += ["--model", directory, "--resume"]
    whole = run(capsys, *arguments, never)
    save = Checkpoint.save

    def interrupted(self):
        save(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "save", interrupted)
        code, out, err = run(capsys, *arguments, file)
    assert (code, out) == (130, "")
    assert err.strip() == f"mechlens: progress is saved in {file}: run the same command to resume"
    code, out, err = run(capsys, *arguments, file)
    assert (code, err) == (0, whole[2])
    assert_same(json.loads(out), json.loads(whole[1]))
    # with nothing saved, and without --resume
    never.unlink()

    def at_once(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", at_once)
    code, _, err = run(capsys, *arguments, never)
    assert (code, err.strip()) == (130, f"mechlens: interrupted before any progress was saved in {never}")


def test_several_layers_are_searched_greedily_one_by_one(capsys, tmp_path, directory, model):
    path = tmp_path / "x.csv"
    arguments = ["-l", "0:2", "-f", 3, "--tokens", 2, "--model", directory]
    _, out, _ = run(capsys, "features", "greedy", *arguments, "--json", "--out", path)
    tables = [search_greedy(model, Features(layer, [3]), n_tokens=2).to_dataframe() for layer in (0, 1)]
    expected = pd.concat(tables, ignore_index=True)
    assert_same([row for each in json.loads(out) for row in each["rows"]], expected.to_dict("records"))
    assert pd.read_csv(path, keep_default_na=False)["id"].tolist() == expected["id"].tolist()


@pytest.mark.parametrize(
    "arguments",
    [
        ["exhaustive", "--layer", "0:2", "--feature", "1", "--feature", "4:6", "--bos", "--top", "2"],
        [
            "greedy",
            "--feature",
            "0:2",
            "--tokens",
            "2",
            "--aggregate",
            "sum",
            "--beam",
            "2",
            "--prefix",
            "a b",
        ],
        ["gradient", "--feature", "3", "--restarts", "4", "--steps", "3", "--prior", "norm", "--isolated"],
        ["alignment", "--top", "2", "--no-random", "--model", "MODEL"],
        ["examples", "--feature", "1", "--top", "2", "--length", "9", "--no-bos", "--limit", "4", "CORPUS"],
    ],
)
def test_a_page_has_the_command_that_wrote_it(capsys, tmp_path, directory, corpus, arguments):
    path = tmp_path / "x.html"
    given = [str({"MODEL": directory, "CORPUS": corpus}.get(each, each)) for each in arguments]
    if "MODEL" not in arguments:
        given[1:1] = ["--model", str(directory)]
    given[1:1] = ["--out", str(path)]
    code, out, err = run(capsys, "features", *given, "--quiet")
    assert (code, out, err) == (0, "", "")
    command = html.unescape(re.search(r"mechlens features [^<]*", path.read_text())[0])
    assert sorted(shlex.split(command)[2:]) == sorted(given)
    # positional arguments come last
    if arguments[-1] in ("MODEL", "CORPUS") and arguments[-2] != "--model":
        assert shlex.split(command)[-1] == given[-1]


def test_a_page_shows_all_requested_features(capsys, tmp_path, directory):
    path = tmp_path / "x.html"
    arguments = ["--feature", "0:20", "--model", directory, "--out", path, "--quiet"]
    code, _, _ = run(capsys, "features", "exhaustive", *arguments)
    assert code == 0
    # layer, feature and tokens: the table below the figure
    rows = re.findall(r"<tr><td[^>]*>(\d+)</td><td[^>]*>(\d+)</td>", path.read_text())
    assert rows == [(str(layer), str(feature)) for layer in range(2) for feature in range(20)]


@pytest.mark.parametrize(
    "arguments",
    [["exhaustive"], ["greedy", "--tokens", 1], ["gradient", *FEW, "--tokens", 2], ["examples", "CORPUS"]],
)
def test_json_is_one_object_that_names_the_model(capsys, directory, corpus, arguments):
    arguments = [corpus if each == "CORPUS" else each for each in arguments]
    code, out, err = run(capsys, "features", *arguments, "--model", directory, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["model"]["processing"] is False
    assert found["site"] == "resid_post"
