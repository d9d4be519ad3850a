"""A small compiled model, and whether a call left a model as it was."""

import torch

import slope_fx
from models import Plain

X = torch.randn(3, 8)


def plain(**more):
    torch.manual_seed(0)
    model = Plain()
    return slope_fx.compile(model, **{"example_inputs": X, "backend": "aot_eager", **more})


def snapshot(model):
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "ids": {k: id(v) for k, v in model.named_parameters()},
        "types": [type(m) for m in model.modules()],
        "dicts": [sorted(m.__dict__) for m in model.modules()],
        "compiled": [m._compiled_call_impl for m in model.modules()],
    }


def assert_untouched(model, before):
    after = snapshot(model)
    for key in ("ids", "types", "dicts", "compiled"):
        assert after[key] == before[key], key
    assert list(after["state"]) == list(before["state"])
    assert all(torch.equal(after["state"][k], v) for k, v in before["state"].items())
