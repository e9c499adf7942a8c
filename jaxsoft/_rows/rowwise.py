"""What a function along the classes does before its formula, and after it."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Int

from jaxsoft._core import devices, programs
from jaxsoft._core.axes import ClassAxis, merge_axes, merged_axis, unmerge_axes
from jaxsoft._core.devices import Mesh
from jaxsoft._core.sizes import is_empty
from jaxsoft._rows.logits import Logits, keep_inputs
from jaxsoft._rows.statistics import Row, statistics


def rowwise(
    *,
    places: Callable[..., Any],
    empty: Callable[..., Any],
    static: tuple[str, ...] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function of arrays along one axis a compiled one of arrays along several axes.

    The function gets the arrays with these axes merged into one, each made to differ along the
    mesh axes along which one of them does, the axis by the name of `axis`, and the static options.
    An array with fewer axes than the first belongs to the rows, or to the classes, and stays as it
    is. The function returns arrays with the merged axis, or without it, or a number.

    Args:
        places: the axes of the results, as `programs.program` takes them.
        empty: the results for a first array without an entry, given it, the shape of the rows
            and the static options.
        static: the names of its options that are not arrays.
    """

    def decorated(fun: Callable[..., Any]) -> Callable[..., Any]:
        def call(
            *arrays: Array | None, axes: tuple[int, ...], mesh: Mesh | None, **options: Any
        ) -> Any:
            x = arrays[0]
            assert x is not None
            shape = x.shape
            keepdims = options.pop("keepdims", False)
            sizes = [1 if i in axes else size for i, size in enumerate(shape)]
            rows = tuple(size for i, size in enumerate(sizes) if keepdims or i not in axes)
            if is_empty(x):
                return empty(x, rows, **options)
            merged = [
                a if a is None or a.ndim < len(shape) else merge_axes(a, axes)
                for a in devices.aligned(*arrays, mesh=mesh)
            ]
            axis = ClassAxis(merged_axis(len(shape), axes), mesh)
            out = fun(*merged, axis=axis, **options)

            def restored(a: Array) -> Array:
                ndim = len(shape) - len(axes) + 1
                if a.ndim == ndim:
                    return unmerge_axes(a, axes, shape)
                return a.reshape(rows) if a.ndim == ndim - 1 else a  # else reduced to a number

            return tuple(map(restored, out)) if isinstance(out, tuple) else restored(out)

        call.__name__ = fun.__name__  # of the program that is compiled
        return programs.program(static=("axes", "mesh", *static), places=places)(call)

    return decorated


def as_given(x: Array, _: tuple[int, ...], **__: Any) -> Array:
    """The result without an entry of a function whose result has the shape of its argument."""
    return x


def from_statistics(
    rule: Callable[[Logits, Row], Array],
    logits: Callable[[], Logits],
    axis: ClassAxis,
    *,
    label: Int[Array, "..."] | None = None,
    prevent_cse: bool = False,
) -> tuple[Row, Array]:
    """The statistics of logits, and what a rule makes of both.

    Reverse mode keeps the statistics and what the logits are made of, not the logits.
    """
    row = statistics(logits(), axis, label)
    return row, keep_inputs(lambda: rule(logits(), row), prevent_cse=prevent_cse)
