"""Run a command in this process, as a shell would."""

from __future__ import annotations

import functools

import pytest

from mechlens import cli
from mechlens.models.load import loading


@functools.cache
def kept(load_model, name, **options):
    return load_model(name, **options)


def run(capsys, *arguments):
    """Exit code, standard output and standard error; the bundled model is loaded only once."""
    own = loading.load_model

    def load_model(name, **options):
        return kept(own, name, **options) if name == loading.BUNDLED else own(name, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_model", load_model)
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def refused(capsys, arguments, message, monkeypatch, folder):
    """Assert that a command is refused in one line, with exit code 2, and leaves no files."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(folder)
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("mechlens: ")
    assert not out
    assert not list(folder.iterdir())
