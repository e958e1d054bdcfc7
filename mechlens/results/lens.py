"""Results about what vectors of the residual stream say in terms of the vocabulary."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechlens.results.base import Result, column_name, row_place

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LogitLensResult(Result):
    """What each layer of a model would say about the next token, if it were the last."""

    tokens: Int[Tensor, "batch pos"]
    """What the model read."""
    mask: Bool[Tensor, "batch pos"]
    """False where a position is padding. All statistics are nan there, and `top_ids` are without meaning."""
    positions: tuple[int, ...]
    """The positions that were read out, in the order of the axis `read`."""
    context_length: Int[Tensor, "batch read"]
    """How many tokens the model saw up to and with each position: a row longer than the context is read in
    windows, which begin half a context before the first token that is read in them. 0 for padding."""
    rows: tuple[str, ...]
    """`embed`, then the layers by number, or heads such as `L0H3` for the component `result`."""
    component: str
    """`resid_post`, `attn_out`, ...: what was read; the row `embed` is always block 0's `resid_pre`."""
    onto_stream: bool
    """Whether a sub-block's or head's output was read together with the stream it was added to."""
    decoder: str
    """`final_norm`, `norm_only`, `none`, `tuned_lens`, or the name of a function."""
    last_blocks: int
    """Through how many of the last blocks vectors went before the decoder."""
    statistics: tuple[str, ...]
    """Which of `entropy`, `kl_final`, `kl_input`, `log_prob` and `rank` were computed; the others are nan."""
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
    really follows; nan at the last position), and each target by its name; nats."""
    rank: dict[str, Float[Tensor, "row batch read"]]
    """Of the same tokens; 1 is the most likely, ties count strictly larger logits. nan as above."""
    target_ids: dict[str, Int[Tensor, "batch read"]]
    """The targets that were asked for, by the name that they have in `log_prob` and `rank`."""
    strings: dict[str, str]
    """The text of every token above, by its id as text."""
    prepend_bos: bool

    def to_dataframe(self) -> pd.DataFrame:
        """One row per row of the lens, sequence and position: row, layer (-1 for `embed`), head (for the
        component `result`; absent for `embed`), sequence, pos, token (read there), guess (the likeliest next
        token), probability (of the guess), entropy, kl_final, kl_input, and `rank_` and `log_prob_` of
        `final`, `input`, `next` and of each target. Padding is left out.

        A target's columns have its name, with `·` for each space, as in pictures: `rank_·Paris`. A `·` of its
        own, a backslash, and what does not print are their Python escapes, so that no two targets share one.
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
            **{
                name: getattr(self, name)
                for name in self.statistics
                if name in ("entropy", "kl_final", "kl_input")
            },
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
        if self.component == "result":
            table.insert(2, "head", pd.Series([places[row][1] for row in table["row"]], dtype="Int64"))
        return table

    def probability(self, name: str) -> Float[Tensor, "row batch read"]:
        """Probability of `final`, `input`, `next` or a target."""
        if name not in self.log_prob:
            raise ValueError(f"no token {name!r} in this result, which has {', '.join(self.log_prob)}")
        return self.log_prob[name].exp()

    def texts(self, ids: Int[Tensor, "..."]) -> list[str]:
        """The texts of ids, in one flat list."""
        return [self.strings[str(i)] for i in ids.flatten().tolist()]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class VectorLens(Result):
    """What vectors of the residual stream say about the next token."""

    vectors: Float[Tensor, "vector d_model"]
    decoder: str
    """`final_norm`, `norm_only`, `none`, or the name of a function."""
    top_ids: Int[Tensor, "vector k"]
    """The most likely next tokens, the likeliest first."""
    top_probabilities: Float[Tensor, "vector k"]
    entropy: Float[Tensor, " vector"]
    """Nats."""
    log_prob: dict[str, Float[Tensor, " vector"]]
    """Of the targets, by id as text or by the name they were given; nats."""
    rank: dict[str, Float[Tensor, " vector"]]
    """Of the targets; 1 is the most likely, ties count strictly larger logits."""
    strings: dict[str, str]
    """The text of every token above, by its id as text."""

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
