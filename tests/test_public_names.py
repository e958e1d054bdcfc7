"""The public names exist, are documented, and import nothing until used."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mechlens


def test_importing_mechlens_imports_nothing_else() -> None:
    code = (
        "import sys; before = set(sys.modules); import mechlens; dir(mechlens)\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new & {'torch', 'numpy', 'pandas', 'plotly', 'transformers', 'transformer_lens'}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("name", mechlens.__all__)
def test_a_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(mechlens, name)
    assert (value.__doc__ or "").strip()
    assert getattr(value, "__name__", name) == name


def test_every_line_of_the_stub_is_a_public_name() -> None:
    """A line that the pattern misses would silently drop a name."""
    stub = Path(mechlens.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    imported = [node for node in ast.parse(stub).body if isinstance(node, ast.ImportFrom)]
    assert sorted(alias.name for node in imported for alias in node.names) == mechlens.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'mechlens' has no attribute 'scroe_heads'"):
        mechlens.scroe_heads  # noqa: B018


def test_dir_lists_the_names_before_they_are_used() -> None:
    assert set(mechlens.__all__) <= set(dir(mechlens))


def imported_in(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=os.environ | environment
    )


def test_the_folder_above_a_checkout_does_not_hide_the_package(tmp_path) -> None:
    """Any folder called mechlens would be importable as a namespace package."""
    (tmp_path / "mechlens" / "mechlens").mkdir(parents=True)
    ran = imported_in(tmp_path, "import mechlens; print(mechlens.__all__[0])")
    assert ran.stdout.strip() == mechlens.__all__[0], ran.stderr


@pytest.mark.parametrize("other", ["mechlens-0.3.0.dist-info", None])
def test_another_project_of_the_same_name_gives_a_warning(tmp_path, other) -> None:
    (tmp_path / "mechlens").symlink_to(Path(mechlens.__file__).parent)
    (tmp_path / "mechlens_toolkit-0.1.0.dist-info").mkdir()
    if other:
        (tmp_path / other).mkdir()
    ran = imported_in(tmp_path, "import mechlens", PYTHONPATH=str(tmp_path))
    assert ran.returncode == 0
    assert ("uninstall both" in ran.stderr) == bool(other)
