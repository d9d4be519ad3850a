"""No write to ``layer.weight`` is lost: each is carried out on the kept values, or refused."""

import copy

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, vmap
from transformers import initialization

import models
import slope_fx
from slope_fx.errors import ArgumentError, UnsupportedError

D_OUT, D_IN = 16, 24
RANDOM = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D_IN, D_OUT)
        self.stack = nn.Parameter(torch.randn(3, 16, D_OUT))

    def forward(self, x):
        return torch.bmm(self.layer(x).expand(3, -1, -1), self.stack.mT)


def compiled(backend=None, sparsity="2:4", **more):
    model = slope_fx.compile(
        Net(), sparsity, example_inputs=torch.randn(2, D_IN), skip_first=False, skip_head=False,
        backend=backend, on_fallback="ignore", **more,
    )  # fmt: skip
    return model, model.layer, slope_fx.sparse_weights(model)["layer"]


def assign(layer, value):
    layer.weight = value


def assign_data(layer, value):
    layer.weight.data = value


def delete(layer):
    del layer.weight


def set_item(tensor, value):
    tensor[1] = value


def no_grad(write):
    """A write under ``no_grad``, as to any parameter."""

    def written(layer, weight):
        with torch.no_grad():
            write(layer, weight)

    return written


def inference(write):
    def written(layer, weight):
        with torch.inference_mode():
            write(layer, weight)

    return written


CARRIED_OUT = {
    "mul_": no_grad(lambda layer, w: layer.weight.mul_(0.5)),
    "*= of data": lambda layer, w: layer.weight.data.mul_(0.5),
    "in inference mode": inference(lambda layer, w: layer.weight.mul_(0.5)),
    "detach": lambda layer, w: layer.weight.detach().mul_(0.5),
    "a row": no_grad(lambda layer, w: layer.weight[3].mul_(2)),
    "set item": no_grad(lambda layer, w: set_item(layer.weight, 0.0)),
    "a transpose's slice": no_grad(lambda layer, w: layer.weight.t()[2:5].neg_()),
    "torch.transpose": no_grad(lambda layer, w: torch.transpose(layer.weight, 0, 1)[0].zero_()),
    "split": no_grad(lambda layer, w: layer.weight.split(8)[1].neg_()),
    "flat": no_grad(lambda layer, w: layer.weight.view(-1)[:40].mul_(3)),
    "out=": no_grad(lambda layer, w: torch.mul(w.to_dense(), 2, out=layer.weight)),
    "foreach": no_grad(lambda layer, w: torch._foreach_mul_([layer.weight], 2.0)),
    "copy_ of pruned": no_grad(lambda layer, w: layer.weight.copy_(w.to_dense() * 3)),
    "data = pruned": lambda layer, w: assign_data(layer, w.to_dense() * 3),
    "add_ where kept": no_grad(lambda layer, w: layer.weight.add_(w.forward_mask() * 0.5)),
    "clamp_": no_grad(lambda layer, w: layer.weight.clamp_(-0.01, 0.01)),
    "two at once": no_grad(lambda layer, w: layer.weight.mul_(0.5).neg_()),
    "vector_to_parameters": lambda layer, w: nn.utils.vector_to_parameters(
        w.to_dense().flatten() * 2, [layer.weight]
    ),
}  # fmt: skip
"""Writes of which nothing is lost: pruned elements stay zero."""


@pytest.mark.parametrize("how", CARRIED_OUT)
def test_a_write_that_leaves_pruned_elements_zero_is_carried_out(how):
    _, layer, weight = compiled()
    # The same write to a plain parameter with the same numbers.
    plain = nn.Linear(D_IN, D_OUT)
    plain.weight.data.copy_(weight.to_dense())
    before = weight.to_dense()
    version = weight.values._version
    CARRIED_OUT[how](layer, weight)
    mask = weight.forward_mask()
    fixed = copy.deepcopy(weight)
    fixed.to_dense, fixed.forward_mask = (lambda: before), (lambda: mask)
    CARRIED_OUT[how](plain, fixed)
    assert not torch.equal(weight.to_dense(), before)
    assert torch.equal(weight.to_dense(), plain.weight.detach())
    assert torch.equal(layer.weight.detach().clone(), plain.weight.detach())
    assert weight.values._version > version
    assert not weight.masks_problem()


INITIALISERS = {
    "uniform_": nn.init.uniform_,
    "normal_": nn.init.normal_,
    "trunc_normal_": lambda w: nn.init.trunc_normal_(w, mean=0.5),
    "constant_": lambda w: nn.init.constant_(w, 0.3),
    "ones_": nn.init.ones_,
    "zeros_": nn.init.zeros_,
    "eye_": nn.init.eye_,
    "xavier_uniform_": nn.init.xavier_uniform_,
    "xavier_normal_": nn.init.xavier_normal_,
    "kaiming_uniform_": nn.init.kaiming_uniform_,
    "kaiming_normal_": nn.init.kaiming_normal_,
    "orthogonal_": nn.init.orthogonal_,
    "sparse_": lambda w: nn.init.sparse_(w, 0.3),
    "data.normal_": lambda w: w.data.normal_(0, 0.02),
    "data.uniform_": lambda w: w.data.uniform_(-1, 1),
    "data.fill_": lambda w: w.data.fill_(0.5),
    "transformers": lambda w: initialization.trunc_normal_(w, std=0.02),
}


@pytest.mark.parametrize("how", INITIALISERS)
def test_initialisers_give_the_dense_numbers_where_kept(how):
    _, layer, weight = compiled()
    plain = nn.Linear(D_IN, D_OUT)
    for target in (layer, plain):
        torch.manual_seed(3)
        INITIALISERS[how](target.weight)
    assert torch.equal(weight.to_dense(), plain.weight.detach() * weight.forward_mask())
    assert not weight.masks_problem()


def test_reset_parameters_and_a_models_own_initialisation():
    _, layer, weight = compiled()
    plain = nn.Linear(D_IN, D_OUT)
    for target in (layer, plain):
        torch.manual_seed(5)
        target.reset_parameters()
    assert torch.equal(weight.to_dense(), plain.weight.detach() * weight.forward_mask())
    assert torch.equal(layer.bias, plain.bias)
    model = slope_fx.compile(models.llama(), backend="aot_eager")
    before = {n: w.to_dense() for n, w in slope_fx.sparse_weights(model).items()}
    model.apply(model._init_weights)
    for name, weight in slope_fx.sparse_weights(model).items():
        assert not torch.equal(weight.to_dense(), before[name])
    ids = models.batch()
    dense = slope_fx.densify(model)
    torch.testing.assert_close(models.loss_of(model, ids), models.loss_of(dense, ids))


def test_stacks_of_weights():
    model, _, _ = compiled()
    weight = slope_fx.sparse_weights(model)["stack"]
    nn.init.normal_(model.stack)
    with torch.no_grad():
        model.stack[1].mul_(0)
        assert not weight.to_dense()[1].any()
        with pytest.raises(UnsupportedError, match="stack"):
            model.stack[0, 0] += 1
    dense = torch.randn(3, 16, D_OUT)
    assert torch.equal(weight.write_(dense).to_dense(), dense * weight.forward_mask())


def merged(layer, weight):
    layer.weight.data += RANDOM  # as PEFT merges


REFUSED = {
    "with gradients on": lambda layer, w: layer.weight.mul_(2),
    "add_": no_grad(lambda layer, w: layer.weight.add_(RANDOM)),
    "data +=": merged,
    "copy_": no_grad(lambda layer, w: layer.weight.copy_(RANDOM)),
    "data.copy_": lambda layer, w: layer.weight.data.copy_(RANDOM),
    "data =": lambda layer, w: assign_data(layer, RANDOM),
    "data = another dtype": lambda layer, w: assign_data(layer, w.to_dense().double()),
    "data = another shape": lambda layer, w: assign_data(layer, torch.zeros(3, 3)),
    "a row": no_grad(lambda layer, w: set_item(layer.weight, 1.0)),
    "a view": no_grad(lambda layer, w: layer.weight.t().add_(1)),
    "out=": no_grad(lambda layer, w: torch.add(RANDOM, 1, out=layer.weight)),
    "foreach": no_grad(lambda layer, w: torch._foreach_add_([layer.weight], 1.0)),
    "vector_to_parameters": lambda layer, w: nn.utils.vector_to_parameters(
        RANDOM.flatten(), [layer.weight]
    ),
    "set_": lambda layer, w: layer.weight.set_(RANDOM),
    "resize_": lambda layer, w: layer.weight.resize_(3),
    "share_memory_": lambda layer, w: layer.weight.share_memory_(),
    "a parameter": lambda layer, w: assign(layer, nn.Parameter(RANDOM)),
    "a tensor": lambda layer, w: assign(layer, RANDOM),
    "None": lambda layer, w: assign(layer, None),
    "delete": lambda layer, w: delete(layer),
    "register_parameter": lambda layer, w: layer.register_parameter(
        "weight", nn.Parameter(RANDOM)
    ),
    "functional_call": lambda layer, w: functional_call(
        layer, {"weight": RANDOM}, torch.randn(2, D_IN)
    ),
    "an optimizer": lambda layer, w: torch.optim.SGD([layer.weight], 0.1),
    "an optimizer, no_grad": no_grad(lambda layer, w: torch.optim.AdamW([layer.weight])),
    "its gradient": lambda layer, w: setattr(layer.weight, "grad", RANDOM),
    "a hook": lambda layer, w: layer.weight.register_hook(print),
    "dlpack": lambda layer, w: torch.utils.dlpack.from_dlpack(layer.weight.detach()),
    "write_, shape": lambda layer, w: w.write_(torch.zeros(3, 3)),
    "write_, dtype": lambda layer, w: w.write_(torch.zeros(D_OUT, D_IN).long()),
    "write_, type": lambda layer, w: w.write_([1.0]),
}  # fmt: skip


@pytest.mark.parametrize("how", REFUSED)
def test_a_write_that_would_be_lost_is_refused(how):
    _, layer, weight = compiled()
    before, reading = weight.to_dense(), layer.weight
    bits = weight.backward_bits.clone()
    kind = ArgumentError if how.startswith("write_") else UnsupportedError
    with pytest.raises(kind, match="layer"):
        REFUSED[how](layer, weight)
    assert torch.equal(weight.to_dense(), before)
    assert torch.equal(layer.weight.detach().clone(), before)
    assert torch.equal(reading.detach().clone(), before)
    assert torch.equal(weight.backward_bits, bits)


def test_numpy_and_old_readings():
    _, layer, weight = compiled()
    with pytest.raises(ValueError, match="read-only"):
        layer.weight.detach().numpy()[0] = 1
    for old in (layer.weight, layer.weight.data, layer.weight.t()):
        with torch.no_grad():
            weight.values.mul_(2)
            with pytest.raises(UnsupportedError, match="before its values changed"):
                old.mul_(2)


def test_while_the_adapter_takes_part():
    model, layer, weight = compiled(adapter_rank=2)
    slope_fx.Schedule(model, 1, adapter_start=0.0)
    weight.lora_B.data.normal_()
    with torch.no_grad(), pytest.raises(UnsupportedError, match="its adapter is active"):
        layer.weight.mul_(0.5)
    weight.write_(RANDOM)
    assert torch.equal(weight.to_dense(), RANDOM * weight.forward_mask())


def test_freezing_by_the_weight_freezes_the_values():
    _, layer, weight = compiled()
    layer.weight.requires_grad_(False)
    assert not weight.values.requires_grad
    layer.weight.requires_grad = True
    assert weight.values.requires_grad
    assert layer.weight.detach().requires_grad_().grad is None  # a leaf of the caller's own
    assert weight.values.requires_grad


def test_reading_is_as_before():
    _, layer, weight = compiled()
    x = torch.randn(4, D_IN)
    y = nn.functional.linear(x, layer.weight)
    assert type(y) is torch.Tensor
    y.square().sum().backward()
    dense = weight.to_dense().requires_grad_()
    nn.functional.linear(x, dense).square().sum().backward()
    kept = dense.grad[weight.forward_mask()].view(weight.values.shape)
    torch.testing.assert_close(weight.values.grad, kept)
    assert vmap(lambda a: a @ layer.weight.t())(x.view(2, 2, D_IN)).shape == (2, 2, D_OUT)
    assert torch.equal(torch.stack([layer.weight.detach()])[0], weight.to_dense())


@given(st.sampled_from(["1:2", "2:4", "2:8", "4:16"]), st.integers(0, 99), st.booleans())
def test_write_projects_on_the_mask(pattern, seed, half):
    n, m = map(int, pattern.split(":"))
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2 * m, m), nn.Linear(m, 2 * m))
    slope_fx.compile(
        model, pattern, example_inputs=torch.randn(2, 2 * m), skip_first=False, skip_head=False,
        backend=None,
    )  # fmt: skip
    weight = slope_fx.sparse_weights(model)["1"]
    dense = torch.randn(2 * m, m, dtype=torch.bfloat16 if half else torch.float64)
    forward = weight.forward_mask()
    assert weight.write_(dense) is weight
    want = dense.float() * forward
    assert torch.equal(weight.to_dense(), want)
    assert torch.equal(weight.forward_mask(), forward)
    kept = (want * weight.backward_mask()).abs().view(-1, m, m).sum()  # of the largest n of each m
    best = want.abs().view(-1, m, m).topk(n, dim=1).values.sum()
    torch.testing.assert_close(kept, best)


class Writes(nn.Module):
    """A forward that writes to its own weight, as RWKV's does to evaluate."""

    def __init__(self, write) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 16)
        self.write = write

    def forward(self, x):
        if not torch.compiler.is_exporting():
            with torch.no_grad():
                self.write(self.second.weight)
        return self.second(self.first(x))


@torch.library.custom_op("slope_fx_tests::halve", mutates_args=("w",))
def halve(w: torch.Tensor) -> None:
    w.div_(2)


IN_GRAPH = {
    "a custom op": halve,
    "div_": lambda w: w.div_(2),
    "data": lambda w: w.data.div_(2),
    "set item": lambda w: set_item(w, 0.0),
    "a view": lambda w: w.t()[0].zero_(),
    "iadd": lambda w: w.__iadd__(1),
    "out": lambda w: torch.mul(w, 2, out=w),
    "init": lambda w: nn.init.normal_(w),
    "relu": lambda w: nn.functional.relu(w, inplace=True),
    "detached": lambda w: w.detach().view(-1)[3:].add_(1),
}


@pytest.mark.parametrize("phase", ["sparse", "adapter"])
@pytest.mark.parametrize("how", IN_GRAPH)
def test_writes_in_a_compiled_graph_are_refused(how, phase):
    model = slope_fx.compile(
        Writes(IN_GRAPH[how]), adapter_rank=2, example_inputs=torch.randn(2, 8), skip_head=False,
        backend="eager",
    )  # fmt: skip
    slope_fx.Schedule(model, 2, adapter_start=float(phase == "sparse"))
    before = slope_fx.sparse_weights(model)["second"].to_dense()
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(UnsupportedError, match="second"):
            model(torch.randn(2, 8))
    assert torch.equal(slope_fx.sparse_weights(model)["second"].to_dense(), before)


@pytest.mark.full
def test_rwkv_is_refused_and_works_without_its_rescaling():
    config = transformers.RwkvConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, attention_hidden_size=32,
        intermediate_size=64, context_length=32, rescale_every=1,
    )  # fmt: skip
    model = slope_fx.compile(transformers.RwkvForCausalLM(config), backend="eager").eval()
    ids = models.batch()
    with torch.no_grad(), pytest.raises(UnsupportedError, match="rescale_every"):
        model(ids)
    config.rescale_every = 0
    model = slope_fx.compile(transformers.RwkvForCausalLM(config), backend="eager").eval()
    with torch.no_grad():
        want = slope_fx.densify(model).eval()(ids).logits
        torch.testing.assert_close(model(ids).logits, want)


def test_peft_merges_nothing_into_a_sparse_layer():
    from peft import LoraConfig, get_peft_model

    model = slope_fx.compile(models.llama(), backend="aot_eager")
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj"]))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    ids = models.batch()
    before = models.loss_of(tuned, ids)
    with pytest.raises(UnsupportedError, match=r"up_proj.*densify"):
        tuned.merge_and_unload()
    torch.testing.assert_close(models.loss_of(tuned, ids), before)
