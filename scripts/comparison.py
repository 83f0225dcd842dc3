"""What compare_methods measures: the texts of one model, and what the model makes of them when it is pruned."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from comparison_cells import OF_THE_TEXT, Cell, identity_digest
from measured import Measured
from torch import Tensor
from transformers import GenerationConfig

from llmprune.checkpoint.layout import digest, fingerprint
from llmprune.checkpoint.provenance import command_line, tool_versions
from llmprune.config import PruneConfig
from llmprune.data import Corpus, bos_token, calibration_windows, evaluation_windows, load_corpus
from llmprune.errors import UserError
from llmprune.eval.perplexity import Perplexity, evaluate
from llmprune.machine import give_back_memory
from llmprune.model import Loaded
from llmprune.pipeline import prune_layers

__all__ = ["Comparison", "Task", "leave_out", "looks_at_text", "sampled"]

CHARACTERS_PER_TOKEN = 64
"""How much text is read for each calibration token, so that seeds have a choice."""

LEAVE_OUT_CHARACTERS = 2**24
"""How much is read where documents are left out: the same for any number of windows, so that the rest is the same."""

SAMPLED = "sampled"
"""The name of the text that the dense model writes itself."""

EVALUATION_SEED = 10**6
"""Of the evaluation text that the model writes; calibration takes the run's seeds, which are small numbers."""


# Texts ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exam:
    """A text for evaluation, or windows (n, eval_seq_len) that the model wrote; `digest` of the windows."""

    name: str
    text: Corpus | Tensor
    digest: str


class Texts:
    """Calibration windows and evaluation texts, made while the model is still dense."""

    def __init__(self, loaded: Loaded, options: dict[str, Any]) -> None:
        self.model, self.tokenizer, self.options = loaded.model, loaded.tokenizer, options
        self.kept: Corpus | None = None
        self._sampled: dict[tuple[int, int], Tensor] = {}
        exams = [self._exam(name, self._text(name)) for name in options["eval_dataset"]]
        if options["leave_out"]:
            self.kept, unseen = leave_out(self._whole(options["dataset"]), options["leave_out"])
            exams.append(self._exam("unseen", unseen))
        self.exams = exams

    def calibration(self, config: PruneConfig) -> tuple[Tensor, dict[str, Any]]:
        """Windows (num_samples, seq_len) int64 for a config, and where they come from."""
        count, seq_len = config.num_samples, config.seq_len
        assert seq_len is not None
        source: Corpus | Tensor
        if config.dataset == SAMPLED:
            source, origin = self._sample(count, seq_len, config.seed), {"name": SAMPLED}
        else:
            source = self.kept or self._load(config.dataset, "calibration", CHARACTERS_PER_TOKEN * count * seq_len)
            origin = {"name": source.name, **source.provenance}
        bos = None if config.dataset == SAMPLED else self._bos(config.bos)
        windows = calibration_windows(
            source, self.tokenizer, num_samples=count, seq_len=seq_len, seed=config.seed, bos=bos
        )
        return windows, origin

    def _text(self, name: str) -> Corpus | Tensor:
        tokens, seq_len = self.options["eval_tokens"], self.options["eval_seq_len"]
        if name == SAMPLED:
            return self._sample(max(1, tokens // seq_len), seq_len, EVALUATION_SEED)
        return self._load(name, "evaluation", CHARACTERS_PER_TOKEN * tokens)

    def _exam(self, name: str, text: Corpus | Tensor) -> Exam:
        windows = evaluation_windows(
            text,
            self.tokenizer,
            seq_len=self.options["eval_seq_len"],
            tokens=self.options["eval_tokens"],
            bos=self._bos("auto"),
        )
        return Exam(text.name if isinstance(text, Corpus) else name, text, digest(windows))

    def _whole(self, name: str) -> Corpus:
        if name == SAMPLED:
            raise UserError("--leave-out is for texts made of documents; --eval-dataset sampled is other sampled text.")
        return self._load(name, "calibration", LEAVE_OUT_CHARACTERS)

    def _load(self, name: str, purpose: Any, enough: int) -> Corpus:
        return load_corpus(name, purpose=purpose, tokenizer=self.tokenizer, enough_characters=enough)

    def _bos(self, mode: Any) -> int | None:
        return bos_token(mode, self.tokenizer, self.model.config.model_type)

    def _sample(self, count: int, seq_len: int, seed: int) -> Tensor:
        """As `sampled`, which takes long: what was written before is taken again."""
        known = self._sampled.get((seq_len, seed))
        if known is None or len(known) < count:
            known = self._sampled[seq_len, seed] = sampled(
                self.model, self.tokenizer, count, seq_len=seq_len, seed=seed
            )
        return known[:count]


def leave_out(corpus: Corpus, every: int) -> tuple[Corpus, Corpus]:
    """The documents that stay, and every so many-th (the 5th, the 10th, …), which nobody calibrates on, as "unseen"."""
    unseen = corpus.texts[every - 1 :: every]
    if every < 2 or not unseen:
        raise UserError(f"--leave-out {every}: {corpus.name} has {len(corpus.texts)} documents, none or all left out.")
    kept = [text for number, text in enumerate(corpus.texts, 1) if number % every]
    return _part(corpus, kept, f"{corpus.name}, 1 in {every} left out"), _part(corpus, unseen, "unseen")


def _part(whole: Corpus, texts: Sequence[str], name: str) -> Corpus:
    part = load_corpus(list(texts), purpose="calibration")
    return replace(part, name=name, provenance={"part_of": whole.provenance, **part.provenance})


@torch.no_grad()
def sampled(model: Any, tokenizer: Any, count: int, *, seq_len: int, seed: int) -> Tensor:
    """(count, seq_len) int64: what the model writes from BOS on at temperature 1; of more windows the first are the
    same. It may not end before the window does."""
    bos = model.config.get_text_config().bos_token_id
    bos = tokenizer.bos_token_id if bos is None else bos
    if bos is None:
        raise UserError("a sampled text begins with BOS, and neither the model's config nor its tokenizer has one.")
    # top_k has a default of 50; what a checkpoint's own generation settings say is not wanted either.
    free = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    settings = GenerationConfig(**free, min_length=seq_len, max_length=seq_len, pad_token_id=0)
    start = torch.full((16, 1), bos, device=model.device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        batches = [
            model.generate(start, attention_mask=torch.ones_like(start), generation_config=settings).cpu()
            for _ in range(-(-count // len(start)))
        ]
    return torch.cat(batches)[:count]


# Measuring ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A cell that is wanted: the dense model if `config` is None."""

    label: str
    config: PruneConfig | None
    identity: dict[str, Any]
    windows: Tensor | None = None
    calibration: dict[str, Any] | None = None


class Comparison:
    """One model and its texts. `tasks` says what is wanted, `measure` does it; before each, the weights are dense."""

    def __init__(self, loaded: Loaded, device: torch.device, options: dict[str, Any]) -> None:
        self.loaded, self.device, self.options = loaded, device, options
        self.model = loaded.model.to(device)
        self.weights = identity_digest(fingerprint(self.model))
        self.texts = Texts(loaded, options)
        # On the CPU, where there is room: a GPU need not hold the model twice.
        tensors = chain(self.model.parameters(), self.model.buffers())
        self.dense = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in tensors]
        self.made = {
            "versions": {**tool_versions(device), "commit": _commit()},
            "threads": torch.get_num_threads(),
            "command": command_line(),
        }

    def tasks(self, configs: Sequence[tuple[str, PruneConfig]]) -> list[Task]:
        """The dense model, then each (label, config); all windows are made here, so that too little text is an early
        error."""
        return [Task("dense", None, self._identity(None, None)), *(self._task(*each) for each in configs)]

    def measure(self, task: Task) -> Cell:
        """Prune and evaluate."""
        for tensor, value in self.dense:
            tensor.data.copy_(value)
        seconds, memory = (None, None) if task.config is None else self._prune(task)
        return Cell(
            label=task.label,
            **self._conditions(task),
            identity=task.identity,
            seconds=seconds,
            memory=memory,
            perplexities=[self._perplexity(exam) for exam in self.texts.exams],
            model=self.loaded.base_name,
            made={**self.made, "date": datetime.now(timezone.utc).isoformat(timespec="milliseconds")},
        )

    def _conditions(self, task: Task) -> dict[str, Any]:
        """What the table sorts by. A method that looks at no text has none of the text's."""
        of_the_text = dict.fromkeys(("num_samples", "seq_len", "seed", "calibration"))
        config = task.config
        if config is not None and looks_at_text(config):
            of_the_text = {"num_samples": config.num_samples, "seq_len": config.seq_len, "seed": config.seed}
            of_the_text["calibration"] = task.calibration
        return {"sparsity": None if config is None else config.sparsity, **of_the_text}

    def _task(self, label: str, config: PruneConfig) -> Task:
        windows, calibration = self.texts.calibration(config)
        return Task(label, config, self._identity(config, windows), windows, calibration)

    def _identity(self, config: PruneConfig | None, windows: Tensor | None) -> dict[str, Any]:
        settings = {} if config is None else asdict(config)
        # What is off is left out: a setting that llmprune learns later, and that is off, leaves old cells valid.
        on = {name: value for name, value in settings.items() if name not in OF_THE_TEXT and value not in OFF}
        return {
            "settings": on,
            "seed": None if config is None else config.seed,
            "model": self.weights,
            "calibration": None if windows is None else digest(windows),
            "evaluation": [exam.digest for exam in self.texts.exams],
        }

    def _prune(self, task: Task) -> tuple[float, int | None]:
        assert task.config is not None
        assert task.windows is not None
        model, windows, config, device = self.model, task.windows, task.config, self.device
        give_back_memory()
        return cost_of(lambda: prune_layers(model, windows, config, device=device), device)

    def _perplexity(self, exam: Exam) -> Perplexity:
        tokens, seq_len = self.options["eval_tokens"], self.options["eval_seq_len"]
        result = evaluate(self.model, self.loaded.tokenizer, exam.text, tokens=tokens, seq_len=seq_len)
        if isinstance(exam.text, Corpus):
            return result
        protocol = result.protocol.replace("token ids as given", f"{exam.name}: written by the dense model")
        return replace(result, dataset=exam.name, protocol=protocol)


OFF = (None, False, 0, ())


def looks_at_text(config: PruneConfig) -> bool:
    """Whether other calibration windows would give other weights."""
    return config.recipe.statistic is not None or bool(config.tune)


def cost_of(work: Callable[[], object], device: torch.device) -> tuple[float, int | None]:
    """Seconds that `work` takes, and the most memory, in bytes, on top of what was held before: of the GPU if that
    computes, else of this process where the kernel counts it (Linux), else None. On a CPU the seconds are those that
    the processors worked for this process: a table takes hours, and what else the machine does must not count."""
    if device.type == "cuda":
        start = time.perf_counter()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return time.perf_counter() - start, torch.cuda.max_memory_allocated(device) - before
    if not os.access("/proc/self/clear_refs", os.W_OK):
        start = time.process_time()
        work()
        return time.process_time() - start, None
    with Measured() as process:
        work()
    numbers = process.numbers()
    return numbers["cpu_seconds"], int(numbers["anonymous_peak"] - numbers["anonymous_before"])


def _commit() -> str | None:
    """Of the checkout that this script lies in, "-dirty" where files were changed; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--match="]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
