"""``densify``: converts a compiled model to a plain dense model."""

import copy
import tempfile
from typing import Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slope_fx.attach import detach
from slope_fx.errors import UnsupportedError, first_line
from slope_fx.hub import unmark
from slope_fx.integrations import peft
from slope_fx.planning.config import check_choice
from slope_fx.record import record_of, sparse_weights
from slope_fx.sparse.install import uninstall
from slope_fx.sparse.weight import SparseWeight

Model = TypeVar("Model", bound=nn.Module)
Adapters = Literal["merge", "drop", "peft"]


def densify(model: Model, adapters: Adapters = "merge", *, inplace: bool = False) -> Model:
    """Returns a plain dense model with the same outputs as ``model``. Pruned elements are zero.

    The dense model has no parts of slope_fx. It saves, loads, compiles and trains as any dense
    model.

    Args:
        model: the object that ``compile`` or ``load_pretrained`` returned.
        adapters: "merge" adds active adapters to the weights, so that pruned elements are no
            longer zero. "drop" omits the adapters. "peft" returns a ``peft.PeftModel`` with the
            adapters on the dense model.
        inplace: whether to change ``model`` instead of a copy. In place, the parameters are
            replaced, so call this before the next optimizer is made.

    Returns:
        The dense model; with "peft" a ``peft.PeftModel``.

    Raises:
        StateError: ``model`` is not the object that ``compile`` returned.
        ArgumentError: ``adapters`` has a value that is not allowed.
        UnsupportedError: the model is sharded, or cannot be copied; or, with "peft", no adapter is
            active or PEFT does not support adapters for a layer.
    """
    check_choice("adapters", adapters, get_args(Adapters))
    record_of(model)
    for weight in sparse_weights(model).values():
        if isinstance(weight.values, DTensor):
            raise UnsupportedError(
                f"{weight.name} is sharded. Save the model with slope_fx.save_pretrained, load it "
                "on one process with load_pretrained, and call densify there."
            )
    if adapters == "peft":
        peft.adapted(model)  # raises errors before the model changes
    dense = model if inplace else _copied(model)
    if adapters != "peft":
        _expand(dense, merge=adapters == "merge")
        return dense
    with tempfile.TemporaryDirectory() as folder:
        peft.export_peft(dense, folder)
        _expand(dense, merge=False)
        return peft.library().PeftModel.from_pretrained(dense, folder, is_trainable=True)


def _copied(model: Model) -> Model:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # such as a stored result with an autograd history
        raise UnsupportedError(
            f"the model can't be copied ({type(error).__name__}: {first_line(error)}). This "
            "happens if a module keeps a result of its last call. Call "
            "densify(model, inplace=True), which needs no copy."
        ) from error


@torch.no_grad()
def _expand(model: nn.Module, *, merge: bool) -> None:
    """Give all layers of ``model`` dense weights, and remove all parts of slope_fx."""

    def dense_of(weight: SparseWeight) -> Tensor:
        matrix = weight.to_dense().view(-1, weight.d_in)
        if merge and weight.adapter_active:
            lora_a, lora_b = cast(Tensor, weight.lora_A), cast(Tensor, weight.lora_B)
            a = lora_a.view(weight.stack, -1, weight.d_in)
            b = lora_b.view(weight.stack, weight.d_out, -1)
            # float64, so that the sum is rounded only once, to the dtype of the weight.
            product = weight.scale * torch.bmm(b.double(), a.double())
            matrix = (matrix.double() + product.view_as(matrix)).to(matrix.dtype)
        return weight.layout.to_parameter(matrix).contiguous()

    uninstall(model, dense_of)
    detach(model)
    unmark(getattr(model, "config", None))
