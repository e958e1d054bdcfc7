"""Train the small language model that ships with mechlens, from plain text, on a CPU or a GPU.

A GPT-NeoX model (rotary positions on a quarter of each head, parallel blocks, MLPs, untied
embeddings) learns two things at once: English from the given books, and copying from *stories*.
A story is a string of chunks cut from one base string at random places, so whatever recurs does so
at irregular distances and no head can win by attending a fixed number of tokens back. Short
contexts come first, because there induction heads form soonest, and long ones at the end.

    python experiments/train_bundled_model.py --corpus books.jsonl.gz --out runs/bundled

The corpus is one or more .txt, .jsonl or .jsonl.gz files (`text` field), or folders of them.
Run the same command again to resume after an interruption: the result is the one an uninterrupted
run gives, because every batch is drawn from its own seed. Needs torch, transformers, tokenizers
and safetensors only.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

BOS = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that shapes the weights, apart from the text itself."""

    vocab_size: int = 2048
    n_layers: int = 4
    d_model: int = 192
    n_heads: int = 6
    context: int = 512
    steps: int = 11000
    batch_tokens: int = 2048
    learning_rate: float = 3e-3
    warmup: int = 200
    decay: float = 4 / 11  # share of the steps, at the end, over which the rate falls to zero
    weight_decay: float = 0.05
    short_until: float = 0.28  # share of the steps with a context of 64, mostly stories; see `stage`
    long_from: float = 0.70  # share of the steps before the whole context; 256 in between
    text_share: float = 0.30  # of a batch, in the short stage
    final_text_share: float = 0.75  # later
    seed: int = 0

    def stage(self, step: int) -> tuple[int, float]:
        """(context, share of text) at a step: short and mostly stories first, long text later."""
        done = step / max(1, self.steps)
        if done < self.short_until:
            return min(64, self.context), self.text_share
        if done < self.long_from:
            return min(256, self.context), self.final_text_share
        return self.context, self.final_text_share

    def rate(self, step: int) -> float:
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        fall = min(1.0, (self.steps - step) / max(1.0, self.decay * self.steps))
        return self.learning_rate * rise * fall


# -- text ------------------------------------------------------------------------------------------


def documents(paths: list[Path]) -> Iterator[str]:
    """The documents of text and JSON-lines files, folders searched in name order."""
    for path in paths:
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.name.endswith((".txt", ".jsonl", ".jsonl.gz")))
            if not found:
                raise SystemExit(f"{path} holds no .txt, .jsonl or .jsonl.gz file")
            yield from documents(found)
        elif path.name.endswith((".jsonl", ".jsonl.gz")):
            opener = gzip.open if path.name.endswith(".gz") else open
            with opener(path, "rt", encoding="utf-8") as lines:
                for line in lines:
                    yield json.loads(line)["text"]
        elif path.exists():
            yield path.read_text(encoding="utf-8")
        else:
            raise SystemExit(f"no such corpus: {path}")


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose only special token begins a sequence and ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, clean_up_tokenization_spaces=False
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: Iterator[str]) -> Tensor:
    """All documents as one int32 vector, each followed by the end-of-text token."""
    ids: list[int] = []
    for text in texts:
        # by paragraph: the tokenizer needs memory for several times what it is given
        for piece in text.splitlines(keepends=True):
            ids.extend(tokenizer.backend_tokenizer.encode(piece).ids)
        ids.append(tokenizer.bos_token_id)
    return torch.tensor(ids, dtype=torch.int32)


def bigram_loss(train: Tensor, held_out: Tensor, vocab_size: int) -> float:
    """Mean loss in nats of a bigram model with absolute discounting and back-off, fitted on `train`.

    The discount is n1 / (n1 + 2 n2) (Ney, Essen and Kneser 1994); what it frees goes to the unigram
    distribution with one added to each count.
    """
    unigram = torch.bincount(train.long(), minlength=vocab_size).double() + 1
    unigram /= unigram.sum()
    pairs, counts = (train[:-1].long() * vocab_size + train[1:].long()).unique(return_counts=True)
    counts = counts.double()
    n1, n2 = float((counts == 1).sum()), float((counts == 2).sum())
    discount = n1 / (n1 + 2 * n2) if n1 + n2 else 0.0
    first = pairs // vocab_size
    total = torch.zeros(vocab_size, dtype=torch.double).index_add_(0, first, counts)
    kinds = torch.zeros(vocab_size, dtype=torch.double).index_add_(0, first, torch.ones_like(counts))
    before, after = held_out[:-1].long(), held_out[1:].long()
    wanted = before * vocab_size + after
    place = torch.searchsorted(pairs, wanted).clamp(max=len(pairs) - 1)
    seen = torch.where(pairs[place] == wanted, counts[place] - discount, 0.0)
    freed = torch.where(total[before] > 0, discount * kinds[before], 1.0)
    probability = (seen + freed * unigram[after]) / total[before].clamp(min=1)
    return float(-probability.log().mean())


# -- batches ---------------------------------------------------------------------------------------


def story(length: int, base: Tensor, mean_chunk: float, generator: torch.Generator) -> Tensor:
    """`length` tokens made of chunks of `base`, each begun at a random place of it.

    The first chunk starts at the beginning. Chunks have at least two tokens, so that a copy never
    pays off before its second token is known, and geometric lengths beyond that.
    """
    pieces: list[Tensor] = []
    have = start = 0
    while have < length:
        u = torch.rand(2, generator=generator)
        more = int(math.log(max(float(u[0]), 1e-9)) / math.log(1 - 1 / max(1.5, mean_chunk - 1)))
        piece = base[start : start + 2 + more]
        pieces.append(piece)
        have += len(piece)
        start = int(float(u[1]) * (len(base) - 1))
    return torch.cat(pieces)[:length]


def make_batch(recipe: Recipe, step: int, text: Tensor, bos: int, valid: Tensor) -> Tensor:
    """The token ids `[batch, context]` of one step, a function of the recipe, the step and the text."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    context, text_share = recipe.stage(step)
    rows = []
    for _ in range(max(1, recipe.batch_tokens // context)):
        u = torch.rand(3, generator=generator).tolist()
        if u[0] < text_share:
            at = torch.randint(len(text) - context, (1,), generator=generator).item()
            row = text[at : at + context - 1].long()
        else:
            # log-uniform: repeats at every distance up to half the context, chunks of every length
            longest = max(4, context // 2)
            n_base = int(math.exp(math.log(4) + u[1] * (math.log(longest) - math.log(4))))
            mean_chunk = math.exp(math.log(3) + u[2] * (math.log(max(4, n_base)) - math.log(3)))
            if torch.rand(1, generator=generator).item() < 0.8:
                base = valid[torch.randint(len(valid), (n_base,), generator=generator)]
            else:
                at = torch.randint(len(text) - n_base, (1,), generator=generator).item()
                base = text[at : at + n_base].long()
            row = story(context - 1, base, mean_chunk, generator)
        rows.append(torch.cat([torch.tensor([bos]), row]))
    return torch.stack(rows)


# -- measuring while training ----------------------------------------------------------------------


@torch.no_grad()
def text_loss(model: GPTNeoXForCausalLM, tokens: Tensor, bos: int, context: int, limit: int) -> float:
    """Mean loss in nats per token over windows of `[BOS, context - 1 tokens]`, at most `limit` windows."""
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
    """Accuracy on the second of two copies, and the best induction and previous-token scores.

    A watch over the run only: the figures of the model card are measured by mechlens.
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


# -- files -----------------------------------------------------------------------------------------


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    whole = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    write_atomically(path, lambda part: save_file(whole, part, metadata=metadata))


def save_model(model: GPTNeoXForCausalLM, folder: Path, step: int) -> None:
    """The weights in float16 as a Hugging Face directory."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {k: v.half() for k, v in model.state_dict().items()}
    save_tensors(folder / "model.safetensors", half, {"format": "pt", "step": str(step)})
    config = model.config.to_dict()
    for private in ("_attn_implementation", "_name_or_path", "use_cache"):
        config.pop(private, None)
    config |= {"architectures": ["GPTNeoXForCausalLM"], "dtype": "float16"}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_atomically(folder / "config.json", lambda part: part.write_text(text))


def save_state(
    path: Path, model: torch.nn.Module, optimiser: torch.optim.Optimizer, step: int, recipe: Recipe
) -> None:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimiser.state.get(parameter, {}).items():
            tensors[f"optimiser.{key}.{name}"] = value
    header = {"step": str(step), "recipe": json.dumps(dataclasses.asdict(recipe), sort_keys=True)}
    save_tensors(path, tensors, header)


def load_state(path: Path, model: torch.nn.Module, optimiser: torch.optim.Optimizer, recipe: Recipe) -> int:
    with safe_open(path, "pt") as file:
        header = file.metadata()
    theirs = json.loads(header["recipe"])
    ours = dataclasses.asdict(recipe)
    if theirs != ours:
        other = sorted(k for k in ours if theirs.get(k) != ours[k])
        raise SystemExit(
            f"{path.parent} was begun with another recipe ({', '.join(other)} differ): "
            "use the same options to resume it, or another --out"
        )
    tensors = load_file(path)
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    for name, parameter in model.named_parameters():
        state = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"optimiser.{key}.{name}" in tensors:
                state[key] = tensors[f"optimiser.{key}.{name}"].to(parameter.device)
        if state:
            optimiser.state[parameter] = state
    return int(header["step"])


# -- the run ---------------------------------------------------------------------------------------


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
    """Tokenizer and token vectors, made once and kept in `out`."""
    cache = out / "tokens.safetensors"
    if not cache.exists():
        tokenizer = train_tokenizer(documents(corpus), recipe.vocab_size)
        train = encode(tokenizer, documents(corpus))
        if validation:
            held_out = encode(tokenizer, documents(validation))
        else:
            cut = len(train) - len(train) // 50
            train, held_out = train[:cut], train[cut:]
        tokenizer.save_pretrained(out)
        save_tensors(cache, {"train": train, "validation": held_out}, {})
    tokens = load_file(cache)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out, local_files_only=True)
    shortest = min(len(tokens["train"]), len(tokens["validation"]))
    if shortest <= recipe.context:
        raise SystemExit(
            f"the corpus is too small: its shorter part has {shortest} tokens, "
            f"and a context of {recipe.context} needs more than that"
        )
    if len(tokenizer) > recipe.vocab_size:
        raise SystemExit(
            f"{out} holds a tokenizer of {len(tokenizer)} tokens, more than --vocab-size: use another --out"
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
    """Train to the end (or for `stop_after` steps of this call) and return the record of the run."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer, text, held_out = prepare(recipe, corpus, validation, out)
    bos = tokenizer.bos_token_id
    valid = torch.tensor([i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids])
    model = build_model(recipe, bos).to(device)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )
    state, record_path = out / "state.safetensors", out / "training.json"
    step = 0
    record: dict[str, Any] = {"log": [], "seconds": 0.0}
    if state.exists():
        step = load_state(state, model, optimiser, recipe)
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

    interrupted = []
    previous_handlers = {
        kind: signal.signal(kind, lambda *_: interrupted.append(True))
        for kind in (signal.SIGINT, signal.SIGTERM)
    }
    keep, begun, base_seconds, first_step = log_spaced(recipe.steps), time.time(), record["seconds"], step

    def checkpoint() -> None:
        record["seconds"] = base_seconds + time.time() - begun
        write_atomically(record_path, lambda part: part.write_text(json.dumps(record, indent=1)))
        save_state(state, model, optimiser, step, recipe)

    try:
        while True:
            if step in keep:
                save_model(model, out / "checkpoints" / f"step-{step:06d}", step)
            if step % log_every == 0 or step == recipe.steps:
                model.eval()
                row = {"step": step, "validation_loss": text_loss(model, held_out, bos, recipe.context, 64)}
                row |= copying(model, bos, valid, min(50, (recipe.context - 1) // 2))
                model.train()
                record["log"] = [r for r in record["log"] if r["step"] != step] + [row]
                checkpoint()
                speed = (step - first_step) * recipe.batch_tokens / max(1e-9, time.time() - begun)
                print(
                    f"step {step:6d}/{recipe.steps}  text {row['validation_loss']:.3f}  "
                    f"copy accuracy {row['second_half_accuracy']:.2f}  "
                    f"induction {row['induction_score']:.2f}  previous {row['previous_token_score']:.2f}  "
                    f"{speed:,.0f} tokens/s",
                    flush=True,
                )
            if (
                step == recipe.steps
                or interrupted
                or (stop_after is not None and step - first_step >= stop_after)
            ):
                break
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate(step)
            batch = make_batch(recipe, step, text, bos, valid).to(device)
            with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
                logits = model(batch).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            step += 1
        checkpoint()
    finally:
        for kind, handler in previous_handlers.items():
            signal.signal(kind, handler)
    if step < recipe.steps:
        print(f"stopped at step {step}: run the same command again to go on", flush=True)
        return record
    model.eval()
    record["validation_loss"] = text_loss(model, held_out, bos, recipe.context, limit=len(held_out))
    checkpoint()
    save_model(model, out, step)
    losses = f"validation loss {record['validation_loss']:.4f} nats, bigram {record['bigram_loss']:.4f}"
    print(f"{losses}; saved to {out}")
    return record


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, nargs="+", required=True, help="text files or folders")
    parser.add_argument(
        "--validation", type=Path, nargs="*", default=[], help="default: the last 2%% of the corpus"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for weights, tokenizer, checkpoints and state"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--log-every", type=int, default=250, metavar="STEPS")
    for field in dataclasses.fields(Recipe):
        kind = type(field.default)
        parser.add_argument("--" + field.name.replace("_", "-"), type=kind, default=field.default)
    given = parser.parse_args(argv)
    recipe = Recipe(**{f.name: getattr(given, f.name) for f in dataclasses.fields(Recipe)})
    train(recipe, given.corpus, given.validation, given.out, given.device, given.log_every)


if __name__ == "__main__":
    main()
