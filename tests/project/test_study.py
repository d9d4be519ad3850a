"""The accuracy study: its arms are what they say, and what it costs to run them."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

import slope_fx

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "accuracy"))
import study
import training
from arms import ARMS, RUNGS, Arm, Rung, cost, make, own_rates, set_backward, trunk_of

SIZE = Rung(layers=3, width=32, batch=2)


IN_CI = ("dense-half", "slope r=6.25% from 90%, rate x8", "transposable scaled", "evolve",
         "first and last block dense", "exact backward 1:4")  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in IN_CI else pytest.mark.full) for n in ARMS]
)
def test_each_arm_is_what_it_says(name):
    torch.manual_seed(0)
    arm = ARMS[name]
    model, schedule = make(arm, SIZE, context=8, steps=100)
    weights = {} if arm.pattern is None else slope_fx.sparse_weights(model)
    expected = {"MLP only": 9, "first and last block dense": 7}
    assert len(weights) == expected.get(name, 0 if arm.pattern is None else 21)
    for weight in weights.values():
        assert str(weight.pattern) == arm.pattern
        keeps_all = torch.equal(weight.forward_mask(), weight.backward_mask())
        assert keeps_all == (arm.mask == "transposable")
        assert weight.method.name == arm.method
        assert bool(weight.rank) == bool(arm.rank)
        if arm.pooled:
            taken = weight.lora_A != 0
            assert (taken.sum(0) == 1).all()
            assert (taken.sum(1) - weight.d_in / weight.rank).abs().max() < 1
            assert weight.lora_A[taken].unique().numel() == 1
            assert not weight.lora_B.any()
    groups = slope_fx.param_groups(model, 1e-3, **own_rates(arm, 1e-3, 300))
    rates = {g["name"]: (g["lr"], g.get("adapter_warmup")) for g in groups}
    assert rates.get("sparse", (None,))[0] == (arm.pattern and (2e-3 if arm.scaled else 1e-3))
    if arm.rank:
        assert rates["adapters"] == ((8e-3, 3) if "x8" in name else (1e-3, None))
        trained = [p for g in groups if g["name"] == "adapters" for p in g["params"]]
        assert len(trained) == (21 if arm.pooled else 42)
    if weights:
        assert schedule is not None
        set_backward(arm, model, 97, 100)
        weight = next(iter(weights.values()))
        keeps_all = torch.equal(weight.forward_mask(), weight.backward_mask())
        assert keeps_all == (arm.mask == "transposable" or arm.exact_from <= 0.97)


@pytest.mark.parametrize(
    ("arm", "want"),
    [
        (Arm(None), 1.0),
        (Arm(), 0.5),
        (Arm("1:4"), 0.25),
        (Arm(exact_from=0.0), 2 / 3),
        (Arm(exact_from=0.94), 0.51),
        (Arm(method="sr-ste"), 2.5 / 3),
        (Arm(method="gradual"), 0.75),
        (Arm(method="evolve"), 0.5 + 0.5 * 0.0075),
        (Arm(mask="transposable"), 0.5),
        (Arm(dense_layers=("*.self_attn.*",)), (4 * 32 + 0.5 * 3 * 88) / (4 * 32 + 3 * 88)),
    ],
)
def test_the_cost_of_the_products(arm, want):
    assert cost(arm, SIZE) == pytest.approx(want)


def test_an_adapter_costs_while_it_takes_part():
    """Of rank r: r / d_in + r / d_out of a dense layer, over a quarter of the run."""
    sizes = [(32, 32)] * 4 + [(32, 88), (32, 88), (88, 32)]
    total = sum(d_in * d_out for d_in, d_out in sizes)
    adapters = sum(d_in / 16 * (d_in + d_out) for d_in, d_out in sizes)
    want = 0.5 + 0.25 * adapters / total
    assert cost(Arm(rank=1 / 16, start=0.75), SIZE) == pytest.approx(want)
    pooled = sum(d_in / 16 * d_out for d_in, d_out in sizes)
    want = 0.5 + 0.25 * pooled / total
    assert cost(Arm(rank=1 / 16, start=0.75, pooled=True), SIZE) == pytest.approx(want)


@pytest.fixture
def page(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "docs"))
    from pages import accuracy

    return accuracy


def test_intervals_are_of_students_t(page):
    mean, half = page.interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(4.303 * 1.5275252 / 3**0.5, rel=1e-6)
    assert page.interval([1.0])[1] == float("inf")


def test_differences_are_paired_by_seed(page):
    """Seeds differ by far more than arms: an unpaired interval would hide the difference."""
    losses = {"dense": 0.0, "slope": 0.04, "transposable": 0.01}
    runs = [
        {"arm": arm, "rung": "small", "seed": seed, "lr": 8e-3, "loss": seed + loss + seed * 1e-4
         * (arm == "transposable"), "cost": 0.5, "seconds": 10.0, "tokens": 1000,
         "device": "a CPU"}
        for seed in (1, 2, 3) for arm, loss in losses.items()
    ]  # fmt: skip
    runs.append({**runs[0], "seed": 0, "rung": "quick"})
    runs.append({**runs[2], "lr": 32e-3, "loss": 9.0})  # another rate has a row of its own
    text = page.compared(runs)
    row, other = (line for line in text.splitlines() if line.startswith("| transposable"))
    assert "| 9.0000 |" in other
    assert "| -0.0298 ± 0.0002 |" in row
    assert re.search(r"\+0\.7[45] ± 0\.01", row)
    assert "quick" in page.tuned(runs)
    assert "quick" not in text


def _results(losses, rung="quick"):
    return {("slope", rung, rate, 0): {"loss": loss} for rate, loss in losses.items()}


def _next(results):
    """What the stage tune runs next; a best rate exists when there is nothing."""
    left = set(study.planned("tune", results)) - set(results)
    if left:
        with pytest.raises(SystemExit, match="'slope' has no best rate yet"):
            study.best_rates(results)
    return {(rung, rate) for _, rung, rate, _ in left}


def test_the_grid_of_rates_grows_until_the_best_is_inside(monkeypatch):
    monkeypatch.setattr(study, "ARMS", {"slope": Arm()})
    losses = {2e-3: 1.4, 4e-3: 1.3, 8e-3: 1.2, 16e-3: 1.1, 32e-3: 1.0, 64e-3: 1.05}
    begun = _results({rate: losses[rate] for rate in study.RATES})
    for further in (32e-3, 64e-3):
        assert _next(begun) == {("quick", further)}
        begun |= _results({further: losses[further]})
    assert _next(begun) == {("small", 32e-3), ("small", 16e-3)}
    begun |= _results({32e-3: 1.0, 16e-3: 0.9}, "small")
    assert _next(begun) == {("small", 8e-3)}
    assert study.best_rates(begun | _results({8e-3: 0.95}, "small")) == {"slope": 16e-3}
    assert _next(begun | _results({8e-3: 0.85}, "small")) == {("small", 4e-3)}
    assert _next(_results({4e-3: 1.0, 8e-3: 1.1, 16e-3: 1.2})) == {("quick", 2e-3)}
    assert _next(_results({8e-3: 1.2})) == {("quick", 4e-3), ("quick", 16e-3)}


def test_arms_without_a_quick_stage_and_arms_with_a_trunk(monkeypatch):
    arms = {"slope": Arm(tuned_from="small"), "late": ARMS["slope r=6.25% from 90%"]}
    monkeypatch.setattr(study, "ARMS", arms)
    monkeypatch.setattr(study, "trunk_of", {"slope": None, "late": ("slope", 0.9)}.get)
    assert _next({}) == {("small", rate) for rate in study.RATES}
    done = _results({4e-3: 1.0, 8e-3: 0.9, 16e-3: 1.1}, "small")
    assert study.best_rates(done) == {"slope": 8e-3, "late": 8e-3}


def test_a_stage_runs_what_is_not_there_yet(tmp_path, monkeypatch):
    lines = tmp_path / "lines.jsonl"
    started = []

    def process(command, **_):
        given = dict(zip(command[3::2], command[4::2], strict=True))
        started.append(given["--arm"])
        result = {"arm": given["--arm"], "rung": given["--rung"], "lr": float(given["--lr"]),
                  "seed": int(given["--seed"]), "loss": 1.0, "seconds": 1.0}  # fmt: skip
        with lines.open("a") as file:
            file.write(json.dumps(result) + "\n")
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(study.subprocess, "run", process)
    monkeypatch.setattr(study, "rows", lambda cache: None)
    monkeypatch.setattr(study, "CACHE", tmp_path)
    study.queue("quick", lines, 1, "cpu", float("inf"))
    assert started == list(study.QUICK)
    kept = lines.read_text().splitlines()
    lines.write_text(kept[1] + "\n")
    study.queue("quick", lines, 1, "cpu", float("inf"))
    first, _, last = study.QUICK
    assert started[3:] == [first, last]


def test_a_stage_goes_on_while_results_ask_for_more(tmp_path, monkeypatch):
    lines = tmp_path / "lines.jsonl"
    started = []

    def process(command, **_):
        given = dict(zip(command[3::2], command[4::2], strict=True))
        started.append(float(given["--lr"]))
        result = {"arm": given["--arm"], "rung": given["--rung"], "lr": started[-1], "seed": 0,
                  "loss": abs(started[-1] - 32e-3), "seconds": 1.0}  # fmt: skip
        if started[-1] != 64e-3:  # this one fails, and is not begun again
            with lines.open("a") as file:
                file.write(json.dumps(result) + "\n")
        return type("Done", (), {"returncode": int(started[-1] == 64e-3)})

    monkeypatch.setattr(study, "ARMS", {"slope": Arm()})
    monkeypatch.setattr(study.subprocess, "run", process)
    monkeypatch.setattr(study, "rows", lambda cache: None)
    monkeypatch.setattr(study, "CACHE", tmp_path)
    study.queue("tune", lines, 1, "cpu", float("inf"))
    assert started == [*study.RATES, 32e-3, 64e-3]


FORKS = {
    "slope r=1.56% from 99%": ("slope", 0.99),
    "slope r=6.25% from 99%": ("slope", 0.99),
    "slope r=6.25% from 90%": ("slope", 0.9),
    "slope r=6.25% from 90%, rate x8": ("slope", 0.9),
    "slope r=6.25% from 75%": ("slope", 0.75),
    "slope r=6.25% from 75%, pooled": ("slope", 0.75),
    "transposable r=6.25% from 75%": ("transposable", 0.75),
    "exact backward from 95%": ("slope", 0.95),
}
"""The arms that have the first steps of another one."""


def test_the_arms_that_share_their_first_steps():
    found = {arm: trunk_of(arm) for arm in ARMS}
    assert {arm: fork for arm, fork in found.items() if fork is not None} == FORKS


def test_a_trunk_runs_before_the_arms_that_begin_with_it(monkeypatch):
    monkeypatch.setattr(study, "best_rates", lambda results: dict.fromkeys(ARMS, 8e-3))
    order = [key for key in study.planned("compare", {}) if key[1:] == ("small", 8e-3, 2)]
    assert len(order) == len(ARMS)
    assert {arm for arm, *_ in order[-len(FORKS) :]} == set(FORKS)


@pytest.mark.full
@pytest.mark.parametrize("arm", [a for a in FORKS if "1.56%" not in a])
def test_a_run_from_the_state_of_its_trunk_is_the_whole_run(arm, tmp_path, monkeypatch):
    text = torch.randint(0, 256, (80, 16), generator=torch.Generator().manual_seed(0))
    text = {part: text.to(torch.uint8) for part in ("train", "held_out")}
    monkeypatch.setattr(training, "rows", lambda *_: text)
    monkeypatch.setattr(training, "CACHE", tmp_path)
    monkeypatch.setattr(training, "CONTEXT", 16)
    tiny = Rung(layers=1, width=32, batch=2)
    monkeypatch.setattr(Rung, "tokens", property(lambda self: 40 * self.batch * 16))
    monkeypatch.setitem(RUNGS, "quick", tiny)
    trunk, shared = FORKS[arm]

    def run(arm):
        return training.run(arm, "quick", 4e-2, 1, "cpu")

    whole = run(arm)
    assert whole["forked_at"] == 0
    alone = run(trunk)
    forked = run(arm)
    assert forked["forked_at"] == int(shared * 40) - 1
    error = abs(forked["loss"] - whole["loss"])  # engines add in another order
    assert error < 0.1 * abs(alone["loss"] - whole["loss"])
    assert [step for step, _ in forked["curve"]] == [step for step, _ in whole["curve"]]
    for (_, mine), (_, other) in zip(forked["curve"], whole["curve"], strict=True):
        assert mine == pytest.approx(other, rel=1e-6)
