"""What `python -m jaxsoft` measures and shows. Needs the packages of the extra `demo`.

`view` shows to a person what the other modules measure: each one thing, returned as plain data in
which `failures` says what is wrong. `timing` is how `speed`, and `python -m benchmarks`, time.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar, runtime_checkable

Step = TypeVar("Step")


@runtime_checkable
class Track(Protocol):
    """Hands on steps one by one and shows how many are done."""

    def __call__(self, steps: Sequence[Step], description: str, /) -> Iterable[Step]: ...
