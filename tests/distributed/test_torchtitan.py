"""torchtitan's trainer on two ranks, with FSDP2: the example's recipe on a tiny Llama."""

import importlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from ranks import Ranks

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        importlib.util.find_spec("torchtitan") is None, reason="torchtitan is not installed"
    ),
]
EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS, PHASE = 20, 10  # adapters from half of the run on


@pytest.fixture(scope="module")
def titan():
    """Processes of their own, because importing torchtitan changes torch."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def seed(titan, tmp_path_factory):
    """torchtitan's seed checkpoint: the same initial weights for runs of any world size.

    torchtitan initializes sharded weights with random numbers that depend on the world size on a
    CPU, so its own way to compare runs is needed.
    """
    folder = tmp_path_factory.mktemp("seed")
    titan.run(1, make_seed, str(folder))
    return folder


@pytest.fixture(scope="module")
def one_process(titan, seed, tmp_path_factory):
    return titan.run(1, train, started(seed, tmp_path_factory.mktemp("one")))[0]


def started(seed, folder):
    return str(shutil.copytree(seed, folder, dirs_exist_ok=True))


def sparse_config(folder, backend="aot_eager", **given):
    for path in (str(EXAMPLES), str(EXAMPLES.parent / "tests" / "helpers")):
        if path not in sys.path:
            sys.path.insert(0, path)
    # In this order: the first tells torchtitan, before it is imported, to use the CPU.
    torchtitan_cpu, torchtitan_llama = map(
        importlib.import_module, ("torchtitan_cpu", "torchtitan_llama")
    )

    config = torchtitan_cpu.dense_config(folder, STEPS)
    config = torchtitan_llama.sparse(config, "2:4", adapter_rank=4, backend=backend, **given)
    config.lr_scheduler.adapter_start = PHASE / STEPS
    config.lr_scheduler.backward_mask_interval = 3
    return config


def configs_of_the_example():
    """Names, patterns and sizes of the configs that the page names, as torchtitan finds them."""
    sys.path[:0] = [str(EXAMPLES), str(EXAMPLES.parent / "tests" / "helpers")]
    importlib.import_module("torchtitan_cpu")
    from torchtitan.config import ConfigManager

    found = {}
    for name in ("llama3_8b_sparse", "llama3_debugmodel_sparse"):
        arguments = ["--module", "torchtitan_llama", "--config", name, "--training.steps", "7"]
        config = ConfigManager().parse_args(arguments)
        slope = config.model_spec.model.slope
        found[name] = (slope.sparsity, slope.options, config.training.steps)
    return found


def test_the_configs_of_the_example(titan):
    assert titan.run(1, configs_of_the_example) == [
        {
            "llama3_8b_sparse": ("2:4", {"adapter_rank": 64}, 7),
            "llama3_debugmodel_sparse": ("2:4", {"adapter_rank": 8}, 7),
        }
    ]


def make_seed(folder):
    config = sparse_config(folder)
    config.checkpoint.create_seed_checkpoint = True
    trainer = config.build()
    trainer.checkpointer.save(curr_step=0, last_step=True)  # as torchtitan.train does
    trainer.close()


def train(folder, stop=STEPS, backend="aot_eager", activations="selective"):
    """Returns losses, logged metrics of slope_fx, and the final state of the model, whole."""
    config = sparse_config(folder, backend)
    if activations == "full":
        from torchtitan.distributed.activation_checkpoint import FullAC

        config.activation_checkpoint = FullAC.Config()
    config.checkpoint.interval = stop
    trainer = config.build()
    trainer.should_continue_training = lambda: trainer.step < stop
    losses, metrics, log = [], [], trainer.metrics_processor.log

    def keep(step, loss, *others, extra_metrics):
        losses.append(loss)
        metrics.append({k: v for k, v in extra_metrics.items() if k.startswith("slope/")})
        log(step, loss, *others, extra_metrics=extra_metrics)

    with mock.patch.object(trainer.metrics_processor, "log", keep), mock.patch("time.sleep"):
        trainer.train()
    trainer.close()
    state = {
        name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()
        for name, tensor in trainer.model_parts[0].state_dict().items()
    }
    return losses, metrics, state


def same(found, expected, first=0):
    losses, metrics, state = found
    torch.testing.assert_close(losses, expected[0][first:], rtol=2e-6, atol=2e-6)
    assert metrics == expected[1][first:]
    assert state.keys() == expected[2].keys()
    for name, tensor in state.items():
        if tensor.dtype is torch.uint8:
            assert torch.equal(tensor, expected[2][name]), name
        else:
            torch.testing.assert_close(tensor, expected[2][name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("backend", "activations"),
    [("aot_eager", "selective"), ("aot_eager", "full"), ("inductor", "selective")],
)
def test_two_ranks_equal_one_process(titan, seed, one_process, tmp_path, backend, activations):
    found = titan.run(2, train, started(seed, tmp_path), STEPS, backend, activations)
    same(found[0], one_process)
    assert found[0][0] == found[1][0]
    losses, metrics, state = found[0]
    assert losses[-1] < losses[0]
    assert [m["slope/adapter_phase"] for m in metrics] == [0.0] * PHASE + [1.0] * (STEPS - PHASE)
    trained = [t.abs().max() for name, t in state.items() if name.endswith("lora_B")]
    assert len(trained) == 9  # all linears but the first and the head
    assert min(trained) > 0.02


@pytest.mark.parametrize("stop", [PHASE - 2, PHASE + 4])
@pytest.mark.parametrize("world", [1, 2])
def test_a_stopped_run_goes_on(titan, seed, one_process, tmp_path, stop, world):
    folder = started(seed, tmp_path)
    titan.run(2, train, folder, stop)
    same(titan.run(world, train, folder)[0], one_process, first=stop)


def initial():
    import slope_fx

    trainer = sparse_config(os.devnull).build()
    (model,) = trainer.model_parts
    trainer.close()
    report = str(slope_fx.explain(model))
    problems = [weight.masks_problem() for weight in slope_fx.sparse_weights(model).values()]
    shapes = {
        name: (tuple(weight.values.shape), tuple(weight.values.to_local().shape))
        for name, weight in slope_fx.sparse_weights(model).items()
    }
    spread = {
        name: weight.values.full_tensor().abs().mean().item()
        for name, weight in slope_fx.sparse_weights(model).items()
    }
    return report, problems, shapes, spread


def test_the_initial_model(titan):
    (report, problems, shapes, spread), _ = titan.run(2, initial)
    assert "fed directly by the embeddings (skip_first)" in report
    assert "output head (skip_head)" in report
    assert "9 of 11 linears are sparse" in report
    assert problems == [""] * 9
    assert shapes["layers.1.feed_forward.w2"] == ((32, 32), (16, 32))
    # The larger half of N(0, 0.02), by magnitude in groups of four, has this mean magnitude.
    assert spread["layers.0.feed_forward.w1"] == pytest.approx(0.0245, rel=0.1)


def refused(change):
    config = sparse_config(os.devnull)
    change = {
        "lr_scheduler": lambda: setattr(config, "lr_scheduler", _plain_schedulers()),
        "compile": lambda: setattr(config.compile, "enable", True),
        "graphs": lambda: setattr(config.training, "disable_cuda_graphs", False),
        "spmd": lambda: setattr(config.parallelism, "spmd_backend", "spmd_types"),
        "tp": lambda: setattr(config.parallelism, "tensor_parallel_degree", 2),
        "pp": lambda: setattr(config.parallelism, "pipeline_parallel_degree", 2),
        "graph_trainer": lambda: setattr(config, "compile", _graph_compile()),
        "hf": lambda: setattr(config.checkpoint, "last_save_in_hf", True),
        "experts": _experts,
        "param_init": lambda: setattr(
            config.model_spec.model.layers[0].feed_forward.w1, "param_init", None
        ),
    }[change]
    try:
        change()
        config.build()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def _plain_schedulers():
    from torchtitan.components.optimizer import LRSchedulersContainer

    return LRSchedulersContainer.Config()


def _experts():
    from torchtitan.models.qwen3 import model_registry

    from slope_fx.integrations.torchtitan import SlopeConverter

    model_registry("debugmodel_moe", converters=[SlopeConverter.Config()])


def _graph_compile():
    from torchtitan.experiments.graph_trainer.configs import GraphTrainerCompileConfig

    return GraphTrainerCompileConfig()


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ("lr_scheduler", "ArgumentError", "SlopeSchedulers.Config"),
        ("compile", "ArgumentError", "--compile.components loss"),
        ("graphs", "ArgumentError", "--training.disable_cuda_graphs"),
        ("spmd", "UnsupportedError", "--parallelism.spmd_backend partial_dtensor"),
        ("tp", "UnsupportedError", "parallelism.tensor_parallel_degree=2"),
        ("pp", "UnsupportedError", "parallelism.pipeline_parallel_degree=2"),
        ("graph_trainer", "UnsupportedError", "the graph trainer traces each step"),
        ("hf", "UnsupportedError", "checkpoint.last_save_in_hf"),
        ("experts", "UnsupportedError", "mixtures of experts"),
        ("param_init", "UnsupportedError", "layers.0.feed_forward.w1: its config has no"),
    ],
)
def test_what_is_refused(titan, change, error, says):
    answer, other = titan.run(2, refused, change)
    assert answer == other
    assert answer is not None
    assert answer[0] == error
    assert says in answer[1]
