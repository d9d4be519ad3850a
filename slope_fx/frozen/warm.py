"""``warm_up``: compiles a model before its first request."""

import logging
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from slope_fx.errors import ArgumentError
from slope_fx.record import record_of

log = logging.getLogger(__name__)

TOKENS = 6
"""The new tokens of a run. The first decoding step compiles for its own lengths, the second for all
lengths."""


@torch.no_grad()
def warm_up(
    model: nn.Module, batch: int | Iterable[int] = 1, length: int = 64, **options: Any
) -> float:
    """Compile the prefill and the decoding of ``model.generate``, so that no request has to.

    Inductor keeps compiled code on the disk (``TORCHINDUCTOR_CACHE_DIR``). A second process that
    calls this therefore takes seconds where the first one takes a minute.

    Args:
        model: a compiled or frozen causal language model of transformers.
        batch: number of sequences of a request, or several. A batch of 1 has graphs of its own;
            all larger batches share graphs.
        length: typical number of tokens of a prompt. Other lengths use the same graphs.
        options: of ``generate``, as the requests have them, such as
            ``cache_implementation="static"``.

    Returns:
        The seconds that it took.

    Raises:
        StateError: ``model`` is not the object that ``compile`` or ``load_pretrained`` returned.
        ArgumentError: the model can't generate, ``length`` and 6 new tokens are more than the
            model's positions, or an argument has a value that is not allowed.
    """
    record_of(model)
    if not callable(getattr(model, "generate", None)):
        raise ArgumentError(
            f"model is a {type(model).__name__}, which has no generate(). Call it once on inputs "
            "of the shapes of your requests."
        )
    batches = [batch] if isinstance(batch, int) else list(batch)
    for name, value in [("length", length), *(("batch", value) for value in batches)]:
        if type(value) is not int or value < 1:
            raise ArgumentError(f"{name}={value!r}; allowed is a whole number from 1 up.")
    check_positions(model, length, TOKENS)
    limit = positions_of(model)
    # Two lengths, so that Dynamo sees that the length changes.
    other = length + 3 if limit is None or length + 3 + TOKENS <= limit else max(1, length - 3)
    started = time.perf_counter()
    for rows in batches:
        for count in (length, other):
            request(model, rows, count, TOKENS, **options)
    seconds = time.perf_counter() - started
    log.info("warmed up in %.1f s", seconds)
    return seconds


def positions_of(model: Any) -> int | None:
    """The largest number of tokens of a prompt and its text, or None."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_positions(model: Any, length: int, tokens: int) -> None:
    """Check that a prompt and its new tokens fit into the model.

    Raises:
        ArgumentError: they do not.
    """
    limit = positions_of(model)
    if limit is not None and length + tokens > limit:
        raise ArgumentError(
            f"length={length}, tokens={tokens}: a prompt of {length} tokens and {tokens} new ones "
            f"are {length + tokens}, and the model has {limit} positions. Ask for fewer."
        )


@torch.no_grad()
def request(model: Any, batch: int, length: int, tokens: int, **options: Any) -> None:
    """Generate ``tokens`` new tokens for ``batch`` random prompts of ``length`` tokens."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(vocabulary, (batch, length), device=next(model.parameters()).device)
    made = {"max_new_tokens": tokens, "min_new_tokens": tokens, **options}
    model.generate(ids, attention_mask=torch.ones_like(ids), **made)
