"""The commands ``slope-fx generate`` and ``slope-fx bench``."""

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slope_fx.checkpoints import load_pretrained
from slope_fx.densify import densify
from slope_fx.errors import ArgumentError
from slope_fx.frozen.warm import check_positions, request
from slope_fx.hub import tokenizer_of
from slope_fx.progress import progress

ROUNDS = 5


def generate_text(
    source: str, prompt: str, *, tokens: int, temperature: float, seed: int, dtype: str | None
) -> str:
    """The text that a checkpoint writes after a prompt, with the prompt.

    Args:
        source: a checkpoint with a tokenizer.
        prompt: the prompt.
        tokens: the largest number of new tokens.
        temperature: of the sampling; 0 takes the most likely token.
        seed: of the sampling.
        dtype: dtype of the model; None keeps the stored one.

    Raises:
        ArgumentError: the checkpoint has no tokenizer, the prompt has no tokens, the text would be
            longer than the model's positions, or an argument is not allowed.
        CheckpointError: as for ``load_pretrained``.
    """
    if tokens < 1 or not 0 <= temperature < math.inf:
        raise ArgumentError(
            f"tokens={tokens}, temperature={temperature}; tokens is a number from 1 up, and the "
            "temperature one from 0 up."
        )
    if not 0 <= seed < 2**63:
        raise ArgumentError(f"seed={seed}; allowed is a whole number from 0 to 2**63 - 1.")
    tokenizer = _tokenizer(source)
    # To compile the model takes longer than to write a text.
    model: Any = load_pretrained(source, frozen=True, dtype=dtype, backend=None)
    _check_generates(model, source)
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].numel():
        raise ArgumentError(f"prompt={prompt!r} has no tokens. Pass a text to go on from.")
    check_positions(model, inputs["input_ids"].shape[1], tokens)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature}
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=tokens, **sampling)
    text: str = tokenizer.decode(out[0], skip_special_tokens=True)
    return text


@dataclass(frozen=True)
class Side:
    """The figures of one model.

    Attributes:
        tokens_per_second: of the decoding, of all sequences together.
        first_token_seconds: from the prompt to the first token, compiled.
        compile_seconds: the time of the first requests, which compile.
        bytes: of the parameters and buffers.
    """

    tokens_per_second: float
    first_token_seconds: float
    compile_seconds: float
    bytes: int


def bench(
    source: str, *, batch: int, length: int, tokens: int, dtype: str | None, dense: bool
) -> dict[str, Any]:
    """Measure the requests of a frozen checkpoint, in turns with the dense model.

    Both models are compiled as one graph and have a static cache.

    Args:
        source: a checkpoint.
        batch, length: number of prompts, and tokens of each.
        tokens: new tokens of a request, at least 2.
        dtype: dtype of the model; None keeps the stored one.
        dense: whether to measure the dense model with the same weights too.

    Returns:
        "frozen" and "dense": the fields of :class:`Side`. "speedup": of the tokens per second.

    Raises:
        ArgumentError: the model can't generate, a request would be longer than the model's
            positions, or an argument is not allowed.
        CheckpointError: as for ``load_pretrained``.
    """
    for name, value, least in (("batch", batch, 1), ("length", length, 1), ("tokens", tokens, 2)):
        if value < least:
            raise ArgumentError(f"{name}={value}; allowed is a whole number from {least} up.")
    model = load_pretrained(source, frozen=True, dtype=dtype)
    _check_generates(model, source)
    check_positions(model, length, tokens)
    models = {"frozen": model}
    if dense:
        models["dense"] = densify(copy.deepcopy(model), inplace=True)
        models["dense"].compile()
    cache = {"cache_implementation": "static"}
    compiled = {}
    for name, each in progress(models.items(), "compile", "model", delay=0.0):
        started = time.perf_counter()
        for count in (tokens, 1):
            request(each, batch, length, count, **cache)
            request(each, batch, length, count, **cache)
        compiled[name] = time.perf_counter() - started
    taken: dict[str, dict[int, list[float]]] = {name: {1: [], tokens: []} for name in models}
    for _ in progress(range(ROUNDS), "measure", "round"):
        for name, each in models.items():
            for count in (1, tokens):
                taken[name][count].append(
                    _seconds(lambda e=each, c=count: request(e, batch, length, c, **cache))  # type: ignore[misc]
                )
    report: dict[str, Any] = {}
    for name, each in models.items():
        first, whole = (statistics.median(taken[name][count]) for count in (1, tokens))
        rate = batch * (tokens - 1) / (whole - first)
        report[name] = asdict(Side(rate, first, compiled[name], _size(each)))
    if dense:
        sides = report["frozen"], report["dense"]
        report["speedup"] = sides[0]["tokens_per_second"] / sides[1]["tokens_per_second"]
    return report


def bench_text(report: dict[str, Any]) -> str:
    """The report of :func:`bench` as a table."""
    from tabulate import tabulate

    rows = [
        (
            name,
            f"{side['tokens_per_second']:.1f}",
            f"{1000 * side['first_token_seconds']:.1f} ms",
            f"{side['compile_seconds']:.1f} s",
            f"{side['bytes'] / 2**20:.1f} MiB",
        )
        for name, side in report.items()
        if name != "speedup"
    ]
    table = tabulate(rows, ("model", "tokens/s", "first token", "to compile", "weights"))
    if "speedup" not in report:
        return table
    return f"{table}\n\nDecoding: {report['speedup']:.2f}x the speed of the dense model."


def _seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _size(model: nn.Module) -> int:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _check_generates(model: Any, source: str) -> None:
    if not (hasattr(model, "can_generate") and model.can_generate()):
        raise ArgumentError(
            f"source={source!r} holds a {type(model).__name__}, which can't generate text. Pass a "
            "checkpoint of a causal language model of transformers."
        )


def _tokenizer(source: str) -> Any:
    if not Path(source).is_dir():
        raise ArgumentError(f"source={source!r} is not a folder. Pass a checkpoint.")
    tokenizer = tokenizer_of(source)
    if tokenizer is None:
        raise ArgumentError(
            f"source={source!r} has no tokenizer. Save it with the model: "
            "slope_fx.save_pretrained(model, path, tokenizer=tokenizer)."
        )
    return tokenizer
