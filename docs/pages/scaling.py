"""The figures of docs/scaling.md."""

from .common import DOCS, RESULTS, Result, filled, read, table

GIB = 2**30
WIRE = 50e9
"""Bytes a second that a GPU receives: a network card of 400 Gb/s for each."""
FLOPS = 400e12
"""Floating-point operations a second of a GPU, dense bf16."""
NOT_RUN = "`benchmarks/kill_ranks.py` kills ranks at random moments. No run of it is committed yet."
APART = ("loss_sparse", "loss_adapter", "weights")
PARAMETERS = {"Llama 2 7B": 6.74e9, "Llama 3 70B": 70.55e9}


def scaling() -> str:
    text = (DOCS / "scaling.md").read_text()
    killed = RESULTS / "kill_ranks.json"  # takes an hour on a quiet machine
    said = kills(read("kill_ranks")) if killed.exists() else NOT_RUN
    blocks = {"ranks": agreement(read("ranks")), "kills": said, "scaling": sizes(read("scaling"))}
    return filled(text, blocks)


def agreement(result: Result) -> str:
    """How far each way to train on several ranks is from one process."""
    rows = [
        (row["way"], row["model"], row["ranks"], row["micro"], row["backend"],
         *(f"{row[key]:.0e}" if row[key] else "0" for key in APART), row["mask_bytes"])
        for row in result["rows"]
    ]  # fmt: skip
    headers = (
        "", "model", "ranks", "micro-batches", "backend", "losses, sparse phase",
        "losses, adapter phase", "weights", "bytes of masks",
    )  # fmt: skip
    return (
        f"{result['steps']} steps of AdamW with refreshes of the backward masks, half of them in "
        "the adapter phase, beside the same steps in one process with `aot_eager`. "
        "The worst difference of a loss, and of a weight after the last step "
        f"(`tests/helpers/ranks_matrix.py`, {result['date']}, at {result['commit']}):\n\n"
        f"{table(rows, headers)}\n\n"
        "The weights of pipelines through Inductor are the furthest apart: those runs have AdamW's "
        "default `eps` (the others `1e-4`), which turns the rounding of a gradient near zero into "
        "a step. One process with Inductor is as far from one with `aot_eager`. FSDP2 x TP and "
        "HSDP need four ranks. TP on four ranks has a Llama with four heads of keys, the others "
        "have two."
    )


def kills(result: Result) -> str:
    other, moments = result["other_world_sizes"], result["moments"]
    at = " and ".join(map(str, other["first_step_of_each"][1:]))
    first, *later = other["ranks"]
    return (
        f"A run of the example on {result['ranks']} ranks under `torchrun --max-restarts` had "
        f"{result['kills']} kills: a random rank got a SIGKILL while it started, in a step, in a "
        f"checkpoint, or at the end. {result['kills_while_saving']} of them hit an unfinished "
        f"checkpoint, {result['kills_in_adapter_phase']} the adapter phase. "
        f"{sum(m['steps_taken'] > m['steps_kept'] for m in moments)} lost steps, which were taken "
        "again. The losses, the model, the optimizer's state and the random states at the end are "
        "those of a run without kills, bit for bit.\n\n"
        f"A second run began on {first} ranks and was stopped and started again on "
        f"{' and '.join(map(str, later))}, at steps {at} of {other['steps']}. Its losses differ by "
        f"at most {other['worst_loss']:.0e} from a run on two ranks, its weights by "
        f"{other['worst_weight']:.0e}, and {other['bytes_of_masks_differing'] or 'no'} bytes of "
        "masks (`benchmarks/kill_ranks.py`)."
    )


def sizes(result: Result) -> str:
    rows = []
    for model, worlds in result["models"].items():
        for world, sides in worlds.items():
            for name in ("dense", "sparse", "adapter"):
                side = sides[name]
                moved = side["all_gather"] + side["reduce_scatter"]
                seconds = moved / WIRE
                hidden = seconds * FLOPS / (6 * PARAMETERS[model])
                rows.append((
                    model, f"{int(world):,}", {"adapter": "2:4, adapters"}.get(name, name),
                    f"{side['held'] / GIB:.2f}", f"{side['block'] / GIB:.2f}",
                    f"{side['all_gather'] / GIB:.1f}", f"{side['reduce_scatter'] / GIB:.1f}",
                    f"{side['refresh'] / 2**20:.1f}", f"{seconds:.2f}", f"{hidden:,.0f}",
                ))  # fmt: skip
    headers = (
        "model", "ranks", "", "held, GiB", "a block, gathered", "all-gathers, GiB a step",
        "reduce-scatters, GiB a step", "a refresh, MiB", "s on the wire", "tokens that hide it",
    )  # fmt: skip
    rows = [(*row[:2], row[2].replace("sparse", "2:4"), *row[3:]) for row in rows]
    return (
        "This is its arithmetic for two Llamas with 2:4 weights and adapters of rank "
        f"{result['arguments']['adapter_rank']}, on rank 0, which has the largest shards. Nothing "
        "was run on so many ranks. The shards of weights, gradients and moments are fp32, as the "
        "example keeps them; all-gathers are in bf16, with masks of one bit; gradients are reduced "
        'in fp32. "Held" leaves out activations and what is gathered. The output head and '
        "embeddings are dense and stay outside of the blocks.\n\n"
        f"{table(rows, headers)}\n\n"
        f'"s on the wire" is the sum of what a rank receives over {WIRE / 1e9:.0f} GB/s, a card of '
        "400 Gb/s for each GPU. FSDP2 hides it behind computation that takes as long: 6 operations "
        f"for each parameter and token, at {FLOPS / 1e12:.0f} TFLOP/s. The last column is the "
        "number of tokens of a rank and step for which that is so. A sparse product that is "
        "faster than dense needs more tokens than this, in proportion. Within a node the wire is "
        "faster than this, and from some hundred ranks on latency adds to it. So:\n\n"
        "- **8 ranks**, one node: the gain is memory. A rank holds 0.54 of dense, or trains a "
        "model of nearly twice the size.\n"
        "- **64 ranks**: the wire begins to matter. A step sends 0.56 of dense, so a batch of "
        "little more than half the tokens hides it.\n"
        "- **1,024 ranks**: shards are small, and what is gathered fills the memory: the blocks, "
        "and the dense parameters outside of them, which count the same as in a dense model. The "
        "bytes a step no longer fall with the number of ranks. Replicate groups of 64 (HSDP): "
        "then the columns of 64 ranks hold, and an all-reduce of the gradient shards comes on top."
    )
