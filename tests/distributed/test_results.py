"""The committed results of the long runs on ranks are complete, and inside of what is promised."""

import json

import pytest

import consistency
import ranks_matrix

RESULTS = consistency.ROOT / "benchmarks" / "results"


def result(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def test_each_way_is_as_one_process():
    rows = result("ranks")["rows"]
    cases = [[str(part) for part in c] for c in (*ranks_matrix.CASES, *ranks_matrix.PIPELINES)]
    assert [row["case"] for row in rows] == cases
    assert not [row for row in rows if ranks_matrix.wrong(row)]


@pytest.mark.parametrize("key", ["loss_sparse", "loss_adapter", "mask_bytes", "weights"])
def test_a_difference_is_told(key):
    row = result("ranks")["rows"][0]
    assert ranks_matrix.wrong({**row, key: 1e-3})
    assert ranks_matrix.wrong({**row, key: float("nan")})


def test_ranks_were_killed_in_both_phases():
    found = result("kill_ranks")
    assert found["kills"] == len(found["moments"]) >= 30
    assert found["identical"]
    assert found["kills_while_saving"] > 0
    assert 0 < found["kills_in_adapter_phase"] < 30
    assert {moment["moment"] for moment in found["moments"]} == {"start", "step", "save", "end"}
    assert {moment["rank"] for moment in found["moments"]} == {0, 1}
    other = found["other_world_sizes"]
    assert max(other["worst_loss"], other["worst_weight"]) < 1e-5
    assert other["bytes_of_masks_differing"] == 0


def test_no_stage_holds_more_than_the_shard_and_a_block():
    found = result("distributed_memory")
    assert {entry["world"] for entry in found["stages"]} == {2, 4}
    for entry in found["stages"]:
        above = max(entry["tensors_above"], entry["resident_above"])
        assert above <= found["sizes"]["block"], entry
