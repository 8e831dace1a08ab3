"""Continues prompts: python -m train.sample RUN_OR_MODEL --prompt "..." [--prompt "..."].

The model is a run's folder, a Hugging Face folder or a .gguf file.
"""

import dataclasses
import sys

import numpy as np
from tyro.conf import Positional, UseAppendAction

from train.command import main


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Continues prompts with a run's or a pretrained model."""

    model: Positional[str]
    """Folder of a run, Hugging Face folder, or .gguf file"""
    prompt: UseAppendAction[tuple[str, ...]]
    """Text to go on with; may be given several times, and may be empty"""
    max_tokens: int = 100
    """The most new tokens of each prompt"""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the likeliest token"""
    top_k: int | None = None
    """Draws from so many of the likeliest tokens; None from all"""
    top_p: float = 1.0
    """Draws from the likeliest tokens that together have this probability"""
    seed: int = 0
    """Of the draws"""
    step: int | None = None
    """Of a run, the checkpoint of this step; None is the newest good one"""


def sample(arguments: Arguments) -> list[str]:
    """Prints each prompt with its continuation, and returns the continuations.

    Raises:
      UsageError: the model can't be read, or a prompt or number is impossible.
    """
    from models.generate import generate
    from train import runs
    from train.errors import UsageError
    from train.tokenizer import encode_prompt

    if not arguments.prompt:
        raise UsageError('--prompt: is missing; give a text, e.g. --prompt "My fellow"')
    for text in arguments.prompt:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError(f"--prompt {text!r}: is not UTF-8; give text") from None
    model = runs.load(arguments.model, arguments.step)
    tokenizer, start = model.tokenizer, list(model.start)
    prompts = [
        # An empty one where nothing stands before a text: what follows the end of another.
        np.array([*start, *encode_prompt(tokenizer, text)[:-1]] or [tokenizer.end], np.int32)
        for text in arguments.prompt
    ]
    try:
        found = generate(
            model.config,
            model.params,
            prompts,
            arguments.max_tokens,
            context=model.context,
            end=tokenizer.end,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            seed=arguments.seed,
            known=tokenizer.vocab_size,
        )
    except ValueError as error:
        raise UsageError(f"{arguments.model}: {error}") from None
    texts = []
    for prompt, begin, new in zip(arguments.prompt, prompts, found, strict=True):
        # Decoded together, since a character may be cut by the border.
        whole = tokenizer.decode([*begin[len(start) :], *new])
        exact = whole.startswith(prompt)
        texts.append(whole.removeprefix(prompt) if exact else tokenizer.decode(new))
        print(prompt + texts[-1])
        if len(prompts) > 1:
            print("-" * 40)
    return texts


if __name__ == "__main__":
    sys.exit(main("train.sample", Arguments, sample))
