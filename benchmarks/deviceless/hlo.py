"""What an optimised HLO module does to memory: its kernels, and the bytes that each of them moves.

What is counted, and how:

- A kernel is an instruction that runs: a fusion, a custom call (such as a product of matrices by a
  library), a copy, or whatever was not fused. What is only a view of memory is none: parameters,
  constants, tuples and their elements, bitcasts, and the second half of an asynchronous pair.
- A kernel reads each array that it is given once and writes each of its results once, whatever the
  caches make of it. The scratch of a custom call, a last result of bytes, is not written.
- Of an array that is only sliced or gathered from, the entries taken are read. Within a fusion the
  part of each instruction that its users need is followed from the results to the parameters.
- An update in place (dynamic-update-slice, scatter) of an array that the kernel is given writes the
  entries updated, and a scatter reads them. Where that array must be kept XLA has put a copy before
  it, which is a kernel of its own. An update of anything else writes all of its result.
- A while loop runs its body as often as XLA has noted. Where it has not, the body counts once, and
  the total is a lower bound. A conditional counts the branch that moves most; a call, or an
  asynchronous start, what it calls. Conditions of loops are not counted.
- Memory of the chip, S(1) and so on in a layout (the vector memory of a TPU), moves no bytes.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

_HEAD = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_ASSIGNMENT = re.compile(r"\s+(?P<root>ROOT )?%(?P<name>[\w.\-]+) = ")
_OPCODE = re.compile(r"\s*(?P<opcode>[\w\-]+)\(")
_SHAPE = re.compile(r"(?P<dtype>[a-z]\w*)\[(?P<sizes>[\d,<=]*)\](?:\{(?P<layout>[^}]*)\})?")
_DTYPE = re.compile(r"[a-z]+?(?P<bits>\d+)(?:e\d+m\d+\w*)?")
_NAME = re.compile(r"%([\w.\-]+)")
_COMMENT = re.compile(r"/\*index=\d+\*/")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_VIEWS = {
    "add-dependency",
    "after-all",
    "async-update",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
# Custom calls that only reserve or describe memory.
_MARKERS = {"AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding"}
_SLICES = {"dynamic-slice", "gather", "slice"}
_UPDATES = {"dynamic-update-slice", "scatter"}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array: a result, or one of a tuple."""

    dtype: str
    entries: int
    bits: int  # of an entry; 0 for what is not in the memory of the device


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    leaves: tuple[Leaf, ...]
    operands: tuple[str, ...]
    argument: str  # what stands in the parentheses
    attributes: str  # and what stands behind them
    is_root: bool

    @property
    def entries(self) -> int:
        """The entries of all leaves."""
        return sum(leaf.entries for leaf in self.leaves)

    @property
    def bytes(self) -> float:
        """The bytes of all leaves."""
        return sum(leaf.entries * leaf.bits for leaf in self.leaves) / 8

    def attribute(self, name: str) -> str:
        """The value of an attribute that is a name; empty without it."""
        found = re.search(rf'\b{name}="?%?([\w.\-$]+)', self.attributes)
        return found[1] if found else ""


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An instruction that runs, how often, and the bytes that it moves each time."""

    name: str
    kind: str
    read: float
    written: float
    runs: int = 1

    @property
    def bytes(self) -> float:
        """The bytes that it moves in all."""
        return self.runs * (self.read + self.written)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a module does to memory.

    Attributes:
        kernels: in the order in which they run.
        floor: the bytes of the arguments and the results: no program moves less.
        exact: False if a loop runs an unknown number of times.
    """

    kernels: tuple[Kernel, ...]
    floor: float
    exact: bool

    @property
    def launches(self) -> int:
        """How many kernels run."""
        return sum(kernel.runs for kernel in self.kernels)

    @property
    def bytes(self) -> float:
        """The bytes that they move."""
        return sum(kernel.bytes for kernel in self.kernels)


def traffic(text: str) -> Traffic:
    """Counts the kernels of an optimised module, given as text, and the bytes that they move."""
    module = Module(text)
    kernels = tuple(module.kernels(module.entry))
    entry = module.computations[module.entry].values()
    interface = [i for i in entry if i.opcode == "parameter" or i.is_root]
    return Traffic(kernels, sum(i.bytes for i in interface), module.exact)


class Module:
    """A parsed module.

    Attributes:
        computations: the instructions of each computation by name, operands before their users.
        entry: the name of the computation that runs.
        exact: False as soon as `kernels` has met a loop of unknown length.
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self.exact = True
        current: dict[str, Instruction] = {}
        for line in _COMMENT.sub("", text).splitlines():
            if head := _HEAD.match(line):
                current = self.computations.setdefault(head["name"], {})
                self.entry = head["name"] if head["entry"] else self.entry
            elif assignment := _ASSIGNMENT.match(line):
                instruction = _instruction(assignment, line[assignment.end() :])
                current[instruction.name] = instruction
        if not self.entry:
            raise ValueError("hlo: the text has no ENTRY computation")

    def kernels(self, name: str) -> Iterator[Kernel]:
        """The kernels that a computation runs."""
        computation = self.computations[name]
        for instruction in computation.values():
            opcode = instruction.opcode
            if opcode in _VIEWS or opcode.endswith("-done"):
                continue
            if opcode == "while":
                yield from self._loop(instruction)
            elif opcode == "conditional":
                branches = [list(self.kernels(branch)) for branch in _branches(instruction)]
                yield from max(branches, key=lambda kernels: sum(k.bytes for k in kernels))
            elif callee := self._callee(instruction):
                yield from self.kernels(callee)
            elif instruction.attribute("custom_call_target") not in _MARKERS:
                yield self._kernel(_started(instruction, computation), computation)

    def _loop(self, loop: Instruction) -> Iterator[Kernel]:
        trips = _TRIPS.search(loop.attributes)
        self.exact &= trips is not None
        for kernel in self.kernels(loop.attribute("body")):
            yield dataclasses.replace(kernel, runs=kernel.runs * (int(trips[1]) if trips else 1))

    def _callee(self, instruction: Instruction) -> str:
        """The computation that a call or an asynchronous start runs."""
        if instruction.opcode == "call":
            return instruction.attribute("to_apply") or instruction.attribute("calls")
        return instruction.attribute("calls") if instruction.opcode.endswith("-start") else ""

    def _kernel(self, instruction: Instruction, computation: Computation) -> Kernel:
        operands = [computation[name] for name in instruction.operands]
        if instruction.opcode == "fusion":
            kind = instruction.attribute("kind")
            fused = self.computations[instruction.attribute("calls")]
            parts = _parts_of_parameters(fused, len(operands))
            results = _results(fused)
            written = sum(_written(r, fused) if _in_place(r, fused) else r.bytes for r in results)
        else:
            kind = instruction.attribute("custom_call_target") or instruction.opcode
            in_place = instruction.opcode in _UPDATES
            parts = _parts_of_operands(instruction, 1, operands, in_place=in_place)
            written = _written(instruction, computation)
        # An array that is given twice is read once.
        read: dict[str, float] = collections.defaultdict(float)
        for operand, part in zip(operands, parts, strict=True):
            read[operand.name] = max(read[operand.name], part * operand.bytes)
        return Kernel(instruction.name, kind, sum(read.values()), written)


# -------------------------------------------------------------------------------------- parsing


def _instruction(assignment: re.Match[str], text: str) -> Instruction:
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    found = _OPCODE.match(text, end)
    if found is None:
        raise ValueError(f"hlo: no instruction in {text!r}")
    stop = _closing(text, found.end() - 1)
    argument = text[found.end() : stop - 1]
    return Instruction(
        name=assignment["name"],
        opcode=found["opcode"],
        leaves=tuple(map(_leaf, _SHAPE.finditer(text[:end]))),
        operands=tuple(_NAME.findall(argument)),
        argument=argument,
        attributes=text[stop:],
        is_root=assignment["root"] is not None,
    )


def _closing(text: str, start: int) -> int:
    """The position behind the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if not depth:
            return position + 1
    raise ValueError(f"hlo: unbalanced parentheses in {text!r}")


def _leaf(shape: re.Match[str]) -> Leaf:
    dtype = shape["dtype"]
    entries = math.prod(int(size.lstrip("<=")) for size in shape["sizes"].split(",") if size)
    named = _DTYPE.fullmatch(dtype)
    if named is None and dtype not in _BITS:
        raise ValueError(f"hlo: unknown type {dtype}")
    bits = int(named["bits"]) if named else _BITS[dtype]
    elsewhere = re.search(r"S\([1-9]", shape["layout"] or "")
    return Leaf(dtype, entries, 0 if elsewhere else bits)


def _branches(instruction: Instruction) -> list[str]:
    found = _BRANCHES.search(instruction.attributes)
    if found:
        return _NAME.findall(found[1])
    return [instruction.attribute(f"{value}_computation") for value in ("true", "false")]


def _started(instruction: Instruction, computation: Computation) -> Instruction:
    """The instruction that an asynchronous start stands for, if it is not in a computation."""
    opcode = instruction.opcode.removesuffix("-start")
    if opcode == instruction.opcode:
        return instruction
    # A copy returns (result, operand, context), any other start ((operands), result, context).
    given = sum(len(computation[name].leaves) for name in instruction.operands)
    result = instruction.leaves[0 if opcode == "copy" else given]
    return dataclasses.replace(instruction, opcode=opcode, leaves=(result,))


# --------------------------------------------------------------------------------- what is read


def _parts_of_parameters(fused: Computation, count: int) -> list[float]:
    """The part of each parameter that a fusion reads, from 0 to 1."""
    needed: dict[str, float] = collections.defaultdict(float)
    updates = {result.name for result in _results(fused) if _in_place(result, fused)}
    parts = [0.0] * count
    for instruction in reversed(list(fused.values())):
        part = 1.0 if instruction.is_root else min(1.0, needed[instruction.name])
        if instruction.opcode == "parameter":
            parts[int(instruction.argument)] = part
        operands = [fused[name] for name in instruction.operands]
        in_place = instruction.name in updates
        needs: dict[str, float] = {}  # an operand that is given twice is needed once
        for operand, need in zip(
            operands,
            _parts_of_operands(instruction, part, operands, in_place=in_place),
            strict=True,
        ):
            needs[operand.name] = max(need, needs.get(operand.name, 0.0))
        for name, need in needs.items():
            needed[name] += need
    return parts


def _parts_of_operands(
    instruction: Instruction, part: float, operands: list[Instruction], *, in_place: bool
) -> list[float]:
    """The part of each operand that is needed for a part of the result."""
    parts = [part] * len(operands)
    if not operands:
        return parts
    taken = part * instruction.entries / max(1, operands[0].entries)
    if instruction.opcode in _SLICES or instruction.opcode == "broadcast":
        parts[0] = min(1.0, taken)
    elif in_place and instruction.opcode == "dynamic-update-slice":
        parts[0] = 0.0
    elif in_place and instruction.opcode == "scatter":
        arrays = len(operands) // 2  # the arrays, the places, and an update for each array
        for i in range(arrays):
            parts[i] = min(1.0, operands[arrays + 1 + i].entries / max(1, operands[i].entries))
    return parts


# ------------------------------------------------------------------------------ what is written


def _results(fused: Computation) -> list[Instruction]:
    """What a fusion returns, without the bitcasts around it."""
    (root,) = (instruction for instruction in fused.values() if instruction.is_root)
    results = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return [_source(result, fused) for result in results]


def _source(instruction: Instruction, computation: Computation) -> Instruction:
    while instruction.opcode == "bitcast":
        instruction = computation[instruction.operands[0]]
    return instruction


def _in_place(result: Instruction, fused: Computation) -> bool:
    """Whether a result of a fusion is an update of an array that the fusion is given."""
    if result.opcode not in _UPDATES:
        return False
    return _source(fused[result.operands[0]], fused).opcode == "parameter"


def _written(instruction: Instruction, computation: Computation) -> float:
    """The bytes that an instruction writes, in place if it can."""
    operands = [computation[name] for name in instruction.operands]
    if instruction.opcode == "dynamic-update-slice":
        return operands[1].bytes
    if instruction.opcode == "scatter":
        return sum(operand.bytes for operand in operands[len(operands) // 2 + 1 :])
    *_, last = instruction.leaves
    if instruction.opcode == "custom-call" and len(instruction.leaves) > 1 and last.dtype == "s8":
        return instruction.bytes - last.entries * last.bits / 8
    return instruction.bytes
