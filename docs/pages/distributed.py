"""The sections of docs/results.md on models that are trained by several processes."""

from slope_fx.report.tables import Sharding

from .common import Result, mib, section, table, taken


def bytes_section(result: Result) -> str:
    """Bytes that each rank receives, as ratios to the dense model."""
    size, entries = result["arguments"], result["bytes"]
    setting = ("world", "every_linear", "way", "dtype")
    dense = {tuple(e[k] for k in setting): e for e in entries if e["kind"] == "dense"}
    found: dict[tuple[str, ...], dict[int, str]] = {}
    for entry in entries:
        if entry["kind"] == "dense":
            continue
        base = dense[tuple(entry[k] for k in setting)]
        ratios = [
            f"{entry[key] / base[key]:.3f}" if base[key] else "-"
            for key in ("all_gather", "gradients")
        ]
        linears = "all" if entry["every_linear"] else "default"
        kind = "active" if "active" in entry["kind"] else "idle"
        row = (linears, entry["way"], entry["dtype"], kind, *ratios)
        found.setdefault(row, {})[entry["world"]] = f"{entry['refresh'] / 1024:.0f}"
    worlds = size["worlds"]
    rows = [(*row, *(refresh.get(w, "") for w in worlds)) for row, refresh in found.items()]
    headers = (
        "sparse linears", "wrapper", "weights", "adapters", "all-gathers", "gradients",
        *(f"a refresh, KiB, {w} ranks" for w in worlds),
    )  # fmt: skip
    return section(
        "Bytes between processes",
        f"A Llama of {size['layers']} layers and width {size['width']} on real gloo ranks. What a "
        "rank receives in a step at 2:4 is divided by what it receives with the dense model. The "
        "ratios are the same on " + " and ".join(map(str, worlds)) + " ranks. `all`: "
        "`skip_first=False, skip_head=False`. bf16 compute: fp32 weights with "
        "`MixedPrecisionPolicy(param_dtype=torch.bfloat16)`. Masks whole: the masks are "
        "`ignored_params` of `fully_shard`, so each rank has all of them and none is gathered, at "
        f"the cost of 3/16 byte a dense element on each rank. {taken(result)}",
        table(rows, headers),
    )


def memory_section(result: Result) -> str:
    sizes, size = result["sizes"], result["arguments"]
    rows = [
        (e["stage"], e["world"], *(mib(e[k]) for k in ("shard", "resident_above")),
         f"{e['resident_above'] / sizes['block']:.2f}", mib(e["tensors_above"]))
        for e in result["stages"]
    ]  # fmt: skip
    headers = (
        "stage", "ranks", "shard, MiB", "most above it, MiB", "in blocks", "tensors above, MiB"
    )  # fmt: skip
    return section(
        "Memory of a rank",
        f"A Llama of {size['layers']} layers and width {size['width']}, "
        f"{mib(sizes['model'])} MiB dense in fp32, sharded by `fully_shard`; a dense block has "
        f"{mib(sizes['block'])} MiB. The shard is what the rank keeps: parameters, buffers and "
        "Adam's moments where there are any. The most above it is resident memory, sampled, beyond "
        "what is resident after the stage. The last column counts the live tensors that operations "
        "make, beyond the shard. `load_pretrained` to the meta device reserves addresses for the "
        f"dense model, which the system never maps to memory. {taken(result)}",
        table(rows, headers),
    )


def plan_section(result: Result) -> str:
    size = result["arguments"]
    return section(
        "A model of 70 billion parameters on 64 ranks",
        "`slope-fx explain config.json --no-measure --world-size "
        f"{size['world_size']} --adapter-rank {size['adapter_rank']}`, for Llama 3 70B in bf16. It "
        f"took {result['seconds']:.0f} s and {mib(result['peak_resident'])} MiB. The shards are "
        f"those of `fully_shard` on a fake world, which a test compares. {taken(result)}",
        f"```text\n{Sharding.from_dict(result['sharding'])}\n```",
    )
