"""Loaded models predict the same as Hugging Face's model, on either engine and offline."""

from __future__ import annotations

import importlib.metadata
import logging
import re
import socket
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from mechlens.errors import ModelLoadError
from mechlens.models.load import loading, local
from mechlens.models.load.loading import BUNDLED, load_model
from mechlens.models.protocol import describe, engine_of
from mechlens.text.tokens import own_bos_token_id
from tests.shared import BACKENDS, HAS_HOOKED, STORIES, needs_shared
from tests.tiny_models import KINDS, TOY_CONFIG, write_tiny_model, write_tokenizer, write_toy

# float32 sums in a different order; the tiny models' log probabilities reach -30
TOLERANCE = 5e-5


def tokens_for(d_vocab: int, length: int = 30) -> torch.Tensor:
    return torch.randint(0, d_vocab, (2, length), generator=torch.Generator().manual_seed(1))


def hf_log_probs(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, local_files_only=True, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        return model.eval()(tokens).logits.log_softmax(-1)


def log_probs(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).log_softmax(-1)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("something opened a socket")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


@pytest.mark.parametrize("processing", [True, False], ids=["processed", "raw"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_match_hugging_face(tiny_directories, kind, backend, processing):
    directory = tiny_directories / kind
    tokens = tokens_for(64)
    model = load_model(directory, backend=backend, processing=processing)
    error = (log_probs(model, tokens) - hf_log_probs(directory, tokens)).abs().max()
    assert error < TOLERANCE
    info = describe(model)
    assert (info.name, info.processing, info.dtype) == (kind, processing, "float32")
    assert (info.n_layers, info.n_heads, info.d_model, info.d_vocab, info.n_ctx) == (2, 4, 32, 64, 32)
    assert info.architecture.lower().startswith(kind.replace("_", ""))
    assert info.engine == {"hooked": "HookedTransformer", "bridge": "TransformerBridge"}[backend]
    assert info.engine_version == importlib.metadata.version("transformer-lens")


@needs_shared
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("processing", [True, False], ids=["processed", "raw"])
def test_log_probs_of_a_trained_model_match_hugging_face(backend, processing):
    tokens = tokens_for(512, 100)
    model = load_model(STORIES, backend=backend, processing=processing)
    assert (log_probs(model, tokens) - hf_log_probs(STORIES, tokens)).abs().max() < TOLERANCE
    assert describe(model).name == "stories260K"


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gpt2", {"n_inner": 40}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("llama", {"head_dim": 12}),
        ("llama", {"tie_word_embeddings": True}),
    ],
    ids=str,
)
def test_settings_that_transformer_lens_ignores_are_respected(tmp_path, kind, changes):
    # TransformerLens would mistake this GPT-2 for a Llama
    directory = tmp_path / "llama-gemma-2-2b-bert"
    write_tiny_model(directory, kind, **changes)
    tokens = tokens_for(64)
    for processing in (True, False):
        model = load_model(directory, processing=processing)
        assert (log_probs(model, tokens) - hf_log_probs(directory, tokens)).abs().max() < TOLERANCE


def test_processing_centers_the_unembedding_unless_logits_are_capped(tiny_directories):
    processed = load_model(tiny_directories / "gpt2")
    raw = load_model(tiny_directories / "gpt2", processing=False)
    capped = load_model(tiny_directories / "gemma2")
    assert processed.W_U.mean(-1).abs().max() < 1e-6
    assert raw.W_U.mean(-1).abs().max() > 1e-2
    # with a soft-cap, centering would change the predictions
    assert capped.W_U.mean(-1).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float64], ids=str)
def test_weights_and_predictions_have_the_requested_dtype(tiny_directories, dtype):
    model = load_model(tiny_directories / "gpt_neox", dtype=dtype)
    wanted = torch.bfloat16 if dtype == "bfloat16" else torch.float64
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    assert describe(model).dtype == str(wanted).removeprefix("torch.")
    exact = hf_log_probs(tiny_directories / "gpt_neox", tokens_for(64))
    kl = (exact.exp() * (exact - log_probs(model, tokens_for(64)).float())).sum(-1).mean()
    # bfloat16 has 8 bits, which costs a few hundredths of a nat with large random weights; the float32
    # reference has a rounding error of about 1e-8 nats
    assert kl < (0.1 if dtype == "bfloat16" else 1e-7)


def test_nothing_opens_a_socket(tiny_directories, no_network):
    for kind in ("gpt2", "qwen2", "llama"):
        for backend in BACKENDS:
            load_model(tiny_directories / kind, backend=backend)


def test_the_bundled_model_loads_offline(tmp_path, monkeypatch, no_network):
    write_tiny_model(tmp_path / "bundled", "gpt_neox")
    monkeypatch.setattr(loading, "BUNDLED_DIRECTORY", tmp_path / "bundled")
    assert describe(load_model()).name == describe(load_model(BUNDLED)).name == BUNDLED


def test_half_precision_files_load_in_float32(tmp_path):
    model = write_tiny_model(tmp_path / "half", "gpt_neox")
    model.half().save_pretrained(tmp_path / "half")
    loaded = load_model(tmp_path / "half")
    assert describe(loaded).dtype == "float32"
    tokens = tokens_for(64)
    assert (log_probs(loaded, tokens) - hf_log_probs(tmp_path / "half", tokens)).abs().max() < TOLERANCE


def test_a_reopened_file_gives_all_its_tensors(tmp_path, monkeypatch):
    import safetensors

    model = write_tiny_model(tmp_path / "gpt2", "gpt2")
    opened = []
    own = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", lambda *given: opened.append(given) or own(*given))
    monkeypatch.setattr(local, "_MAPPED_AT_ONCE", 2000)
    found = local.read_safetensors(tmp_path / "gpt2" / "model.safetensors", torch.float64)
    assert len(opened) > 3
    expected = {name: each for name, each in model.state_dict().items() if name in found}
    assert {name.partition(".")[0] for name in model.state_dict().keys() - found.keys()} == {"lm_head"}
    for name, each in expected.items():
        assert torch.equal(found[name], each.double()), name


class Copies(TorchDispatchMode):
    """Records the sizes of copied tensors."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default):
            self.sizes.append(made.numel())
        return made


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("processing", [True, False], ids=["processed", "raw"])
def test_a_forward_pass_copies_no_weights(tiny_directories, kind, processing):
    model = load_model(tiny_directories / kind, processing=processing)
    block = model.blocks[0]
    smallest = min(each.numel() for each in (block.attn.W_Q, block.attn.W_O, block.mlp.W_in))
    with torch.no_grad(), Copies() as copies:
        # one token, so activations are far smaller
        model(torch.tensor([[3]]), return_type=None)
    assert max(copies.sizes, default=0) < smallest


@pytest.mark.skipif(HAS_HOOKED, reason="TransformerLens 3 has HookedTransformer")
def test_a_single_warning_says_that_only_the_slower_engine_is_installed(
    tiny_directories, monkeypatch, recwarn
):
    monkeypatch.setattr(loading, "_warned", set())
    for _ in range(2):
        load_model(tiny_directories / "gpt2")
    told = [str(warning.message) for warning in recwarn if "no HookedTransformer" in str(warning.message)]
    assert len(told) == 1
    assert "sweeps" in told[0]


def test_nothing_is_printed_or_logged(tiny_directories, capfd, caplog):
    handlers = list(logging.getLogger().handlers)
    for dtype in ("float32", "float16"):
        load_model(tiny_directories / "gemma2", dtype=dtype)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert logging.getLogger().handlers == handlers


def test_loading_leaves_the_random_state_unchanged(tiny_directories, tmp_path):
    write_toy(tmp_path / "toy")  # its config.json has a seed

    # Python's own random state is not checked, because beartype uses it.
    numpy_state, torch_state = numpy.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    load_model(tiny_directories / "gpt2")
    load_model(tmp_path / "toy")
    assert (numpy.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)


class TestBeginningOfSequence:
    def test_a_tokenizers_own_bos_is_kept(self, tiny_directories):
        for backend in BACKENDS:
            model = load_model(tiny_directories / "llama", backend=backend)
            assert own_bos_token_id(model.tokenizer) == 1
            assert model.to_tokens("ab", prepend_bos=True)[0, 0] == 1
            assert own_bos_token_id(load_model(tiny_directories / "gpt2", backend=backend).tokenizer) == 0

    def test_no_bos_is_made_up(self, tiny_directories):
        for backend in BACKENDS:
            model = load_model(tiny_directories / "qwen2", backend=backend)
            assert own_bos_token_id(model.tokenizer) is None
            assert model.tokenizer.bos_token is None
            assert model.tokenizer.eos_token == "<|end|>"
            assert model.to_tokens(["ab", "a"], prepend_bos=False).shape == (2, 2)

    def test_a_model_without_a_tokenizer_has_no_bos(self, tmp_path):
        write_toy(tmp_path / "toy")
        assert own_bos_token_id(load_model(tmp_path / "toy").tokenizer) is None

    @pytest.mark.parametrize(("kind", "expected"), [("qwen2", None), ("gpt2", 0), ("llama", 1)])
    def test_bos_is_recognized_in_a_model_that_mechlens_did_not_load(self, tiny_directories, kind, expected):
        assert own_bos_token_id(users_bridge(tiny_directories / kind).tokenizer) == expected


def users_bridge(directory: Path):
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(directory), device="cpu")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_loaded_bridge_has_the_hook_points_of_transformer_lenss_own(tiny_directories, kind):
    ours = load_model(tiny_directories / kind, backend="bridge")
    theirs = users_bridge(tiny_directories / kind)
    theirs.enable_compatibility_mode(disable_warnings=True)
    names, expected = ({key: point.name for key, point in each.hook_dict.items()} for each in (ours, theirs))
    assert list(names.items()) == list(expected.items())


class TestDescribe:
    def test_a_bridge_that_mechlens_did_not_load(self, tiny_directories):
        bridge = users_bridge(tiny_directories / "llama")
        info = describe(bridge)
        assert (info.name, info.architecture, info.processing) == ("llama", "LlamaForCausalLM", False)
        bridge.enable_compatibility_mode(disable_warnings=True)
        assert describe(bridge).processing is True

    @pytest.mark.skipif(not HAS_HOOKED, reason="TransformerLens 4 has no HookedTransformer")
    @pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning")
    def test_a_hooked_transformer_that_mechlens_did_not_load(self):
        from transformer_lens import HookedTransformer

        model = HookedTransformer(TOY_CONFIG | {"act_fn": "gelu"})
        info = describe(model)
        assert (info.name, info.architecture, info.engine) == (
            "custom",
            "attention-only",
            "HookedTransformer",
        )
        assert (info.revision, info.n_layers, info.d_vocab) == (None, 2, 64)
        assert own_bos_token_id(model.tokenizer) is None

    def test_objects_that_are_not_models_are_refused(self):
        for function in (describe, engine_of):
            with pytest.raises(TypeError, match=r"model must be a HookedTransformer or a .* got int"):
                function(3)


class TestTransformerLensFormat:
    @pytest.mark.parametrize("backend", ["hooked"] if HAS_HOOKED else ["bridge"])
    @pytest.mark.parametrize("processing", [True, False], ids=["processed", "raw"])
    @pytest.mark.parametrize("normalization", ["LN", None])
    def test_predictions_follow_the_formula(self, tmp_path, normalization, processing, backend):
        weights = write_toy(tmp_path / "toy", normalization_type=normalization)
        model = load_model(tmp_path / "toy", backend=backend, processing=processing)
        tokens = tokens_for(64)
        expected = attention_only_logits(weights, tokens, normalization is not None).log_softmax(-1)
        assert (log_probs(model, tokens) - expected).abs().max() < TOLERANCE
        info = describe(model)
        assert (info.name, info.architecture, info.processing) == ("toy", "attention-only", processing)

    @pytest.mark.skipif(not HAS_HOOKED, reason="TransformerLens 4 has no HookedTransformer")
    def test_a_bias_that_comes_only_from_the_norm_is_folded_into_the_output(self, tmp_path):
        weights = write_toy(tmp_path / "toy")
        for name, each in weights.items():
            if re.search(r"attn\.b_", name):
                each.zero_()
        save_file(weights, tmp_path / "toy" / "model.safetensors")
        model = load_model(tmp_path / "toy")
        assert weights["blocks.0.ln1.b"].abs().max() > 0.1
        assert not model.b_V.any()
        assert model.b_O.abs().max() > 0.01

    @pytest.mark.parametrize("act_fn", ["gelu_new", "solu_ln"])
    def test_processing_leaves_a_model_with_mlps_unchanged(self, tmp_path, act_fn):
        write_toy(tmp_path / "toy", attn_only=False, d_mlp=24, act_fn=act_fn)
        raw, processed = (load_model(tmp_path / "toy", processing=processing) for processing in (False, True))
        tokens = tokens_for(64)
        assert (log_probs(raw, tokens) - log_probs(processed, tokens)).abs().max() < TOLERANCE
        assert describe(raw).architecture == "TransformerLens"

    @pytest.mark.skipif(not HAS_HOOKED, reason="TransformerLens 4's bridge has no gated MLP with biases")
    def test_processing_that_would_change_the_model_is_refused(self, tmp_path):
        # the gate has no bias to absorb the norm's bias, so TransformerLens drops it
        write_toy(tmp_path / "toy", attn_only=False, d_mlp=24, act_fn="silu", gated_mlp=True)
        with pytest.raises(ModelLoadError, match=r"does not predict what .* use processing=False"):
            load_model(tmp_path / "toy")
        load_model(tmp_path / "toy", processing=False)

    def test_missing_weights_are_an_error_not_zeros(self, tmp_path):
        weights = write_toy(tmp_path / "toy")
        del weights["blocks.1.attn.W_O"]
        save_file(weights, tmp_path / "toy" / "model.safetensors")
        with pytest.raises(ModelLoadError, match=r"lack 1 tensors .* such as blocks\.1\.attn\.W_O"):
            load_model(tmp_path / "toy")

    def test_unexpected_weights_are_an_error(self, tmp_path):
        weights = write_toy(tmp_path / "toy")
        weights["blocks.2.ln1.w"] = torch.ones(32)
        save_file(weights, tmp_path / "toy" / "model.safetensors")
        with pytest.raises(ModelLoadError, match=r"1 tensors beyond .* such as blocks\.2\.ln1\.w"):
            load_model(tmp_path / "toy")

    def test_weights_of_wrong_sizes_are_an_error(self, tmp_path):
        write_toy(tmp_path / "toy")
        config = (tmp_path / "toy" / "config.json").read_text()
        (tmp_path / "toy" / "config.json").write_text(config.replace('"d_head": 8', '"d_head": 4'))
        with pytest.raises(ModelLoadError, match=r"weights do not fit its config\.json"):
            load_model(tmp_path / "toy")

    @pytest.mark.skipif(not HAS_HOOKED, reason="TransformerLens 4's bridge has them")
    def test_a_bridge_that_cannot_read_the_format_says_so(self, tmp_path):
        write_toy(tmp_path / "toy")
        with pytest.raises(ModelLoadError, match="use backend='hooked', or install transformer-lens 4"):
            load_model(tmp_path / "toy", backend="bridge")

    def test_a_tokenizer_is_read(self, tmp_path):
        write_toy(tmp_path / "toy")
        write_tokenizer(tmp_path / "toy", bos_is_eos=False)
        model = load_model(tmp_path / "toy")
        assert own_bos_token_id(model.tokenizer) == 1
        assert model.to_tokens("ab", prepend_bos=True).tolist() == [[1, 3, 4]]


def attention_only_logits(weights, tokens: torch.Tensor, normalize: bool) -> torch.Tensor:
    """An attention-only model, written out."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        if not normalize:
            return x
        x = x - x.mean(-1, keepdim=True)
        return (
            x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.w"] + weights[f"{name}.b"]
        )

    pos = tokens.shape[1]
    x = weights["embed.W_E"][tokens] + weights["pos_embed.W_pos"][:pos]
    for layer in range(2):
        at = f"blocks.{layer}.attn."
        h = norm(x, f"blocks.{layer}.ln1")
        for head in range(4):
            q, k, v = (h @ weights[f"{at}W_{name}"][head] + weights[f"{at}b_{name}"][head] for name in "QKV")
            scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(torch.ones(pos, pos).triu(1).bool(), -1e9)
            x = x + scores.softmax(-1) @ v @ weights[f"{at}W_O"][head]
        x = x + weights[f"{at}b_O"]
    return norm(x, "ln_final") @ weights["unembed.W_U"] + weights["unembed.b_U"]


def test_a_checkpoint_is_loaded_from_a_training_directory(tmp_path):
    """The only tokenizer is in the directory above the checkpoints."""
    run = tmp_path / "run"
    for step in (0, 64):
        write_tiny_model(run / "checkpoints" / f"step-{step:06d}", "gpt_neox", seed=step, tokenizer=False)
    write_tokenizer(run)
    model = load_model(run, checkpoint=64)
    info = describe(model)
    assert (info.name, info.revision) == ("run", "step-000064")
    expected = hf_log_probs(run / "checkpoints" / "step-000064", tokens_for(64))
    assert (log_probs(model, tokens_for(64)) - expected).abs().max() < TOLERANCE
    with pytest.raises(ModelLoadError, match="no checkpoint 7: it has 0, 64"):
        load_model(run, checkpoint=7)


def test_a_cached_model_loads_offline(tmp_path, monkeypatch, no_network):
    """A hub model in the layout of the local cache."""
    from huggingface_hub import constants

    repository = tmp_path / "models--EleutherAI--pythia-70m"
    write_tiny_model(repository / "snapshots" / "abc", "gpt_neox")
    for revision in ("main", "step512"):
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert describe(load_model("pythia-70m")).name == "EleutherAI/pythia-70m"
    info = describe(load_model("EleutherAI/pythia-70m", checkpoint=512))
    assert (info.name, info.revision) == ("EleutherAI/pythia-70m", "step512")
