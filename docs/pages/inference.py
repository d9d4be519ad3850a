"""The figures of docs/inference.md."""

from .common import DOCS, Result, filled, mib, pivot, read_if_there, speedup, table, taken

BLOCKS = {
    "speed": "frozen", "start": "frozen_start", "quality": "frozen_quality",
    "peer": "llama_cpp_peer", "quantised": "quantised", "package": "package", "joined": "joined",
    "openvino": "openvino_peer", "profile": "decode_profile",
}  # fmt: skip


def inference() -> str:
    makers = {
        "speed": speed, "start": start, "quality": quality, "peer": peer, "quantised": quantised,
        "package": package, "joined": joined, "openvino": openvino,
        "profile": profile,
    }  # fmt: skip
    found = {block: read_if_there(name) for block, name in BLOCKS.items()}
    blocks = {
        block: f"No run of `benchmarks/{BLOCKS[block]}.py` is committed yet." if result is None
        else makers[block](result)
        for block, result in found.items()
    }  # fmt: skip
    return filled((DOCS / "inference.md").read_text(), blocks)


def speed(result: Result) -> str:
    """Decoding by batch and prefill, and the bytes of the pruned layers."""
    parts = []
    for found in result["frozen"]:
        sides = list(found["cases"][0]["sides"])
        rows = [
            (f"{case['what']} {case['size']:,}", case["best"],
             *(speedup(case["sides"][side]) if side in case["sides"] else "" for side in sides))
            for case in found["cases"]
        ]  # fmt: skip
        bytes_row = ("bytes", "", *(f"{found['bytes'][s]:.3f}" if s in found["bytes"] else ""
                                    for s in sides))  # fmt: skip
        about = f"{found['model']}, {found['parameters'] / 1e6:.0f} M parameters, {found['dtype']}"
        headers = ("", "faster dense side", *sides)
        parts.append(f"**{about}**\n\n{table([*rows, bytes_row], headers)}")
    costs = [
        case["adapters_cost"] for found in result["frozen"] for case in found["cases"]
        if case["what"] == "decode" and case["size"] == 1
    ]  # fmt: skip
    return (
        "How many times faster than dense, with the middle half of the pairs. A decoding step has "
        "one token for each sequence and a static cache of 256 positions; a prefill is one "
        "sequence. Both sides are `torch.compile`d as one graph. The dense side is the faster of "
        "two: as it is, and with the weights packed for oneDNN (`freezing`). "
        "`dense int8` is PyTorch's own int8 product in the same layers. Adapters have rank "
        "d_in / 64. The last row has the bytes of the pruned layers, of those of the dense "
        f"ones in the same dtype (`benchmarks/frozen.py`, {_at(result)}).\n\n"
        + "\n\n".join(parts)
        + f"\n\nAdapters cost {100 * (min(costs) - 1):.0f} to {100 * (max(costs) - 1):.0f}% of a "
        "decoding step at batch 1."
    )


def start(result: Result) -> str:
    rows = [
        (row["model"], row["side"], row["start"], f"{row['load_seconds']:.2f}",
         mib(row["load_peak"]), mib(row["resident_loaded"]), f"{row['first_token_seconds']:.1f}",
         f"{row['request_seconds']:.1f}", f"{1000 * row['steady_request_seconds']:.0f}",
         mib(row["resident_after"]), mib(row["bytes"]))
        for row in result["rows"]
    ]  # fmt: skip
    headers = (
        "model", "side", "start", "load, s", "peak while loading, MiB", "resident then",
        "first token, s", "first request, s", "a later request, ms", "resident after", "weights",
    )  # fmt: skip
    return (
        "A process of its own loads a bf16 model and answers a request of 64 tokens with 16 new "
        "ones. A cold start finds no compiled code on the disk, a warm one finds that of the cold "
        "start. Memory is what came on top of the imported libraries "
        f"(`benchmarks/frozen_start.py`, {_at(result)}).\n\n"
        f"{table(rows, headers)}"
    )


def quality(result: Result) -> str:
    rows = []
    for row in result["rows"]:
        adapters = {None: "", False: "none", True: "EoRA"}[row.get("adapters")]
        size = f"{row['bytes_an_element'] / 2:.3f}" if "bytes_an_element" in row else ""
        rows.append((row["values"], adapters, f"{row['perplexity']:.2f}", size))
    arguments = result["arguments"]
    return (
        f"Perplexity of SmolLM2-135M on {arguments['rows']} held-out rows of "
        f"{arguments['context']} tokens, pruned once to 2:4 by Wanda and not trained; adapters of "
        f"rank {arguments['rank']} (`benchmarks/frozen_quality.py`, {result['date']}, at "
        f"{result['commit']}). Values that are not quantised are in fp32 here, and their bytes are "
        "given of fp32; those of codes are of 16 bits.\n\n"
        + table(rows, ("values", "adapters", "perplexity", "bytes an element / 2"))
    )


def peer(result: Result) -> str:
    rows = []
    for side in result["sides"]:
        low, high = side["quartiles"]
        rows.append((
            side["side"], f"**{side['tokens_per_second']:.1f}** ({low:.1f} to {high:.1f})",
            f"{side['megabytes']:.0f}",
        ))  # fmt: skip
    return (
        "Decoding of one sequence by SmolLM2-135M, tokens per second, in turns in one process, "
        f"with llama.cpp (llama-cpp-python {result['llama_cpp']}; its output head is quantised "
        "too, ours is bf16) "
        f"(`benchmarks/llama_cpp_peer.py`, {_at(result)}).\n\n"
        + table(rows, ("", "tokens/s", "MB of weights"))
    )


def profile(result: Result) -> str:
    """Where a decoding step goes."""
    parts = list(result["sides"][0]["shares"])
    rows = [
        (side["side"], f"**{1e3 * side['seconds']:.1f}**",
         *(f"{1e3 * side['seconds'] * side['shares'][part]:.1f}" for part in parts))
        for side in result["sides"]
    ]  # fmt: skip
    return (
        f"A decoding step of {result['model']}, one sequence, bf16, milliseconds. The parts are "
        "the shares that torch.profiler finds "
        f"(`benchmarks/decode_profile.py`, {_at(result)}).\n\n" + table(rows, ("", "step", *parts))
    )


def quantised(result: Result) -> str:
    names = list(dict.fromkeys(row["product"] for row in result["quantised"]))
    columns, rows = pivot(
        result["quantised"],
        lambda row: (f"{row['d_in']} -> {row['d_out']}", row["tokens"]),
        lambda row: row["product"],
        lambda row: f"{1e6 * row['seconds']:.0f}",
    )
    assert columns == names
    return (
        "A product alone, microseconds, inputs in bf16; the dense ones are PyTorch's "
        f"(`benchmarks/quantised.py`, {_at(result)}).\n\n"
        + table(((*key, *cells) for key, cells in rows.items()), ("", "tokens", *names))
    )


def package(result: Result) -> str:
    rows = [
        (name, f"{call['python']:.2f}", f"{call['package']:.2f}")
        for name, call in result["milliseconds"].items()
    ]
    return (
        "A call of a frozen Llama 4x512 with adapters, median in milliseconds "
        f"(`benchmarks/package.py`, {_at(result)}).\n\n"
        + table(rows, ("", "compiled, from Python", "package"))
    )


def joined(result: Result) -> str:
    found = {(row["case"], bool(row["rank"])): speedup(row) for row in result["rows"]}
    cases = dict.fromkeys(case for case, _ in found)
    rows = [(case, found[case, False], found[case, True]) for case in cases]
    return (
        "How many times faster one call is than two or three, one token, bf16 "
        f"(`benchmarks/joined.py`, {_at(result)}).\n\n"
        + table(rows, ("", "without adapters", "adapters of rank 16"))
    )


def openvino(result: Result) -> str:
    rows = [
        (row["side"], f"{1e3 * row['seconds']:.1f} ({1e3 * row['quartiles'][0]:.1f} to "
         f"{1e3 * row['quartiles'][1]:.1f})")
        for row in result["rows"]
    ]  # fmt: skip
    return (
        f"One token through the {result['arguments']['model']}, milliseconds, OpenVINO "
        f"{result['openvino'].split('-')[0]} (`benchmarks/openvino_peer.py`, {_at(result)}).\n\n"
        + table(rows, ("", "ms"))
    )


def _at(result: Result) -> str:
    """Where and when; a file may have rows of several runs, each with its commit."""
    rows = result.get("frozen", result.get("rows", []))
    commits = dict.fromkeys(row.get("commit", result["commit"]) for row in rows)
    return taken({**result, "commit": ", ".join(commits or [result["commit"]])}).removesuffix(".")
