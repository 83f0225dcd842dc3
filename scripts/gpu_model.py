"""End to end: one token after another from a Llama of random weights, dense and 2:4, on a GPU as one CUDA graph.

Both models have the same weights; every weight that is not packed is one tensor in both. A step (embedding, layers,
attention over a static cache, the likeliest token) is recorded once and replayed for every token, in one of two modes:

    graph      transformers' modules as they are
    compiled   the same through torch.compile, which joins the small operations between the products

The ratio that counts is the one in the mode in which the dense model is faster.
"""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from gpu_clock import Device, laps
from gpu_rows import Tuned
from gpu_weights import kept_entries
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmprune.runtime import timing
from llmprune.runtime.sparsify import sparsify
from llmprune.runtime.weight import SparseWeight

__all__ = ["LLAMA_8B", "SMALL", "Mode", "ModelResult", "Sizes", "random_model", "run_model", "use_tuned"]

CONTEXT, NEW_TOKENS, ROUNDS = 128, 64, 7
"""Places in the cache that count as read, tokens in a lap, and laps of each model."""

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Sizes:
    """Of a Llama."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    key_value_heads: int
    vocabulary: int

    @property
    def memory_needed(self) -> int:
        """Bytes: the dense model, the packed one beside it, and what recording takes."""
        heads = self.hidden + self.hidden * self.key_value_heads // self.heads
        layer = 2 * self.hidden * heads + 3 * self.hidden * self.ffn
        return int(2 * (2 * self.vocabulary * self.hidden + 1.7 * self.layers * layer)) + 4 * 2**30


LLAMA_8B = Sizes(32, 4096, 14336, 32, 8, 128256)
SMALL = Sizes(2, 256, 512, 4, 2, 512)


@dataclass
class Mode:
    """One way to run both: tokens per second in every lap, or why there are none."""

    name: str
    dense: list[float] = field(default_factory=list)
    sparse: list[float] = field(default_factory=list)
    failure: str | None = None
    same_tokens: int = 0

    @property
    def ratio(self) -> float | None:
        """How many times faster the sparse model is."""
        return statistics.median(self.sparse) / statistics.median(self.dense) if self.sparse and self.dense else None


@dataclass
class ModelResult:
    """Both models. Memory in bytes: of the tensors, and the most that was allocated while decoding (on a GPU)."""

    sizes: Sizes
    packed_linears: int = 0
    dense_bytes: int = 0
    sparse_bytes: int = 0
    dense_peak: int | None = None
    sparse_peak: int | None = None
    modes: list[Mode] = field(default_factory=list)

    @property
    def best(self) -> Mode | None:
        """The mode in which the dense model is fastest."""
        done = [mode for mode in self.modes if mode.ratio is not None]
        return max(done, key=lambda mode: statistics.median(mode.dense), default=None)

    @property
    def memory_ratio(self) -> float | None:
        """Sparse memory over dense memory: peaks where they were measured, else that of the tensors."""
        if self.dense_peak and self.sparse_peak:
            return self.sparse_peak / self.dense_peak
        return self.sparse_bytes / self.dense_bytes if self.dense_bytes else None

    def as_json(self) -> dict[str, Any]:
        """With ratios written out."""
        modes = [{**asdict(mode), "ratio": mode.ratio} for mode in self.modes]
        return {**asdict(self), "modes": modes, "memory_ratio": self.memory_ratio}


def random_model(sizes: Sizes, device: torch.device, seed: int) -> LlamaForCausalLM:
    """Made on the device: at 8 billion parameters that takes seconds. Every linear of the layers is 2:4."""
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_value_heads,
        tie_word_embeddings=False,
        dtype=DTYPE,
    )
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            shape = (module.out_features, module.in_features)
            module.weight.data.masked_fill_(~kept_entries(shape, "2:4", generator), 0)
    model.eval().requires_grad_(False)
    return model


def packed_twin(model: LlamaForCausalLM) -> tuple[LlamaForCausalLM, int]:
    """The same model with its sparse linears packed, and how many; all other tensors are shared."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    return twin, sparsify(twin)


def use_tuned(tuned: list[Tuned], weights: dict[tuple[int, int], SparseWeight]) -> None:
    """Hand what tuning measured at one token to the dispatcher, under the names of its paths.

    weights : one of each shape, by (rows, columns)
    """
    for (rows, columns), weight in weights.items():
        times: dict[str, float] = {}
        for found in tuned:
            case = found.case
            alike = (case.rows, case.columns, case.pattern, case.tokens) == (rows, columns, "2:4", 1)
            if alike and found.microseconds is not None:  # of an interleaved final: the search is less exact
                times[found.config] = found.microseconds
        if times:
            timing.store(weight.device, timing.Timings({timing.described(weight): {"1": times}}))


class _Cache:
    """Keys and values of every layer in fixed places: what the model's attention asks of a cache, and no more."""

    is_compileable = True

    def __init__(self, model: LlamaForCausalLM, position: Tensor, slots: int) -> None:
        config: Any = model.config
        heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        shape = (1, heads, slots, size)
        self.position = position
        self.keys = [torch.zeros(shape, dtype=DTYPE, device=position.device) for _ in model.model.layers]
        self.values = [torch.zeros_like(key) for key in self.keys]

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Put one token's key and value in their place."""
        self.keys[layer].index_copy_(2, self.position, key)
        self.values[layer].index_copy_(2, self.position, value)
        return self.keys[layer], self.values[layer]

    def get_seq_length(self, layer: int = 0) -> int:
        """Never used for the position, which is given."""
        return CONTEXT


class Decoder:
    """Greedy decoding in which nothing leaves the device: step after step reads and writes the same memory."""

    def __init__(self, model: LlamaForCausalLM, *, compiled: bool) -> None:
        device = model.lm_head.weight.device
        self.ids = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.position = torch.full((1,), CONTEXT, dtype=torch.long, device=device)
        self.told = torch.zeros(CONTEXT + NEW_TOKENS, dtype=torch.long, device=device)
        self._places = torch.arange(CONTEXT + NEW_TOKENS, device=device)
        self._cache = _Cache(model, self.position, CONTEXT + NEW_TOKENS)
        self._model = model
        self._next = torch.compile(self._likeliest, dynamic=False) if compiled else self._likeliest

    def _likeliest(self, ids: Tensor, position: Tensor) -> Tensor:
        mask = (self._places <= position).view(1, 1, 1, -1)
        logits = self._model(
            input_ids=ids,
            position_ids=position.view(1, 1),
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
        ).logits
        likeliest: Tensor = logits[:, -1].argmax(-1, keepdim=True)
        return likeliest

    def step(self) -> None:
        """One token."""
        with torch.no_grad():
            word = self._next(self.ids, self.position)
            self.ids.copy_(word)
            self.told.index_copy_(0, self.position, word.view(1))
            self.position.add_(1)

    def back(self) -> None:
        """To the beginning of the text."""
        self.ids.zero_()
        self.position.fill_(CONTEXT)


def run_model(
    sizes: Sizes, device: Device, *, seed: int, tuned: list[Tuned], compile_too: Callable[[], bool]
) -> ModelResult:
    """Make both models, decode with them in turns.

    compile_too : asked after the first mode, whether there is time for the second
    """
    result = ModelResult(sizes)
    dense = random_model(sizes, device.device, seed)
    result.dense_bytes = _tensor_bytes(dense)
    result.dense_peak = _peak(dense, device)
    sparse, result.packed_linears = packed_twin(dense)
    result.sparse_bytes = _tensor_bytes(sparse)
    use_tuned(tuned, _one_of_each(sparse))
    for name in ("graph", "compiled"):
        if name == "graph" or compile_too():
            result.modes.append(_mode(name, dense, sparse, device))
    del dense
    torch.compiler.reset()  # compiled code may hold the weights that it was made for
    gc.collect()
    device.free()
    result.sparse_peak = _peak(sparse, device)
    return result


def _one_of_each(model: nn.Module) -> dict[tuple[int, int], SparseWeight]:
    from llmprune.runtime.placement import sparse_linears

    return {(m.out_features, m.in_features): SparseWeight(m.packed(), m.bias) for m in sparse_linears(model).values()}


def _tensor_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _peak(model: LlamaForCausalLM, device: Device) -> int | None:
    """Most bytes while this model alone is there and decodes."""
    device.peak(again=True)
    decoder = Decoder(model, compiled=False)
    lap = device.record([decoder.step])
    lap()
    return device.peak()


def _mode(name: str, dense: LlamaForCausalLM, sparse: LlamaForCausalLM, device: Device) -> Mode:
    mode = Mode(name)
    decoders = {
        "dense": Decoder(dense, compiled=name == "compiled"),
        "sparse": Decoder(sparse, compiled=name == "compiled"),
    }
    try:
        steps = {form: device.record([decoder.step], NEW_TOKENS) for form, decoder in decoders.items()}
    except Exception as error:  # what cannot be recorded or compiled is told, and the other mode stands
        device.wait()
        mode.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return mode

    def text(form: str) -> Callable[[], float]:
        def lap() -> float:
            decoders[form].back()
            device.wait()
            return steps[form]()

        return lap

    found = laps({form: text(form) for form in decoders}, ROUNDS)
    mode.dense, mode.sparse = ([1 / seconds for seconds in found[form]] for form in ("dense", "sparse"))
    told = [decoder.told[CONTEXT:].tolist() for decoder in decoders.values()]
    mode.same_tokens = next((i for i, (one, other) in enumerate(zip(*told)) if one != other), NEW_TOKENS)
    return mode
