"""What each kernel that is bound by memory moves, on paper.

The kernels' docstrings say it in words, a test counts it in the interpreter, and the GPU
benchmark holds their times against it.
"""


def bytes_per_weight(kernel: str, itemsize: int, n: int, m: int) -> tuple[float, float]:
    """Bytes read and bytes written for each element of the dense weight.

    Args:
        kernel: its name; "prune" is ``magnitude_mask`` with values, "expand_twice_pruned" is
            ``expand`` with the backward mask, "linear" the product with one tile of tokens,
            its inputs and outputs aside.
        itemsize: bytes of an element of the weight.
        n, m: the pattern.
    """
    kept = n / m
    weight, values = float(itemsize), itemsize * kept
    forward, backward = 1 / 8, kept / 8
    return {
        "magnitude_mask": (weight, forward),
        "prune": (weight, forward + values),
        "backward_mask": (values + forward, backward),
        "expand": (values + forward, weight),
        "expand_twice_pruned": (values + forward + backward, weight),
        "compress": (weight + forward, values),
        "transpose": (values + forward + backward, values + forward),
        "linear": (values + forward, 0.0),
        "input_grad": (values + forward + backward, 0.0),
        "weight_grad": (forward, values),
    }[kernel]
