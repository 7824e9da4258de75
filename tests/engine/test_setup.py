# SPDX-License-Identifier: Apache-2.0
"""Where compiled programs are kept: what lies there runs as this user."""

import logging
import os
from pathlib import Path

import jax
import pytest

from slora_jax.engine.setup import keep_compiled_programs


@pytest.fixture(autouse=True)
def unset():
    """JAX's cache is of the whole process."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_it_is_made_for_this_user_only(tmp_path: Path, caplog):
    keep_compiled_programs(str(tmp_path / "new" / "one"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "new" / "one")
    assert (tmp_path / "new" / "one").stat().st_mode & 0o077 == 0
    assert not caplog.records


def test_one_of_another_user_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", 4712, -1) if os.getuid() == 0 else None
    with pytest.raises(ValueError, match=r"compilation_cache_dir .* another user .* your own"):
        keep_compiled_programs(str(tmp_path / "theirs"))
    assert jax.config.jax_compilation_cache_dir is None


def test_one_that_all_may_write_to_is_warned_of(tmp_path: Path, caplog):
    tmp_path.chmod(0o777)
    with caplog.at_level(logging.WARNING):
        keep_compiled_programs(str(tmp_path))
    assert "any user may put programs into" in caplog.text
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)


def test_one_that_cannot_be_made_is_left_to_jax():
    keep_compiled_programs("/proc/nothing")
    assert jax.config.jax_compilation_cache_dir == "/proc/nothing"


def test_the_users_own_choice_stays(tmp_path: Path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    keep_compiled_programs(str(tmp_path / "ours"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    assert not (tmp_path / "ours").exists()
