"""Time and memory to load a model and run it once, compared with transformers and TransformerLens.

    python benchmarks/load.py [--pairs 3]

The model has SmolLM2-135M's shape and random weights. Each load runs in a new process, after the imports.
Memory is the peak beyond that, as a multiple of the size of the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from common import Row, print_rows

THREADS = "2"
LAYERS, D_MODEL, D_MLP, VOCABULARY = 30, 576, 1536, 49152
HOOKED = int(version("transformer-lens").split(".")[0]) < 4
ENGINES = ("hooked", "bridge") if HOOKED else ("bridge",)
LIMIT = 2.3
SECONDS, UNKNOWN_SECONDS = 4.0, 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="runs of each, interleaved")
    parser.add_argument(
        "--one", nargs=2, help="WAY FOLDER: load this way from this folder, and print time and memory"
    )
    options = parser.parse_args()
    if options.one:
        measure(*options.one)
        return
    with tempfile.TemporaryDirectory(prefix="mechlens-") as folder:
        subprocess.run([sys.executable, __file__, "--one", "make", folder], check=True)
        for dtype in ("float32", "bfloat16"):
            compare(Path(folder), dtype, options.pairs)
    taken = in_new_process("unknown", "")["seconds"]
    print_rows(
        "an unknown name, offline",
        [Row("load_model, without the import of torch", taken, "s", UNKNOWN_SECONDS)],
    )


def compare(folder: Path, dtype: str, pairs: int) -> None:
    engines = [f"ours-{engine}-{kind}" for engine in ENGINES for kind in ("processed", "raw")]
    ways = ["hf", "theirs-hooked" if HOOKED else "theirs-bridge", *engines]
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(pairs):
        for way in ways:
            found[way].append(in_new_process(f"{way}-{dtype}", str(folder)))
    # one layer at a time is processed in float32, in addition to the weights
    layer = 4 * (D_MODEL * D_MODEL * 8 // 3 + 3 * D_MODEL * D_MLP) / 2**20
    engine = found[ways[-1]][0]
    rows = [
        Row("torch, transformers and TransformerLens, import", engine["import_seconds"], "s"),
        Row("  memory added by TransformerLens", engine["import_added"], "MiB"),
    ]
    for way in ways:
        ours = way.startswith("ours")
        weights = found[way][0]["weights"]
        seconds = statistics.median(each["seconds"] for each in found[way])
        added = statistics.median(each["added"] for each in found[way])
        allowed = LIMIT + (layer / weights if dtype == "bfloat16" else 0)
        title = NAMES[way]
        rows.append(Row(f"{title}, time", seconds, "s", SECONDS if ours else None))
        rows.append(Row(f"{title}, peak / weights", added / weights, "", round(allowed, 2) if ours else None))
    print_rows(f"SmolLM2-135M's shape in {dtype}, {weights:.0f} MiB of weights, {THREADS} threads", rows)


NAMES = {
    "hf": "Hugging Face",
    "theirs-hooked": "HookedTransformer's own, processed",
    "theirs-bridge": "the bridge's own, raw",
} | {
    f"ours-{engine}-{kind}": f"load_model, {engine}, {kind}"
    for engine in ("hooked", "bridge")
    for kind in ("processed", "raw")
}


def in_new_process(way: str, folder: str) -> dict[str, float]:
    """The figures of one load in a new process."""
    environment = os.environ | {"OMP_NUM_THREADS": THREADS, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if way == "unknown":
        # a port without a listener, as if offline, and an empty cache
        environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": tempfile.gettempdir()}
        environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-W", "ignore", __file__, "--one", way, folder]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(way: str, folder: str) -> None:
    """Load the model once and print the figures, or `make` the model."""
    start = time.perf_counter()
    if way == "unknown":
        from mechlens import load_model
        from mechlens.errors import ModelLoadError

        try:
            load_model("EleutherAI/pythia-71m")
        except ModelLoadError:
            print(json.dumps({"seconds": time.perf_counter() - start}))
            return
        raise AssertionError("there is no such model")
    import torch
    import transformers
    import transformers.models.llama.modeling_llama

    if way == "make":
        make(folder)
        return
    name, *kind, dtype = way.split("-")
    bare = high_water()
    if name != "hf":
        import transformer_lens  # noqa: F401 - its import is measured
    engine = {"import_seconds": time.perf_counter() - start, "import_added": high_water() - bare}
    before = high_water()
    start = time.perf_counter()
    if name == "hf":
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    elif name == "ours":
        from mechlens import load_model

        model = load_model(folder, backend=kind[0], processing=kind[1] == "processed", dtype=dtype)
    else:
        model = theirs(kind[0], folder, getattr(torch, dtype))
    if name == "hf":
        # a memory-mapped file is only read on use; the other ways run the model while loading
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.long))
    taken = time.perf_counter() - start
    hf_size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) / 2**20
    weights = hf_size / (1 if dtype == "float32" else 2)
    assert next(model.parameters()).dtype == getattr(torch, dtype)
    print(json.dumps({"seconds": taken, "added": high_water() - before, "weights": weights, **engine}))


def theirs(engine: str, folder: str, dtype: object) -> object:
    """Load a folder as a user of TransformerLens would."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if engine == "bridge":
        from transformer_lens.model_bridge import TransformerBridge

        return TransformerBridge.boot_transformers(
            folder, hf_model=hf_model, tokenizer=tokenizer, dtype=dtype
        )
    from transformer_lens import HookedTransformer
    from transformer_lens import loading_from_pretrained as loading
    from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig

    settings = loading.convert_hf_model_config(folder) | {"dtype": dtype, "device": "cpu"}
    cfg = HookedTransformerConfig.from_dict(settings)
    state = loading.get_pretrained_state_dict(folder, cfg, hf_model, dtype=dtype)
    model = HookedTransformer(cfg, tokenizer)
    model.load_and_process_state_dict(state, fold_ln=True, center_unembed=True)
    return model


def make(folder: str) -> None:
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=D_MODEL,
        intermediate_size=D_MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0}, unk_token="<|endoftext|>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(folder)


def high_water() -> float:
    """Peak memory of this process in MiB; that from `resource` would include its parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise AssertionError("this system does not report peak memory")


if __name__ == "__main__":
    main()
