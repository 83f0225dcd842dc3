"""How the CPU kernel is compiled and kept: once, whoever asks, and never half. A shell script plays the compiler."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from llmprune.runtime import cpu_build
from llmprune.runtime.cpu_build import CannotBuild, kernel_file

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel is written for Linux")

SCRIPT = """#!/bin/sh
echo "$@" >> {log}
sleep {seconds}
for word; do
    test "$before" = -o && echo compiled > "$word"
    before=$word
done
exit {status}
"""
CALLS = 1 + len(cpu_build.LEVELS) + 1
"""Of the compiler for one kernel: the operators, each level, and the link."""

Compiler = Callable[..., Path]


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """Make a compiler that logs its calls; gives the log."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu_build.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(cpu_build.os, "uname", lambda: type("Machine", (), {"machine": "x86_64"}))

    def make(*, seconds: float = 0, status: int = 0, name: str = "compiler") -> Path:
        script, log = tmp_path / name, tmp_path / f"{name}.log"
        script.write_text(SCRIPT.format(log=log, seconds=seconds, status=status))
        script.chmod(0o700)
        log.touch()
        monkeypatch.setenv("CXX", str(script))
        return log

    return make


def _calls(log: Path) -> int:
    return len(log.read_text().splitlines())


def test_it_is_compiled_once_and_then_found(compiler: Compiler) -> None:
    log = compiler()
    first = kernel_file()
    assert first.read_text() == "compiled\n"
    assert first.parent == cpu_build.cache_folder()
    assert torch.__version__ in first.name
    assert kernel_file() == first
    assert _calls(log) == CALLS
    assert "march=native" not in log.read_text()


def test_two_at_once_compile_once(compiler: Compiler) -> None:
    log = compiler(seconds=0.1)
    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(lambda _: kernel_file(), range(2))
    assert one == other
    assert _calls(log) == CALLS


def test_what_a_killed_process_left_stops_nobody(compiler: Compiler) -> None:
    compiler()
    target = kernel_file()
    (target.parent / "tmpleft").mkdir()
    (target.parent / "tmpleft" / "kernel.so").write_text("half")
    assert target.with_suffix(".lock").exists()
    target.unlink()
    assert kernel_file().read_text() == "compiled\n"


def test_another_compiler_makes_another_file(compiler: Compiler) -> None:
    compiler()
    first = kernel_file()
    compiler(name="newer")
    assert kernel_file() != first
    assert first.exists()


def test_a_failing_compiler_leaves_nothing_behind(compiler: Compiler) -> None:
    compiler(status=1)
    with pytest.raises(CannotBuild, match="failed"):
        kernel_file()
    assert not list(cpu_build.cache_folder().glob("*.so"))
    assert not list(cpu_build.cache_folder().glob("tmp*"))


def test_without_a_cache_folder_a_temporary_one_serves(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = compiler()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert kernel_file().parent.parent == tmp_path
    assert kernel_file().parent.stat().st_mode & 0o777 == 0o700
    assert _calls(log) == CALLS


def test_a_user_without_a_home_gets_the_temporary_folder_and_it_must_be_theirs(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    compiler()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(cpu_build.Path, "home", homeless)
    folder = kernel_file().parent
    assert folder.parent == tmp_path
    folder.chmod(0o777)
    with pytest.raises(CannotBuild, match="XDG_CACHE_HOME"):
        kernel_file()


def test_a_temporary_folder_that_others_may_write_to_is_not_trusted(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    kernel_file().parent.chmod(0o777)
    with pytest.raises(CannotBuild, match="XDG_CACHE_HOME"):
        kernel_file()


def test_a_processor_without_avx2_is_told_at_once(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    log = compiler()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(CannotBuild, match="AVX2"):
        kernel_file()
    assert _calls(log) == 0


def test_another_machine_is_told_what_the_kernel_needs(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    log = compiler()
    monkeypatch.setattr(cpu_build.os, "uname", lambda: type("Machine", (), {"machine": "aarch64"}))
    with pytest.raises(CannotBuild, match="aarch64"):
        kernel_file()
    assert _calls(log) == 0
