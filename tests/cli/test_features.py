"""`mechlens features`: what it prints and writes, and how it refuses."""

from __future__ import annotations

import html
import json
import re
import shlex

import numpy as np
import pandas as pd
import pytest

from mechlens.analyses.features import (
    feature_alignment,
    feature_examples,
    search_complete,
    search_gradient,
    search_greedy,
)
from mechlens.models.load.loading import load_model
from mechlens.models.run.sampling import sample_tokens
from mechlens.models.weights.randomize import random_like
from mechlens.results import (
    CompleteSearch,
    FeatureAlignment,
    FeatureExamples,
    GradientSearch,
    GreedySearch,
)
from mechlens.results.checkpoint import Checkpoint
from tests.cli.test_cli import run
from tests.close import assert_same

COMMANDS = ("complete", "greedy", "gradient", "align", "examples")
TEXT = "the cat sat on the mat and the dog sat on the cat " * 4


@pytest.fixture(scope="module")
def directory(tiny_directories):
    return tiny_directories / "gpt2"


@pytest.fixture(scope="module")
def model(directory):
    """Two layers, 32 features, 64 tokens of a letter each, a context of 32."""
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
    for option in ("--json", "--quiet", "--seed", "--device", "--dtype", "--revision", "--out", "--model"):
        assert option in out, f"{command} has no {option}"


def test_the_group_lists_its_commands(capsys):
    code, out, _ = run(capsys, "features", "--help")
    assert code == 0
    for command in COMMANDS:
        assert re.search(rf"^\W*{command} +[A-Z]", out, re.MULTILINE)


BEFORE_LOADING = [
    (["bogus"], "No such command 'bogus'"),
    (["complete", "--layer", "first"], "--layer must be a number, or a nonempty range"),
    (["complete", "--layer", "4:4"], "got '4:4'"),
    (
        ["greedy", "--feature", "1,2"],
        "such as 10:40 or -20:, got '1,2'; repeat the option for several",
    ),
    (
        ["complete", "--resume", "x.safetensors", "--out", "./x.safetensors"],
        "--out and --resume must be different files, got x.safetensors for both",
    ),
    (
        ["complete", "--site", "resid_pre"],
        "--site must be one of resid_post, attn_out, mlp_out",
    ),
    (["complete", "--top", "0"], "Invalid value for '--top'"),
    (["complete", "--out", "x.png"], "--out must be a .html or .csv or .safetensors file"),
    (["complete", "--out", "no/such/x.csv"], "does not exist"),
    (["complete", "-f", "0:65", "--out", "x.html"], "the tokens of at most 64 features, but 65 are"),
    (["complete", "--resume", "x.json"], "resume must be a .safetensors file"),
    (["greedy", "--aggregate", "mean"], "--aggregate must be one of last, sum, got 'mean'"),
    (["greedy", "--tokens", "0"], "Invalid value for '--tokens'"),
    (["greedy", "--beam", "0"], "Invalid value for '--beam'"),
    (["greedy", "-l", "0:2", "--out", "x.safetensors"], "holds one search, but 2 layers are asked for"),
    (
        ["greedy", "-l", "0", "-l", "1", "--resume", "x.safetensors"],
        "--resume is for the search of one layer",
    ),
    (["gradient", "--objective", "l2"], "--objective must be one of constant, maximise, maximin, l1, cosine"),
    (["gradient", "--objective", "l1"], "--objective l1 needs --target TEXT"),
    (
        ["gradient", "--target", "a"],
        "is for --objective l1, cosine or continuation, but it is constant",
    ),
    (
        ["gradient", "--objective", "continuation", "--target", "a", "--feature", "3"],
        "--objective continuation reads no feature: leave out --feature",
    ),
    (
        ["gradient", "--objective", "continuation", "--target", "a", "--position", "0"],
        "leave out --position",
    ),
    (
        ["gradient", "--objective", "continuation", "--target", "a", "--layer", "0"],
        "reads no feature: leave out --layer",
    ),
    (["gradient", "--objective", "continuation", "--target", "a", "--isolated"], "leave out --isolated"),
    (
        ["gradient", "--objective", "maximise", "--constant", "5"],
        "--constant is for --objective constant, but it is maximise",
    ),
    (["gradient", "--constant", "inf"], "--constant must be a finite number, got inf"),
    (["gradient", "--patience", "0"], "Invalid value for '--patience'"),
    (["gradient", "--prior", "l2"], "--prior must be one of none, softmax, norm, nearest, got 'l2'"),
    (["gradient", "--prior-weight", "2"], "--prior-weight is for --prior norm and nearest, but it is none"),
    (
        ["gradient", "--prior", "norm", "--prior-weight", "-1"],
        "--prior-weight must be a finite number",
    ),
    (["gradient", "--optimiser", "LBFGS"], "--optimiser must be one of Adadelta"),
    (["gradient", "--learning-rate", "0"], "--learning-rate must be above 0 and at most 1e+06, but is 0.0"),
    (["gradient", "--learning-rate", "nan"], "--learning-rate must be above 0"),
    (["gradient", "--learning-rate", "1e38"], "--learning-rate must be above 0 and at most 1e+06"),
    (["gradient", "--steps", "0"], "Invalid value for '--steps'"),
    (["gradient", "--restarts", "0"], "Invalid value for '--restarts'"),
    (["gradient", "--tokens", "2", "--position", "2"], "position 2 is out of range"),
    (["gradient", "--layer", "0:2"], "Invalid value for '--layer'"),
    (["align", "--out", "x.safetensors"], "holds one comparison: leave out --against and add --no-random"),
    (["align", "--no-random", "--layer", "3"], "one layer has no other to be compared with"),
    (["examples", "nowhere.txt"], "corpus nowhere.txt does not exist"),
    (["examples", "/", "--length", "0"], "Invalid value for '--length'"),
    (
        ["examples", "/", "-f", "0:65", "--out", "x.html"],
        "at most 64 features, but 65 are asked for",
    ),
]
AFTER_LOADING = [
    (["complete", "--layer", "2"], "layer 2 is out of range"),
    (["complete", "--layer", "1", "--layer", "-1"], "layer 1 is given twice"),
    (["complete", "--feature", "0:40"], "feature 32 is out of range"),
    (["complete", "--top", "65"], "--top must be at most the vocabulary's 64, but is 65"),
    (["complete", "--prefix", "a" * 32], "context"),
    (["greedy", "--layer", "-3"], "layer -3 is out of range"),
    (["greedy", "--beam", "65"], "beam must be at most the vocabulary's 64"),
    (["greedy", "--tokens", "33"], "context of 32: search fewer"),
    (["gradient", "--layer", "2"], "layer 2 is out of range"),
    (["gradient", "--feature", "32"], "feature 32 is out of range"),
    (
        ["gradient", "--objective", "l1", "--target", "ab"],
        "as many tokens as are searched, 1, but has 2",
    ),
    (["align", "--layer", "0:3"], "layer 2 is out of range"),
    (["align", "--feature", "32"], "feature 32 is out of range"),
    (["align", "--against", "./elsewhere"], "elsewhere"),
]


def refused(capsys, arguments, message, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "features", *arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("mechlens: ")
    assert not out
    assert not list(tmp_path.iterdir()), "a refused command leaves nothing behind"


@pytest.mark.parametrize(("arguments", "message"), BEFORE_LOADING)
def test_a_wrong_argument_is_refused_before_the_model_is_loaded(
    capsys, arguments, message, monkeypatch, tmp_path
):
    # a model that is not there would be refused first, if it were asked for
    refused(capsys, [*arguments, "--model", "./nowhere"], message, monkeypatch, tmp_path)


@pytest.mark.parametrize(("arguments", "message"), AFTER_LOADING)
def test_what_the_model_does_not_have_is_refused(
    capsys, arguments, message, monkeypatch, tmp_path, directory
):
    refused(capsys, [*arguments, "--model", directory], message, monkeypatch, tmp_path)


def test_a_model_without_bos_or_mlps_or_tokenizer_is_told(
    capsys, monkeypatch, tmp_path_factory, tmp_path, tiny_directories
):
    from tests.tiny_models import write_toy

    bos = ["complete", "--bos", "--model", tiny_directories / "qwen2"]
    refused(capsys, bos, "this model has no BOS token: leave out --bos", monkeypatch, tmp_path)
    toy = tmp_path_factory.mktemp("toy")
    write_toy(toy)
    message = "this model has no MLPs, so there is no post to search"
    refused(capsys, ["complete", "--site", "post", "--model", toy], message, monkeypatch, tmp_path)
    text = ["complete", "--prefix", "a", "--model", toy]
    refused(capsys, text, "this model has no tokenizer, so it reads no text", monkeypatch, tmp_path)


def test_a_model_given_twice_is_refused(capsys, monkeypatch, tmp_path):
    message = "the model is given twice, as gpt2 and as --model gpt2-medium: leave one out"
    refused(capsys, ["align", "gpt2", "--model", "gpt2-medium"], message, monkeypatch, tmp_path)


def saved(capsys, tmp_path, directory, *arguments):
    path = tmp_path / "x.safetensors"
    code, out, err = run(capsys, "features", *arguments, "--model", directory, "--out", path, "--quiet")
    assert (code, out, err) == (0, "", "")
    return path


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], {"features": range(8)}),
        (
            ["--layer", 1, "--feature", "2:4", "--feature", -1, "--top", 3],
            {"layers": [1], "features": [2, 3, 31], "top_k": 3},
        ),
        (
            ["--site", "post", "-l", "-2:", "--bos"],
            {"site": "post", "features": range(8), "prepend_bos": True},
        ),
        (["--prefix", "ab", "-f", 3], {"features": [3], "prefix": "ab"}),
        (["--prefix", "", "-f", 3], {"features": [3]}),
    ],
)
def test_every_option_of_complete_reaches_the_analysis(
    capsys, tmp_path, directory, model, arguments, options
):
    path = saved(capsys, tmp_path, directory, "complete", *arguments)
    assert_same(CompleteSearch.load(path), search_complete(model, **options))


def test_every_option_of_greedy_reaches_the_analysis(capsys, tmp_path, directory, model):
    path = saved(capsys, tmp_path, directory, "greedy", "--tokens", 1)
    assert_same(GreedySearch.load(path), search_greedy(model, layer=1, features=range(4), n_tokens=1))
    path = saved(capsys, tmp_path, directory, "greedy", "--feature", 9)
    assert_same(GreedySearch.load(path), search_greedy(model, layer=1, features=[9], n_tokens=4))
    arguments = ["-l", 0, "-f", 5, "--tokens", 2, "--aggregate", "sum", "--beam", 2, "--site", "mlp_out"]
    path = saved(capsys, tmp_path, directory, "greedy", *arguments, "--prefix", "a", "--bos")
    assert_same(
        GreedySearch.load(path),
        search_greedy(
            model,
            layer=0,
            features=[5],
            n_tokens=2,
            aggregate="sum",
            beam=2,
            site="mlp_out",
            prefix="a",
            prepend_bos=True,
        ),
    )


FEW = ["--restarts", 4, "--steps", 3]
FEW_OPTIONS = {"restarts": 4, "steps": 3}


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (
            ["-l", 0, "--tokens", 2, "-f", "3:5", "--position", -1, "--prior", "norm", "--prior-weight", 0.5],
            {
                "layer": 0,
                "n_tokens": 2,
                "selection": np.s_[1, [3, 4]],
                "prior": "norm",
                "prior_weight": 0.5,
            },
        ),
        (
            # steps so large that none gets better
            ["--tokens", 2, "--constant", 0.5, "--patience", 1, "--learning-rate", 100],
            {
                "layer": 1,
                "n_tokens": 2,
                "selection": np.s_[:, [0]],
                "constant": 0.5,
                "patience": 1,
                "learning_rate": 100,
            },
        ),
        (
            [
                "--objective",
                "maximise",
                "--optimiser",
                "SGD",
                "--learning-rate",
                0.5,
                "--seed",
                3,
                "--isolated",
            ],
            {
                "layer": 1,
                "n_tokens": 1,
                "selection": np.s_[:, [0]],
                "objective": "maximise",
                "optimiser": "SGD",
                "learning_rate": 0.5,
                "seed": 3,
                "isolated": True,
            },
        ),
        (
            ["--objective", "cosine", "--target", "ab", "--tokens", 2, "--prefix", "c", "--bos"],
            {
                "layer": 1,
                "n_tokens": 2,
                "selection": None,
                "objective": "cosine",
                "target": "ab",
                "prefix": "c",
                "prepend_bos": True,
            },
        ),
        (
            ["-l", 0, "-f", "3:6", "--objective", "maximin"],
            {"layer": 0, "n_tokens": 1, "selection": np.s_[:, 3:6], "objective": "maximin"},
        ),
        (
            ["--objective", "continuation", "--target", "ab", "--prior", "nearest"],
            {
                "n_tokens": 1,
                "objective": "continuation",
                "target": "ab",
                "prior": "nearest",
            },
        ),
    ],
)
def test_every_option_of_gradient_reaches_the_analysis(
    capsys, tmp_path, directory, model, arguments, options
):
    path = saved(capsys, tmp_path, directory, "gradient", *arguments, *FEW)
    assert_same(GradientSearch.load(path), search_gradient(model, **FEW_OPTIONS, **options))


def test_one_token_and_one_feature_stand_beside_the_best_of_all_tokens(capsys, tmp_path, directory, model):
    options = {"site": "mlp_out", "prefix": "a", "prepend_bos": True}
    best = search_complete(model, layers=[0], features=[7], **options)
    arguments = ["-l", 0, "-f", 7, "--site", "mlp_out", "--prefix", "a", "--bos"]
    path = saved(capsys, tmp_path, directory, "gradient", *arguments, *FEW)
    found = GradientSearch.load(path)
    assert found.optimum == float(best.activations[0, 0, 0])
    assert_same(
        found,
        search_gradient(
            model, layer=0, selection=np.s_[:, 7], n_tokens=1, complete=best, **options, **FEW_OPTIONS
        ),
    )
    code, out, _ = run(capsys, "features", "gradient", *arguments, *FEW, "--model", directory)
    assert code == 0
    assert f"The best of all tokens ({best.to_dataframe()['token'][0]}) has {found.optimum:.3f}: " in out


def test_align_compares_layers_and_random_weights(capsys, directory, model):
    code, out, _ = run(
        capsys, "features", "align", directory, "--top", 3, "--seed", 2, "--feature", "0:16", "--json"
    )
    assert code == 0
    found = json.loads(out)

    def search(one):
        return search_complete(one, features=range(16), top_k=3)

    trained, drawn = search(model), search(random_like(model, 2))
    blocks = search(random_like(model, 2, keep_embeddings=True))
    expected = {
        "layers, trained": feature_alignment(trained),
        "layers, random weights": feature_alignment(drawn),
        "layers, random blocks": feature_alignment(blocks),
        "trained vs. random weights": feature_alignment(trained, drawn),
        "trained vs. random blocks": feature_alignment(trained, blocks),
    }
    assert [each["compared"] for each in found["comparisons"]] == list(expected)
    for each, result in zip(found["comparisons"], expected.values(), strict=True):
        for what in ("same", "overlap"):
            share = result.share(what)
            assert each[what]["value"] == share.value
            assert (each[what]["low"], each[what]["high"]) == (share.low, share.high)
            assert (each[what]["chance"], each[what]["verdict"]) == (share.chance, share.verdict)
    index = expected["trained vs. random blocks"].index_share(other=True)
    assert list(found["is_index"].values())[-1]["value"] == index.value
    assert len(found["is_index"]) == 3


def test_align_with_another_model_compares_layer_with_layer(capsys, tmp_path, directory, model):
    from tests.tiny_models import write_tiny_model

    other = tmp_path / "deeper"
    write_tiny_model(other, "gpt2", seed=1, n_layer=3)
    arguments = ["features", "align", "--model", directory, "--against", other, "--no-random"]
    _, out, _ = run(capsys, *arguments, "--json")
    found = json.loads(out)
    assert [each["compared"] for each in found["comparisons"]] == ["layers", "gpt2 vs. deeper"]
    options = {"top_k": 5}
    expected = feature_alignment(
        search_complete(model, **options), search_complete(load_model(other, processing=False), **options)
    )
    assert_same(found["comparisons"][1]["same"]["value"], expected.share().value)
    path = tmp_path / "x.csv"
    code, _, _ = run(capsys, *arguments, "--out", path, "--quiet")
    assert code == 0
    table = pd.read_csv(path)
    assert table["compared"].value_counts().to_dict() == {"gpt2 vs. deeper": 6, "layers": 1}


def test_a_model_that_does_not_compare_is_refused(
    capsys, monkeypatch, tmp_path, tmp_path_factory, directory, tiny_directories
):
    from tests.tiny_models import write_tiny_model

    small = tmp_path_factory.mktemp("models") / "small"
    write_tiny_model(small, "gpt2", n_layer=1, n_inner=16)
    capsys.readouterr()
    for against, arguments, message in (
        (tiny_directories / "llama", [], "llama has another tokenizer"),
        (small, ["--layer", "1"], "small has no layer 1: it has 1"),
        (small, ["--feature", "17", "--site", "post"], "small has no feature 17: it has 16"),
    ):
        given = ["align", "--model", directory, "--against", against, *arguments]
        refused(capsys, given, message, monkeypatch, tmp_path)


def test_align_alone_is_saved(capsys, tmp_path, directory, model):
    path = saved(capsys, tmp_path, directory, "align", "--no-random", "--top", 2, "--site", "mlp_out")
    expected = feature_alignment(search_complete(model, top_k=2, site="mlp_out"))
    assert_same(FeatureAlignment.load(path), expected)


def test_align_of_one_layer_is_with_random_weights_alone(capsys, directory):
    code, out, _ = run(capsys, "features", "align", directory, "--layer", 1, "--json")
    assert code == 0
    names = [each["compared"] for each in json.loads(out)["comparisons"]]
    assert names == ["trained vs. random weights", "trained vs. random blocks"]


def test_every_option_of_examples_reaches_the_analysis(capsys, tmp_path, directory, model, corpus):
    path = saved(capsys, tmp_path, directory, "examples", corpus)
    expected = feature_examples(model, corpus, layers=[1], features=range(4))
    assert_same(FeatureExamples.load(path), expected)
    other = tmp_path / "other.txt"
    other.write_text(TEXT[::-1])
    path = saved(capsys, tmp_path, directory, "examples", corpus, other)
    expected = feature_examples(model, [corpus, other], layers=[1], features=range(4))
    assert_same(FeatureExamples.load(path), expected)
    arguments = ["-l", 0, "-f", 3, "--top", 2, "--length", 8, "--limit", 5, "--no-bos", "--site", "post"]
    path = saved(capsys, tmp_path, directory, "examples", corpus, *arguments)
    expected = feature_examples(
        model,
        corpus,
        layers=[0],
        features=[3],
        top_k=2,
        length=8,
        limit=5,
        prepend_bos=False,
        site="post",
    )
    assert_same(FeatureExamples.load(path), expected)


def test_examples_without_files_are_of_what_the_model_writes(capsys, tmp_path, directory, model):
    options = ["--length", 8, "--limit", 5, "--seed", 3]
    path = saved(capsys, tmp_path, directory, "examples", *options)
    written = sample_tokens(model, batch=5, seq_len=8, seed=3)
    expected = feature_examples(model, written, layers=[1], features=range(4))
    assert_same(FeatureExamples.load(path), expected)


def test_a_corpus_that_is_none_is_refused(capsys, tmp_path, directory, corpus):
    for arguments, message in (
        ([directory / "config.json"], "a corpus is a .txt"),
        ([corpus, "--length", 33], "do not fit into the model's context of 32"),
        ([corpus, "--length", 1], "hold no text beside BOS"),
    ):
        code, _, err = run(capsys, "features", "examples", *arguments, "--model", directory)
        assert code == 2
        assert message in err
        assert len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize("arguments", [["complete"], ["greedy", "--tokens", 1], ["examples", "CORPUS"]])
def test_a_search_resumes_and_says_if_it_cannot(capsys, tmp_path, directory, corpus, arguments):
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
        ["complete"],
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
    # without anything saved, and without --resume
    never.unlink()

    def at_once(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", at_once)
    code, _, err = run(capsys, *arguments, never)
    assert (code, err.strip()) == (
        130,
        f"mechlens: interrupted before any progress was saved in {never}",
    )


def test_several_layers_are_searched_greedily_one_by_one(capsys, tmp_path, directory, model):
    path = tmp_path / "x.csv"
    arguments = ["-l", "0:2", "-f", 3, "--tokens", 2, "--model", directory]
    _, out, _ = run(capsys, "features", "greedy", *arguments, "--json", "--out", path)
    tables = [search_greedy(model, layer=layer, features=[3], n_tokens=2).to_dataframe() for layer in (0, 1)]
    expected = pd.concat(tables, ignore_index=True)
    assert_same(json.loads(out)["tokens"], expected.to_dict("records"))
    assert pd.read_csv(path, keep_default_na=False)["id"].tolist() == expected["id"].tolist()


@pytest.mark.parametrize(
    "arguments",
    [
        ["complete", "--layer", "0:2", "--feature", "1", "--feature", "4:6", "--bos", "--top", "2"],
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
        ["align", "--top", "2", "--no-random", "--model", "MODEL"],
        ["align", "--top", "1", "--seed", "3", "MODEL"],
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
    # an argument without an option's name comes last
    if arguments[-1] in ("MODEL", "CORPUS") and arguments[-2] != "--model":
        assert shlex.split(command)[-1] == given[-1]


def test_a_page_shows_all_features_that_were_asked_for(capsys, tmp_path, directory):
    path = tmp_path / "x.html"
    arguments = ["--feature", "0:20", "--model", directory, "--out", path, "--quiet"]
    code, _, _ = run(capsys, "features", "complete", *arguments)
    assert code == 0
    # of layer, feature, and tokens: the table below the picture
    rows = re.findall(r"<tr><td[^>]*>(\d+)</td><td[^>]*>(\d+)</td>", path.read_text())
    assert rows == [(str(layer), str(feature)) for layer in range(2) for feature in range(20)]


@pytest.mark.parametrize(
    "arguments",
    [["complete"], ["greedy", "--tokens", 1], ["gradient", *FEW, "--tokens", 2], ["examples", "CORPUS"]],
)
def test_json_is_one_object_that_tells_the_model(capsys, directory, corpus, arguments):
    arguments = [corpus if each == "CORPUS" else each for each in arguments]
    code, out, err = run(capsys, "features", *arguments, "--model", directory, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["model"]["processing"] is False
    assert found["site"] == "resid_post"


def test_the_bundled_models_tokens_fit_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(capsys, "features", "complete", "--top", 2)
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    shown = re.findall(r"feature \d", out)
    assert shown == [f"feature {number}" for number in range(8)]
