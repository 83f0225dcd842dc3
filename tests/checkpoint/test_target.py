"""The output's place: refused early, filled aside, put there in one step, and nothing left of a run that failed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from safetensors import SafetensorError

from llmprune.checkpoint.target import check_output, publish, write_errors
from llmprune.errors import UserError


def checkpoint(path: Path, text: str = "old") -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(text)
    return path


def content(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_a_new_directory_is_fine_and_not_made_yet(tmp_path: Path) -> None:
    target = check_output(tmp_path / "a" / "b", overwrite=False, source=tmp_path / "model", need_bytes=10)
    assert target == (tmp_path / "a" / "b").resolve()
    assert content(tmp_path) == []


def test_an_empty_directory_counts_as_free(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert check_output(tmp_path / "out", overwrite=False, source=None, need_bytes=10).is_dir()


def test_a_taken_directory_needs_overwrite(tmp_path: Path) -> None:
    checkpoint(tmp_path / "out")
    with pytest.raises(UserError, match=r"exists already.*--overwrite"):
        check_output(tmp_path / "out", overwrite=False, source=None, need_bytes=10)
    check_output(tmp_path / "out", overwrite=True, source=None, need_bytes=10)


def test_overwrite_does_not_delete_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "wedding.jpg").touch()
    with pytest.raises(UserError, match="no model"):
        check_output(tmp_path / "photos", overwrite=True, source=None, need_bytes=10)


@pytest.mark.parametrize(
    ("output", "relation"), [("model", "is"), ("model/pruned", "lies inside"), (".", "holds")], ids=str
)
def test_the_source_is_never_written(tmp_path: Path, output: str, relation: str) -> None:
    source = checkpoint(tmp_path / "model")
    with pytest.raises(UserError, match=f"{relation} the model's own directory"):
        check_output(tmp_path / output, overwrite=True, source=source, need_bytes=10)


def test_a_folder_that_holds_the_source_file_is_never_replaced(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "m") / "m.gguf"
    model.write_text("weights")
    for folder in (tmp_path / "m", tmp_path):
        with pytest.raises(UserError, match=r"holds the model itself, m\.gguf"):
            check_output(folder, overwrite=True, source=model, need_bytes=0)
    check_output(tmp_path / "m" / "out", overwrite=False, source=model, need_bytes=0)


def test_a_mount_point_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "volume")
    (tmp_path / "volume").mkdir()
    with pytest.raises(UserError, match=r"is a mount point, .*choose a folder inside it"):
        check_output(tmp_path / "volume", overwrite=False, source=None, need_bytes=0)
    check_output(tmp_path / "volume" / "out", overwrite=False, source=None, need_bytes=0)


def test_a_link_to_the_source_is_the_source(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model")
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(UserError, match="own directory"):
        check_output(tmp_path / "link", overwrite=True, source=source, need_bytes=10)


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match="is a file"):
        check_output(tmp_path / "out", overwrite=True, source=None, need_bytes=10)
    with pytest.raises(UserError, match="is a file"):
        check_output(tmp_path / "out" / "deeper", overwrite=True, source=None, need_bytes=10)


def test_a_parent_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere, so it is acted
    with pytest.raises(UserError, match="may not write"):
        check_output(tmp_path / "out", overwrite=False, source=None, need_bytes=10)


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 10**9))
    check_output(tmp_path / "out", overwrite=False, source=None, need_bytes=int(0.95 * 10**9))
    with pytest.raises(UserError, match=r"needs 1\.03 GB .* has 1 GB free"):
        check_output(tmp_path / "out", overwrite=False, source=None, need_bytes=int(0.98 * 10**9))


def test_what_was_filled_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    with publish(target, overwrite=False) as staging:
        assert staging.parent == target.parent
        (staging / "deep").mkdir()
        (staging / "deep" / "file").write_text("x")
        assert not target.exists()
    assert (target / "deep" / "file").read_text() == "x"
    assert content(tmp_path / "new") == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def half() -> None:
        with publish(tmp_path / "out", overwrite=False) as staging:
            (staging / "half").write_text("x")
            raise error

    with pytest.raises(error):
        half()
    assert content(tmp_path) == []


def test_overwriting_replaces_all_of_the_old(tmp_path: Path) -> None:
    target = checkpoint(tmp_path / "out")
    (target / "stale.safetensors").touch()
    with publish(target, overwrite=True) as staging:
        (staging / "config.json").write_text("new")
        assert (target / "config.json").read_text() == "old"
    assert content(target) == ["config.json"]
    assert (target / "config.json").read_text() == "new"
    assert content(tmp_path) == ["out"]


def test_a_failure_within_keeps_the_old(tmp_path: Path) -> None:
    target = checkpoint(tmp_path / "out")
    with pytest.raises(ValueError, match="broken"), publish(target, overwrite=True):
        raise ValueError("broken")
    assert (target / "config.json").read_text() == "old"
    assert content(tmp_path) == ["out"]


def test_a_failed_rename_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = checkpoint(tmp_path / "out")
    rename = Path.rename

    def refusing(self: Path, to: Path) -> Path:
        if ".tmp-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(UserError, match="Input/output error"), publish(target, overwrite=True):
        pass
    assert (target / "config.json").read_text() == "old"
    assert content(tmp_path) == ["out"]


def test_a_target_that_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(UserError, match="could not be written"), publish(target, overwrite=False):
        checkpoint(target, "somebody else's")
    assert (target / "config.json").read_text() == "somebody else's"
    assert content(tmp_path) == ["out"]


KILLED = """
import os, pathlib, signal, sys
from llmprune.checkpoint import target
where, moment = pathlib.Path(sys.argv[1]), sys.argv[2]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if moment == "before":
    target._put_in_place = lambda *_, **__: die()
rename = pathlib.Path.rename
def between(self, to):
    if moment == "between" and ".tmp-" in self.name:
        die()
    return rename(self, to)
pathlib.Path.rename = between
with target.publish(where, overwrite=True) as staging:
    (staging / "config.json").write_text("new")
"""


@pytest.mark.parametrize("moment", ["before", "between"])
def test_a_killed_run_loses_nothing_and_the_next_cleans_up(tmp_path: Path, moment: str) -> None:
    target = checkpoint(tmp_path / "o[u]t*")
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), moment], timeout=120)
    assert done.returncode == -signal.SIGKILL
    left = [name.split("-")[0] for name in content(tmp_path) if name.startswith(".")]
    assert left == ([".o[u]t*.tmp"] if moment == "before" else [".o[u]t*.old", ".o[u]t*.tmp"])
    survivor = target if moment == "before" else next(tmp_path.glob(".*.old-*"))
    assert (survivor / "config.json").read_text() == "old"
    with publish(target, overwrite=True) as staging:
        assert content(tmp_path) == [staging.name, "o[u]t*"]
        assert (target / "config.json").read_text() == "old"
        (staging / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "new"
    assert content(tmp_path) == ["o[u]t*"]


def test_a_living_run_beside_ours_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f".out.tmp-{os.getppid()}"
    other.mkdir()
    unrelated = tmp_path / ".out.tmp-notes"
    unrelated.mkdir()
    with publish(tmp_path / "out", overwrite=False):
        pass
    assert other.is_dir()
    assert unrelated.is_dir()


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError('Error while serializing: IoError(Os { code: 28, message: "No space left on device" })'),
    ],
    ids=["OSError", "SafetensorError"],
)
def test_a_full_disk_is_one_sentence(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(UserError, match="the disk is full; make room"), write_errors(tmp_path):
        raise error
