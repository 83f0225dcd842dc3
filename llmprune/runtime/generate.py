"""`llmprune generate DIR --prompt …`: text from a packed or dense model, word by word, and how fast it came."""

from __future__ import annotations

import time
from typing import Any

import click
import torch
from transformers import TextStreamer
from transformers.generation.streamers import BaseStreamer

from llmprune.errors import UserError
from llmprune.model import max_seq_len
from llmprune.runtime.opening import Opened, Wanted, form_of, open_model, token_ids

__all__ = ["Clock", "Speed", "command", "generate", "model_options", "prompt_tokens"]


class Speed:
    """When each token came, in seconds from the start of its generation."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.times: list[float] = []

    def tick(self) -> None:
        """A token is there."""
        self.times.append(time.perf_counter() - self.began)

    @property
    def first(self) -> float:
        """Seconds to the first token: the time for reading the prompt."""
        return self.times[0]

    @property
    def tokens_per_second(self) -> float | None:
        """Of all tokens after the first; None for a single one."""
        elapsed = self.times[-1] - self.times[0]
        return (len(self.times) - 1) / elapsed if elapsed > 0 else None


class Clock(BaseStreamer):
    """Notes when tokens come, and which."""

    def __init__(self) -> None:
        self.speed = Speed()
        self.tokens: list[int] = []
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        """transformers hands over the prompt first, then each token as soon as it is on the CPU."""
        if self._prompt:
            self._prompt = False
            return
        self.speed.tick()
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        """Nothing is left to do."""


class _Screen(TextStreamer):
    """Prints text as soon as its tokens make whole words, and notes the times."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.clock = Clock()

    def put(self, value: torch.Tensor) -> None:
        """See `Clock`."""
        self.clock.put(value)
        super().put(value)  # type: ignore[no-untyped-call]  # transformers' own

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """A piece of text that will not change any more."""
        click.echo(text, nl=stream_end)


def generate(
    opened: Opened,
    ids: torch.Tensor,
    streamer: BaseStreamer,
    *,
    new_tokens: int,
    temperature: float = 0.0,
    to_the_end: bool = False,
) -> None:
    """Let the model go on from `ids` (1, tokens); what comes goes to the streamer.

    temperature : 0 takes the likeliest token each time
    to_the_end : exactly so many tokens, even where the model would end its text

    Raises
    ------
    UserError
        if prompt and new tokens are more than the model takes: some models then stop with an error about an index.
    """
    limit, length = max_seq_len(opened.model), ids.shape[1]
    if limit is not None and length + new_tokens > limit:
        raise UserError(
            f"the model takes {limit} tokens; got a prompt of {length} and --max-new-tokens {new_tokens}: shorten one."
        )
    settings: dict[str, Any] = {"do_sample": temperature > 0, "top_k": None, "top_p": None}
    settings |= {"num_beams": 1, "num_return_sequences": 1}  # words are shown as they come, of one text
    settings["temperature"] = temperature if temperature > 0 else None
    if to_the_end:
        settings["min_new_tokens"] = new_tokens
    if opened.model.generation_config.pad_token_id is None:
        settings["pad_token_id"] = 0  # there is one text, so nothing is ever padded
    with torch.inference_mode():
        opened.model.generate(
            ids, attention_mask=torch.ones_like(ids), streamer=streamer, max_new_tokens=new_tokens, **settings
        )


def prompt_tokens(opened: Opened, wanted: int, *, new_tokens: int) -> int:
    """How long a prompt may be, `wanted` at most, that leaves the model room for the new tokens."""
    limit = max_seq_len(opened.model)
    return wanted if limit is None else max(1, min(wanted, limit - new_tokens))


def model_options(function: Any) -> Any:
    """The argument and options that say which model, for `Wanted`."""
    for decorate in (
        click.argument("name", metavar="DIR"),
        click.option(
            "--dtype", default="auto", show_default=True, help="auto (as stored), float32, bfloat16 or float16."
        ),
        click.option("--device", help="Such as cpu or cuda:1.  [default: the GPU if there is one]"),
        click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model."),
    ):
        function = decorate(function)
    return function


@click.command(help="Go on from a prompt with a packed or dense model, and tell how fast. DIR may be a hub id.")
@model_options
@click.option("--prompt", required=True, help="Text to go on from.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True, help="Tokens at most.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy; above, tokens are drawn.")
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses what is drawn.")
def command(*, prompt: str, max_new_tokens: int, temperature: float, seed: int, **wanted: Any) -> None:
    if not temperature >= 0:  # nan is neither
        raise UserError(f"--temperature is 0 (greedy) or more; got {temperature}.")
    opened = open_model(Wanted(**wanted))
    ids = token_ids(opened, prompt)
    torch.manual_seed(seed)
    screen = _Screen(opened.tokenizer)
    generate(opened, ids, screen, new_tokens=max_new_tokens, temperature=temperature)
    click.echo(_told(opened, screen.clock.speed, ids.shape[1]), err=True)


def _told(opened: Opened, speed: Speed, prompt: int) -> str:
    rate = speed.tokens_per_second
    ending = "" if rate is None else f", then {rate:.1f} tokens/s"
    told = f"{len(speed.times)} tokens, the first after {speed.first:.2f} s ({prompt} in the prompt){ending}"
    return f"{told}; {form_of(opened.packed, opened.unpacked)}."
