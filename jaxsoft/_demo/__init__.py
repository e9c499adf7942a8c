"""What `python -m jaxsoft` measures and shows. Needs the packages of the extra `demo`.

Each module but `view` measures one thing and returns plain data, in which `failures` says what is
wrong; `view` shows this data to a person.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar, runtime_checkable

Step = TypeVar("Step")


@runtime_checkable
class Track(Protocol):
    """Hands on steps one by one and shows how many are done."""

    def __call__(self, steps: Sequence[Step], description: str, /) -> Iterable[Step]: ...
