"""What a platform's own forms buy: the same programs with the portable ones."""

import contextlib
from collections.abc import Iterator

from jaxsoft._core.primitives import AlongClasses
from jaxsoft._rows import jacobian_product, statistics

PRIMITIVES = [
    value
    for module in (statistics, jacobian_product)
    for value in vars(module).values()
    if isinstance(value, AlongClasses)
]


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Programs that are compiled here have none of the forms for one platform."""
    own = [(p, platform, form) for p in PRIMITIVES for platform, form in p.forms.items()]
    for primitive, platform, _ in own:
        primitive.lower(primitive.formula, platform)
    try:
        yield
    finally:
        for primitive, platform, form in own:
            primitive.lower(form, platform)
