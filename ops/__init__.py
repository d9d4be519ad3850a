"""The custom ops of the namespace ``slope_fx``, registered with ``torch.library``.

``expand``, ``add_adapter``
    the markers: what a model's ``weight`` reads as. Right for any code that uses a
    weight, and what the passes look for (``weights.py``, ``adapter.py``).
``sparse_linear``, ``sparse_input_grad``, ``sparse_weight_grad``
    the three products of METHOD, of one weight or of a stack of weights; the last two are the
    gradient of the first (``sparse_linear.py``, ``groups.py``).
``compress``, ``magnitude_mask``, ``backward_mask``
    dense to compressed, and the choice of masks (``weights.py``, ``masks.py``).

Masks are bit-packed uint8 (``kernels/packing.py``): the forward mask one bit per
element of the (d_out, d_in) weight, the backward mask one bit per kept value.
"""

if __name__ != "slope_fx.ops":
    # A second import under another name would register every op twice.
    raise ImportError(f"import this package as slope_fx.ops, not as {__name__!r}")

from slope_fx.ops.adapter import add_adapter
from slope_fx.ops.masks import backward_mask, magnitude_mask
from slope_fx.ops.sparse_linear import sparse_input_grad, sparse_linear, sparse_weight_grad
from slope_fx.ops.weights import compress, expand, expand_grad

# After all of them, whose rules these register.
from slope_fx.ops import double_backward as double_backward  # isort: skip
from slope_fx.ops import vmap as vmap  # isort: skip

__all__ = [
    "add_adapter",
    "backward_mask",
    "compress",
    "expand",
    "expand_grad",
    "magnitude_mask",
    "sparse_input_grad",
    "sparse_linear",
    "sparse_weight_grad",
]
