"""What other tools do to a compiled model: it works, or one of our errors says what to do."""

import copy
import gc
import warnings

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.utils import prune

import models
import slope_fx
from models import batch, loss_of


def compiled(rank=2, backend="aot_eager", model=None, **more):
    model = models.llama() if model is None else model
    return slope_fx.compile(model, adapter_rank=rank, backend=backend, **more)


def step(model, optimizer, schedule=None, seed=0):
    loss = loss_of(model, batch(seed))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if schedule is not None:
        schedule.step()
    return loss.item()


# --- idle adapters ----------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["sparse", "adapter"])
def test_distributed_checkpoints_resume_in_either_phase(phase, tmp_path):
    """DCP makes a new optimizer's state by a step with zero gradients; idle adapters get none."""

    def made(seed):
        torch.manual_seed(seed)
        model = compiled()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = slope_fx.Schedule(
            model, 6, adapter_start=0.0 if phase == "adapter" else 0.9, backward_mask_interval=1
        )
        return model, optimizer, schedule

    def state(model, optimizer):
        weights, of_optimizer = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": of_optimizer}

    model, optimizer, schedule = made(0)
    for i in range(2):
        step(model, optimizer, schedule, i)
    dcp.save(state(model, optimizer), checkpoint_id=tmp_path / "dcp")
    saved = schedule.state_dict()
    want = [step(model, optimizer, schedule, i) for i in range(2, 5)]

    model, optimizer, schedule = made(1)
    loaded = state(model, optimizer)
    dcp.load(loaded, checkpoint_id=tmp_path / "dcp")
    set_state_dict(
        model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
    )
    schedule.load_state_dict(saved)
    assert [step(model, optimizer, schedule, i) for i in range(2, 5)] == want


def test_zeroed_gradients_don_t_move_idle_adapters():
    model = compiled()
    slope_fx.Schedule(model, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for weight in slope_fx.sparse_weights(model).values():
        weight.lora_A.grad = torch.zeros_like(weight.lora_A)
    before = [w.lora_A.clone() for w in slope_fx.sparse_weights(model).values()]
    step(model, optimizer)
    after = [w.lora_A for w in slope_fx.sparse_weights(model).values()]
    assert all(map(torch.equal, before, after))
    weights = slope_fx.sparse_weights(model).values()
    assert not any(optimizer.state[factor] for w in weights for factor in (w.lora_A, w.lora_B))


def test_adapters_without_a_schedule_are_told_once():
    model = compiled()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.warns(slope_fx.errors.TrainingWarning, match=r"Schedule was made.*never take part"):
        step(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", slope_fx.errors.TrainingWarning)
        step(model, optimizer)
        # Nor with a Schedule, without adapters, or if the model doesn't train.
        other = compiled()
        schedule = slope_fx.Schedule(other, 10)
        step(other, torch.optim.SGD(other.parameters(), 0.1), schedule)
        plain = compiled(rank=None)
        step(plain, torch.optim.SGD(plain.parameters(), 0.1))
        idle, head = compiled(), nn.Linear(2, 2)
        head(torch.ones(2)).sum().backward()
        torch.optim.SGD([*idle.parameters(), *head.parameters()], 0.1).step()


def test_a_run_that_ends_before_its_adapters_begin_is_told():
    model = compiled()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = slope_fx.Schedule(model, 1000)
    step(model, optimizer, schedule)
    holding = [schedule]
    del schedule

    def drop():
        holding.clear()
        gc.collect()  # a frame may hold it still

    with pytest.warns(
        slope_fx.errors.TrainingWarning, match=r"ended at step 1 of total_steps=1000.*990"
    ):
        drop()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = slope_fx.Schedule(model, 10, adapter_start=1.0)  # never, by choice
        schedule.step()
        schedule = slope_fx.Schedule(model, 1000)  # never stepped
        del schedule
        schedule = slope_fx.Schedule(model, 2, adapter_start=0.5)
        schedule.step()
        del schedule
        gc.collect()


# --- masks among the parameters ---------------------------------------------------------------


def test_unfreezing_all_parameters():
    model = compiled(rank=None)
    for parameter in model.parameters():
        parameter.requires_grad = False
    for parameter in model.parameters():
        parameter.requires_grad = True
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    assert all(p.requires_grad == p.is_floating_point() for p in model.parameters())
    loss_of(model, batch()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.is_floating_point())


MASKED = {
    "norm": lambda model: sum(p.norm() ** 2 for p in model.parameters()),
    "penalty": lambda model: sum((p**2).sum() for p in model.parameters()),
    "pow": lambda model: sum(p.pow(2).sum() for p in model.parameters()),
    "average": lambda model: [p.mul_(0.9) for p in model.parameters()],
    "lerp": lambda model: [p.lerp_(p, 0.1) for p in model.parameters()],
    "vector": lambda model: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(model.parameters()), model.parameters()
    ),
    "reinitialise": lambda model: [nn.init.normal_(p) for p in model.parameters()],
}


@pytest.mark.parametrize("how", MASKED)
def test_arithmetic_on_masks_is_refused(how):
    model = compiled(rank=None)
    bits = {n: w.forward_bits.clone() for n, w in slope_fx.sparse_weights(model).items()}
    with (
        torch.no_grad(),
        pytest.raises(slope_fx.errors.UnsupportedError, match=r"if p\.requires_grad"),
    ):
        MASKED[how](model)
    for name, weight in slope_fx.sparse_weights(model).items():
        assert torch.equal(weight.forward_bits, bits[name])


def test_lbfgs():
    model = compiled(rank=None)

    def closure():
        loss = loss_of(model, batch())
        model.zero_grad()
        loss.backward()
        return loss

    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    with pytest.raises(slope_fx.errors.ArgumentError, match="LBFGS moves every parameter"):
        optimizer.step(closure)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    first = closure().item()
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.optim.LBFGS(trained, max_iter=2, lr=0.1).step(closure)
    assert closure().item() < first


def test_fsdp1_is_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(slope_fx.errors.UnsupportedError, match="Use FSDP2"):
            FullyShardedDataParallel(compiled(), device_id=torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def test_copies_and_pickles_keep_masks():
    model = compiled()
    for other in (copy.deepcopy(model),):
        for name, weight in slope_fx.sparse_weights(other).items():
            same = slope_fx.sparse_weights(model)[name]
            assert type(weight.forward_bits) is type(same.forward_bits)
            assert torch.equal(weight.forward_bits, same.forward_bits)
    model.double().float()
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())


# --- quantisation, export, second derivatives --------------------------------------------------


def test_quantize_dynamic():
    from torch.ao.quantization import quantize_dynamic

    model = compiled(rank=None).eval()
    with (
        pytest.warns(match="deprecated"),
        pytest.raises(slope_fx.errors.UnsupportedError, match="densify"),
    ):
        quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    dense = slope_fx.densify(model)
    with pytest.warns(match="deprecated"):
        quantized = quantize_dynamic(dense, {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        got, want = quantized(batch()).logits, dense(batch()).logits
    assert (got - want).abs().max() < 0.2 * want.abs().max()


def test_libraries_that_replace_the_weight():
    """As torchao's quantize_ does."""
    model = compiled(rank=None)
    name, _ = next(iter(slope_fx.sparse_weights(model).items()))
    layer = model.get_submodule(name)
    with pytest.raises(slope_fx.errors.UnsupportedError, match=r"quantise.*densify"):
        layer.weight = nn.Parameter(layer.weight.detach().half(), requires_grad=False)


def test_pruning_on_top():
    model = compiled(rank=None)
    layer = model.model.layers[1].mlp.up_proj
    with pytest.raises(slope_fx.errors.UnsupportedError, match="prune"):
        prune.l1_unstructured(layer, "weight", 0.3)


def test_exported_programs():
    model = slope_fx.compile(
        models.Plain(), example_inputs=torch.randn(2, 8), skip_head=False, backend="aot_eager"
    ).eval()
    x = torch.randn(2, 8)
    with pytest.warns(slope_fx.errors.ExpandedWeightWarning, match=r"torch\.export.*densify"):
        program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    dense = torch.export.export(slope_fx.densify(model), (x,))
    assert "slope_fx" not in str(dense.graph)
    torch.testing.assert_close(dense.module()(x), model(x))


def test_onnx(tmp_path):
    x = torch.randn(2, 8)
    model = slope_fx.compile(
        models.Plain(), example_inputs=x, skip_head=False, backend="aot_eager"
    ).eval()
    with pytest.raises(Exception, match="densify") as raised:
        torch.onnx.export(model, (x,), tmp_path / "a.onnx", verbose=False)
    assert "ONNX has no op" in str(raised.value)
    torch.onnx.export(slope_fx.densify(model), (x,), tmp_path / "b.onnx", verbose=False)
    assert (tmp_path / "b.onnx").is_file()


def test_double_backward():
    x = torch.randn(2, 8, requires_grad=True)
    model = slope_fx.compile(
        models.Plain(), example_inputs=x.detach(), skip_first=False, backend="eager"
    )
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(slope_fx.errors.UnsupportedError, match=r"sparse_.*second derivatives"):
        gradient.square().sum().backward()
    model = slope_fx.compile(
        models.Plain(), example_inputs=x.detach(), skip_first=False, backend="aot_eager"
    )
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):  # AOTAutograd's own, as for dense
        gradient.square().sum().backward()


# --- the model as it is ------------------------------------------------------------------------


def test_explain_shows_layers_that_were_replaced():
    model = compiled(rank=None)
    reports = {r.name: r for r in slope_fx.explain(model).linears}
    name = "model.layers.1.mlp.up_proj"
    assert reports[name].kind == "sparse"
    model.model.layers[1].mlp.up_proj = nn.Linear(32, 128, bias=False)
    model.model.layers[0].mlp = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 32))
    now = {r.name: r for r in slope_fx.explain(model).linears}
    assert (now[name].kind, now[name].shape, now[name].bytes_after) == ("dense", (128, 32), 16384)
    assert now[name].reason == "its layer was replaced after compile"
    assert "removed, moved or replaced" in now["model.layers.0.mlp.up_proj"].reason
    assert now["model.layers.0.mlp.0"].reason == "it was added after compile"
    assert now["model.layers.1.mlp.down_proj"].kind == "sparse"
    before = slope_fx.explain(model)
    assert len(before.sparse) == len(slope_fx.sparse_weights(model))


def test_a_model_that_keeps_a_result_is_densified_in_place():
    class Keeps(models.Plain):
        def forward(self, x):
            y = super().forward(x)
            if not torch.compiler.is_exporting():
                self.last = y * 2  # as RecurrentGemma keeps its state
            return y

    x = torch.randn(2, 8)
    model = slope_fx.compile(Keeps(), example_inputs=x, backend="eager")
    want = model(x)
    with pytest.raises(slope_fx.errors.UnsupportedError, match="inplace=True"):
        slope_fx.densify(model)
    assert slope_fx.sparse_weights(model)
    dense = slope_fx.densify(model, inplace=True)
    torch.testing.assert_close(dense(x), want)


def test_lightning_finds_a_learning_rate_and_then_fits(tmp_path, monkeypatch):
    """The finder saves a checkpoint ahead of training, without Schedules, and restores it."""
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.tuner import Tuner

    from slope_fx.integrations.lightning import SlopeCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.lr = 1e-3
            self.model = compiled(model=models.gpt2())

        def training_step(self, ids, index):
            return loss_of(self.model, ids)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=self.lr)

    monkeypatch.chdir(tmp_path)
    callback = SlopeCallback(adapter_start=0.5)
    trainer = lightning.Trainer(
        max_steps=4, accelerator="cpu", callbacks=[callback], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = torch.utils.data.DataLoader([batch(i)[0] for i in range(8)], batch_size=2)
    module = Module()
    Tuner(trainer).lr_find(module, train_dataloaders=data, num_training=3)
    trainer.fit(module, data)
    (schedule,) = callback.schedules
    assert (schedule.last_step, schedule.total_steps, schedule.phase) == (4, 4, "adapter")
