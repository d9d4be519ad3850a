"""Back from compressed weights to a plain dense model."""

import copy
import tempfile
from typing import Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from slope_fx.attach import detach
from slope_fx.errors import UnsupportedError, first_line
from slope_fx.integrations import peft
from slope_fx.planning.config import check_choice
from slope_fx.record import record_of
from slope_fx.sparse.install import uninstall
from slope_fx.sparse.weight import SparseWeight

Model = TypeVar("Model", bound=nn.Module)
Adapters = Literal["merge", "drop", "peft"]


def densify(model: Model, adapters: Adapters = "merge", *, inplace: bool = False) -> Model:
    """A plain dense model that computes what ``model`` does: zeros where it is pruned.

    Nothing of slope_fx is left on it: it saves, loads, compiles and trains like any other, dense.

    Args:
        model: what ``compile`` or ``load_pretrained`` returned.
        adapters: "merge" adds those that take part to the weights, whose zeros they fill;
            "drop" leaves them out; "peft" puts a ``peft.PeftModel`` around the dense model, with
            adapters of its own.
        inplace: change ``model`` itself instead of a copy; it must be made dense before its
            parameters are given to another optimizer.

    Returns:
        The dense model; with "peft" a ``peft.PeftModel``.

    Raises:
        StateError: ``model`` is not the object that ``compile`` returned.
        ArgumentError: ``adapters`` is none of its choices.
        UnsupportedError: "peft" where PEFT has no adapter for a layer; or a model that can't be
            copied.
    """
    check_choice("adapters", adapters, get_args(Adapters))
    record_of(model)
    if adapters == "peft":
        peft.adapted(model)  # raises before anything is changed
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
    except Exception as error:  # what a module keeps of its last call may have a graph behind it
        raise UnsupportedError(
            f"the model can't be copied ({type(error).__name__}: {first_line(error)}), as a model "
            "that keeps a result of its last call can't. densify(model, inplace=True) needs no "
            "copy."
        ) from error


@torch.no_grad()
def _expand(model: nn.Module, *, merge: bool) -> None:
    """Give every layer of ``model`` its dense weight, and take all else of slope_fx away."""

    def dense_of(weight: SparseWeight) -> Tensor:
        matrix = weight.to_dense().view(-1, weight.d_in)
        if merge and weight.adapter_active:
            lora_a, lora_b = cast(Tensor, weight.lora_A), cast(Tensor, weight.lora_B)
            a = lora_a.view(weight.stack, -1, weight.d_in)
            b = lora_b.view(weight.stack, weight.d_out, -1)
            # The sum is rounded once, to the weight's own dtype.
            product = weight.scale * torch.bmm(b.double(), a.double())
            matrix = (matrix.double() + product.view_as(matrix)).to(matrix.dtype)
        return weight.layout.to_parameter(matrix).contiguous()

    uninstall(model, dense_of)
    detach(model)
