"""The post "interpreting GPT: the logit lens" as a script: its figures, and its claims as numbers.

    python experiments/logit_lens.py --model mechlens-books --out out/logit_lens

Prints each claim with a measured number and a verdict, and saves every result (`.safetensors`), table
(`.csv`) and figure (`.html`), and all figures on one page, `report.html`, which opens without a network.
`--model gpt2` is the post's own kind of model. Questions from the post's comments are answered, too: whether
improbable tokens' directions are used for other work, how well a linear map reads the input out of each
layer, and how much nearer to the final prediction a tuned lens is. The last two are trained on `--corpus`
(text files, or folders of them), and without one on text that the model writes itself.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import plotly.graph_objects as go

import mechlens
from mechlens.errors import ModelLoadError
from mechlens.models.protocol import LensModel
from mechlens.results import InputProbe, LogitLensResult, LogitVariance, Result, TunedLens
from mechlens.show.section import Figure, Section
from mechlens.studies.logit_lens import EIFFEL, LensStudy

Drawn = tuple[str, go.Figure, str]
"""Name of the file, the figure, and what it shows."""
STRETCH = 12
"""Tokens beside one another."""
RANK_BOUND, INPUT_RANK_BOUND = 100, 1000
"""Where the post's colours end for ranks of the final guess and of the input."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mechlens-books", help="bundled name, hub name or directory")
    parser.add_argument("--out", type=Path, default=Path("out/logit_lens"), help="folder to write to")
    parser.add_argument("--rare", default=None, help="the rare token to copy, such as ' plasma'")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the other rare tokens, and of what is trained"
    )
    parser.add_argument("--corpus", type=Path, nargs="+", default=None, help="text to train on")
    parser.add_argument("--no-training", action="store_true", help="leave out what has to be trained")
    parser.add_argument("--device", default=None)
    options = parser.parse_args()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        model = mechlens.load_model(options.model, device=options.device)
        study = mechlens.reproduce_logit_lens(model, rare=options.rare, seed=options.seed)
        comments, further = ask_comments(model, study, options.corpus, options.seed, not options.no_training)
    except (ModelLoadError, ValueError, OSError) as error:
        parser.error(str(error))

    print(f"{study.prose.model.name}, BOS: {study.prose.prepend_bos}\n")
    print("claim | published | measured | what would do | verdict")
    for c in study.comparisons:
        measured = c.measured if isinstance(c.measured, str) else "nothing"
        bound = f"at least {c.low}" if c.low is not None else f"at most {c.high}"
        print(f"{c.claim} | {c.published} | {measured} | {bound} | {c.verdict}")
    print(f"\nafter {EIFFEL!r}: {top_guesses(study)}")
    for name, line in statements(further):
        print(f"{name}: {line}")

    written = study.save(options.out)
    for name, result in further.items():
        written.append(result.save(options.out / f"{name}.safetensors"))
    chapters = [*post_figures(study), *comments]
    for _, _, figures in chapters:
        for name, figure, _ in figures:
            path = options.out / f"{name}.html"
            figure.write_html(path, include_plotlyjs="directory")
            written.append(path)
    sections = [
        Section(
            title,
            text,
            [Figure(figure, caption, keeps_width=True) for _, figure, caption in figures],
        )
        for title, text, figures in chapters
    ]
    page = mechlens.write_report(
        options.out / "report.html",
        *sections,
        title="The logit lens",
        model=study.prose.model,
        comparisons=study.comparisons,
        command=shlex.join(["python", *sys.argv]),
    )
    print(f"\nwrote {len(written) + 1} files to {options.out}; all figures are on {page}")


def top_guesses(study: LensStudy) -> str:
    """What each layer says at the end of the post's prompt."""
    lens = study.eiffel
    guesses = lens.texts(lens.top_ids[:, 0, -1, 0])
    probabilities = lens.top_probabilities[:, 0, -1, 0].tolist()
    return ", ".join(
        f"{row} {guess!r} {probability:.2f}"
        for row, guess, probability in zip(lens.rows, guesses, probabilities, strict=True)
    )


# -- the post's figures ----------------------------------------------------------------------------


def post_figures(study: LensStudy) -> list[tuple[str, str, list[Drawn]]]:
    """Title, text and figures of each chapter."""
    prose, tied = study.prose, not study.prose.kl_input.isnan().all()
    some = stretch(int(prose.mask[0].sum()) // 2)
    guess = "Each layer's top guess after each token of an abstract"
    chapters = [
        (
            "Guesses, ranks and distances",
            "A stretch from the middle of an abstract; each position has seen all that stands before.",
            [
                (
                    "prose_probability",
                    mechlens.plot_logit_lens(prose, "probability", positions=some),
                    f"{guess}; the darker, the more probable.",
                ),
                (
                    "prose_rank",
                    mechlens.plot_logit_lens(prose, "rank", positions=some, high=RANK_BOUND),
                    f"{guess}; colour: rank of the final guess, cut at {RANK_BOUND} as in the post.",
                ),
                (
                    "prose_kl",
                    mechlens.plot_logit_lens(prose, "kl", positions=some),
                    f"{guess}; colour: KL(final || layer) in nats. The row embed stands apart.",
                ),
                (
                    "prose_lines",
                    mechlens.plot_lens_lines(prose, positions=some[-6:]),
                    "Rank of the final guess and KL(final || layer), layer by layer, at six positions.",
                ),
            ],
        ),
        (
            "What is left of the input",
            "Seen from the other side: how near each layer is to the token that was read."
            + (
                ""
                if tied
                else " KL(input || layer) is undefined: the unembedding is not tied to the embedding."
            ),
            [
                *(
                    [
                        (
                            "input_kl",
                            mechlens.plot_logit_lens(prose, "kl_input", positions=some, high=30),
                            "KL(input || layer) in nats, cut at 30 as in the post.",
                        )
                    ]
                    if tied
                    else []
                ),
                (
                    "input_rank",
                    mechlens.plot_logit_lens(prose, "input_rank", positions=some, high=INPUT_RANK_BOUND),
                    f"Rank of the input token at its own position, cut at {INPUT_RANK_BOUND} as in the post.",
                ),
            ],
        ),
    ]
    copying = study.copying
    last = int(copying.mask[0].sum()) - 2
    first = first_copy(copying)
    chapters += [
        (
            "Copying a rare token",
            "The same rare token twice in the same words: where is the second one foretold?",
            [
                (
                    "copying",
                    mechlens.plot_logit_lens(copying, "next_rank", positions=stretch(last), high=RANK_BOUND),
                    "Rank of the token that follows; the last column is to be the rare token.",
                ),
                (
                    "copying_first",
                    mechlens.plot_logit_lens(
                        copying, "input_rank", positions=stretch(first + 4), high=INPUT_RANK_BOUND
                    ),
                    "Rank of the input token around the rare token's first occurrence.",
                ),
                (
                    "copying_lines",
                    mechlens.plot_lens_lines(copying, ("next_rank", "kl"), positions=[last]),
                    "The position before the second copy: rank of the rare token, and KL(final || layer).",
                ),
            ],
        ),
        (
            "Extreme repetition",
            "A sentence over and over: which layers notice?",
            [
                (
                    "repetition",
                    mechlens.plot_logit_lens(
                        study.repetition,
                        "next_rank",
                        positions=stretch(int(study.repetition.mask[0].sum()) - 2),
                        high=RANK_BOUND,
                    ),
                    "Rank of the token that follows, in the last rounds.",
                ),
            ],
        ),
        (
            "Attention and MLPs",
            "What each sub-block adds, read alone: the abstract again.",
            [
                (
                    "sub_blocks",
                    mechlens.plot_sub_blocks(study.attention, study.mlp, "probability", positions=some),
                    "Top guesses of each layer's attention and MLP, read alone.",
                ),
            ],
        ),
        (
            "A fact",
            "The prompt that tutorials use.",
            [
                (
                    "eiffel",
                    mechlens.plot_logit_lens(study.eiffel, "probability"),
                    "Top guess and its probability per layer and position.",
                )
            ],
        ),
    ]
    return chapters


def stretch(last: int) -> list[int]:
    """Positions up to and with `last`."""
    return list(range(max(0, last + 1 - STRETCH), last + 1))


def first_copy(copying: LogitLensResult) -> int:
    """Position of the rare token's first occurrence in the first sequence."""
    ids = copying.tokens[0][copying.mask[0]]
    return int((ids == ids[-1]).nonzero()[0])


# -- what the comments asked -----------------------------------------------------------------------


def ask_comments(
    model: LensModel, study: LensStudy, corpus: Sequence[Path] | None, seed: int, training: bool
) -> tuple[list[tuple[str, str, list[Drawn]]], dict[str, Result]]:
    """Figures and results for the questions below the post."""
    ids = study.prose.tokens[0][study.prose.mask[0]]
    variance = mechlens.logit_variance(model, ids)
    results: dict[str, Result] = {"logit_variance": variance}
    figures = [
        (
            "logit_variance",
            mechlens.plot_logit_variance(variance),
            "How much the logits of tokens vary over layers, by how probable they are in the end.",
        )
    ]
    if training:
        if corpus is None:
            written = mechlens.sample_tokens(model, batch=256, seq_len=63, seed=seed)
            probe = mechlens.probe_input(
                model,
                written,
                train_tokens=written.numel() * 3 // 4,
                held_out_tokens=written.numel() // 5,
                seed=seed,
            )
            lens = mechlens.train_tuned_lens(model, written, seed=seed)
        else:
            probe = mechlens.probe_input(model, corpus, seed=seed)
            lens = mechlens.train_tuned_lens(model, corpus, seed=seed)
        results |= {"input_probe": probe, "tuned_lens": lens}
        figures += [
            (
                "input_probe",
                mechlens.plot_input_probe(probe),
                "How well a linear map reads the input token out of each layer.",
            ),
            (
                "tuned_lens",
                mechlens.plot_tuned_lens(lens),
                "Held-out KL(final || layer) with and without a translator for each layer.",
            ),
        ]
    return [("What the comments asked", "", figures)], results


def statements(further: Mapping[str, Result]) -> list[tuple[str, str]]:
    """The comments' questions, each answered in a line."""
    lines = []
    for result in further.values():
        if isinstance(result, LogitVariance):
            found = result.figures()
            lines.append(
                (
                    "variance over layers of the least probable tokens' logits, as a multiple of the most "
                    "probable ones'",
                    f"{found['variance_ratio']:.2f}; of random groups {found['null_ratio']:.2f} "
                    f"({found['null_ratio_low']:.2f} to {found['null_ratio_high']:.2f})",
                )
            )
        elif isinstance(result, InputProbe):
            accuracy = zip(result.rows, result.accuracy["embedding"][0].tolist(), strict=True)
            lines.append(
                (
                    "held-out accuracy of the input token, read out linearly",
                    ", ".join(f"{row} {value:.3f}" for row, value in accuracy)
                    + f"; always the commonest {result.chance:.3f}",
                )
            )
        elif isinstance(result, TunedLens):
            rows = (*result.rows, str(result.model.n_layers - 1))
            pairs = zip(rows, result.kl_plain.tolist(), result.kl_tuned.tolist(), strict=True)
            lines.append(
                (
                    "held-out KL(final || layer) in nats, plain -> tuned",
                    ", ".join(f"{row} {plain:.3f} -> {tuned:.3f}" for row, plain, tuned in pairs),
                )
            )
    return lines


if __name__ == "__main__":
    main()
