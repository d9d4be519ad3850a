"""The command line ``slope-fx``: explain, convert, inspect, generate, bench and package."""

import argparse
import dataclasses
import json
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from slope_fx.errors import ArgumentError, SlopeError, SlopeWarning

FAILED, MISUSED = 1, 2
"""Exit codes: FAILED for a SlopeError (a wrong model, checkpoint or value) or an error of the file
system, MISUSED for a wrong command line (from argparse). 0 is success."""

_EXPLAIN = """example:
  slope-fx explain config.json --sparsity 2:4
  slope-fx explain my-model-2-4 --json
  slope-fx explain config.json --sparsity '*.mlp.*=2:8' '*=2:4' --adapter-rank 16
  slope-fx explain config.json --no-measure --world-size 64
"""
_CONVERT = """example:
  slope-fx convert my-model my-model-2-4 --to sparse --sparsity 2:4     dense to sparse
  slope-fx convert my-model-2-4 my-model-dense --to dense               and back
  slope-fx convert my-model-2-4 my-adapter --to peft                    my-adapter, my-adapter-base
  slope-fx convert my-adapter my-model-2-4 --to sparse                  and back
  slope-fx convert my-dcp my-model-2-4 --to sparse      of torch.distributed.checkpoint
  slope-fx convert my-model-2-4 my-dcp --to dcp                         and back
  slope-fx convert my-model-2-4 my-frozen --freeze --values int8 --dtype bfloat16
"""
_GENERATE = """example:
  slope-fx generate my-model-2-4 "To be, or not to be" --tokens 40
  slope-fx generate my-model-2-4 "Enter" --temperature 0.8 --seed 1 --json
"""
_BENCH = """example:
  slope-fx bench my-frozen
  slope-fx bench my-frozen --batch 4 --length 512 --tokens 64 --json
"""
_PACKAGE = """example:
  slope-fx package my-frozen model.pt2
  slope-fx package my-frozen model.pt2 --cache 1 1024 --dtype bfloat16
"""
_INSPECT = """example:
  slope-fx inspect my-model-2-4
  slope-fx inspect my-model-2-4 --json && echo whole
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            warnings.simplefilter("always", SlopeWarning)
            text, data = options.run(options)
    except (SlopeError, OSError) as error:  # such as a full disk
        if options.json:
            print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        print(f"slope-fx {options.command}: {error}", file=sys.stderr)
        return FAILED
    print(json.dumps(data, indent=1) if options.json else text)
    return 0


def _parser() -> argparse.ArgumentParser:
    from slope_fx.version import __version__

    parser = argparse.ArgumentParser(
        prog="slope-fx",
        description="Sparse pretraining with SLoPe: reports on models, converts and checks files.",
        epilog="Exit codes: 0 success, 1 the model or checkpoint is wrong, 2 the command line is.",
    )
    parser.add_argument("--version", action="version", version=f"slope-fx {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str, examples: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, help=text, description=text, epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        made.add_argument("--json", action="store_true", help="print JSON instead of text")
        made.set_defaults(run=run)
        return made

    explain = command(
        "explain", _explain,
        "Report on every linear of a model, from its configuration alone.",
        _EXPLAIN,
    )  # fmt: skip
    explain.add_argument(
        "source", metavar="CONFIG_OR_CHECKPOINT",
        help="a config.json, a folder with one, a hub name, or a sparse checkpoint",
    )  # fmt: skip
    _pattern_options(explain)
    explain.add_argument("--tokens", type=int, help="tokens in a measured step (default: 1024)")
    explain.add_argument(
        "--no-measure", action="store_true", help="don't measure speedups on this machine"
    )
    explain.add_argument(
        "--world-size", type=int, metavar="N",
        help="report what each of N ranks holds and sends if FSDP2 shards the model",
    )  # fmt: skip
    explain.add_argument("--dtype", help="dtype of the weights (default: the configuration's)")

    convert = command(
        "convert", _convert,
        "Turn a dense model, a sparse checkpoint, a PEFT adapter or a DCP folder into another.",
        _CONVERT,
    )  # fmt: skip
    convert.add_argument("source", metavar="SOURCE", help="folder of a model, or a hub name")
    convert.add_argument("target", metavar="TARGET", help="folder to write, new or empty")
    convert.add_argument(
        "--to", choices=("sparse", "dense", "peft", "dcp"), help="(default with --freeze: sparse)"
    )
    _pattern_options(convert)
    convert.add_argument(
        "--adapters", choices=("merge", "drop"),
        help="to dense: add the adapters to the weights, or leave them out (default: merge)",
    )  # fmt: skip
    convert.add_argument(
        "--adapter-init", choices=("zero", "svd"),
        help="to sparse, with --adapter-rank: what the adapters start from (default: zero)",
    )  # fmt: skip
    convert.add_argument(
        "--freeze", action="store_true",
        help="to sparse: for inference, without what training needs",
    )  # fmt: skip
    convert.add_argument(
        "--values", choices=("float", "int8", "int4"), default="float",
        help="with --freeze: the format of the values (default: %(default)s)",
    )  # fmt: skip
    convert.add_argument(
        "--group", type=int, help="with int8 or int4: values that share a scale, 32, 64 or 128"
    )
    convert.add_argument("--dtype", help="with --freeze: dtype of the parameters")
    convert.set_defaults(error=convert.error)

    generate = command("generate", _generate, "Write text with a checkpoint.", _GENERATE)
    generate.add_argument("source", metavar="CHECKPOINT", help="a folder with a tokenizer")
    generate.add_argument("prompt", metavar="PROMPT", help="the text to go on from")
    _number(generate, "--tokens", 64, "most new tokens")
    _number(generate, "--temperature", 0.0, "of the sampling; 0: the most likely token")
    _number(generate, "--seed", 0, "of the sampling")
    generate.add_argument("--dtype", help="dtype of the model (default: the stored one)")

    bench = command(
        "bench", _bench, "Time the requests of a frozen checkpoint against the dense model.", _BENCH
    )
    bench.add_argument("source", metavar="CHECKPOINT", help="a folder that save_pretrained wrote")
    _number(bench, "--batch", 1, "prompts of a request")
    _number(bench, "--length", 128, "tokens of a prompt")
    _number(bench, "--tokens", 32, "new tokens of a request")
    bench.add_argument("--dtype", help="dtype of the model (default: the stored one)")
    bench.add_argument("--no-dense", action="store_true", help="don't measure the dense model")

    package = command(
        "package", _package,
        "Compile a frozen checkpoint to a package that runs without slope_fx.", _PACKAGE,
    )  # fmt: skip
    package.add_argument("source", metavar="CHECKPOINT", help="a folder of a transformers model")
    package.add_argument("target", metavar="FILE", help="the package, which ends in .pt2")
    package.add_argument(
        "--cache", nargs=2, type=int, metavar=("BATCH", "LENGTH"),
        help="hold a static cache, for prefill and decoding",
    )  # fmt: skip
    package.add_argument("--dtype", help="dtype of the model (default: the stored one)")

    inspect = command(
        "inspect", _inspect,
        "Verify a sparse checkpoint: hashes, tensors, masks, nothing missing or left over.",
        _INSPECT,
    )  # fmt: skip
    inspect.add_argument("source", metavar="CHECKPOINT", help="a folder that save_pretrained wrote")
    return parser


def _pattern_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sparsity", nargs="+", metavar="N:M",
        help="one pattern, or NAME=N:M for layers by name, the first match wins, NAME=dense "
        "(default: 2:4)",
    )  # fmt: skip
    parser.add_argument(
        "--adapter-rank", type=_rank, metavar="R", help="a rank, or a fraction of a layer's width"
    )


def _number(parser: argparse.ArgumentParser, name: str, default: int | float, text: str) -> None:
    parser.add_argument(
        name, type=type(default), default=default, help=f"{text} (default: {default})"
    )


def _explain(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from slope_fx.report import preview

    explanation = preview(
        options.source, _sparsity(options.sparsity), adapter_rank=options.adapter_rank,
        dtype=options.dtype, tokens=options.tokens, measure=not options.no_measure,
        world_size=options.world_size,
    )  # fmt: skip
    return str(explanation), explanation.to_dict()


def _convert(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from slope_fx.convert import convert

    to: Any = options.to or ("sparse" if options.freeze else None)
    if to is None:
        options.error("the following arguments are required: --to (or --freeze)")
    written = convert(
        options.source, options.target, to, sparsity=_sparsity(options.sparsity),
        adapter_rank=options.adapter_rank, adapter_init=options.adapter_init,
        adapters=options.adapters, freeze=options.freeze, values=options.values,
        group=options.group, dtype=options.dtype,
    )  # fmt: skip
    text = "\n".join(f"{kind}: {folder}" for kind, folder in written.items())
    return text, {kind: str(folder) for kind, folder in written.items()}


def _generate(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from slope_fx.frozen.bench import generate_text

    text = generate_text(
        options.source, options.prompt, tokens=options.tokens, temperature=options.temperature,
        seed=options.seed, dtype=options.dtype,
    )  # fmt: skip
    return text, {"prompt": options.prompt, "text": text}


def _bench(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from slope_fx.frozen.bench import bench, bench_text

    report = bench(
        options.source, batch=options.batch, length=options.length, tokens=options.tokens,
        dtype=options.dtype, dense=not options.no_dense,
    )  # fmt: skip
    return bench_text(report), report


def _package(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from slope_fx.checkpoints import load_pretrained
    from slope_fx.frozen.package import package

    model = load_pretrained(options.source, frozen=True, dtype=options.dtype, backend=None)
    cache = None if options.cache is None else tuple(options.cache)
    made = package(model, options.target, cache=cache)
    data = {**dataclasses.asdict(made), "path": str(made.path), "library": str(made.library)}
    return str(made), data


def _inspect(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from slope_fx.checkpoints import verify

    report = verify(options.source)
    patterns = ", ".join(f"{count} {pattern}" for pattern, count in report.patterns.items())
    lines = [
        f"{report.path}: whole, {report.files} files, {report.bytes:,} bytes.",
        f"{report.model_class}, written by slope_fx {report.version}: {report.tensors} tensors; "
        f"linears: {patterns}, {report.dense} dense.",
        f"Adapters on {report.adapters} layers, taking part in {report.adapters_active}."
        if report.adapters
        else "No adapters.",
        "With the state of a training run."
        if report.training
        else ("Frozen, for inference." if report.frozen else "No training state."),
    ]
    return "\n".join(lines), report.to_dict()


def _sparsity(given: list[str] | None) -> str | dict[str, str | None] | None:
    if given is None:
        return None
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    rules: dict[str, str | None] = {}
    for rule in given:
        name, equals, pattern = rule.rpartition("=")
        name = name if equals else "*"
        if name in rules:
            raise ArgumentError(
                f"--sparsity {' '.join(given)}: two patterns for {name!r}. Give one, or NAME=N:M "
                "for other layers."
            )
        rules[name] = None if pattern == "dense" else pattern
    return rules


def _rank(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _show_warning(message: Any, category: type[Warning], *where: Any) -> None:
    if issubclass(category, SlopeWarning):
        print(f"slope-fx: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
