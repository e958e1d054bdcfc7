"""The logit lens: what vectors of the residual stream predict as the next token."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechlens.arguments import check_type
from mechlens.errors import ArgumentError
from mechlens.results.base import Result, column_name, row_place
from mechlens.results.columns import Column
from mechlens.text.display import visible_token

if TYPE_CHECKING:
    import pandas as pd

STATISTICS = ("entropy", "kl_final", "kl_input", "log_prob", "rank")
"""What `logit_lens` computes for each row besides its most likely tokens."""
OWN_TOKENS = {
    "final": "the model's final guess",
    "input": "the input token",
    "next": "the token that follows",
}
"""The tokens whose rank and log-probability every lens has."""
_SUBLAYERS = {("attn_out", "mlp_out"), ("resid_mid", "resid_post")}
_SHARED = ("model", "tokens", "mask", "positions", "rows", "decoder", "statistics")
"""Fields in which two lenses must agree to be interleaved."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LogitLensResult(Result):
    """What each layer of a model would predict as the next token if it were the last."""

    tokens: Int[Tensor, "batch pos"]
    """What the model read."""
    mask: Bool[Tensor, "batch pos"]
    """False where a position is padding; all statistics are nan there, and `top_ids` are meaningless."""
    positions: tuple[int, ...]
    """The positions that were read out, in order along the axis `read`."""
    context_length: Int[Tensor, "batch read"]
    """Tokens that the model saw up to and including each position; 0 for padding. A row longer than the
    context is run in windows that begin half a context before the first token read out of them."""
    rows: tuple[str, ...]
    """`embed`, then the layers by number, or heads such as `L0H3`."""
    read: str
    """What was read: `resid_post`, `attn_out`, `resid_pre+attn_out`, `result` (heads), ...; the row `embed`
    is always block 0's `resid_pre`."""
    decoder: str
    """`final_norm`, `norm_only`, `none`, `tuned_lens`, `LastBlocks(1)`, or the name of a function."""
    statistics: tuple[str, ...]
    """Which of `entropy`, `kl_final`, `kl_input`, `log_prob` and `rank` were computed; the others are nan."""
    top_ids: Int[Tensor, "row batch read k"]
    """Next tokens, most likely first."""
    top_probabilities: Float[Tensor, "row batch read k"]
    entropy: Float[Tensor, "row batch read"]
    """Nats."""
    kl_final: Float[Tensor, "row batch read"]
    """KL(the model's own distribution || this row), nats."""
    kl_input: Float[Tensor, "row batch read"]
    """KL(the row `embed` || this row), nats; nan if the unembedding is not tied to the embedding, because the
    row `embed` then says nothing about the input token."""
    final_ids: Int[Tensor, "batch read"]
    """The model's own most likely token."""
    log_prob: dict[str, Float[Tensor, "row batch read"]]
    """Log-probability in nats of the tokens `final` (`final_ids`), `input` (the token at the position
    itself), `next` (the token that follows; nan at the last position) and each target by its name."""
    rank: dict[str, Float[Tensor, "row batch read"]]
    """Rank of the same tokens: 1 plus the number of strictly larger logits. nan as above."""
    target_ids: dict[str, Int[Tensor, "batch read"]]
    """The targets by their names in `log_prob` and `rank`."""
    strings: dict[str, str]
    """The text of every token above, keyed by its id as a string."""
    prepend_bos: bool

    columns: ClassVar = (
        Column("token", "token read"),
        Column("guess", "top guess", help="The row's most likely next token."),
        Column("probability", "probability of the top guess"),
        Column("entropy", unit="nats", help="How uncertain the row is: 0 if one token is certain."),
        Column("kl_final", "KL(final || layer)", "nats", help="0 if the row predicts what the model does."),
        Column("kl_input", "KL(input || layer)", "nats", help="Distance from the distribution of row embed."),
    )

    @property
    def title(self) -> str:
        """What was read and how, in one line."""
        return f"Logit lens: {', '.join(self.facts)}"

    @property
    def facts(self) -> tuple[str, ...]:
        """What was read and how, in a few words each."""
        decoder = () if self.decoder == "final_norm" else (f"decoder {self.decoder}",)
        embed = ("embed: the stream at its start, not a head",) if self.unit == "head" else ()
        return (self.model.name, self.read, *decoder, *embed)

    @property
    def unit(self) -> str:
        """What a row stands for: a layer, a head or a sublayer."""
        if self.read.split("+")[-1] == "result":
            return "head"
        return "sublayer" if " and " in self.read else "layer"

    def column(self, name: str) -> Column:
        """One column of `to_dataframe()`; ranks and log-probabilities name their token."""
        for kind in ("rank", "log_prob", "probability"):
            token = self.token_of(name, kind)
            if token is not None:
                whose = OWN_TOKENS.get(token) or visible_token(token)
                unit = "nats" if kind == "log_prob" else ""
                words = kind.replace("log_prob", "log-probability")
                return Column(name, f"{words} of {whose}", unit, digits=0 if kind == "rank" else 3)
        return super().column(name)

    def token_of(self, name: str, kind: str) -> str | None:
        """The token of a column such as `rank_next` or `rank_·Paris` (also as `rank_ Paris`)."""
        given = name.removeprefix(f"{kind}_")
        if given == name:
            return None
        return next((token for token in self.rank if given in (token, column_name(token))), None)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per row of the lens, sequence and position: row, layer (-1 for `embed`), head (where heads
        were read; missing for `embed`), sequence, pos, token (read there), guess (the most likely next
        token), probability (of the guess), entropy, kl_final, kl_input, and `rank_` and `log_prob_` of
        `final`, `input`, `next` and each target. Padding is left out.

        A target's columns have its name, with `·` for each space: `rank_·Paris`. A literal `·`, a backslash
        and whatever does not print become their Python escapes, so that no two targets share a column.
        """
        import pandas as pd

        n_rows, batch, read, _ = self.top_ids.shape
        index = pd.MultiIndex.from_product(
            [self.rows, range(batch), self.positions], names=["row", "sequence", "pos"]
        )
        columns: dict[str, Any] = {
            "token": self.texts(self.tokens[:, list(self.positions)].expand(n_rows, -1, -1)),
            "guess": self.texts(self.top_ids[..., 0]),
            "probability": self.top_probabilities[..., 0],
            **{name: getattr(self, name) for name in STATISTICS[:3] if name in self.statistics},
            **{
                f"{kind}_{column_name(name)}": values
                for kind in ("rank", "log_prob")
                if kind in self.statistics
                for name, values in getattr(self, kind).items()
            },
        }
        flat = {
            name: values if isinstance(values, list) else values.reshape(n_rows * batch * read).numpy()
            for name, values in columns.items()
        }
        table = pd.DataFrame(flat, index=index)
        real = self.mask[:, list(self.positions)].expand(n_rows, -1, -1)
        table = table[real.reshape(-1).numpy()].reset_index()
        places = {row: row_place(row) for row in self.rows}
        table.insert(1, "layer", [places[row][0] for row in table["row"]])
        if self.unit == "head":
            table.insert(2, "head", pd.Series([places[row][1] for row in table["row"]], dtype="Int64"))
        return table

    def summary(self, top: int = 10) -> pd.DataFrame:
        """The last `top` rows of the lens at the last position of the first sequence, last row first."""
        table = self.to_dataframe()
        last = table[(table["sequence"] == 0) & (table["pos"] == self.shown_positions(0)[-1])]
        names = ("row", "guess", "probability", "entropy", "kl_final")
        ranks = [f"rank_{column_name(name)}" for name in self.target_ids]
        return last[[name for name in (*names, *ranks) if name in last]][::-1].head(top)

    def to_json(self) -> dict[str, Any]:
        """Everything but tensors, and the table's rows, each with its `guesses`: the most likely tokens."""
        found = super().to_json()
        column = {position: at for at, position in enumerate(self.positions)}
        for row in found["rows"]:
            place = self.rows.index(row["row"]), row["sequence"], column[row["pos"]]
            pairs = zip(self.texts(self.top_ids[place]), self.top_probabilities[place].tolist(), strict=True)
            row["guesses"] = [{"guess": guess, "probability": share} for guess, share in pairs]
        return found

    def probability(self, name: str) -> Float[Tensor, "row batch read"]:
        """Probability of `final`, `input`, `next` or a target.

        Raises:
            ValueError: this lens has no such token.
        """
        if name not in self.log_prob:
            raise ValueError(f"this lens has no token {name!r}: it has {', '.join(map(repr, self.log_prob))}")
        return self.log_prob[name].exp()

    def texts(self, ids: Int[Tensor, "..."]) -> list[str]:
        """The texts of ids, in one flat list."""
        return [self.strings[str(i)] for i in ids.flatten().tolist()]

    def shown_columns(self, row: int, positions: Any = None) -> list[int]:
        """Indices of a sequence's positions on the axis `read`.

        Args:
            row: which sequence of the batch.
            positions: positions that were read, negative ones from the end; None is all but padding.

        Raises:
            ArgumentError: there is no such sequence.
            ValueError: a position is padding or was not read.
        """
        if not 0 <= row < len(self.tokens):
            raise ArgumentError("row", f"between 0 and {len(self.tokens) - 1}", row)
        n_pos = self.tokens.shape[1]
        if positions is None:
            columns = [at for at, position in enumerate(self.positions) if self.mask[row, position]]
            if not columns:
                raise ValueError(f"sequence {row} has only padding at the positions that were read")
            return columns
        columns = []
        for position in positions:
            if not -n_pos <= position < n_pos or position % n_pos not in self.positions:
                raise ValueError(f"position {position} was not read")
            if not self.mask[row, position]:
                raise ValueError(f"position {position} of sequence {row} is padding")
            columns.append(self.positions.index(position % n_pos))
        if not columns:
            raise ValueError("no position selected")
        return columns

    def shown_positions(self, row: int) -> list[int]:
        """The positions of a sequence that were read and are not padding."""
        return [self.positions[column] for column in self.shown_columns(row)]

    def following(self, row: int) -> dict[int, int]:
        """The id of the token that follows each position of a sequence; nothing follows the last."""
        tokens, mask = self.tokens[row].tolist(), self.mask[row].tolist()
        return {at: tokens[at + 1] for at in range(len(tokens) - 1) if mask[at] and mask[at + 1]}


def interleaved(attn: LogitLensResult, mlp: LogitLensResult) -> LogitLensResult:
    """Two lenses as one: the row `embed`, then each layer's attention and its MLP.

    Args:
        attn: a lens that read `attn_out`, or `resid_mid`.
        mlp: a lens that read `mlp_out`, or `resid_post`.

    Returns:
        A lens with rows `embed`, `0 attn`, `0 MLP`, `1 attn`, ..., which `plot_logit_lens` draws.

    Raises:
        TypeError: one is not a LogitLensResult.
        ValueError: the two are not such a pair, or differ in model, tokens, layers, decoder or targets.

    Example:
        >>> attn = mechlens.logit_lens(model, "The captain", "attn_out")
        >>> mlp = mechlens.logit_lens(model, "The captain", "mlp_out")
        >>> mechlens.interleaved(attn, mlp).rows[:3]
        ('embed', '0 attn', '0 MLP')
    """
    check_type("attn", attn, LogitLensResult)
    check_type("mlp", mlp, LogitLensResult)
    if (attn.read, mlp.read) not in _SUBLAYERS:
        raise ValueError(
            "interleaved lenses must read attn_out and mlp_out, or resid_mid and resid_post, got "
            f"{attn.read} and {mlp.read}"
        )
    first, second = (
        {name: getattr(each, name) for name in _SHARED} | {"targets": tuple(each.target_ids)}
        for each in (attn, mlp)
    )
    for name, value in first.items():
        other = second[name]
        same = torch.equal(value, other) if isinstance(value, Tensor) else value == other
        if not same:
            raise ValueError(f"the two lenses differ in {name}: make them with the same arguments")

    def merge(one: Tensor, two: Tensor) -> Tensor:
        layers = torch.stack([one[1:], two[1:]], dim=1).flatten(0, 1)
        return torch.cat([one[:1], layers])

    k = min(attn.top_ids.shape[-1], mlp.top_ids.shape[-1])
    labels = [f"{layer} {sublayer}" for layer in attn.rows[1:] for sublayer in ("attn", "MLP")]
    numbers: dict[str, Any] = {
        name: merge(getattr(attn, name), getattr(mlp, name)) for name in STATISTICS[:3]
    }
    return dataclasses.replace(
        attn,
        rows=("embed", *labels),
        read=f"{attn.read} and {mlp.read}",
        top_ids=merge(attn.top_ids[..., :k], mlp.top_ids[..., :k]),
        top_probabilities=merge(attn.top_probabilities[..., :k], mlp.top_probabilities[..., :k]),
        **numbers,
        log_prob={name: merge(values, mlp.log_prob[name]) for name, values in attn.log_prob.items()},
        rank={name: merge(values, mlp.rank[name]) for name, values in attn.rank.items()},
        strings=attn.strings | mlp.strings,
    )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class VectorLens(Result):
    """What vectors of the residual stream predict as the next token."""

    vectors: Float[Tensor, "vector d_model"]
    decoder: str
    """`final_norm`, `norm_only`, `none`, or the name of a function."""
    top_ids: Int[Tensor, "vector k"]
    """Next tokens, most likely first."""
    top_probabilities: Float[Tensor, "vector k"]
    entropy: Float[Tensor, " vector"]
    """Nats."""
    log_prob: dict[str, Float[Tensor, " vector"]]
    """Log-probability of the targets in nats, by id as text or by name."""
    rank: dict[str, Float[Tensor, " vector"]]
    """Rank of the targets: 1 plus the number of strictly larger logits."""
    strings: dict[str, str]
    """The text of every token above, keyed by its id as a string."""

    columns: ClassVar = (
        Column("vector"),
        Column("place", help="1 is the most likely token."),
        Column("guess", "next token"),
        Column("probability"),
    )

    def to_dataframe(self) -> pd.DataFrame:
        """One row per vector and place: vector, place (1 is the most likely), guess (the next token at this
        place), probability."""
        import pandas as pd

        n, k = self.top_ids.shape
        index = pd.MultiIndex.from_product([range(n), range(1, k + 1)], names=["vector", "place"])
        columns = {
            "guess": [self.strings[str(i)] for i in self.top_ids.flatten().tolist()],
            "probability": self.top_probabilities.flatten().numpy(),
        }
        return pd.DataFrame(columns, index=index).reset_index()
