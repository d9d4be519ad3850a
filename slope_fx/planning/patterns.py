"""N:M patterns, and rules that select a pattern by the name of a layer."""

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass

from slope_fx.errors import ArgumentError

GROUP_SIZES = (2, 4, 8, 16)
_ALLOWED = 'allowed is "N:M" with M one of 2, 4, 8, 16 and 1 <= N < M, such as "2:4" or "1:8"'


@dataclass(frozen=True)
class Pattern:
    """At most ``n`` nonzeros in each group of ``m`` consecutive elements."""

    n: int
    m: int

    @classmethod
    def parse(cls, text: object, argument: str = "sparsity") -> "Pattern":
        """Returns the pattern of a text such as ``"2:4"``.

        Raises:
            ArgumentError: ``text`` is not ``"N:M"`` with M in 2, 4, 8, 16 and 1 <= N < M.
        """
        if isinstance(text, Pattern):
            return text
        match = re.fullmatch(r"(\d+):(\d+)", text) if isinstance(text, str) else None
        if match is None:
            raise ArgumentError(f"{argument}={text!r} is not an N:M pattern; {_ALLOWED}.")
        try:
            return cls(int(match[1]), int(match[2]))
        except ArgumentError as error:
            raise ArgumentError(f"{argument}={text!r}: {error}") from None

    def __post_init__(self) -> None:
        if type(self.n) is not int or type(self.m) is not int or self.m not in GROUP_SIZES:
            raise ArgumentError(f"the pattern has groups of {self.m}; {_ALLOWED}.")
        if not 1 <= self.n < self.m:
            raise ArgumentError(f"the pattern keeps {self.n} of each {self.m}; {_ALLOWED}.")

    @property
    def density(self) -> float:
        """The fraction of kept elements, N / M."""
        return self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


class PatternRules:
    """The rules of the ``sparsity`` argument. The first match of a layer's name wins.

    Args:
        sparsity: one N:M pattern for all layers (``"2:4"``), or a mapping from ``fnmatch``
            patterns on the qualified name to an N:M pattern, or to None for dense.

    Raises:
        ArgumentError: ``sparsity`` is empty, or has a value that is not allowed.
    """

    def __init__(self, sparsity: str | Pattern | Mapping[str, str | Pattern | None]) -> None:
        if isinstance(sparsity, Mapping):
            if not sparsity:
                raise ArgumentError("sparsity={} names no layer; use a pattern such as '2:4'.")
            self.rules: dict[str, Pattern | None] = {}
            for name, text in sparsity.items():
                if not isinstance(name, str):
                    raise ArgumentError(f"sparsity has the key {name!r}; keys are layer names.")
                self.rules[name] = (
                    None if text is None else Pattern.parse(text, f"sparsity[{name!r}]")
                )
        else:
            self.rules = {"*": Pattern.parse(sparsity)}
        self.matched: set[str] = set()

    def select(self, layer: str) -> tuple[Pattern | None, str]:
        """The pattern of a layer, or None and the reason."""
        for name, pattern in self.rules.items():
            if fnmatch.fnmatchcase(layer, name):
                self.matched.add(name)
                return pattern, "" if pattern else f"sparsity[{name!r}] is None"
        return None, "no key of sparsity matches its name"

    def as_given(self) -> str | dict[str, str | None]:
        """The rules as plain data: one pattern or a mapping."""
        texts = {name: None if p is None else str(p) for name, p in self.rules.items()}
        only = texts.get("*")
        return only if only is not None and len(texts) == 1 else texts

    def unmatched(self) -> list[str]:
        """The keys that have not matched a layer so far."""
        return [name for name in self.rules if name not in self.matched]
