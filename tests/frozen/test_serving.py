"""A frozen model among threads, processes, casts and other libraries."""

import multiprocessing
import threading

import peft
import pytest
import torch
from torch import nn
from torchao import quantization

import models
import slope_fx
from slope_fx.errors import SlopeError, UnsupportedError


def awake(rank=4, backend="aot_eager", make=models.llama) -> nn.Module:
    torch.manual_seed(0)
    return models.awake(make(), rank, backend=backend)


def frozen(**more) -> nn.Module:
    return slope_fx.freeze(awake(**more))


def oracle(model, ids):
    with torch.no_grad():
        return slope_fx.densify(model).double()(ids).logits


# --- threads and processes ----------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)]
)
def test_threads_share_a_model(backend):
    """From the first call, which compiles, with different batches and lengths."""
    model, failures = frozen(backend=backend), []
    inputs = [models.batch(i, 1 + i % 3, 4 + i) for i in range(6)]
    want = [oracle(model, ids) for ids in inputs]
    begin = threading.Barrier(len(inputs))

    def work(i):
        try:
            begin.wait()
            with torch.inference_mode():
                for _ in range(10):
                    torch.testing.assert_close(
                        model(inputs[i]).logits.double(), want[i], rtol=0, atol=2e-6
                    )
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("how", ["fork", pytest.param("spawn", marks=pytest.mark.full)])
def test_processes(how):
    """A fork after a call on several threads hangs in OpenMP, as with dense models."""
    model, ids = frozen(), models.batch(1)
    want = oracle(model, ids)
    model(ids)
    context = multiprocessing.get_context(how)
    queue = context.Queue()
    process = context.Process(target=models.answer, args=(queue, model, ids))
    process.start()
    try:
        got = torch.tensor(queue.get(timeout=120), dtype=torch.float64)
    finally:
        process.kill()
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


# --- casts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param(torch.float64, 1e-6, marks=pytest.mark.full),
        pytest.param(torch.bfloat16, 2e-2, marks=pytest.mark.full),
        (torch.float16, 3e-3),
    ],
)
def test_casts_afterwards(dtype, tolerance, called):
    model, ids = frozen(), models.batch(1)
    want = oracle(model, ids)
    if called:
        model(ids)
    got = model.to(dtype)(ids).logits
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance * want.abs().max().item())
    dense = slope_fx.densify(model)(ids).logits
    torch.testing.assert_close(got, dense, rtol=0, atol=tolerance * want.abs().max().item())


# --- other libraries ----------------------------------------------------------------------------


@pytest.mark.parametrize("freeze", [False, True])
def test_torchao(freeze):
    model, ids = frozen() if freeze else awake(), models.batch(1)
    want = oracle(model, ids)
    dense = slope_fx.densify(model)
    with pytest.raises(UnsupportedError, match=r"quantise.*densify\(model\)"):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    quantization.quantize_(dense, quantization.Int8WeightOnlyConfig())
    error = (dense(ids).logits - want).abs().max()
    assert 0 < error < 0.05 * want.abs().max()


@pytest.mark.full
@pytest.mark.parametrize("freeze", [False, True])
def test_onnx(freeze, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = frozen() if freeze else awake()
    with pytest.raises(Exception, match=r"ONNX has no op.*densify\(model\)"):
        torch.onnx.export(model, (models.batch(),), tmp_path / "a.onnx", verbose=False)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = slope_fx.densify(model)

        def forward(self, input_ids):
            return self.model(input_ids, use_cache=False).logits

    free = torch.export.Dim.DYNAMIC
    torch.onnx.export(
        Logits(), (models.batch(),), tmp_path / "b.onnx", verbose=False, dynamo=True,
        dynamic_shapes={"input_ids": {0: free, 1: free}},
    )  # fmt: skip
    session = onnxruntime.InferenceSession(tmp_path / "b.onnx")
    for ids in (models.batch(1), models.batch(2, 3, 5)):
        (got,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
        want = oracle(model, ids)
        torch.testing.assert_close(torch.from_numpy(got).double(), want, rtol=0, atol=1e-5)


def with_lora(model: nn.Module) -> nn.Module:
    targets = ["q_proj", "v_proj", "down_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, lora_alpha=16))


@pytest.mark.full
@pytest.mark.filterwarnings("error::slope_fx.errors.ExpandedWeightWarning")
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("freeze", [False, True])
def test_lora_of_peft_trains_on_top(freeze, rank, tmp_path):
    """PEFT calls the model's forward, past its compiled call: the blocks are compiled."""

    def made():
        return frozen(rank=rank) if freeze else awake(rank)

    model = made()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted, ids = with_lora(model), models.batch(1)
    assert all("lora_" in name for name, p in adapted.named_parameters() if p.requires_grad)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    adapted.train()
    losses = []
    for _ in range(8):
        losses.append(models.loss_of(adapted, ids))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    left = {name.replace(".base_layer", ""): t for name, t in model.state_dict().items()}
    for name, before in start.items():
        assert torch.equal(left[name], before), name
    for weight in slope_fx.sparse_weights(model).values():
        assert not weight.to_dense()[~weight.forward_mask()].any()

    with torch.no_grad():
        want = adapted.eval()(ids).logits
        adapted.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(made(), tmp_path).eval()
        torch.testing.assert_close(again(ids).logits, want, rtol=0, atol=1e-6)
        plain = made()(ids).logits
        assert (want - plain).abs().max() > 1e-3
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(ids).logits, plain, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore::slope_fx.errors.ExpandedWeightWarning")
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("rank", [pytest.param(None, marks=pytest.mark.full), 4])
@pytest.mark.parametrize("freeze", [pytest.param(False, marks=pytest.mark.full), True])
def test_lora_of_peft_is_not_merged(freeze, rank, safe):
    model = frozen(rank=rank) if freeze else awake(rank)
    sparse = {n: w.to_dense() for n, w in slope_fx.sparse_weights(model).items()}
    adapted, ids = with_lora(model).eval(), models.batch(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B.default" in name:
                parameter.normal_(0, 0.1)
        want = adapted(ids).logits
        with pytest.raises(SlopeError, match=r"down_proj"):
            adapted.merge_and_unload(safe_merge=safe)
        torch.testing.assert_close(adapted(ids).logits, want, rtol=0, atol=1e-5)
    for name, weight in slope_fx.sparse_weights(model).items():
        assert torch.equal(weight.to_dense(), sparse[name])
