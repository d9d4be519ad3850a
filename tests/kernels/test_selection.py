"""The choice of engines: measured once, kept, named in the graph, told, and overruled."""

import json
import time

import pytest
import torch
from torch import nn

import models
import slope_fx
from slope_fx.kernels import engines, racing, selection
from slope_fx.kernels.selection import Choice, Problem, Request, choose
from slope_fx.ops.targets import SPARSE_LINEAR
from slope_fx.passes.graph import arguments

CPU = torch.device("cpu")
F32 = torch.float32


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """No choice made, in memory or on disk, and no limit on the engines."""
    monkeypatch.setenv("SLOPE_FX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("SLOPE_FX_ENGINES")

    def forget():
        selection.forget()
        racing.forget_disk()

    forget()
    yield forget
    forget()


@pytest.fixture
def timings(monkeypatch):
    """Replaces the measuring by made-up times; lists the problems that were "measured"."""
    measured: list[Problem] = []
    seconds = {"cpu": 1.0, "cpu-dense": 2.0, "dense": 2.0, "plain": 3.0}

    def race(runs, device):
        return {name: seconds[name] for name in runs}, measured_with.quiet

    def runs(problem, candidates, device):
        measured.append(problem)
        return {**dict.fromkeys(candidates), "plain": None}

    monkeypatch.setattr(racing, "race", race)
    monkeypatch.setattr(selection, "_runs", runs)
    measured_with = type("Timings", (), {"problems": measured, "seconds": seconds, "quiet": True})
    return measured_with


def chosen(tokens=64, engines="auto", op="sparse_linear", dtype=F32):
    return choose(op, Request(tokens, 16, 16, 2, 4, dtype, CPU, engines=engines))


@pytest.mark.parametrize("op", selection.PRODUCTS)
def test_candidates_and_plain_are_truly_timed(fresh, op):
    assert chosen(op=op) in ("cpu", "cpu-dense")
    (((problem, *_), choice),) = selection._made.items()
    assert problem == Problem(op, 64, 16, 16, 2, 4, "float32", 1)
    assert set(choice.seconds) == {"cpu", "cpu-dense", "plain"}
    assert all(0 < s < 1 for s in choice.seconds.values())
    assert choice.engine == min(("cpu", "cpu-dense"), key=choice.seconds.get)
    assert choice.speedup == choice.seconds["plain"] / choice.seconds[choice.engine]


def test_the_fastest_is_taken(fresh, timings):
    assert chosen() == "cpu"
    timings.seconds.update(cpu=5.0)
    assert chosen(tokens=128) == "cpu-dense"


def test_the_slow_are_dropped_and_the_rest_run_in_turns(monkeypatch):
    calls = []
    runs = {
        "quick": lambda: (calls.append("quick"), time.sleep(0.001)),
        "slow": lambda: (calls.append("slow"), time.sleep(0.02)),
        "other": lambda: calls.append("other"),
    }
    seconds, _ = racing.race(runs, CPU)
    assert calls.count("slow") == 2  # once to warm up, once timed
    assert calls.count("quick") > 10
    assert seconds["slow"] > seconds["quick"]
    assert calls[6:10] != ["quick"] * 4


def test_a_problem_is_measured_once_and_kept_on_disk(fresh, timings, tmp_path):
    for _ in range(3):
        chosen(tokens=33)
        chosen(tokens=64)  # the same bucket
    assert len(timings.problems) == 1
    (stored,) = (tmp_path / "cache").glob("races-*.json")
    assert len(json.loads(stored.read_text())) == 1
    fresh()
    assert chosen(tokens=50) == "cpu"
    assert len(timings.problems) == 1
    chosen(tokens=65)
    chosen(op="sparse_weight_grad")
    chosen(dtype=torch.bfloat16)
    torch.set_num_threads(2)
    chosen()
    assert len(timings.problems) == 5
    assert len(json.loads(stored.read_text())) == 5


def test_what_a_busy_machine_measured_is_not_kept(fresh, timings, tmp_path):
    timings.quiet = False
    assert chosen() == chosen() == "cpu"
    assert len(timings.problems) == 1  # this process keeps it
    fresh()
    timings.seconds.update(cpu=5.0)
    timings.quiet = True
    assert chosen() == "cpu-dense"


def test_a_race_tells_whether_the_machine_was_quiet(monkeypatch):
    monkeypatch.setattr(racing, "_PATIENCE", 0.1)
    pauses = iter([0.0, 0.001, 0.03, 0.03, 0.03, 0.03] + [0.03] * 30)
    best, quiet = racing.race({"disturbed": lambda: time.sleep(next(pauses))}, CPU)
    assert not quiet
    assert best["disturbed"] < 0.02


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"x": 1}', "half"])
def test_a_damaged_file_of_choices_is_measured_anew(fresh, timings, tmp_path, damage):
    chosen()
    (stored,) = (tmp_path / "cache").glob("races-*.json")
    stored.write_text(stored.read_text()[:30] if damage == "half" else damage)
    fresh()
    assert chosen() == "cpu"
    assert len(timings.problems) == 2


def test_many_tokens_are_one_bucket(fresh, timings):
    chosen(tokens=racing.MOST_TOKENS)
    chosen(tokens=10**6)
    assert [p.tokens for p in timings.problems] == [racing.MOST_TOKENS]


def test_measuring_disturbs_nothing(fresh):
    """Not the random state, the grad mode, autocast, nor a tracer around it."""
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chosen()
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    with torch._subclasses.FakeTensorMode():
        assert chosen(tokens=7) in ("cpu", "cpu-dense")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("limit", "allowed"),
    [
        ("", ("cpu", "cpu-dense", "triton", "triton-dense", "cusparselt", "dense")),
        ("dense", ("dense",)),
        ("-cpu, -cpu-dense, -triton, -triton-dense, -cusparselt", ("dense",)),
        ("reference", ("reference",)),
        ("dense, reference", ("dense", "reference")),
        ("cpu,dense,-dense", ("cpu",)),
    ],
)
def test_the_environment_forces_and_forbids(fresh, monkeypatch, limit, allowed):
    monkeypatch.setenv("SLOPE_FX_ENGINES", limit)
    assert engines.allowed_engines() == allowed
    assert engines.allowed_engines("cpu") == ("cpu",)  # an argument overrules it
    if len(allowed) == 1:
        assert chosen() == allowed[0]
        (choice,) = selection._made.values()
        assert choice == Choice(allowed[0], {})  # nothing to measure


@pytest.mark.parametrize("limit", ["gpu", "cpu;dense", "dense,-dense", "cpu,-cpu"])
def test_a_wrong_environment_is_told_by_name(fresh, monkeypatch, limit):
    monkeypatch.setenv("SLOPE_FX_ENGINES", limit)
    with pytest.raises(
        slope_fx.errors.ArgumentError, match=r"SLOPE_FX_ENGINES=.*cpu, cpu-dense, triton"
    ):
        engines.allowed_engines()
    model = models.gpt2()
    before = dict(model.named_parameters())
    with pytest.raises(slope_fx.errors.SlopeError, match="SLOPE_FX_ENGINES"):
        slope_fx.compile(model)
    assert dict(model.named_parameters()).keys() == before.keys()


@pytest.mark.parametrize("engine", ["gpu", "", None, 3, "auto,cpu"])
def test_a_wrong_argument_is_told(engine):
    with pytest.raises(
        slope_fx.errors.ArgumentError, match=r"engine=.*triton-dense, cusparselt, dense, reference"
    ):
        slope_fx.compile(models.gpt2(), engine=engine)
    with pytest.raises(slope_fx.errors.ArgumentError, match="engine="):
        slope_fx.rewriting_backend("eager", engine)


def test_engine_without_a_backend_has_no_effect():
    with pytest.warns(slope_fx.errors.ArgumentWarning, match="engine='dense'"):
        slope_fx.compile(models.gpt2(), backend=None, engine="dense")


def test_tensors_that_an_engine_cannot_serve(fresh):
    engines.say_once.cache_clear()
    with pytest.warns(
        slope_fx.errors.EngineWarning, match=r"cpu engine .* no kernels for torch.float64"
    ):
        assert chosen(engines="cpu", dtype=torch.float64) == "dense"
    assert chosen(dtype=torch.float64) == "dense"  # nobody asked: nothing to say


def test_dense_competes_if_it_is_named_or_alone(fresh, timings):
    assert engines.engines_for(CPU, F32) == ("cpu", "cpu-dense")
    assert engines.engines_for(CPU, F32, "cpu,dense") == ("cpu", "dense")
    assert engines.engines_for(CPU, torch.float64) == ("dense",)
    assert engines.engines_for(torch.device("meta"), F32) == ("dense",)


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.second(self.first(x).relu())


def compiled(graphs, **options):
    """TwoLayers with both layers sparse; the forward graphs that are compiled go to ``graphs``."""

    def backend(gm, inputs):
        def forward_compiler(inner, _):
            graphs.append(inner)
            return inner

        from torch._dynamo.backends.common import aot_autograd

        return aot_autograd(fw_compiler=forward_compiler, bw_compiler=forward_compiler)(gm, inputs)

    return slope_fx.compile(
        TwoLayers(), example_inputs=torch.rand(2, 16), skip_first=False, skip_head=False,
        backend=backend, **options,
    )  # fmt: skip


def engines_in(graph):
    products = (SPARSE_LINEAR, torch.ops.slope_fx.sparse_input_grad.default,
                torch.ops.slope_fx.sparse_weight_grad.default)  # fmt: skip
    return [arguments(node)["engine"] for node in graph.graph.nodes if node.target in products]


@pytest.mark.parametrize("autocast", [False, True])
def test_the_choice_is_in_the_graph(fresh, timings, autocast):
    graphs = []
    model = compiled(graphs)
    with torch.autocast("cpu", enabled=autocast):
        model(torch.rand(5, 16)).float().sum().backward()
    assert [engines_in(graph) for graph in graphs] == [["cpu"] * 2, ["cpu"] * 3]
    assert {p.dtype for p in timings.problems} == {"bfloat16" if autocast else "float32"}


def test_what_torch_has_cached_is_known_and_bound_to_the_environment(fresh, timings, monkeypatch):
    """A second process would find the traced graphs in torch's cache and not trace them; the
    choices are in the cache's key, so they must not wait for the trace."""
    x = torch.rand(5, 16)
    captured: list[torch.fx.GraphModule] = []

    def only_forward(gm, inputs):
        captured.append(gm)
        return gm.forward

    model = slope_fx.compile(
        TwoLayers(), example_inputs=x, skip_first=False, skip_head=False, backend=only_forward
    )
    model(x)
    (gm,) = captured
    names = {"engine", "input_engine", "weight_engine"}
    first, second = (node.kwargs for node in gm.graph.nodes if node.target is SPARSE_LINEAR)
    assert {first.get(name) for name in names - {"input_engine"}} == {"cpu"}
    assert {second.get(name) for name in names} == {"cpu"}
    assert second["engines"] == "auto"
    assert len(slope_fx.explain(model).sparse[1].products) == 3

    monkeypatch.setenv("SLOPE_FX_ENGINES", "dense")
    torch._dynamo.reset()
    model(x)
    *_, last = (node.kwargs for node in captured[-1].graph.nodes if node.target is SPARSE_LINEAR)
    assert {last[name] for name in names} == {"dense"}
    assert last["engines"] == "dense"


def test_autocast_inside_of_the_graph(fresh, timings):
    class Inside(TwoLayers):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x)

    model = slope_fx.compile(
        Inside(), example_inputs=torch.rand(2, 16), skip_first=False, skip_head=False,
        backend="aot_eager",
    )  # fmt: skip
    assert model(torch.rand(5, 16)).dtype == torch.bfloat16
    assert {p.dtype for p in timings.problems} == {"bfloat16"}


def test_an_engine_given_to_compile_is_fixed_forward_and_backward(fresh, timings):
    for engine in ("dense", "cpu", "reference"):
        torch._dynamo.reset()
        graphs = []
        compiled(graphs, engine=engine)(torch.rand(5, 16)).sum().backward()
        assert [engines_in(graph) for graph in graphs] == [[engine] * 2, [engine] * 3]
    assert not timings.problems


def test_explain_shows_the_choices(fresh, timings):
    model = compiled([])
    assert "(not run yet)" in str(slope_fx.explain(model))
    model(torch.rand(5, 16)).sum().backward()
    (first, second) = slope_fx.explain(model).sparse
    assert [(p.product, p.engine, p.speedup) for p in second.products] == [
        ("forward", "cpu", 3.0), ("input gradient", "cpu", 3.0), ("weight gradient", "cpu", 3.0),
    ]  # fmt: skip
    assert [p.product for p in first.products] == ["forward", "weight gradient"]
    assert "cpu 3.00x 3.00x 3.00x" in str(slope_fx.explain(model))
    assert "cpu 3.00x - 3.00x" in str(slope_fx.explain(model))
    timings.seconds.update({"cpu": 9.0, "cpu-dense": 4.0})
    model(torch.rand(500, 16)).sum().backward()
    assert "cpu-dense 0.75x 0.75x 0.75x" in str(slope_fx.explain(model))


def test_a_dynamic_number_of_tokens_is_chosen_for_its_hint(fresh, timings):
    model = compiled([])
    for tokens in (5, 40, 41, 42):
        model(torch.rand(tokens, 16)).sum().backward()
    assert {p.tokens for p in timings.problems} == {8, 64}


def test_a_gain_is_that_of_the_pairs_alone():
    """The best number of tokens counts, with the times of a weight that trains."""

    def pair(op, tokens, ours, **more):
        problem = Problem(op, tokens, 16, 16, 2, 4, "float32", 1, **more)
        return problem, Choice("cpu", {"cpu": ours, "plain": 2.0})

    forward, grad = pair("sparse_linear", 8, 1.0), pair("sparse_weight_grad", 8, 3.0)
    assert selection.gain([], training=True) is None
    assert selection.gain([forward], training=True) is None
    assert selection.gain([forward], training=False) == (2.0, 8)
    assert selection.gain([forward, grad], training=True) == (1.0, 8)
    assert selection.gain([forward, pair("sparse_linear", 64, 0.5)], training=False) == (4.0, 64)
    trains = pair("sparse_linear", 8, 4.0, makes_operand=True)
    for pairs in ([forward, trains], [trains, forward]):
        assert selection.gain(pairs, training=False) == (0.5, 8)
    unmeasured = (forward[0], Choice("cpu", {}))
    assert selection.gain([unmeasured], training=False) is None


def test_a_request_gives_the_problem_and_the_choice(fresh, timings):
    request = Request(33, 16, 16, 2, 4, F32, CPU, values_dtype=torch.float64)
    problem = Problem.of("sparse_linear", request)
    assert problem == Problem("sparse_linear", 64, 16, 16, 2, 4, "float32", 1, "float64")
    choice = selection.chosen("sparse_linear", request)
    assert choice is selection.chosen("sparse_linear", request)
    assert (choice.engine, choice.speedup) == ("cpu", 3.0)
    assert [(p, c) for (p, *_), c in selection._made.items()] == [(problem, choice)]
