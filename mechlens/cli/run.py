"""What all commands share: options, checks before the work, and what is done with the result.

A command is a function whose first argument is a `Run`. `@command` adds the shared options to its signature,
which typer reads, and turns errors about arguments into errors about options.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from mechlens.cli import options
from mechlens.cli.output import deliver

if TYPE_CHECKING:
    from mechlens.models.protocol import LensModel
    from mechlens.results import Result
    from mechlens.show.section import Section

SHARED: dict[str, tuple[Any, Any]] = {
    "model": (options.ModelOption, options.BUNDLED),
    "out": (Path | None, None),
    "device": (options.DeviceOption, None),
    "dtype": (options.DtypeOption, "float32"),
    "revision": (options.RevisionOption, None),
    "cache": (options.CacheOption, True),
    "dry_run": (options.DryRunOption, False),
    "quiet": (options.QuietOption, False),
    "as_json": (options.JsonOption, False),
}
"""Type and default of each option that commands share."""
PAGE, TABLE, WHOLE, PROSE = ".html", ".csv", ".safetensors", ".md"
_KEYWORD = inspect.Parameter.KEYWORD_ONLY
_OUT = {PAGE: ".html (a page)", TABLE: ".csv", WHOLE: ".safetensors", PROSE: ".md"}


class Run:
    """One call of a command: what was asked for, and the steps that every command takes."""

    def __init__(
        self, name: str, function: Callable[..., None], given: Mapping[str, Any], renamed: Mapping[str, str]
    ) -> None:
        self.name, self.function, self.given, self.renamed = name, function, dict(given), renamed
        self._models: dict[tuple[Any, ...], LensModel] = {}

    def carry_out(self, work: Callable[[], None]) -> None:
        """Do the work, or with `--dry-run` print what it would take."""
        if not self.given.get("dry_run"):
            work()
            return
        from mechlens.analyses.plan import measured

        found = measured(work, f"mechlens {self.name}", self._models.values())
        self.given |= {"dry_run": False, "out": None}
        self.show(found)

    @property
    def progress(self) -> bool:
        """Whether progress bars are shown."""
        return options.progress(self.given["quiet"])

    def option(self, argument: str) -> str:
        """The option for a Python argument: `--top` for `top_k`."""
        if argument in self.renamed:
            return self.renamed[argument]
        return options.option_name(self.function, argument)

    @property
    def line(self) -> str:
        """The command line that repeats this call."""
        return options.command(self.name, self.function, self.given)

    def load(
        self, *, processing: bool = True, checkpoint: int | None = None, other: str | None = None
    ) -> LensModel:
        """The model, or another one with the same options."""
        names = ("model", "device", "dtype", "revision", "quiet")
        given = self.given if other is None else self.given | {"model": other, "revision": None}
        key = (processing, checkpoint, other)
        if key not in self._models:
            with _unmetered(self.given.get("dry_run", False)):
                self._models[key] = options.load(
                    *(given[name] for name in names),
                    processing=processing,
                    checkpoint=checkpoint,
                    cache=self.given["cache"],
                )
        return self._models[key]

    def saving(self) -> contextlib.AbstractContextManager[None]:
        """A context for the work: after Ctrl-C, the user is told where progress is saved."""
        return options.saving_progress(self.given.get("resume"))

    def check_single(self, hint: str) -> None:
        """Refuse a .safetensors file and a checkpoint, which hold one result, if there are several."""
        out = self.given["out"]
        if out is not None and out.suffix == WHOLE:
            raise ValueError(f"a {WHOLE} file holds one result, but there are several: {hint}")
        if self.given.get("resume") is not None:
            raise ValueError(f"--resume saves the progress of one search, but there are several: {hint}")

    def show(
        self,
        *results: Result,
        names: Sequence[str] = (),
        sections: Callable[[], Sequence[Section]] | None = None,
        title: str = "",
        **about: Any,
    ) -> None:
        """Save the results, and print them as the user asked.

        Args:
            names: names of several results, listed as `compared` in JSON and in tables.
            sections: what a terminal and a page show; None is the results' own, made with `about`.
            title: title of the page; empty takes the first section's.
            about: options for the results' sections.
        """

        def made() -> Sequence[Section]:
            from mechlens.show.section import section

            return [section(each, **about) for each in results] if sections is None else sections()

        def tables() -> None:
            from mechlens.show.terminal import print_section

            for each in made():
                print_section(each, of=results[0].model.name)

        def as_object() -> Any:
            found = [each.to_json() for each in results]
            if names:
                return [{"compared": name} | each for name, each in zip(names, found, strict=True)]
            return found[0] if len(found) == 1 else found

        def frame() -> Any:
            import pandas as pd

            frames = [each.to_dataframe() for each in results]
            for each, name in zip(frames, names, strict=False):
                each.insert(0, "compared", name)
            return pd.concat(frames, ignore_index=True)

        def save(out: Path) -> list[Path]:
            if out.suffix == WHOLE:
                (result,) = results
                return [result.save(out)]
            if out.suffix == TABLE:
                from mechlens.files import replacing

                with replacing(out) as part:
                    frame().to_csv(part, index=False)
                return [out]
            from mechlens.show.page import write_report

            shown = made()
            return [
                write_report(
                    out, *shown, title=title or shown[0].title, model=results[0].model, command=self.line
                )
            ]

        deliver(self.given, save=save, tables=tables, as_object=as_object, frame=frame)


def _quiet(wanted: bool) -> AbstractContextManager[None]:
    """A context without progress bars, if `wanted`."""
    if not wanted:
        return nullcontext()
    from mechlens.progress import no_bars

    return no_bars()


def _unmetered(wanted: bool) -> AbstractContextManager[Any]:
    """A context that a plan does not count, if `wanted`."""
    if not wanted:
        return nullcontext()
    from mechlens.models.run.meter import unmetered

    return unmetered()


def command(
    name: str,
    *,
    endings: Sequence[str] = (PAGE, TABLE, WHOLE),
    without: Sequence[str] = (),
    renamed: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command from a function `(run, its own options)`.

    Args:
        name: as typed after `mechlens`, such as `ablate heads`.
        endings: those of the files that `--out` accepts; empty if it takes no file.
        without: shared options that the command does not have, or declares itself.
        renamed: options by Python argument, where the names differ.
    """

    def made(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        own = [
            parameter.replace(annotation=hints[parameter.name])
            for parameter in list(inspect.signature(function).parameters.values())[1:]
        ]
        out_help = f"Save to this {options.one_of([_OUT[e] for e in endings])} file."
        shared = []
        for option, (kind, default) in SHARED.items():
            if option in without or option in hints:
                continue
            kind = Annotated[Path | None, typer.Option(help=out_help)] if option == "out" else kind
            shared.append(inspect.Parameter(option, _KEYWORD, default=default, annotation=kind))

        @functools.wraps(function)
        def called(**given: Any) -> None:
            from mechlens.errors import ArgumentError

            run = Run(name, called, given, renamed or {})
            if endings:
                options.check_file(given.get("out"), endings)
            options.check_resume(given.get("resume"), given.get("out"))
            options.check_chat(given.get("chat", False), given.get("bos"))
            if "dtype" in given:
                options.check_known("--dtype", given["dtype"].removeprefix("torch."), options.DTYPES)
            if given.get("as_json") and given.get("as_csv"):
                raise ValueError("--json and --csv both print to standard output: choose one")
            try:
                with _quiet(given.get("quiet", False)):
                    own_given = {parameter.name: given[parameter.name] for parameter in own}
                    run.carry_out(functools.partial(function, run, **own_given))
            except ArgumentError as error:
                raise ValueError(error.said_of(run.option(error.name))) from error

        parameters = [each.replace(kind=_KEYWORD) for each in own] + shared
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {each.name: each.annotation for each in parameters}
        del called.__wrapped__  # typer would read its signature
        return called

    return made
