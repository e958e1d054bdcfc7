"""Studies of a model in, their folder of results, tables and the report page out."""

from __future__ import annotations

from pathlib import Path

from mechlens.plots.facts import plot_facts
from mechlens.results import head_label
from mechlens.results.heads import CLEAR_SCORE, TIMES_NULL
from mechlens.show.circuits import composition_section
from mechlens.show.feature_alignment import feature_alignment_section
from mechlens.show.features import complete_search_section
from mechlens.show.heads import attention_section, head_scores_section, repeated_token_section
from mechlens.show.induction_circuits import induction_circuits_section
from mechlens.show.lens import lens_section
from mechlens.show.page import write_report
from mechlens.show.patching import patching_section
from mechlens.show.section import Figure, Section, Table
from mechlens.studies.facts import FactsStudy
from mechlens.studies.findings import FeaturesStudy, Findings
from mechlens.studies.heads import Reproduction
from mechlens.studies.indirect_object import IndirectObjectStudy
from mechlens.studies.induction_circuits import CircuitStudy
from mechlens.studies.logit_lens import LensStudy
from mechlens.studies.study import Study
from mechlens.text.display import number


def write_findings(findings: Findings, folder: Path, *, command: str) -> list[Path]:
    """Write results (`.safetensors`), tables (`.csv`) and `report.html` into a folder.

    Args:
        folder: made where it is missing; files of an earlier run are replaced.
        command: the command line that makes the same report.

    Returns:
        The paths written, the report last.

    Raises:
        OSError: the folder is a file, or cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = next(iter(findings.results.values())).model
    sections = [section for study in findings.studies.values() for section in study_sections(study)]
    page = write_report(
        folder / "report.html",
        *sections,
        title="Induction heads" if list(findings.studies) == ["heads"] else f"What {model.name} does",
        model=model,
        comparisons=findings.comparisons,
        command=command,
    )
    return [*findings.save(folder), page]


def study_sections(study: Study) -> list[Section]:
    """What a report shows of a study."""
    if isinstance(study, Reproduction):
        return _heads(study)
    if isinstance(study, FactsStudy):
        return [_facts(study)]
    if isinstance(study, CircuitStudy):
        return [
            induction_circuits_section(study.circuits),
            composition_section(study.composition, title="K-composition of all heads"),
        ]
    if isinstance(study, IndirectObjectStudy):
        return _indirect_object(study)
    if isinstance(study, FeaturesStudy):
        return [
            complete_search_section(study.search),
            feature_alignment_section([study.trained, study.random], names=["trained", "random weights"]),
        ]
    assert isinstance(study, LensStudy)
    return [lens_section(study.eiffel, title="The logit lens"), lens_section(study.prose, title="On prose")]


def _heads(reproduction: Reproduction) -> list[Section]:
    heads = reproduction.heads
    names = [head_label(*head) for head in reproduction.patterns.heads]
    return [
        Section("What was found", _findings(reproduction)),
        repeated_token_section(reproduction.performance),
        head_scores_section(heads),
        attention_section(
            reproduction.patterns,
            title="The strongest heads at work",
            text="The two highest heads by induction score and by previous-token score "
            f"({', '.join(names)}) on the first of the sequences. An induction head shows a second "
            f"diagonal over the later copy, {reproduction.performance.seq_len - 1} positions below the "
            "main one; a previous-token head shows one right below the main diagonal.",
        ),
    ]


def _facts(study: FactsStudy) -> Section:
    """What the model knows, by layer, and each fact."""
    facts = study.with_bos
    last = facts.to_dataframe().groupby("fact").last()
    return Section(
        "Facts",
        "The logit lens reads the answer to each prompt off the residual stream after every layer. The null "
        "is the answer to another fact of the same kind, which is wrong here.",
        (
            Figure(
                plot_facts(facts),
                "Share of facts whose answer is the most likely token, or among the ten most likely, and its "
                "mean probability, after each layer; dotted, the same of wrong answers.",
                f"At the end {float(facts.share(1)[-1]):.0%} of the answers are the first guess, "
                f"{float(facts.share(10)[-1]):.0%} among the first ten.",
            ),
            Table(
                ("Relation", "Prompt", "Answer", "First guess", "Rank", "Probability", "Without BOS"),
                [
                    (
                        row["relation"],
                        row["prompt"],
                        row["answer"].strip(),
                        row["guess"].strip(),
                        int(row["rank"]),
                        float(row["probability"]),
                        float(study.without_bos.log_prob[at, -1].exp()),
                    )
                    for at, row in enumerate(last.to_dict("records"))
                ],
                "Each fact, after the last layer.",
                folded=True,
            ),
        ),
    )


def _indirect_object(study: IndirectObjectStudy) -> list[Section]:
    task = study.task
    right = float((task.logit_diff > 0).float().mean())
    example = task.templates[0].format(a=task.subjects[0], b=task.objects[0], s=task.subjects[0])
    return [
        Section(
            "The indirect object",
            f"{example!r} is to be continued with {task.objects[0].strip()}. Over {len(task.tokens)} such "
            f"prompts the logit of the indirect object is {number(float(task.logit_diff.mean()))} above the "
            f"subject's, and the higher of the two in {right:.0%}; of two names that do not occur in the "
            f"prompt the difference is {number(float(task.null.mean()))}.",
        ),
        patching_section(
            study.heads,
            title="Which heads carry it",
            text="Each head's output in the clean run, put into the run with the other name as the subject.",
        ),
        patching_section(
            study.positions,
            title="Where it is, layer by layer",
            text="The residual stream of the clean run, put there at one position before one layer.",
        ),
    ]


def _findings(reproduction: Reproduction) -> str:
    """The finding in two sentences, every figure and name from the results."""
    performance, heads = reproduction.performance, reproduction.heads
    first, second = (performance.estimates[f"{half}_half_accuracy"][0] for half in ("first", "second"))
    accuracy = (
        f"Of random tokens that it has not seen the model foretells {first:.1%}, of the same tokens when "
        f"they come again {second:.1%}."
    )
    named = {}
    for kind in ("induction_score", "previous_token_score"):
        clear = heads.clear_heads(kind)
        named[kind] = ", ".join(f"{head_label(*head)} ({score:.2f})" for head, score in clear[:5])
    return (
        f"{accuracy}\n\nInduction heads: {named['induction_score'] or 'none'}. Previous-token heads: "
        f"{named['previous_token_score'] or 'none'}. Named are heads with a score of at least {CLEAR_SCORE} "
        f"and at least {TIMES_NULL:g} times their null, the highest five."
    )
