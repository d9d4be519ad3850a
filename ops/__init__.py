"""The custom ops of the namespace ``slope_fx``, registered with ``torch.library``.

``expand``, ``add_adapter``
    The markers, which a read of a model's ``weight`` calls. Their result is correct in any code,
    and the passes find them in graphs (``weights.py``, ``adapter.py``).
``sparse_linear``, ``sparse_input_grad``, ``sparse_weight_grad``
    The three products of METHOD, for one weight or a stack of weights. The last two are the
    gradients of the first (``sparse_linear.py``, ``groups.py``).
``compress``, ``magnitude_mask``, ``backward_mask``
    The compression of a dense weight, and the choice of masks (``weights.py``, ``masks.py``).

Masks are packed uint8 (``kernels/packing.py``). The forward mask has one bit per element of the
(d_out, d_in) weight. The backward mask has one bit per value.
"""

if __name__ != "slope_fx.ops":
    # A second import under another name would register all ops again.
    raise ImportError(f"import this package as slope_fx.ops, not as {__name__!r}")

from slope_fx.ops.adapter import add_adapter
from slope_fx.ops.masks import backward_mask, magnitude_mask
from slope_fx.ops.sparse_linear import sparse_input_grad, sparse_linear, sparse_weight_grad
from slope_fx.ops.weights import compress, expand, expand_grad

# These register rules of the ops above, so they come last.
from slope_fx.ops import double_backward as double_backward  # isort: skip
from slope_fx.ops import sharding as sharding  # isort: skip
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
