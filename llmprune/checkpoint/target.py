"""The place of the output: checked before any work is done, filled beside it, and renamed into it in one step.

A run takes hours and its output directory is an argument that people mistype. So everything that can be known about it
is asked first. And a reader must never see half a checkpoint, nor lose the old one to a run that failed: the files are
written to a hidden sibling `.{name}.tmp-{pid}` (a sibling, so that the rename stays within one file system), and the
old directory goes only when the new one is whole. A process that was killed leaves its sibling behind; the next run
finds that its process is dead and cleans up.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from safetensors import SafetensorError

from llmprune.errors import UserError

__all__ = ["check_output", "flush_directory", "publish", "write_errors"]

_MARGIN = 1.05  # on top of the weights: tokenizer, report, and what file systems keep for themselves
_FULL = (errno.ENOSPC, errno.EDQUOT)
_OURS = ("config.json", "llmprune_report.json")


def check_output(path: Path, *, overwrite: bool, source: Path | None, need_bytes: int) -> Path:
    """Make sure that a checkpoint of `need_bytes` can be put at `path`, without touching anything.

    `source` is the directory (or GGUF file) that the model comes from, or None where it comes from the Hub.
    Returns the path absolute, with links resolved: that is the directory that will be replaced.

    Raises
    ------
    UserError
        if `path` is a file, is taken, is (within) the source or holds it, or a mount point, cannot be written, or the
        disk is too small.
    """
    target = Path(path).expanduser().resolve()
    if source is not None and source.is_file():
        if target in source.expanduser().resolve().parents:
            raise UserError(f"{target} holds the model itself, {source.name}, which is never changed: choose another.")
    elif source is not None:
        _check_apart(target, source.expanduser().resolve())
    if target.is_mount():
        raise UserError(f"{target} is a mount point, which cannot be replaced as a whole: choose a folder inside it.")
    _check_free(target, overwrite=overwrite)
    home = next(parent for parent in target.parents if parent.exists())
    if not home.is_dir():
        raise UserError(f"{target} cannot be made, because {home} is a file: choose another output directory.")
    if not os.access(home, os.W_OK | os.X_OK):
        raise UserError(f"{target} cannot be made, because you may not write to {home}: choose another directory.")
    free = shutil.disk_usage(home).free
    if free < need_bytes * _MARGIN:
        raise UserError(
            f"The pruned model needs {_gigabytes(need_bytes * _MARGIN)} and {home} has {_gigabytes(free)} free: "
            "make room, or choose an output directory on another disk."
        )
    return target


@contextmanager
def publish(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A fresh directory to fill, which becomes `target` if the block succeeds, and vanishes if it does not.

    `target` is what `check_output` returned. With `overwrite` an old target is moved aside, and moved back should the
    last step fail. Leftovers of killed runs are cleaned up first.

    Raises
    ------
    UserError
        if the directory cannot be made or put in place (disk full, target taken meanwhile).
    """
    staging = target.parent / f".{target.name}.tmp-{os.getpid()}"
    with write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(target)
        staging.mkdir()
    try:
        yield staging
        with write_errors(target):
            _flush(staging)
            _put_in_place(staging, target, overwrite=overwrite)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def write_errors(directory: Path) -> Iterator[None]:
    """Turn a failed write into one sentence. safetensors reports a full disk with an exception of its own."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        full = getattr(error, "errno", None) in _FULL or "No space left" in str(error) or "os error 28" in str(error)
        cure = "make room, or choose an output directory on another disk" if full else "see what the system says"
        what = "the disk is full" if full else str(error)
        raise UserError(f"The pruned model could not be written to {directory}: {what}; {cure}.") from error


def _check_apart(target: Path, source: Path) -> None:
    if target == source or source in target.parents or target in source.parents:
        relation = "is" if target == source else "lies inside" if source in target.parents else "holds"
        raise UserError(
            f"The output directory {target} {relation} the model's own directory {source}, which is never changed: "
            "choose an output directory apart from it."
        )


def _check_free(target: Path, *, overwrite: bool) -> None:
    if target.is_dir():
        if not any(target.iterdir()):
            return
        if not overwrite:
            raise UserError(f"{target} exists already: choose another directory, or replace it with --overwrite.")
        # --overwrite deletes the directory: a mistyped `--output ~` must not.
        if not any((target / name).exists() for name in _OURS):
            raise UserError(
                f"{target} holds files but no model (no {' or '.join(_OURS)}), so --overwrite does not delete it: "
                "choose another directory."
            )
    elif target.exists():
        raise UserError(f"{target} is a file; the output is a directory: choose another name.")


def _put_in_place(staging: Path, target: Path, *, overwrite: bool) -> None:
    old = target.parent / f".{target.name}.old-{os.getpid()}"
    moved = overwrite and target.exists()
    if moved:
        target.rename(old)
    try:
        staging.rename(target)  # onto a directory with files in it this fails, which is the check against a race
    except BaseException:
        if moved:
            old.rename(target)
        raise
    flush_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _clean_up(target: Path) -> None:
    """Remove what runs that are dead left beside `target`; an old target that one had moved aside comes back."""
    for leftover in target.parent.glob(f".{_literal(target.name)}.*-*"):
        match = re.fullmatch(r"\.(tmp|old)-(\d+)", leftover.name.removeprefix(f".{target.name}"))
        # Our own number on a directory that we have not made yet was a dead process's too: containers reuse numbers.
        if match is None or (int(match[2]) != os.getpid() and psutil.pid_exists(int(match[2]))):
            continue
        if match[1] == "old" and not target.exists():
            leftover.rename(target)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _literal(name: str) -> str:
    """`name` with the characters that a glob would read as a pattern made harmless."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _flush(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    flush_directory(directory)


def flush_directory(directory: Path) -> None:
    """Have the system write down which files a directory holds: a rename counts only then."""
    if os.name == "nt":  # Windows cannot open a directory, and does not need to
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.3g} GB"
