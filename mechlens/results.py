"""What analyses return: frozen dataclasses that explain themselves, make tables, save and load.

A result is one `.safetensors` file: its tensors are the file's tensors, everything else is JSON in
the file's header. Files are written beside their target and moved into place, so a save that is
killed leaves the old file whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_type_hints

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1
R = TypeVar("R", bound="Result")


def head_label(layer: int, head: int) -> str:
    """A head's name in text, such as `L5H5`."""
    return f"L{layer}H{head}"


def parse_head(head: str | tuple[int, int]) -> tuple[int, int]:
    """(layer, head) of a head given as that, as `L5H5` or as `5.5`.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(head, str):
        found = re.fullmatch(r"L?(\d+)[H.](\d+)", head.strip(), re.IGNORECASE)
        if found:
            return int(found[1]), int(found[2])
    elif len(head) == 2:
        return int(head[0]), int(head[1])
    raise ValueError(f"a head is written L5H5, 5.5 or (5, 5), but this is {head!r}")


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """Which model a result was measured on, and in what state."""

    name: str
    """Bundled name, hub name or the directory's last part."""
    revision: str | None
    """Hub revision or checkpoint, where one was asked for."""
    architecture: str
    """The Hugging Face architecture, such as `GPTNeoXForCausalLM`; `attention-only` for toy models."""
    engine: str
    """`HookedTransformer` or `TransformerBridge`."""
    engine_version: str
    """TransformerLens's version."""
    processing: bool | None
    """Whether LayerNorm was folded and weights were centred; None where it cannot be told."""
    dtype: str
    """Of the weights, such as `float32`."""
    n_layers: int
    n_heads: int
    d_model: int
    d_vocab: int
    n_ctx: int


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Result:
    """Base of all results. Two are equal when every field is, nan counting as equal to nan."""

    model: ModelInfo

    types: ClassVar[dict[str, type[Result]]] = {}

    def __init_subclass__(cls) -> None:
        Result.types[cls.__name__] = cls

    def to_dataframe(self) -> pd.DataFrame:
        """A tidy table with one observation per row."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result as one `.safetensors` file, whole or not at all.

        Args:
            path: the file; its folder must exist, and the ending must be `.safetensors`.

        Returns:
            The path written.

        Raises:
            ValueError: another ending, or no such folder.
        """
        target = Path(path)
        if target.suffix != ".safetensors":
            raise ValueError(f"results are saved as .safetensors files, but the path is {target}")
        if not target.parent.is_dir():
            raise ValueError(f"cannot save to {target}: there is no folder {target.parent}")
        tensors: dict[str, Tensor] = {}
        plain: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                tensors[field.name] = value
            elif _is_tensor_dict(value):
                plain[field.name] = {"tensors": list(value)}
                tensors |= {f"{field.name}/{key}": tensor for key, tensor in value.items()}
            elif dataclasses.is_dataclass(value) and not isinstance(value, type):
                plain[field.name] = dataclasses.asdict(value)
            else:
                plain[field.name] = value
        header = {"type": type(self).__name__, "format": FORMAT, "fields": plain}
        whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        with replacing(target) as part:
            save_file(whole, part, metadata={"mechlens": json.dumps(header)})
        return target

    @classmethod
    def load(cls: type[R], path: str | os.PathLike[str]) -> R:
        """Read a result of this type.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged, no result of mechlens, or one of another type.
        """
        result = load(path)
        if not isinstance(result, cls):
            raise ValueError(f"{path} holds a {type(result).__name__}, not a {cls.__name__}")
        return result

    def __repr__(self) -> str:
        """The fields in one line, tensors by their shape."""
        parts = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                shown = f"<{'x'.join(map(str, value.shape))}>"
            elif _is_tensor_dict(value):
                shown = (
                    "{" + ", ".join(f"{k}: <{'x'.join(map(str, v.shape))}>" for k, v in value.items()) + "}"
                )
            else:
                shown = repr(value.name if isinstance(value, ModelInfo) else value)
            parts.append(f"{field.name}={shown}")
        return f"{type(self).__name__}({', '.join(parts)})"

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(
            _equal(getattr(self, field.name), getattr(other, field.name))
            for field in dataclasses.fields(self)
        )

    __hash__ = None  # type: ignore[assignment]  # results hold tensors, which have no hash by value


def load(path: str | os.PathLike[str]) -> Result:
    """Read whatever result a file holds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or no result of mechlens.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such result file: {path}")
    try:
        with safe_open(path, "pt") as file:
            header_text = (file.metadata() or {}).get("mechlens")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no whole .safetensors file ({error}): save it again") from error
    if header_text is None:
        raise ValueError(f"{path} is a .safetensors file, but not a result that mechlens saved")
    try:
        header = json.loads(header_text)
        kind, version, fields = header["type"], header["format"], header["fields"]
        cls = Result.types.get(kind)
        if cls is not None and version <= FORMAT:
            return cls(**_values(cls, fields, tensors))
    except (LookupError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is damaged: its header is not that of a result ({error!r}); save it again"
        ) from error
    raise ValueError(f"{path} holds a {kind}, which this version of mechlens does not know")


def _values(cls: type[Result], fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of a result, from the header and the tensors of its file."""
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        name = field.name
        if name in tensors:
            values[name] = tensors[name]
            continue
        stored = fields[name]
        keys = stored["tensors"] if isinstance(stored, dict) and set(stored) == {"tensors"} else None
        if keys is not None and all(f"{name}/{key}" in tensors for key in keys):
            values[name] = {key: tensors[f"{name}/{key}"] for key in keys}
        elif dataclasses.is_dataclass(hints[name]):
            values[name] = hints[name](**stored)
        else:
            values[name] = _tuples(stored)
    return values


def write_table(table: pd.DataFrame, path: Path) -> Path:
    """Write a table as `.csv`, whole or not at all."""
    with replacing(path) as part:
        table.to_csv(part, index=False)
    return path


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a file beside `target` to write, and move it there when the block ends without an exception.

    So the target is the old file or the whole new one at every moment.
    """
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.chmod(0o666 & ~_umask())
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _is_tensor_dict(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(v, Tensor) for v in value.values())


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples they were saved from."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        a, b = a.cpu(), b.cpu()
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        same = a == b
        if a.is_floating_point():
            same |= a.isnan() & b.isnan()
        return bool(same.all())
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return list(a) == list(b) and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b or (a != a and b != b))


def half_means(
    values: Float[Tensor, "*sequence pos"], half: str, *, seq_len: int, prepend_bos: bool
) -> Float[Tensor, "*sequence"]:
    """Mean over the positions that predict the first or the second copy's tokens.

    Args:
        values: per position i, of the token i + 1; the last position predicts nothing.
        half: `first` or `second`.
    """
    second = int(prepend_bos) + seq_len
    positions = slice(0, second - 1) if half == "first" else slice(second - 1, -1)
    return values[..., positions].mean(-1)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RepeatedTokenPerformance(Result):
    """How well a model predicts random tokens the first and the second time they come."""

    tokens: Int[Tensor, "seed batch pos"]
    """What the model read: BOS (where there is one), the random tokens, the same again."""
    log_prob: Float[Tensor, "seed batch pos"]
    """Log-probability in nats of the right token *after* each position; nan at the last one."""
    correct: Bool[Tensor, "seed batch pos"]
    """Whether the most likely token after each position was the right one; False at the last one."""
    estimates: dict[str, tuple[float, float, float]]
    """(mean, low, high) of `first_half_log_prob`, `second_half_log_prob` in nats and of
    `first_half_accuracy`, `second_half_accuracy` in [0, 1]."""
    single_draws: dict[str, tuple[float, float]]
    """For each estimate, the interval that holds 99% of single sequences."""
    seq_len: int
    """Random tokens in one copy."""
    seeds: tuple[int, ...]
    prepend_bos: bool
    confidence: float
    """Coverage of the intervals in `estimates`, by bootstrap over sequences."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row per sequence and position: seed, sequence, pos, token, log_prob, correct, half.

        `half` is 1 or 2: the copy that the *predicted* token belongs to. The last position predicts
        nothing and is left out.
        """
        import pandas as pd

        n_pos = self.tokens.shape[-1]
        first = int(self.prepend_bos)
        rows = [
            (seed, row, pos, token, log_prob, correct, 1 if pos + 1 < first + self.seq_len else 2)
            for seed, tokens, log_probs, corrects in zip(
                self.seeds, self.tokens.tolist(), self.log_prob.tolist(), self.correct.tolist(), strict=True
            )
            for row in range(len(tokens))
            for pos, (token, log_prob, correct) in enumerate(
                zip(tokens[row], log_probs[row], corrects[row], strict=True)
            )
            if pos < n_pos - 1
        ]
        return pd.DataFrame(rows, columns=["seed", "sequence", "pos", "token", "log_prob", "correct", "half"])


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class HeadScores(Result):
    """Scores of every attention head, per sequence, with intervals and nulls."""

    scores: dict[str, Float[Tensor, "seed batch layer head"]]
    """By kind of score. Scores of patterns lie in [0, 1], `copying_score` in [-1, 1]."""
    nulls: dict[str, Float[Tensor, "seed batch layer head"]]
    """The same measure where its cause is taken away; see `score_heads`. A kind may have none."""
    intervals: dict[str, Float[Tensor, "bound layer head"]]
    """Lower and upper bound of each mean score, by bootstrap over sequences."""
    tokens: dict[str, Int[Tensor, "seed batch pos"]]
    """What the model read, by kind of sequence: `repeated`, `unrelated`, ..."""
    seq_len: int | None
    """Random tokens in one copy; None for a prompt that the user gave."""
    jitter: int
    """Most random tokens that came between the copies; 0 is a fixed period."""
    seeds: tuple[int, ...]
    """Empty for a prompt that the user gave."""
    prepend_bos: bool
    confidence: float
    """Coverage of `intervals`."""

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.scores)

    def mean(self, kind: str) -> Float[Tensor, "layer head"]:
        """Mean score over all sequences that have one; nan where none has."""
        return self._of(self.scores, kind).nanmean((0, 1))

    def null(self, kind: str) -> Float[Tensor, "layer head"]:
        """Mean null over all sequences that have one; nan where none has."""
        return self._of(self.nulls, kind).nanmean((0, 1))

    def _of(self, values: Mapping[str, Tensor], kind: str) -> Tensor:
        if kind not in values:
            raise ValueError(f"no {kind!r} in this result, which has {', '.join(values) or 'none'}")
        return values[kind]

    def ranked(self, kind: str) -> Iterator[tuple[tuple[int, int], float]]:
        """Every ((layer, head), mean score), the highest first; heads with no score are left out."""
        mean = self.mean(kind)
        n_heads = mean.shape[1]
        flat = mean.flatten()
        for index in flat.argsort(descending=True, stable=True).tolist():
            if not torch.isnan(flat[index]):
                yield (index // n_heads, index % n_heads), float(flat[index])

    def to_dataframe(self) -> pd.DataFrame:
        """One row per kind and head: kind, layer, head, label, score, low, high, null, sequences."""
        import pandas as pd

        rows = []
        for kind in self.kinds:
            mean, (low, high) = self.mean(kind), self.intervals[kind]
            null = self.null(kind) if kind in self.nulls else torch.full_like(mean, torch.nan)
            sequences = self.scores[kind].shape[0] * self.scores[kind].shape[1]
            for layer in range(mean.shape[0]):
                for head in range(mean.shape[1]):
                    numbers = [float(each[layer, head]) for each in (mean, low, high, null)]
                    rows.append((kind, layer, head, head_label(layer, head), *numbers, sequences))
        columns = ["kind", "layer", "head", "label", "score", "low", "high", "null", "sequences"]
        return pd.DataFrame(rows, columns=columns)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AttentionPatterns(Result):
    """The attention patterns of some heads on one sequence."""

    tokens: Int[Tensor, " pos"]
    token_strings: tuple[str, ...]
    heads: tuple[tuple[int, int], ...]
    """(layer, head) of each pattern."""
    patterns: Float[Tensor, "pattern dest src"]
    """Attention after softmax; each row sums to 1."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row per head and pair of positions dest >= src: layer, head, dest, src, attention."""
        import pandas as pd

        n_pos = len(self.token_strings)
        dest, src = torch.tril_indices(n_pos, n_pos)
        tables = [
            pd.DataFrame(
                {
                    "layer": layer,
                    "head": head,
                    "dest": dest.numpy(),
                    "src": src.numpy(),
                    "attention": pattern[dest, src].float().cpu().numpy(),
                }
            )
            for (layer, head), pattern in zip(self.heads, self.patterns, strict=True)
        ]
        return pd.concat(tables, ignore_index=True)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LogitLensResult(Result):
    """What each layer of a model would say about the next token, if it were the last."""

    tokens: Int[Tensor, "batch pos"]
    """What the model read."""
    positions: tuple[int, ...]
    """The positions that were read out, in the order of the axis `read`."""
    rows: tuple[str, ...]
    """`embed`, then the layers by number."""
    component: str
    """`resid_post`, `attn_out`, ...: what was read; the row `embed` is always block 0's `resid_pre`."""
    onto_stream: bool
    """Whether a sub-block's output was read together with the stream it was added to."""
    decoder: str
    """`final_norm`, `norm_only`, `none`, or the name of a function."""
    top_ids: Int[Tensor, "row batch read k"]
    """The most likely next tokens, the likeliest first."""
    top_probabilities: Float[Tensor, "row batch read k"]
    entropy: Float[Tensor, "row batch read"]
    """Nats."""
    kl_final: Float[Tensor, "row batch read"]
    """KL(the model's own distribution || this row), nats."""
    kl_input: Float[Tensor, "row batch read"]
    """KL(the row `embed` || this row), nats; nan where the unembedding is not tied to the embedding, because
    then the row `embed` says nothing of the input token."""
    final_ids: Int[Tensor, "batch read"]
    """The model's own most likely token."""
    log_prob: dict[str, Float[Tensor, "row batch read"]]
    """Of the tokens `final` (those above), `input` (the token at the position itself), `next` (the token that
    really follows; nan at the last position), and each target by its id as text; nats."""
    rank: dict[str, Float[Tensor, "row batch read"]]
    """Of the same tokens; 1 is the most likely, ties count strictly larger logits. nan as above."""
    strings: dict[str, str]
    """The text of every token above, by its id as text."""
    prepend_bos: bool

    def to_dataframe(self) -> pd.DataFrame:
        """One row per row of the lens, sequence and position: row, sequence, pos, token, top, probability,
        entropy, kl_final, kl_input, and rank and log-probability of every token that was asked for."""
        import pandas as pd

        n_rows, batch, read = self.entropy.shape
        index = pd.MultiIndex.from_product(
            [self.rows, range(batch), self.positions], names=["row", "sequence", "pos"]
        )
        columns: dict[str, Any] = {
            "token": self.texts(self.tokens[:, list(self.positions)].expand(n_rows, -1, -1)),
            "top": self.texts(self.top_ids[..., 0]),
            "probability": self.top_probabilities[..., 0],
            "entropy": self.entropy,
            "kl_final": self.kl_final,
            "kl_input": self.kl_input,
            **{f"rank_{name}": values for name, values in self.rank.items()},
            **{f"log_prob_{name}": values for name, values in self.log_prob.items()},
        }
        flat = {
            name: values if isinstance(values, list) else values.reshape(n_rows * batch * read).numpy()
            for name, values in columns.items()
        }
        return pd.DataFrame(flat, index=index).reset_index()

    def texts(self, ids: Int[Tensor, "..."]) -> list[str]:
        """The texts of ids, in one flat list."""
        return [self.strings[str(i)] for i in ids.flatten().tolist()]


NOT_JUDGED = "not judged"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One published figure beside the measured one."""

    claim: str
    """What is claimed, such as `induction_score of L5H5`."""
    published: float | str
    measured: float | str
    low: float | None
    """Lower end of what counts as agreement; None for a claim that is no number."""
    high: float | None
    verdict: str
    """`reproduced`, `not reproduced`, or `not judged` where too little was measured."""
    source: str
