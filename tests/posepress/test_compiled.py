"""Compiled code where nothing, or little, can be written."""

import os
from pathlib import Path

import pytest
from numba.core import caching

from pipeline.launch import cell as program
from posepress.compiled import compiled


def doubled(n):
    return 2 * n


def test_a_function_compiles_where_no_cache_can_be_written(monkeypatch):
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    assert compiled(doubled)(21) == 42


def test_other_errors_of_numba_are_not_hidden(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("another one")

    monkeypatch.setattr("numba.njit", broken)
    with pytest.raises(RuntimeError, match="another one"):
        compiled(doubled)


@pytest.fixture
def unwritable(monkeypatch, tmp_path):
    """A machine where neither the code's folder nor the user's cache can be written."""
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / "cache"))
    refused = (Path(program.__file__).parents[2], tmp_path / "home")
    (tmp_path / "home").mkdir()
    monkeypatch.setattr(os, "access", lambda file, _: not any(Path(file).is_relative_to(folder) for folder in refused))
    yield
    os.environ.pop("NUMBA_CACHE_DIR", None)


@pytest.mark.usefixtures("unwritable")
def test_what_is_compiled_is_kept_below_outputs(tmp_path):
    program.keep_compiled(tmp_path / "outputs")
    assert os.environ["NUMBA_CACHE_DIR"] == str(tmp_path / "outputs" / "cache" / "numba")


@pytest.mark.usefixtures("unwritable")
def test_what_can_be_kept_nowhere_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda *_: False)
    program.keep_compiled(tmp_path / "outputs")
    assert "set NUMBA_CACHE_DIR to a writable folder" in capsys.readouterr().err
    assert "NUMBA_CACHE_DIR" not in os.environ


@pytest.mark.usefixtures("unwritable")
def test_a_folder_that_is_given_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/given")
    program.keep_compiled(tmp_path / "outputs")
    assert os.environ["NUMBA_CACHE_DIR"] == "/given"


def test_where_the_code_lies_writable_nothing_changes(tmp_path, monkeypatch):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    program.keep_compiled(tmp_path / "outputs")
    assert "NUMBA_CACHE_DIR" not in os.environ
