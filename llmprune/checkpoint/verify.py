"""A checkpoint on disk against its report: is every tensor there, whole, and as sparse as promised?

The files are read tensor by tensor with safetensors, so a checkpoint of any size can be verified on a small machine,
at any time and without its source. In a packed checkpoint each tensor is unpacked first: the report speaks of dense
ones. Then transformers loads it as a reader would. Every violation is collected; nothing
stops at the first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.checkpoint.layout import SavedWeight, digest
from llmprune.checkpoint.packed import Entry, dense_tensor, index_name, packed_entries
from llmprune.checkpoint.probe import Probe, logits_of
from llmprune.checkpoint.report import Report
from llmprune.checkpoint.stream import INDEX, WEIGHTS
from llmprune.errors import UserError, VerificationError
from llmprune.model import quiet_transformers, shelf_of
from llmprune.model.load import from_files
from llmprune.results import PrunedWeight
from llmprune.sparsity.pattern import NM, parse_pattern

__all__ = ["SAME_LOGITS", "Check", "Verification", "verify"]

_NAMED = 5  # how many names an error shows; all are in Check.failures


SAME_LOGITS = "same logits as before saving"
"""The check that the reloaded model answers as the one in memory did."""


@dataclass(frozen=True)
class Check:
    """One kind of thing that was looked at."""

    what: str
    """As in "bytes as reported"."""
    count: int
    """How many things were looked at."""
    failures: tuple[str, ...] = ()
    """What was wrong, one clause each, beginning with the tensor's name."""

    @property
    def ok(self) -> bool:
        """Whether nothing was wrong."""
        return not self.failures

    @property
    def detail(self) -> str:
        """The first few failures."""
        more = len(self.failures) - _NAMED
        return "; ".join(self.failures[:_NAMED]) + (f"; and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class Verification:
    """The outcome of `verify`."""

    directory: Path
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)

    def raise_if_failed(self) -> None:
        """Raise VerificationError with the first few failures of every kind, if there are any."""
        failed = [f"{check.what}: {check.detail}" for check in self.checks if not check.ok]
        if failed:
            raise VerificationError(f"{self.directory} is not what its report says. " + ". ".join(failed) + ".")


def verify(
    directory: Path,
    *,
    reload: bool = True,
    probe: Probe | None = None,
    trust_remote_code: bool = False,
    rest_on_disk: Path | None = None,
) -> Verification:
    """Check the checkpoint in `directory` against the report in it.

    With `reload`, transformers loads it too (a second model in memory, or, with a directory for weights that are
    converted, one that rests on disk); with `probe`, the loaded model must answer bit for bit like the one that was
    saved. Files beyond the weights are not looked at.

    Raises
    ------
    UserError
        if there is no report to verify against.
    """
    directory = Path(directory)
    report = Report.read(directory)
    with ExitStack() as stack:
        shards, broken = _open_shards(directory, stack)
        places: dict[str, list[str]] = {}
        for file, handle in shards.items():
            for name in handle.keys():  # noqa: SIM118 - not a dictionary
                places.setdefault(name, []).append(file)
        config, entries = _check_config(directory)
        reader = _Reader(shards, places, entries)
        checks = [
            Check("shards readable", len(shards) + len(broken), tuple(broken)),
            _check_names(report, places, indexes={index_name(name) for name in entries}),
            _check_index(directory, places),
            *_check_tensors(report, [name for name in places if name in report.tensors], reader.read),
            config,
        ]
    if reload:
        options = {"trust_remote_code": trust_remote_code, "rest_on_disk": rest_on_disk}
        checks += _check_reload(directory, report, probe, options)
    return Verification(directory, tuple(checks))


def _open_shards(directory: Path, stack: ExitStack) -> tuple[dict[str, Any], list[str]]:
    shards: dict[str, Any] = {}
    broken: list[str] = []
    for path in sorted(directory.glob("*.safetensors")):
        try:
            shards[path.name] = stack.enter_context(safe_open(path, "pt"))
        except (SafetensorError, OSError) as error:
            broken.append(f"{path.name} ({error})")
    return shards, broken


@dataclass(frozen=True)
class _Reader:
    """Reads tensors by their names in the report, packed or not."""

    shards: Mapping[str, Any]
    places: Mapping[str, list[str]]
    entries: Mapping[str, Entry]

    def read(self, name: str) -> Tensor:
        """The dense tensor. Raises UserError if its parts do not fit together, SafetensorError if they are damaged."""
        if name not in self.entries:
            return self._stored(name)
        if index_name(name) not in self.places:
            raise UserError(f"{name} is packed and has no {index_name(name)}")
        return dense_tensor(name, self.entries[name], self._stored(name), self._stored(index_name(name)))

    def _stored(self, name: str) -> Tensor:
        tensor: Tensor = self.shards[self.places[name][0]].get_tensor(name)
        return tensor


def _check_names(report: Report, places: Mapping[str, list[str]], *, indexes: Collection[str]) -> Check:
    failures = [f"{name} is missing" for name in report.tensors if name not in places]
    failures += [
        f"{name} is not in the report ({files[0]})"
        for name, files in places.items()
        if name not in report.tensors and name not in indexes
    ]
    failures += [f"{name} is in {' and '.join(files)}" for name, files in places.items() if len(files) > 1]
    failures += [
        f"{name} is stored though it is tied to {kept}" for name, kept in report.ties.items() if name in places
    ]
    return Check("every tensor once, and no other", len(report.tensors), tuple(failures))


def _check_index(directory: Path, places: Mapping[str, list[str]]) -> Check:
    path = directory / INDEX
    if not path.is_file():
        one = (directory / WEIGHTS).is_file() or not places
        return Check("index of the shards", 0, () if one else (f"{INDEX} is missing",))
    if (directory / WEIGHTS).is_file():
        return Check("index of the shards", 1, (f"{WEIGHTS} lies beside {INDEX} and would be loaded in its place",))
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError):
        return Check("index of the shards", 1, (f"{INDEX} cannot be read",))
    wrong = [name for name in index.keys() | places.keys() if index.get(name) not in places.get(name, [])]
    return Check("index of the shards", len(index), tuple(f"{name} is not where it points" for name in sorted(wrong)))


def _check_tensors(report: Report, names: Collection[str], read: Callable[[str], Tensor]) -> Iterator[Check]:
    """Read every tensor once: its bytes, its zeros, its pattern."""
    changed: list[str] = []
    dense: list[str] = []
    zeros: dict[str, int] = {}
    pruned = 0  # of those that could be read: what was not looked at was not checked
    for name in names:
        held = report.tensors[name]
        try:
            tensor = read(name)
        except SafetensorError as error:
            changed.append(f"{name} cannot be read ({error})")
            continue
        except UserError as error:
            changed.append(str(error))
            continue
        if digest(tensor) != held.sha256:
            changed.append(f"{name} differs from what was {'saved' if held.touched else 'in the source'}")
        if held.touched and (found := tensor.numel() - int(torch.count_nonzero(tensor))) != held.zeros:
            dense.append(f"{name} holds {found} zeros, not {held.zeros}")
        pruned += bool(held.weights)
        for weight in held.weights:
            if tuple(tensor.shape) != held.shape:
                dense.append(f"{name} has shape {tuple(tensor.shape)}, not {held.shape}")
                break
            rows = weight.rows_of(tensor)
            zeros[weight.weight] = zeros.get(weight.weight, 0) + rows.numel() - int(torch.count_nonzero(rows))
            if fault := _pattern_fault(rows, weight):
                dense.append(f"{name} {fault}")
    yield Check("bytes as reported", len(names), tuple(changed))
    yield Check("pattern in pruned tensors", pruned, tuple(dense))
    yield _check_counts(report, zeros)


def _pattern_fault(rows: Tensor, weight: SavedWeight) -> str:
    """What is wrong with the zeros of (rows, in_features), or nothing. A kept weight may be zero by itself."""
    pattern = parse_pattern(weight.pattern)
    if isinstance(pattern, NM):
        groups = (rows == 0).reshape(rows.shape[0], -1, pattern.m).sum(-1)
        short = int((groups < pattern.m - pattern.n).sum())
        return f"breaks {weight.pattern} in {short} of {groups.numel()} groups" if short else ""
    if weight.scope == "row":
        least = pattern.zeros_of(rows.shape[1])
        short = int(((rows == 0).sum(-1) < least).sum())
        return f"has fewer than {least} zeros in {short} of {rows.shape[0]} rows" if short else ""
    return ""  # counted over the whole matrix, which may lie in several tensors


def _check_counts(report: Report, zeros: Mapping[str, int]) -> Check:
    failures = []
    for row in report.pruned:
        found, least = zeros.get(row.name, 0), _least_zeros(row)
        if found != row.zeros:
            failures.append(f"{row.name} holds {found} zeros, not {row.zeros}")
        elif found < least:
            failures.append(f"{row.name} holds {found} zeros, and {row.pattern} needs {least}")
    return Check("zeros of every pruned weight", len(report.pruned), tuple(failures))


def _least_zeros(row: PrunedWeight) -> int:
    """How many zeros the pattern promises in a weight, counted where its method counted them."""
    pattern, (out_features, in_features) = parse_pattern(row.pattern), row.shape
    if row.scope == "matrix":
        return pattern.zeros_of(out_features * in_features)
    return out_features * pattern.zeros_of(in_features)


def _check_config(directory: Path) -> tuple[Check, dict[str, Entry]]:
    """The configuration, and the packed tensors that it names."""
    what = "config.json"
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        entries = packed_entries(config)
    except (OSError, ValueError) as error:  # UserError is a ValueError
        return Check(what, 1, (f"config.json cannot be read ({error})",)), {}
    failures = []
    if entries is None and config.get("quantization_config") is not None:
        failures.append("config.json names a quantization, so readers would unpack dense weights")
    if "llmprune_config" not in config:
        failures.append("config.json has no llmprune_config")
    return Check(what, 1, tuple(failures)), entries or {}


def _check_reload(directory: Path, report: Report, probe: Probe | None, options: Mapping[str, Any]) -> Iterator[Check]:
    arguments = probe.loading if probe is not None else {"dtype": "auto"}
    try:
        with quiet_transformers():
            model, info = from_files(directory, **options, **arguments)
    except Exception as error:  # whatever a reader would meet is what we want to know
        yield Check("transformers loads it", 1, (f"{type(error).__name__}: {error}",))
        return
    carried = {name for name, held in report.tensors.items() if held.carried}
    failures = [
        f"{key} is {kind.removesuffix('_keys')}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for key in sorted(map(str, info.get(kind) or ()))
        if key not in carried
    ]
    failures += [str(message) for message in info.get("error_msgs") or ()]
    yield Check("transformers loads it", len(report.tensors), tuple(failures))
    yield _check_ties(model, report)
    if probe is not None:
        stays = "device_map" in arguments or shelf_of(model) is not None
        yield _check_logits(model if stays else model.to(probe.device), probe)


def _check_ties(model: PreTrainedModel, report: Report) -> Check:
    """Tied tensors share their memory again after loading."""
    state = model.state_dict(keep_vars=True)
    pairs = {dropped: kept for dropped, kept in report.ties.items() if dropped in state and kept in state}
    broken = [f"{name} is no longer tied to {kept}" for name, kept in pairs.items() if not _same(state, name, kept)]
    return Check("ties", len(pairs), tuple(broken))


def _same(state: Mapping[str, Tensor], one: str, other: str) -> bool:
    return state[one] is state[other] or 0 != state[one].data_ptr() == state[other].data_ptr()


def _check_logits(model: PreTrainedModel, probe: Probe) -> Check:
    logits = logits_of(model, probe.input_ids)
    if logits.shape == probe.logits.shape and torch.equal(logits, probe.logits):
        return Check(SAME_LOGITS, logits.numel())
    if logits.shape != probe.logits.shape:
        return Check(SAME_LOGITS, 1, (f"shape {tuple(logits.shape)}, not {tuple(probe.logits.shape)}",))
    worst = float((logits - probe.logits).abs().max())
    return Check(SAME_LOGITS, logits.numel(), (f"they differ by up to {worst:.3g}",))
