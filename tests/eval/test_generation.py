"""Greedy continuations: the likeliest token each time, whatever the model's own settings say."""

from __future__ import annotations

import torch

from llmprune.eval.generation import Continuation, continuations, side_by_side
from tests.builders import tiny_tokenizer
from tests.eval.small_models import MODELS, pruned


def test_greedy_is_the_likeliest_token_at_every_step() -> None:
    model, tokenizer = MODELS["llama"](), tiny_tokenizer(adds_bos=True)
    model.generation_config.update(do_sample=True, temperature=3.0, repetition_penalty=5.0, no_repeat_ngram_size=2)
    model.generation_config.update(num_return_sequences=2, return_dict_in_generate=True, stop_strings=["a"])
    model.generation_config.update(token_healing=True, max_time=0.0, num_beams=3)
    model.generation_config.eos_token_id = None
    [written] = continuations(model, tokenizer, prompts=["a cat"], new_tokens=10)
    ids = tokenizer("a cat")["input_ids"]
    with torch.no_grad():
        for _ in range(10):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert list(written.tokens) == ids[-10:]
    assert written.text == tokenizer.decode(ids[-10:], skip_special_tokens=True)
    assert written.prompt == "a cat"


def test_a_model_that_takes_little_gets_a_shorter_prompt() -> None:
    [written] = continuations(MODELS["llama"](), tiny_tokenizer(), prompts=["0123456789" * 10])
    assert written.prompt.replace(" ", "") == "01234567890123456789012345678901"  # 32 of 64 tokens
    assert 0 < len(written.tokens) <= 32


def test_two_models_stand_side_by_side() -> None:
    model, tokenizer = MODELS["llama"](), tiny_tokenizer()
    dense, other = (continuations(each, tokenizer) for each in (model, pruned(model)))
    for generation, one, two in zip(side_by_side(dense, other), dense, other, strict=True):
        assert (generation.prompt, generation.dense, generation.pruned) == (one.prompt, one.text, two.text)
        assert generation.dense != generation.pruned
    assert all(pair.same_tokens == pair.tokens == 32 for pair in side_by_side(dense, dense) if len(pair.dense) > 40)


def test_how_far_two_texts_go_together() -> None:
    def same(one: tuple[int, ...], two: tuple[int, ...]) -> int:
        [pair] = side_by_side([Continuation("p", one, "")], [Continuation("p", two, "")])
        return pair.same_tokens

    assert same((1, 2, 3), (1, 2, 4)) == 2
    assert same((1, 2), (1, 2, 4)) == 2
    assert same((5,), (1,)) == 0
