"""Checkpoints that earlier versions wrote still load, with the numbers they had."""

from pathlib import Path

import torch

import slope_fx

FOLDER = Path(__file__).with_name("version_1")


def test_a_checkpoint_of_format_version_1(tmp_path):
    """Written by slope_fx 0.1.0: two patterns, a dense layer, adapters that take part."""
    model = slope_fx.load_pretrained(FOLDER / "checkpoint", backend="eager")
    ids = torch.arange(12)[None] % 32
    want = torch.load(FOLDER / "logits.pt")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-5, atol=1e-5)
    weights = slope_fx.sparse_weights(model)
    assert {str(w.pattern) for w in weights.values()} == {"1:4", "2:4"}
    assert all(w.adapter_active and w.rank == 2 for w in weights.values())
    reasons = {r.name: r.reason for r in slope_fx.explain(model).linears if r.kind == "dense"}
    assert "sparsity" in reasons["transformer.h.0.attn.c_proj"]
    assert slope_fx.checkpoints.verify(FOLDER / "checkpoint").adapters_active == len(weights)

    # Saved again it is of this version.
    path = slope_fx.save_pretrained(model, tmp_path / "again")
    again = slope_fx.load_pretrained(path, backend="eager")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
