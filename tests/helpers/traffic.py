"""The bytes that each Triton kernel moves if memory bounds it.

The docstrings of the kernels give the same numbers. A test counts the bytes in the interpreter, and
the GPU benchmark compares the times of the kernels with them.
"""

from slope_fx.kernels.quantised import DEFAULT_GROUP, bytes_of


def bytes_per_weight(kernel: str, itemsize: int, n: int, m: int) -> tuple[float, float]:
    """The bytes read and the bytes written for each element of the dense weight.

    Args:
        kernel: its name. "expand_twice_pruned" is ``expand`` with the backward mask. "linear",
            "input_grad" and "weight_grad" are the products with one tile of tokens; their inputs
            and outputs do not count. "_int8" and "_int4" are kernels with quantised values.
        itemsize: bytes of an element of the weight.
        n, m: the pattern.
    """
    kept = n / m
    weight, values = float(itemsize), itemsize * kept
    forward, backward = 1 / 8, kept / 8
    int8, int4 = (bytes_of(kind, DEFAULT_GROUP[kind], n, m) for kind in ("int8", "int4"))
    return {
        "magnitude_mask": (weight, forward),
        "backward_mask": (values + forward, backward),
        "expand": (values + forward, weight),
        "expand_twice_pruned": (values + forward + backward, weight),
        "compress": (weight + forward, values),
        "expand_int8": (int8, weight),
        "expand_int4": (int4, weight),
        "linear": (values + forward, 0.0),
        "linear_int8": (int8, 0.0),
        "linear_int4": (int4, 0.0),
        "input_grad": (values + forward + backward, 0.0),
        "weight_grad": (forward, values),
    }[kernel]
