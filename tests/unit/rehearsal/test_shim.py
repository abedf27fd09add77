"""The compiled part of the fake device: a compiler that is missing or fails is one line."""

from pathlib import Path

import pytest

from megatron_croc.native_code import cache_folder
from megatron_croc.rehearsal.shim import ShimError, build_shim


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ShimError, match=r"no C\+\+ compiler is installed \(no-such-compiler\)"):
        build_shim()
    assert not list(tmp_path.rglob("*.so"))


def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(
        '#!/bin/sh\nfor word; do [ "$before" = -o ] && : > "$word"; before=$word; done\n'
        "echo 'fake_cuda.cpp:1: error: no header' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(ShimError, match=r"cannot compile fake_cuda\.cpp: .*no header"):
        build_shim()
    assert not list(cache_folder().iterdir())
