"""What SLoPe should gain, on paper: operations, bytes and a roofline.

METHOD's counts, for 2:4 with 16-bit weights. Time is that of the larger of two ceilings, one for
operations and one for bytes, for each operation by itself: nothing is lost around a product, and
sparse tensor cores are twice as fast as dense ones. So it is a limit for an ideal engine on a
device of such ceilings; what is measured falls short of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from shapes import FED_BY_EMBEDDINGS, Architecture

N, M = 2, 4
TENSOR_CORES = 2.0
"""How much faster sparse tensor cores are than dense ones: the limit of a sparse product."""
TWO_OF_THREE = 3 / (1 / TENSOR_CORES + 1 / TENSOR_CORES + 1)
"""The limit of a training step in which two of three products are sparse."""

HALF, SINGLE = 2, 4
"""Bytes of an element."""
MASKS = 1 / 8 + N / M / 8
"""Bytes of both masks for each element of the dense weight: a bit each, and a bit a value."""
OPERAND = HALF * N / M + 1 / 8
"""Bytes of a 2:4 operand that cuSPARSELt reads, for each element: values and two bits a value."""

REBUILT = HALF * N / M + MASKS + HALF + HALF + OPERAND
"""Bytes moved to make one, for each element: values and masks in, dense out and in, operand out."""


@dataclass(frozen=True)
class Operation:
    """One step of a model, on both sides.

    Attributes:
        name: what it is.
        flops: operations, dense; ``times`` faster on the sparse side.
        times: 2 where sparse tensor cores do it, else 1.
        dense_bytes, sparse_bytes: that it moves.
        extra_flops: that only the sparse side has, by dense tensor cores.
    """

    name: str
    flops: float
    times: float
    dense_bytes: float
    sparse_bytes: float
    extra_flops: float = 0.0


@dataclass(frozen=True)
class Roofline:
    """A device: dense 16-bit operations and bytes a second at best."""

    flops: float
    bytes: float

    def dense(self, operations: list[Operation]) -> float:
        """Seconds of the dense side."""
        return sum(max(o.flops / self.flops, o.dense_bytes / self.bytes) for o in operations)

    def sparse(self, operations: list[Operation]) -> float:
        """Seconds of the sparse side."""
        return sum(
            max((o.flops / o.times + o.extra_flops) / self.flops, o.sparse_bytes / self.bytes)
            for o in operations
        )


def weights(sizes: Architecture, layers: int, skip_first: bool = True) -> tuple[int, int, int]:
    """Elements of the sparse linears, of those left dense, and of all else, in so many blocks."""
    block = sizes.block()
    first = skip_first * sum(block[name][0] * block[name][1] for name in FED_BY_EMBEDDINGS)
    every = layers * sum(d_in * d_out for d_in, d_out in block.values())
    return every - first, first, layers * sizes.vectors() + sizes.embeddings()


def inference(
    sizes: Architecture,
    layers: int,
    tokens: int,
    context: int,
    rank: float = 0.0,
    kept: bool = False,
    skip_first: bool = True,
) -> list[Operation]:
    """A forward pass over ``tokens`` in sequences of ``context``, adapters of ``rank`` * hidden.

    With ``kept`` operands are there already; else each is made for its product.
    """
    low = round(rank * sizes.hidden)
    operations = list(_forward(sizes, layers, tokens, context, low, skip_first))
    made = 0.0 if kept else REBUILT * weights(sizes, layers, skip_first)[0]
    return [*operations, Operation("operands", 0, 1, 0, made)]


def training(
    sizes: Architecture, layers: int, tokens: int, context: int, skip_first: bool = True
) -> list[Operation]:
    """A training step with AdamW, everything in 16 bits, without adapters.

    Each forward product has two more of its size, of which the input gradient is sparse.
    """
    operations = list(_forward(sizes, layers, tokens, context, 0, skip_first))
    for o in tuple(operations):
        if o.name.startswith("attention"):
            operations.append(Operation(f"{o.name}, gradient", 2.5 * o.flops, 1, 0, 0))
            continue
        if not o.flops:
            twice = 2 * o.dense_bytes
            operations.append(Operation(f"{o.name}, gradient", 0, 1, twice, twice))
            continue
        operations.append(
            Operation(f"{o.name}, input gradient", o.flops, o.times, o.dense_bytes, o.sparse_bytes)
        )
        # Its factors are the activations, read whole; its result the kept positions.
        operations.append(
            Operation(f"{o.name}, weight gradient", o.flops, 1, o.dense_bytes, o.sparse_bytes)
        )
    sparse, dense, other = weights(sizes, layers, skip_first)
    # Both operands once a step, that of the input gradient turned over before.
    operations.append(Operation("operands", 0, 1, 0, sparse * (2 * REBUILT + 2 * HALF)))
    # Weight and two moments are read and written, the gradient is read.
    each = 7 * HALF
    rest = each * (dense + other)
    operations.append(Operation("AdamW", 0, 1, each * sparse + rest, each * sparse * N / M + rest))
    return operations


def _forward(
    sizes: Architecture, layers: int, tokens: int, context: int, rank: int, skip_first: bool
) -> Iterator[Operation]:
    for layer in range(layers):
        for name, (d_in, d_out) in sizes.block().items():
            stays = skip_first and layer == 0 and name in FED_BY_EMBEDDINGS
            weight, activations = d_in * d_out, HALF * tokens * (d_in + d_out)
            low = 0 if stays else rank * (d_in + d_out)
            yield Operation(
                f"{name}{' (dense)' if stays else ''}",
                2.0 * tokens * weight,
                1 if stays else TENSOR_CORES,
                HALF * weight + activations,
                (HALF if stays else OPERAND) * weight + activations
                + HALF * (low + (tokens * 2 * rank if low else 0)),
                2.0 * tokens * low,
            )  # fmt: skip
        # Two products with the context, half of them behind the causal mask.
        yield Operation("attention", 2.0 * tokens * context * sizes.hidden, 1, 0, 0)
        # Norms, activation, residuals: each reads and writes about so much, fused.
        moved = HALF * tokens * (8.0 * sizes.hidden + 3 * sizes.ffn)
        yield Operation("elementwise", 0, 1, moved, moved)
    head = HALF * (sizes.hidden * sizes.vocabulary + tokens * (sizes.hidden + sizes.vocabulary))
    yield Operation("head", 2.0 * tokens * sizes.hidden * sizes.vocabulary, 1, head, head)


@dataclass(frozen=True)
class State:
    """Bytes of what lives from step to step (training), or at all (inference).

    Attributes:
        dense, sparse: the whole model.
        linears: sparse over dense, of the pruned linears alone.
        operands: what cuSPARSELt takes beside them where its operands are kept: between two steps
            under gradient accumulation, or at inference if it is told to.
    """

    dense: float
    sparse: float
    linears: float
    operands: float


def training_state(sizes: Architecture, layers: int, weight: int, moments: int) -> State:
    """Weights, gradients and Adam's moments, of so many bytes an element."""
    sparse, dense, other = weights(sizes, layers)
    each = 2 * weight + 2 * moments
    ratio = N / M + MASKS / each
    rest = each * (dense + other)
    return State(
        each * sparse + rest, ratio * each * sparse + rest, ratio, 2 * OPERAND * sparse
    )  # fmt: skip


def inference_state(sizes: Architecture, layers: int, rank: float = 0.0) -> State:
    """16-bit weights, and adapters of ``rank`` * hidden on the pruned linears."""
    sparse, dense, other = weights(sizes, layers)
    low = 0
    for name, (d_in, d_out) in sizes.block().items():
        count = layers - (1 if name in FED_BY_EMBEDDINGS else 0)
        low += count * round(rank * sizes.hidden) * (d_in + d_out)
    ratio = N / M + MASKS / HALF
    rest = HALF * (dense + other)
    return State(
        HALF * sparse + rest, ratio * HALF * sparse + HALF * low + rest,
        ratio + low / sparse, OPERAND * sparse,
    )  # fmt: skip
