"""Compiling the CPU kernel: once for each torch, into the user's cache folder.

Two sources make one shared object. The arithmetic (cpu_rows.cpp) is compiled once for each instruction set
and the processor is asked at run time which of them it has, so that a cache folder that several machines share is safe
for all of them. The compiler is called directly: the loader in torch.utils.cpp_extension needs ninja and setuptools,
and when it is killed it leaves a lock behind that the next process waits for, for ever. Here the lock is the kernel's
own (flock), which dies with its holder, and a finished file appears by renaming, so that nobody ever sees half of it.

The file's name holds torch's version and a digest of sources, flags and compiler: whatever changes, another file is
made. Nothing is ever deleted.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

__all__ = ["CannotBuild", "cache_folder", "kernel_file"]

LEVELS = {
    "avx2": "-mavx2 -mfma -mf16c -mbmi -mbmi2 -mpopcnt",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mbmi -mbmi2 -mpopcnt",
    "avx512_bf16": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi2 -mavx512bf16 -mfma -mf16c -mbmi -mbmi2 "
    "-mpopcnt",
}
"""Flags of each instruction set that the arithmetic is compiled for."""

_FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden"]
_SOURCES = ("cpu_kernel.cpp", "cpu_rows.cpp", "cpu_rows.h", "cpu_vectors.h")


class CannotBuild(Exception):
    """The kernel cannot be had on this machine. The text says why, as the end of a sentence."""


def kernel_file() -> Path:
    """The compiled kernel, compiled now if it was not before.

    Raises
    ------
    CannotBuild
        if the machine is no x86-64 Linux with AVX2, there is no folder to write to, or the compiler fails.
    """
    machine = os.uname().machine if sys.platform == "linux" else sys.platform
    if machine != "x86_64":
        raise CannotBuild(f"it is written for x86-64 Linux, and this is {machine}")
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        raise CannotBuild("it needs AVX2, which torch does not find on this processor")
    name = f"cpu_kernel-torch{torch.__version__}-{_digest()}.so"
    folders = [cache_folder(), _spare_folder()]
    for folder in folders:
        with suppress(OSError):  # a home that may not even be entered
            if (folder / name).exists() and _is_safe(folder):
                return folder / name
    for folder in folders:
        if _can_write(folder):
            _build(folder / name)
            return folder / name
    raise CannotBuild(f"neither {folders[0]} nor {folders[1]} can be written to; let XDG_CACHE_HOME name a folder")


def cache_folder() -> Path:
    """Where llmprune keeps what it can make again: `llmprune` in the user's cache folder (XDG_CACHE_HOME)."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "llmprune"
    try:
        return Path.home() / ".cache" / "llmprune"
    except RuntimeError:  # no HOME, and a user number without an account, as in some containers
        return _spare_folder()


# Folders --------------------------------------------------------------------------------------------------------------


def _spare_folder() -> Path:
    """For users without a home that can be written to, as in many containers."""
    return Path(tempfile.gettempdir()) / f"llmprune-{os.getuid()}"


def _is_safe(folder: Path) -> bool:
    """What is loaded runs as this user, so in a place that all can write to the folder must be this user's alone."""
    about = folder.stat()
    return folder != _spare_folder() or (about.st_uid == os.getuid() and not about.st_mode & 0o022)


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return _is_safe(folder)
    except OSError:
        return False


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """One process at a time. Where a file system has no locks all may work at once, for the same result."""
    import fcntl

    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            logging.getLogger(__name__).info("%s cannot be locked", file)
        yield


# The compiler ---------------------------------------------------------------------------------------------------------


def _digest() -> str:
    """Sixteen hexadecimal digits that change with the sources, the flags and the compiler's name."""
    here = Path(__file__).parent
    parts = [(here / source).read_bytes() for source in _SOURCES]
    parts += [" ".join([*_compiler(), *_FLAGS, *LEVELS.values()]).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _compiler() -> list[str]:
    try:
        return shlex.split(os.environ.get("CXX", "")) or ["c++"]
    except ValueError as error:
        raise CannotBuild(f"CXX={os.environ['CXX']} is no command ({error})") from None


def _build(target: Path) -> None:
    with _locked(target.with_suffix(".lock")):
        if target.exists():  # by the process that had the lock before
            return
        logging.getLogger(__name__).warning("llmprune compiles its CPU kernel; this happens once and takes a minute.")
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            _compile(Path(folder))
            (Path(folder) / "kernel.so").replace(target)


def _compile(folder: Path) -> None:
    """kernel.so in `folder`: the operators and the arithmetic of each level at once, then one shared object."""
    here, about_torch = Path(__file__).parent, Path(torch.__file__).parent
    headers = ["-isystem", str(about_torch / "include")]
    commands = [["-fopenmp", *headers, "-c", str(here / "cpu_kernel.cpp"), "-o", str(folder / "kernel.o")]]
    for level, flags in LEVELS.items():
        defined = f"-DKERNELS=kernels_{level}"
        commands.append([*flags.split(), defined, "-c", str(here / "cpu_rows.cpp"), "-o", str(folder / f"{level}.o")])
    with ThreadPoolExecutor(len(commands)) as threads:
        list(threads.map(_run, commands))
    objects = sorted(str(file) for file in folder.glob("*.o"))
    libraries = ["-L", str(about_torch / "lib"), "-ltorch_cpu", "-lc10"]
    _run(["-shared", "-fopenmp", *objects, *libraries, "-o", str(folder / "kernel.so")])


def _run(arguments: Sequence[str]) -> None:
    command = [*_compiler(), *_FLAGS, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CannotBuild(
            f"there is no C++ compiler {command[0]} ({error.strerror}); install g++ 11 or newer, or name one with CXX"
        ) from error
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or [""]
        raise CannotBuild(f"{shlex.join(command[:1])} failed: {said[0].strip()}")
