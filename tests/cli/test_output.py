"""Output of the command line is not lost: targets that cannot be written, and every encoding."""

from __future__ import annotations

import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import mechlens
from mechlens.cli import commands, main, options
from mechlens.results import load
from tests.cli.commands import run

SMALL = ["--seq-len", "5", "--batch", "2"]
PAGES = {
    "lens": ["lens", "abc"],
    "patch": ["patch", *SMALL],
    "ablate heads": ["ablate", "heads", *SMALL],
    "ablate mlps": ["ablate", "mlps", *SMALL],
    "circuit": ["circuit", "0.0", "1.0"],
    "composition": ["composition", "--draws", "2"],
    "induction-circuits": ["induction-circuits", "--pair", "0.0,1.0", *SMALL],
    "task": ["task", "TASK"],
    "features exhaustive": ["features", "exhaustive"],
    "features greedy": ["features", "greedy", "--tokens", "1"],
    "features gradient": ["features", "gradient", "--restarts", "2", "--steps", "1"],
    "features alignment": ["features", "alignment", "--no-random"],
    "features examples": ["features", "examples", "CORPUS", "--length", "8"],
}
FILES = {**PAGES, "heads": ["heads", "--n-seeds", "1", *SMALL]}
FOLDERS = {"reproduce": ["reproduce", "--n-seeds", "1", *SMALL]}
COMMANDS = {**FILES, **FOLDERS}


@pytest.fixture
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("the cat sat on the mat and the dog sat on the cat " * 4)
    path.with_name("task.csv").write_text("clean,corrupted,answer,wrong\nabc,bca,a,b\n")
    return path


@pytest.fixture
def temporary(tmp_path_factory, monkeypatch):
    """The system's temporary folder."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def arguments_of(command, model, corpus):
    places = {"CORPUS": str(corpus), "TASK": str(corpus.with_name("task.csv"))}
    return [*(places.get(each, each) for each in COMMANDS[command]), "--model", str(model)]


# -- targets that cannot be written ----------------------------------------------------------------


@pytest.mark.parametrize("command", FILES)
@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("none/x.csv", "cannot write none/x.csv: the folder none does not exist"),
        ("file/x.csv", "cannot write file/x.csv: file is not a folder"),
        ("folder.csv", "cannot write folder.csv: it is a folder"),
        (f"{'x' * 300}.csv", f"cannot write {'x' * 300}.csv: File name too long"),
        pytest.param(
            "/proc/x.csv",
            "cannot write /proc/x.csv: No such file or directory",
            marks=pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc here"),
        ),
    ],
)
def test_a_target_that_cannot_be_written_is_refused_before_the_work(
    capsys, monkeypatch, tmp_path, corpus, command, out, message
):
    (tmp_path / "file").touch()
    (tmp_path / "folder.csv").mkdir()
    monkeypatch.chdir(tmp_path)
    # loading this missing model would fail first
    code, printed, err = run(capsys, *arguments_of(command, "./nowhere", corpus), "--out", out)
    assert (code, printed, err) == (2, "", f"mechlens: {message}\n")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder.csv"]


def test_a_folder_that_cannot_be_created_is_refused_before_the_work(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    for out, message in (
        ("file", "--out must be a folder, but file is a file"),
        ("file/a/b", f"--out must be a folder, but {tmp_path / 'file'} is a file"),
        *([("/proc/a/b", "cannot write to /proc/a/b: No such")] if Path("/proc/self").exists() else []),
    ):
        code, printed, err = run(capsys, "reproduce", "--model", "./nowhere", "--out", out)
        assert (code, printed) == (2, "")
        assert err.startswith(f"mechlens: {message}")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_checkpoint_that_cannot_be_written_is_refused_before_the_work(capsys, tmp_path):
    file = tmp_path / f"{'x' * 300}.safetensors"
    code, _, err = run(capsys, "patch", "--model", "./nowhere", "--resume", file)
    assert (code, err) == (2, f"mechlens: cannot write {file}: File name too long\n")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused_before_the_work(capsys, tmp_path):
    tmp_path.chmod(0o500)
    target = tmp_path / "x.csv"
    code, _, err = run(capsys, "heads", "--model", "./nowhere", "--out", target)
    assert (code, err) == (2, f"mechlens: cannot write {target}: Permission denied\n")


# -- writing that fails after the work -------------------------------------------------------------


def losing_its_folder(monkeypatch, folder):
    """The result's folder disappears during the work."""
    real = options.load

    def load_and_remove(*given, **more):
        shutil.rmtree(folder)
        if folder.name == "out":
            folder.touch()  # so it cannot be created again
        return real(*given, **more)

    monkeypatch.setattr(options, "load", load_and_remove)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.filterwarnings("ignore")
def test_a_result_that_cannot_be_written_is_printed_and_kept_elsewhere(
    capsys, monkeypatch, tmp_path, temporary, tiny_directories, corpus, command
):
    arguments = arguments_of(command, tiny_directories / "gpt2", corpus)
    folder = tmp_path / "out"
    folder.mkdir()
    target = folder if command == "reproduce" else folder / "x.csv"
    code, expected, err = run(capsys, *arguments, "--out", target)
    assert code == 0
    wrote = f"{target / 'report.html'} and 7 other files" if command == "reproduce" else target
    assert err.splitlines()[-1] == f"mechlens: wrote {wrote}"
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    losing_its_folder(monkeypatch, folder)
    code, printed, err = run(capsys, *arguments, "--out", target)
    assert (code, printed) == (1, expected)
    said = re.fullmatch(
        rf"mechlens: cannot write {re.escape(str(target))}: .*; the result is in (.*)", err.splitlines()[-1]
    )
    kept = Path(said[1])
    assert kept.parent.parent == temporary
    assert kept.name == target.name
    saved = {path.name: path.read_bytes() for path in (kept.iterdir() if kept.is_dir() else [kept])}
    assert set(saved) == set(whole)
    tables = [name for name in whole if name.endswith(".csv")]
    assert [saved[name] for name in tables] == [whole[name] for name in tables]
    assert not re.search(r"\.part|Error", err)


@pytest.mark.parametrize("ending", [".html", ".safetensors"])
def test_a_page_and_a_whole_result_are_kept_as_well(
    capsys, monkeypatch, tmp_path, temporary, tiny_directories, ending
):
    (tmp_path / "out").mkdir()
    losing_its_folder(monkeypatch, tmp_path / "out")
    arguments = ["composition", "--model", tiny_directories / "gpt2", "--json"]
    code, printed, err = run(capsys, *arguments, "--out", tmp_path / "out" / f"x{ending}")
    assert code == 1
    kept = Path(err.rpartition(" is in ")[2].strip())
    if ending == ".html":
        assert "Plotly.newPlot" in kept.read_text()
    else:
        assert load(kept).to_dataframe()["score"].max() == json.loads(printed)["rows"][0]["score"]


@pytest.mark.skipif(os.name != "posix", reason="limits are POSIX's")
@pytest.mark.filterwarnings("ignore:prefix_matching_score is left out")
@pytest.mark.parametrize(
    ("command", "out"),
    [
        ("composition", "x.html"),
        ("composition", "x.safetensors"),
        ("composition", "x.csv"),
        ("reproduce", "x"),
    ],
)
def test_on_a_full_disk_the_result_is_printed_even_if_quiet(
    capsys, monkeypatch, tmp_path, temporary, tiny_directories, command, out
):
    """With a real limit on file sizes, which also applies to the temporary folder."""
    import resource

    load, (soft, hard) = options.load, resource.getrlimit(resource.RLIMIT_FSIZE)

    def load_and_limit(*given, **more):
        model = load(*given, **more)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        return model

    monkeypatch.setattr(options, "load", load_and_limit)
    # otherwise truncated bytecode would stay next to the sources, and later processes could not import it
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", tiny_directories / "gpt2", "--quiet", "--out", out, *FEW[command]]
    try:
        code, printed, err = run(capsys, command, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = f"cannot write {out}: File too large; saving it in {temporary} failed, too"
    assert err.splitlines()[-1] == f"mechlens: {said}"
    assert code == 1
    assert {"composition": "(gpt2)", "reproduce": "Nothing is published"}[command] in printed
    assert list(temporary.iterdir()) == []
    assert {each.name for each in tmp_path.iterdir()} <= {"x"}


FEW = {"composition": ["--draws", "2"], "reproduce": ["--n-seeds", "1", *SMALL]}


def test_a_result_that_cannot_be_drawn_is_printed_with_the_reason(capsys, monkeypatch, tmp_path, temporary):
    def refuse(*given, **more):
        raise ValueError("these scores cannot be drawn")

    monkeypatch.setattr(mechlens, "plot_composition_scores", refuse, raising=False)
    code, printed, err = run(capsys, "composition", "--out", tmp_path / "x.html")
    assert (code, err) == (2, "mechlens: these scores cannot be drawn\n")
    assert "K-composition of heads (mechlens-books)" in printed
    assert list(temporary.iterdir()) == []


def test_messages_about_files_stay_out_of_json_and_csv(capsys, tmp_path, tiny_directories):
    model = ["--model", tiny_directories / "gpt2"]
    path = tmp_path / "a  b.csv"
    code, out, err = run(capsys, "lens", "abc", *model, "--csv", "--out", path)
    assert (code, err) == (0, f"mechlens: wrote {path}\n")
    assert out == path.read_text()
    code, out, err = run(capsys, "lens", "abc", *model, "--json", "--out", path)
    assert (code, err) == (0, f"mechlens: wrote {path}\n")
    assert json.loads(out)["read"] == "resid_post"
    assert run(capsys, "lens", "abc", *model, "--quiet", "--out", path) == (0, "", "")


# -- standard output -------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize(("argument", "unbuffered"), [("--version", ""), ("--help", ""), ("--help", "1")])
def test_a_closed_output_gives_one_line(argument, unbuffered):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mechlens", argument],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    assert done.returncode == 1
    assert done.stderr == "mechlens: cannot write to standard output: No space left on device\n"


@pytest.mark.skipif(os.name != "posix", reason="pipes are POSIX's")
def test_a_reader_that_stops_early_gets_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "mechlens", "--help"], stdout=pipe, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (1, "")


TEXT = "Mr. Pickwick sät naïf — „он“ sat 東京 🚢"
WRONG = [["lens", TEXT, "--stat", TEXT], [TEXT], ["models", TEXT], ["patch", "--text", TEXT, "--site", TEXT]]
FEW_RUNS = [["lens", "Mr. Pickwick sat"], ["composition", "--draws", "2", "--model", "MODEL"]]
"""The encoding that failed on a caption, and another."""
RUNS = [
    *FEW_RUNS,
    ["lens", TEXT, "--target", " the", "--stat", "rank_final"],
    ["lens", TEXT, "--csv", "--model", "MODEL"],
    ["lens", TEXT, "--json", "--model", "MODEL"],
    ["heads", "--text", TEXT, "--top", "1", "--model", "MODEL"],
    ["patch", "--text", TEXT, "--by", "layer", "--model", "MODEL"],
    ["circuit", "0.2", "1.1", "--tokens", TEXT, "--top", "2", "--model", "MODEL"],
    ["induction-circuits", "--pair", "0.2,1.1", "--batch", "2", "--seq-len", "9", "--model", "MODEL"],
    ["features", "exhaustive", "--feature", "0:2", "--model", "MODEL"],
    ["features", "greedy", "--tokens", "1", "--prefix", TEXT, "--model", "MODEL"],
    ["features", "gradient", "--steps", "1", "--restarts", "2", "--prefix", TEXT, "--model", "MODEL"],
    ["features", "examples", "CORPUS", "--length", "9", "--feature", "1", "--model", "MODEL"],
    ["features", "alignment", "--no-random", "--feature", "0:4", "--model", "MODEL"],
    ["models", "--like", "gpt2"],
    *([*words, "--help"] for words in commands.every()),
]
FRAMES = "─━│┃┌┏┡└"


@pytest.fixture(scope="module")
def in_encoding(tiny_directories, tmp_path_factory):
    """Exit codes of invalid input and some runs, and the lines of both outputs in an encoding."""
    corpus = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    corpus.write_text("The ship—the “captain” sät\t東京 🚢\n" * 30, encoding="utf-8")

    model = tmp_path_factory.mktemp("models") / "sät 東京 🚢"
    shutil.copytree(tiny_directories / "gpt2", model)
    places = {"MODEL": str(model), "CORPUS": str(corpus)}

    @functools.cache
    def outputs(encoding, n_runs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COLUMNS", "100")
            files = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2)]
            patch.setattr(sys, "stdout", files[0])
            patch.setattr(sys, "stderr", files[1])
            codes = []
            for arguments in [*WRONG, *RUNS[:n_runs]]:
                with pytest.raises(SystemExit) as ended:
                    main([places.get(each, each) for each in arguments])
                codes.append(ended.value.code)
        return codes, *(file.buffer.getvalue().decode(encoding).splitlines() for file in files)

    return outputs


# warnings are printed, as outside the tests
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("encoding", "n_runs"),
    [("ascii", len(RUNS)), *((encoding, len(FEW_RUNS)) for encoding in ("cp1252", "latin-1", "cp932"))],
)
def test_every_command_survives_every_encoding(in_encoding, encoding, n_runs):
    codes, everything, complaints = in_encoding("utf-8", n_runs)
    assert codes == [2] * len(WRONG) + [0] * n_runs
    codes_here, out, err = in_encoding(encoding, n_runs)
    assert codes_here == codes

    def in_this(lines):
        """The lines, with characters that the encoding lacks as Python escapes them."""
        return [line.encode(encoding, "backslashreplace").decode(encoding) for line in lines]

    # frames are drawn differently
    whole = [line for line in everything if not set(line) & set(FRAMES)]
    assert any("東京" in line for line in everything)
    assert [line for line in in_this(whole) if line not in out] == []
    assert err == in_this(complaints)
    assert len(err) >= len(WRONG)


def test_a_process_survives_an_encoding_that_lacks_a_caption():
    """A real process, with the encoding of a terminal or file."""
    done = subprocess.run(
        [sys.executable, "-m", "mechlens", *FEW_RUNS[0]],
        capture_output=True,
        check=False,
        env=os.environ | {"PYTHONIOENCODING": "cp1252"},
    )
    assert done.returncode == 0
    # on a bridge it names the engine
    assert all(line.startswith(b"mechlens: ") for line in done.stderr.splitlines())
    assert done.stdout.decode("cp1252").startswith("Logit lens: mechlens-books")


@pytest.mark.skipif(os.name != "posix", reason="arguments are bytes on POSIX alone")
@pytest.mark.parametrize(
    ("encoding", "arguments", "message"),
    [
        ("ascii", [b"\xff"], r"No such command '\udcff'"),
        ("ascii", [b"lens", b"a", b"--out", b"\xff"], r"got \udcff"),
        (
            "utf-8",
            [b"heads", b"--out", b"\xff/x.csv"],
            r"cannot write \udcff/x.csv: the folder \udcff does not exist",
        ),
        ("ascii", [b"reproduce", b"--out", __file__.encode() + b"/\xff"], r"--out must be a folder, but"),
        ("utf-8", [b"lens", b"a", b"--stat", b"\xff"], r"got '\udcff'"),
    ],
)
def test_invalid_bytes_are_refused_in_one_line(arguments, message, encoding):
    done = subprocess.run(
        [sys.executable, "-m", "mechlens", *arguments],
        capture_output=True,
        check=False,
        env=os.environ | {"PYTHONIOENCODING": encoding, "HF_HUB_OFFLINE": "1"},
    )
    assert (done.returncode, done.stdout) == (2, b"")
    (line,) = done.stderr.decode(encoding).splitlines()
    assert message in line


# -- other messages --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")
def test_each_warning_is_printed_once(capsys, tmp_path):
    from tests.tiny_models import write_toy

    write_toy(tmp_path)
    capsys.readouterr()
    code, _, err = run(capsys, "heads", "--model", tmp_path, "--n-seeds", 2, *SMALL)
    assert code == 0
    assert len(err.splitlines()) == len(set(err.splitlines()))
    assert "this model has no tokenizer, so no BOS: its sequences begin with an ordinary token" in err


def test_a_terminal_shows_what_is_loaded_and_from_where(capsys, monkeypatch):
    monkeypatch.setattr(options, "progress", lambda quiet: not quiet)
    _, _, err = run(capsys, "composition", "--draws", 2, "--device", "cpu")
    assert err.splitlines()[0] == "loading mechlens-books on cpu ..."
    # the line is complete even if there is no such place
    _, _, err = run(capsys, "composition", "--device", "cuda:99")
    loading, refused = err.splitlines()
    assert loading == "loading mechlens-books"
    assert refused.startswith("mechlens: device 'cuda:99' is not available")
    _, _, err = run(capsys, "composition", "--draws", 2, "--quiet")
    assert err == ""
