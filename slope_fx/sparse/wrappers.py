"""Finds a ``DistributedDataParallel`` that was made before ``compile``."""

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from slope_fx.errors import StateError


def check_wrapper(name: str, values: Tensor) -> None:
    """Check that the DistributedDataParallel that runs now, if any, synchronises a layer's values.

    Args:
        name: of the layer.
        values: its trained parameter.

    Raises:
        StateError: the wrapper was made before ``compile``, and does not know the parameter.
    """
    wrapper = DistributedDataParallel._get_active_ddp_module()
    if wrapper is None or any(p is values for p in wrapper._module_parameters):
        return
    raise StateError(
        f"{name}: the DistributedDataParallel around the model was made before compile and goes on "
        "synchronising the parameters that compile replaced. Call slope_fx.compile first, then "
        "wrap."
    )
