"""Maps back to the input from full matrices: `lstsq`, all distances, and logits of the whole vocabulary."""

from __future__ import annotations

import torch

from mechlens.models.protocol import describe


def residuals(model, tokens, keep):
    """The residual stream at the kept positions, by row, in float64."""
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    rows = [cache["blocks.0.hook_resid_pre"]]
    rows += [cache[f"blocks.{layer}.hook_resid_post"] for layer in range(model.cfg.n_layers)]
    return [row[keep].double() for row in rows]


def unembedding(model):
    """`W_U` with the final norm's scale and, for LayerNorm, its centering; `[d_vocab, d_model]`, float64."""
    W_U = model.W_U.detach().double()
    if getattr(model.ln_final, "w", None) is not None:
        scale = model.ln_final.w.detach().double()
        # Gemma's norm multiplies by 1 + weight; HookedTransformer adds the 1 on loading, a bridge does not
        if type(model).__name__ == "TransformerBridge" and "Gemma" in describe(model).architecture:
            scale = 1 + scale
        W_U = scale[:, None] * W_U
    return (W_U - W_U.mean(0) if model.cfg.normalization_type.startswith("LN") else W_U).T


def fit(X, Y):
    """Least squares with an intercept; the minimum-norm solution if there are several."""
    # gelsd gives that one; the other drivers need full rank, which a centered stream has only through
    # float32 rounding
    rounding = X.shape[1] ** 0.5 * torch.finfo(torch.float32).eps
    M = torch.linalg.lstsq(X - X.mean(0), Y - Y.mean(0), rcond=rounding, driver="gelsd").solution
    return M, Y.mean(0) - X.mean(0) @ M


def fit_ridge(X, Y, ridge):
    """The same with a ridge penalty, as least squares with d_model additional rows."""
    d_model = X.shape[1]
    centered = X - X.mean(0)
    penalty = (ridge * centered.pow(2).mean(0).mean() * len(X)).sqrt() * torch.eye(d_model).double()
    wanted = torch.cat([Y - Y.mean(0), torch.zeros(d_model, Y.shape[1]).double()])
    M = torch.linalg.lstsq(torch.cat([centered, penalty]), wanted).solution
    return M, Y.mean(0) - X.mean(0) @ M


def accuracy(guesses, C, ids):
    distances = (guesses[:, None, :] - C.double()[None]).pow(2).sum(-1)
    return (distances.argmin(1) == ids).double().mean()


def r2(guesses, Y):
    """By element, and over all."""
    errors, squares = (guesses - Y).pow(2).sum(0), (Y - Y.mean(0)).pow(2).sum(0)
    return 1 - errors / squares, 1 - errors.sum() / squares.sum()


def cosine(M, C, A):
    """The logits of all tokens from `M C.T` and `A.T`, minus their means over the vocabulary."""
    logits = M.double() @ (C.double() - C.double().mean(0)).T
    other = (A.double() - A.double().mean(0)).T
    return (logits * other).sum() / (logits.norm() * other.norm())


def random_map(M, draw):
    """M with its singular vectors replaced; `draw` gives a random orthogonal matrix of a size."""
    s = torch.linalg.svdvals(M.double())
    U, V = draw(M.shape[0]), draw(M.shape[1])
    return U[:, : len(s)] @ torch.diag(s) @ V.T
