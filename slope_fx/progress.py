"""A progress bar for what can take minutes."""

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(steps: Iterable[T], what: str, unit: str, delay: float = 3.0) -> Iterable[T]:
    """The steps, with a bar on a terminal's stderr once they take longer than ``delay`` seconds."""
    bar: Iterable[T] = tqdm(steps, what, unit=unit, delay=delay, disable=None, leave=False)
    return bar
