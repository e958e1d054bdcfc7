"""Shared by the benchmarks: tables, timing, peak memory and random models."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured figure."""

    what: str
    measured: float
    unit: str
    target: float | None = None
    """The largest allowed value, or None if the figure is only printed."""

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        return "met" if self.measured <= self.target else "MISSED"


def print_rows(title: str, rows: Sequence[Row]) -> None:
    print(f"\n{title}")
    width = max(len(row.what) for row in rows)
    print(f"  {'':{width}}  {'measured':>10}  {'target':>8}")
    for row in rows:
        target = "" if row.target is None else f"<= {row.target:g}"
        print(f"  {row.what:{width}}  {row.measured:10.3g}  {target:>8}  {row.unit:8} {row.verdict}".rstrip())


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_bytes(work: Callable[[], Any]) -> int:
    """Peak memory that `work` allocates.

    Counts every block that PyTorch's CPU allocator hands out and takes back, including tensors inside
    operators. Python objects and the matrix library's own buffers are not counted.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results = profiler.profiler
    assert results is not None
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def check_peak_bytes() -> None:
    """Check a known case: two overlapping blocks of 8 MiB, and a third after they are freed."""

    def work() -> None:
        one = torch.empty(2**21)
        two = torch.empty(2**21)
        del one, two
        torch.empty(2**21)

    assert peak_bytes(work) == 2 * 2**23, "this version of the profiler counts memory differently"


def random_gpt2_small() -> Any:
    """A model with GPT-2 small's shape and random weights, on the installed engine; works offline."""
    return random_gpt2(n_layers=12, n_heads=12, d_model=768)


def random_gpt2(*, n_layers: int, n_heads: int, d_model: int) -> Any:
    """A GPT-2 model with random weights; see `random_gpt2_small`."""
    from mechlens.models.load import engines
    from mechlens.models.load.local import HuggingFaceModel

    torch.manual_seed(0)
    if int(version("transformer-lens").split(".")[0]) < 4:
        with engines.quiet():
            from transformer_lens import HookedTransformer
            from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig

            return HookedTransformer(
                HookedTransformerConfig(
                    n_layers=n_layers,
                    n_heads=n_heads,
                    d_model=d_model,
                    d_head=64,
                    d_mlp=4 * d_model,
                    d_vocab=50257,
                    n_ctx=1024,
                    act_fn="gelu_new",
                    normalization_type="LN",
                    device="cpu",
                    init_mode="gpt2",
                )
            ).eval()
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    config = GPT2Config(
        architectures=["GPT2LMHeadModel"],
        attn_implementation="eager",
        n_layer=n_layers,
        n_head=n_heads,
        n_embd=d_model,
    )
    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0}, unk_token="<|endoftext|>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    with tempfile.TemporaryDirectory(prefix="mechlens-") as folder:
        config.save_pretrained(folder)
        # the bridge reloads the tokenizer from its folder
        tokenizer.save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        return engines.bridge_from_hf(
            HuggingFaceModel(GPT2LMHeadModel(config).eval(), tokenizer, "GPT2LMHeadModel"),
            processing=False,
            dtype=torch.float32,
            directory=Path(folder),
        )


def random_smollm2() -> Any:
    """A model with SmolLM2-135M's shape and random weights, on the installed engine; works offline."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from mechlens import load_model

    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=30,
        hidden_size=576,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    # random tokens are drawn from the tokenizer's vocabulary
    words = {"<|endoftext|>": 0} | {f"t{number}": number for number in range(1, config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>")),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
    )
    with tempfile.TemporaryDirectory(prefix="mechlens-") as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return load_model(folder)
