"""Train the small language model bundled with mechlens, from plain text, on a CPU or a GPU.

A GPT-NeoX model (rotary embeddings on a quarter of each head, parallel blocks, untied embeddings) learns
English from books, and copying from *stories*. A story is a sequence of chunks, each cut from one base
sequence at a random place. Repeats therefore occur at irregular distances, and no head can predict them by
attending a fixed number of tokens back. Training starts with short contexts, in which induction heads form
sooner, and ends with long ones.

    python experiments/train_bundled_model.py --corpus books.jsonl.gz --out runs/bundled

The corpus is one or more .txt, .jsonl or .jsonl.gz files (`text` field), or folders of them. To resume after
an interruption, run the same command again. Every batch has its own seed, so the result is the same.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bundled_model_data import Recipe, bigram_loss, encode, make_batch, train_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from mechlens.files import replacing
from mechlens.results.checkpoint import load_state, save_state
from mechlens.text.corpus import read_texts


@torch.no_grad()
def text_loss(model: GPTNeoXForCausalLM, tokens: Tensor, bos: int, context: int, limit: int) -> float:
    """Mean loss in nats per token over at most `limit` windows of BOS and `context - 1` tokens."""
    n = min(limit, len(tokens) // (context - 1))
    rows = tokens[: n * (context - 1)].long().view(n, context - 1)
    rows = F.pad(rows, (1, 0), value=bos).to(model.device)
    total = 0.0
    for part in rows.split(16):
        logits = model(part).logits.float()
        total += F.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return total / (n * (context - 1))


@torch.no_grad()
def copying(model: GPTNeoXForCausalLM, bos: int, valid: Tensor, length: int) -> dict[str, float]:
    """Accuracy on the second of two copies, and the highest induction and previous-token scores.

    These only monitor training; the figures in the model card are measured by mechlens.
    """
    generator = torch.Generator().manual_seed(10_007)
    half = valid[torch.randint(len(valid), (16, length), generator=generator)]
    rows = torch.cat([torch.full((16, 1), bos), half, half], dim=1).to(model.device)
    fast = model.config._attn_implementation
    model.set_attn_implementation("eager")
    out = model(rows, output_attentions=True)
    model.set_attn_implementation(fast)
    right = out.logits[:, length:-1].argmax(-1) == rows[:, length + 1 :]
    patterns = torch.stack(out.attentions).float()
    induction = patterns.diagonal(1 - length, -2, -1)[..., 2:].mean((1, 3))
    previous = patterns.diagonal(-1, -2, -1).mean((1, 3))
    return {
        "second_half_accuracy": right.float().mean().item(),
        "induction_score": induction.max().item(),
        "previous_token_score": previous.max().item(),
    }


MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""AdamW's state for each parameter."""


def save_model(model: GPTNeoXForCausalLM, folder: Path, step: int) -> None:
    """Save the weights in float16 as a Hugging Face directory."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {name: value.half().cpu().contiguous() for name, value in model.state_dict().items()}
    with replacing(folder / "model.safetensors") as part:
        save_file(half, part, metadata={"format": "pt", "step": str(step)})
    config = model.config.to_dict()
    for private in ("_attn_implementation", "_name_or_path", "use_cache"):
        config.pop(private, None)
    config |= {"architectures": ["GPTNeoXForCausalLM"], "dtype": "float16"}
    with replacing(folder / "config.json") as part:
        part.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_progress(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, recipe: Recipe
) -> None:
    """Save weights and optimizer state, once there has been a step."""
    if step:
        tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
        for name, parameter in model.named_parameters():
            tensors |= {f"{key}.{name}": optimizer.state[parameter][key] for key in MOMENTS}
        save_state(path, "training", tensors, {"model": {}, **dataclasses.asdict(recipe)}, step=step)


def load_progress(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe
) -> int:
    """Restore weights and optimizer state, and return their step."""
    names = [f"model.{name}" for name in model.state_dict()]
    names += [f"{key}.{name}" for key in MOMENTS for name, _ in model.named_parameters()]
    arguments = {"model": {}, **dataclasses.asdict(recipe)}
    tensors, step = load_state(path, "training", "a training run", names, arguments)
    model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {key: tensors[f"{key}.{name}"].to(parameter.device) for key in MOMENTS}
    return step


def build_model(recipe: Recipe, bos: int) -> GPTNeoXForCausalLM:
    torch.manual_seed(recipe.seed)
    config = GPTNeoXConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.d_model,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        intermediate_size=4 * recipe.d_model,
        max_position_embeddings=recipe.context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        hidden_act="gelu",
        use_parallel_residual=True,
        tie_word_embeddings=False,
        bos_token_id=bos,
        eos_token_id=bos,
    )
    return GPTNeoXForCausalLM(config)


def log_spaced(steps: int) -> set[int]:
    """0, 1, 2, 3, 4, 6, 8, 11, ...: powers of the square root of two, and the last step."""
    return {0, steps} | {round(2 ** (k / 2)) for k in range(2 * int(math.log2(max(2, steps))) + 1)}


def prepare(
    recipe: Recipe, corpus: list[Path], validation: list[Path], out: Path
) -> tuple[PreTrainedTokenizerFast, Tensor, Tensor]:
    """The tokenizer and token vectors, created once and kept in `out`."""
    cache = out / "tokens.safetensors"
    if not cache.exists():
        tokenizer = train_tokenizer(read_texts(corpus), recipe.vocab_size)
        train = encode(tokenizer, read_texts(corpus))
        if validation:
            held_out = encode(tokenizer, read_texts(validation))
        else:
            cut = len(train) - len(train) // 50
            train, held_out = train[:cut], train[cut:]
        tokenizer.save_pretrained(out)
        with replacing(cache) as part:
            save_file({"train": train, "validation": held_out.contiguous()}, part)
    tokens = load_file(cache)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out, local_files_only=True)
    shortest = min(len(tokens["train"]), len(tokens["validation"]))
    if shortest <= recipe.context:
        raise ValueError(
            f"the corpus is too small: the shorter part has {shortest} tokens; it needs more than the "
            f"context of {recipe.context}"
        )
    if len(tokenizer) > recipe.vocab_size:
        raise ValueError(
            f"the tokenizer in {out} has {len(tokenizer)} tokens, more than --vocab-size: use another --out"
        )
    return tokenizer, tokens["train"], tokens["validation"]


def train(
    recipe: Recipe,
    corpus: list[Path],
    validation: list[Path],
    out: Path,
    device: str,
    log_every: int = 250,
    stop_after: int | None = None,
) -> dict[str, Any]:
    """Train to the end, or for `stop_after` steps, and return the record of the run."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer, text, held_out = prepare(recipe, corpus, validation, out)
    bos = tokenizer.bos_token_id
    valid = torch.tensor([i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids])
    model = build_model(recipe, bos).to(device)
    optimizer = build_optimizer(model, recipe)
    state, record_path = out / "state.safetensors", out / "training.json"
    step = 0
    record: dict[str, Any] = {"log": [], "seconds": 0.0}
    if state.exists():
        step = load_progress(state, model, optimizer, recipe)
        record = json.loads(record_path.read_text())
        record["log"] = [row for row in record["log"] if row["step"] <= step]
    if "bigram_loss" not in record:
        record["bigram_loss"] = bigram_loss(text, held_out, recipe.vocab_size)
    record |= {
        "recipe": dataclasses.asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_tokens": len(text),
        "validation_tokens": len(held_out),
    }
    print(
        f"{record['parameters']:,} parameters, {len(text):,} tokens of text, "
        f"bigram validation loss {record['bigram_loss']:.3f}, from step {step} of {recipe.steps}",
        flush=True,
    )
    keep, begun, base_seconds, first_step = log_spaced(recipe.steps), time.time(), record["seconds"], step

    def save() -> None:
        record["seconds"] = base_seconds + time.time() - begun
        with replacing(record_path) as part:
            part.write_text(json.dumps(record, indent=1))
        save_progress(state, model, optimizer, step, recipe)

    with noting_signals() as interrupted:
        while True:
            if step in keep:
                save_model(model, out / "checkpoints" / f"step-{step:06d}", step)
            if step % log_every == 0 or step == recipe.steps:
                row = {"step": step} | evaluate(model, recipe, held_out, bos, valid)
                record["log"] = [r for r in record["log"] if r["step"] != step] + [row]
                save()
                speed = (step - first_step) * recipe.batch_tokens / max(1e-9, time.time() - begun)
                print(
                    f"step {step:6d}/{recipe.steps}  text {row['validation_loss']:.3f}  "
                    f"copy accuracy {row['second_half_accuracy']:.2f}  "
                    f"induction {row['induction_score']:.2f}  previous {row['previous_token_score']:.2f}  "
                    f"{speed:,.0f} tokens/s",
                    flush=True,
                )
            stopped = stop_after is not None and step - first_step >= stop_after
            if step == recipe.steps or interrupted or stopped:
                break
            train_step(model, optimizer, recipe.rate(step), make_batch(recipe, step, text, bos, valid))
            step += 1
        save()
    if step < recipe.steps:
        print(f"stopped at step {step}: run the same command to resume", flush=True)
        return record
    model.eval()
    record["validation_loss"] = text_loss(model, held_out, bos, recipe.context, limit=len(held_out))
    save()
    save_model(model, out, step)
    losses = f"validation loss {record['validation_loss']:.4f} nats, bigram {record['bigram_loss']:.4f}"
    print(f"{losses}; saved to {out}")
    return record


def build_optimizer(model: GPTNeoXForCausalLM, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW, with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )


def train_step(
    model: GPTNeoXForCausalLM, optimizer: torch.optim.Optimizer, rate: float, batch: Tensor
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    batch = batch.to(model.device)
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        logits = model(batch).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def evaluate(
    model: GPTNeoXForCausalLM, recipe: Recipe, held_out: Tensor, bos: int, valid: Tensor
) -> dict[str, float]:
    model.eval()
    found = {"validation_loss": text_loss(model, held_out, bos, recipe.context, 64)}
    found |= copying(model, bos, valid, min(50, (recipe.context - 1) // 2))
    model.train()
    return found


@contextlib.contextmanager
def noting_signals() -> Iterator[list[bool]]:
    """A list that becomes nonempty on Ctrl-C or SIGTERM; within the block they have no other effect."""
    noted: list[bool] = []
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.signal(kind, lambda *_: noted.append(True)) for kind in kinds}
    try:
        yield noted
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, nargs="+", required=True, help="text files or folders")
    parser.add_argument(
        "--validation", type=Path, nargs="*", default=[], help="default: the last 2%% of the corpus"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for weights, tokenizer and checkpoints"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--log-every", type=int, default=250, metavar="STEPS")
    for field in dataclasses.fields(Recipe):
        kind = type(field.default)
        parser.add_argument("--" + field.name.replace("_", "-"), type=kind, default=field.default)
    given = parser.parse_args(argv)
    recipe = Recipe(**{f.name: getattr(given, f.name) for f in dataclasses.fields(Recipe)})
    try:
        train(recipe, given.corpus, given.validation, given.out, given.device, given.log_every)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
