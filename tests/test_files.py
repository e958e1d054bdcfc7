"""Files are written completely or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from mechlens.files import check_writable, replacing


def test_a_failed_write_names_the_target_and_leaves_no_file(tmp_path):
    target = tmp_path / "x.csv"
    target.write_text("old")
    with pytest.raises(OSError, match="No space left") as failed, replacing(target):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert failed.value.filename == str(target)
    assert [each.name for each in tmp_path.iterdir()] == ["x.csv"]
    assert target.read_text() == "old"


@pytest.mark.parametrize("what", ["none/x.csv", f"{'é' * 200}.csv"])
def test_a_target_that_cannot_be_written_is_named_before_and_while_writing(tmp_path, what):
    target = tmp_path / what
    with pytest.raises(OSError, match=r"No such file|too long") as tried:
        check_writable(target)
    with pytest.raises(OSError, match=r"No such file|too long") as failed, replacing(target) as part:
        part.write_text("new")
    assert tried.value.filename == failed.value.filename == str(target)
    assert list(tmp_path.iterdir()) == []


def test_an_error_about_another_file_is_not_changed(tmp_path):
    with pytest.raises(FileNotFoundError) as failed, replacing(tmp_path / "x.csv"):
        Path("nowhere").read_text()
    assert failed.value.filename == "nowhere"


@pytest.mark.parametrize("name", ["x.csv", f"{'é' * 125}.csv"])
def test_checking_a_target_changes_nothing(tmp_path, name):
    target = tmp_path / name
    check_writable(target)
    assert list(tmp_path.iterdir()) == []
    target.write_text("old")
    check_writable(target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
