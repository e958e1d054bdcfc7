"""What commands share: options, checks of their values, and loading the model."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.models import ArgumentInfo
from typer.utils import get_params_from_function

from mechlens.cli import finishing

if TYPE_CHECKING:
    from mechlens.models.protocol import LensModel

BUNDLED = "mechlens-books"


def _show_help(context: Any, wanted: bool) -> bool:
    if wanted:
        print(context.get_help())
        raise typer.Exit
    return wanted


HelpOption = Annotated[
    bool, typer.Option("--help", callback=_show_help, is_eager=True, help="Show this message and exit.")
]
"""For groups of commands. Typer's own help option makes typer import pydantic (0.15 s)."""
ModelOption = Annotated[
    str,
    typer.Option("--model", "-m", help="Model name (`mechlens models` lists them), directory or GGUF file."),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="Device: cpu, cuda, cuda:1 or mps. [default: cuda if available, else cpu]")
]
DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Known values are repeated here, so that an unknown one is refused before torch is imported."""
DtypeOption = Annotated[str, typer.Option(help=f"Data type of the weights: {', '.join(DTYPES)}.")]
ABLATIONS = ("mean", "resample", "zero")
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the hub.")]
CacheOption = Annotated[
    bool, typer.Option("--cache/--no-cache", help="Cache the dequantized weights of a GGUF file.")
]
SeedOption = Annotated[
    int, typer.Option(min=0, max=2**31, help="First random seed; further seeds count up from it.")
]
SeedsOption = Annotated[int, typer.Option("--n-seeds", min=1, help="Number of random seeds.")]
LengthOption = Annotated[int, typer.Option(min=1, help="Number of random tokens before they repeat.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Number of sequences per seed.")]
BosOption = Annotated[
    bool | None, typer.Option("--bos/--no-bos", help="Prepend the BOS token. [default: if the model has one]")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print neither progress bars nor tables.")]
DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Estimate runs, arithmetic, memory and time from a part of the work."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
ResumeOption = Annotated[
    Path | None,
    typer.Option(help="Save progress to this .safetensors file, and resume from it if it exists."),
]
TextArgument = Annotated[str, typer.Argument(help="Text to run the model on.")]
ChatOption = Annotated[
    bool, typer.Option("--chat", help="Wrap the text as a user message in the model's chat template.")
]
CorpusArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[FILES]...",
        help=".txt, .jsonl or .jsonl.gz files (field `text`), or folders of them. "
        "[default: text sampled from the model]",
    ),
]
OWN_WINDOWS = 128
"""Maximum number of windows of text sampled from the model."""


_NOT_WRITTEN = ("resume", "quiet", "cache", "dry_run", "as_json", "as_csv")


def load(
    name: str,
    device: str | None,
    dtype: str,
    revision: str | None,
    quiet: bool,
    *,
    checkpoint: int | None = None,
    processing: bool = True,
    cache: bool = True,
) -> LensModel:
    with _loading(name, progress(quiet)) as say:
        from mechlens.models.load.loading import load_model, parse_device

        chosen = parse_device(device)
        say(f" on {chosen} ...")
    return load_model(
        name,
        device=chosen,
        dtype=dtype,
        revision=revision,
        checkpoint=checkpoint,
        processing=processing,
        cache=cache,
    )


@contextlib.contextmanager
def _loading(name: str, shown: bool) -> Iterator[Callable[[str], None]]:
    """Print at once which model is loading, and its device on the same line once torch is imported."""

    def say(text: str) -> None:
        if shown:
            print(text, end="", file=sys.stderr, flush=True)

    say(f"loading {name}")
    try:
        yield say
    finally:
        say("\n")


def numbers(option: str, given: Sequence[str]) -> list[int]:
    """Integers and ranges, the end not included; `-20:` is the last 20."""
    found: list[int] = []
    for each in given:
        first, colon, end = each.partition(":")
        try:
            start = int(first or 0) if colon else int(first)
            some = range(start, int(end or 0) if colon else start + 1)
        except ValueError:
            some = range(0)
        if not some:
            raise ValueError(
                f"{option} must be a number, or a nonempty range such as 10:40 or -20:, got {each!r}"
                + ("; repeat the option for several" if "," in each else "")
            )
        found += some
    return found


def command(name: str, function: Callable[..., None], given: Mapping[str, Any]) -> str:
    """The command line that repeats a call, quoted for a shell, without options that have their default.

    Args:
        name: of the command, such as `lens` or `ablate heads`.
        function: the command; its signature has the names and defaults of the options.
        given: its arguments. Those in `_NOT_WRITTEN` do not change the result and are left out.
    """
    options = ["mechlens", *name.split()]
    arguments: list[str] = []
    for each, parameter in get_params_from_function(function).items():
        about, value = parameter.default, given[each]
        several = value if isinstance(value, list) else [] if value is None else [value]
        if isinstance(about, ArgumentInfo):
            arguments += map(str, several)
        elif each not in _NOT_WRITTEN and value != about.default:
            on, _, off = _long_name(each, about).partition("/")
            for one in several:
                options += [on] if one is True else [off] if one is False else [on, str(one)]
    ambiguous = any(word.startswith("-") for word in arguments)
    return shlex.join([*options, *(["--"] if ambiguous else []), *arguments])


def option_name(function: Callable[..., None], argument: str) -> str:
    """An argument's name on the command line, such as `--top` or `TEXT`; its own name if it has none."""
    about = get_params_from_function(function).get(argument)
    if about is None:
        return argument
    return (
        argument.upper() if isinstance(about.default, ArgumentInfo) else _long_name(argument, about.default)
    )


def _long_name(argument: str, about: Any) -> str:
    long = [word for word in about.param_decls or () if word.startswith("--")]
    return str(long[0]) if long else f"--{argument.replace('_', '-')}"


def progress(quiet: bool) -> bool:
    return not quiet and sys.stderr.isatty()


def check_known(option: str, given: str, known: Sequence[str]) -> None:
    if given not in known:
        one_of = "one of " if len(known) > 1 else ""
        raise ValueError(f"{option} must be {one_of}{', '.join(known)}, got {given!r}")


def check_chat(chat: bool, bos: bool | None) -> None:
    if chat and bos is not None:
        raise ValueError(f"with --chat the chat template places BOS: leave out --{'' if bos else 'no-'}bos")


def prompt(model: LensModel, text: str, chat: bool) -> Any:
    """The prompt for a text: the text itself, or the token ids of a chat."""
    if not chat:
        return text
    from mechlens.text.prompts import chat_tokens

    return chat_tokens(model, text)


def check_corpus(files: Sequence[str] | None) -> None:
    for file in files or ():
        if not Path(file).exists():
            raise ValueError(f"corpus {file} does not exist: give a file or a folder")


def corpus(
    files: Sequence[str] | None,
    model: LensModel,
    *,
    length: int | None,
    windows: int | None,
    bos: bool | None,
    seed: int,
    quiet: bool,
) -> Any:
    """The files, or text sampled from the model."""
    if files:
        return [Path(file) for file in files]
    from mechlens.models.run.sampling import sample_tokens
    from mechlens.text.corpus import LENGTH

    return sample_tokens(
        model,
        batch=min(windows or OWN_WINDOWS, OWN_WINDOWS),
        seq_len=length or min(LENGTH, model.cfg.n_ctx),
        seed=seed,
        prepend_bos=bos,
        progress=progress(quiet),
    )


def one_of(names: Sequence[str]) -> str:
    """Such as `a, b or c`."""
    return " or ".join(", ".join(names).rsplit(", ", 1))


def check_file(out: Path | None, endings: Sequence[str]) -> None:
    """Check before the work that the output file can be written."""
    if out is None:
        return
    if out.suffix not in endings:
        raise ValueError(f"--out must be a {one_of(endings)} file, got {out}")
    _check_writable(out)


def check_resume(resume: Path | None, out: Path | None) -> None:
    """Check before the work that the checkpoint can be written and is not the output file."""
    if resume is None:
        return
    _check_writable(resume)
    from mechlens.results.checkpoint import checkpoint_path

    checkpoint_path(resume)
    if out is not None and resume.resolve() == out.resolve():
        raise ValueError(f"--out and --resume must be different files, got {out} for both")


def check_folder(folder: Path) -> None:
    """Check before the work that the output folder exists or can be made, and can be written to."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"--out must be a folder, but {existing} is a file")
    from mechlens.files import check_writable

    try:
        check_writable(existing / "results")
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}") from error


def _check_writable(file: Path) -> None:
    from mechlens.files import check_writable

    folder, what = file.parent, None
    try:
        if not folder.is_dir():
            what = f"{folder} is not a folder" if folder.exists() else f"the folder {folder} does not exist"
        elif file.is_dir():
            what = "it is a folder"
        else:
            check_writable(file)
    except OSError as error:
        what = error.strerror
    if what is not None:
        raise ValueError(f"cannot write {file}: {what}")


@contextlib.contextmanager
def saving_progress(resume: Path | None) -> Iterator[None]:
    """After Ctrl-C, say where the progress is saved."""
    if resume is None:
        yield
        return
    try:
        with finishing():
            yield
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt(
            f"progress is saved in {resume}: run the same command to resume"
            if resume.is_file()
            else f"interrupted before any progress was saved in {resume}"
        ) from stopped
