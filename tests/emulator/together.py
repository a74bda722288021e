"""What a warp does together: neighbouring operations are done at one meeting of its threads.

A meeting costs a switch to each thread; a kernel's inner loop has dozens of products and
`ldmatrix` in a row. So instructions are put in an order that brings them together: those that touch
registers alone go before a meeting where they can, and wait for its results where they must.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from emulator import rules
from emulator.parse import Address, Immediate, Instruction, Operand, Register, Vector

# They write their first operand, read the others, and do nothing else that others could see.
MOVABLE = set(
    "add sub mul mad div rem min max neg abs fma sqrt rcp rsqrt ex2 lg2 sin cos tanh copysign "  # noqa: SIM905
    "and or xor not shl shr shf popc clz brev bfe bfi lop3 prmt dp4a setp selp mov cvt cvta".split()
)


@dataclass(frozen=True)
class Collective:
    """What a rule says of an instruction that a warp does together."""

    work: str  # the C++ function
    inputs: tuple[Register | str, ...]  # or C++ of 32 bits
    results: tuple[tuple[Operand, str], ...]  # with their types
    mask: str = "~0u"


def registers(*operands: Operand) -> Iterator[str]:
    for operand in operands:
        if isinstance(operand, Register):
            yield operand.name
        elif isinstance(operand, Address):
            yield from registers(operand.base, *operand.coordinates)
        elif isinstance(operand, Vector):
            yield from registers(*operand.items)


def arrange(stretch: Sequence[Instruction]) -> Iterator[Instruction | list[Instruction]]:
    """Instructions, and lists of those that are done together."""
    region: list[Instruction] = []
    for i in stretch:
        if _may_join(i) or i.opcode in MOVABLE:
            region.append(i)
            continue
        yield from _arrange_region(region)
        yield [i] if rules.find(i).is_collective else i
        region = []
    yield from _arrange_region(region)


def _may_join(i: Instruction) -> bool:
    """Of a whole warp, whatever it does."""
    is_whole = True
    if i.opcode in ("shfl", "elect"):
        mask = i.operands[-1]
        is_whole = isinstance(mask, Immediate) and mask.number % 2**32 == 2**32 - 1
    return rules.find(i).is_collective and i.guard is None and is_whole


def _arrange_region(todo: list[Instruction]) -> Iterator[Instruction | list[Instruction]]:
    while todo:
        # Names of registers: read and written by the meeting, and by those that wait for it.
        batch, batch_reads, batch_writes = [], set(), set()
        waiting, waiting_reads, waiting_writes = [], set(), set()
        for i in todo:
            writes = set(registers(i.operands[0]))
            reads = set(registers(*i.operands[1:]))
            if i.guard:
                reads.add(i.guard.name)
            joins = rules.find(i).is_collective
            must_wait = reads & waiting_writes or writes & (waiting_reads | waiting_writes)
            if joins:  # it may read what the meeting writes, but not in an address
                addresses = [o for o in i.operands if isinstance(o, Address)]
                must_wait = must_wait or batch_writes.intersection(registers(*addresses))
            else:
                must_wait = (
                    must_wait or reads & batch_writes or writes & (batch_reads | batch_writes)
                )
            if must_wait:
                waiting.append(i)
                waiting_reads |= reads
                waiting_writes |= writes
            elif joins:
                batch.append(i)
                batch_reads |= reads
                batch_writes |= writes
            else:
                yield i
        if batch:
            yield batch
        todo = waiting


def emit(c, batch: Sequence[Instruction]) -> str:
    """C++ of a meeting: inputs to their slots, the operations, results to registers."""
    lines: list[str] = []
    slots: dict[str, int] = {}  # where a register's value is
    results: dict[str, str] = {}  # the assignment to each register
    operations, size, mask = [], 0, ""
    for i in batch:
        collective = rules.find(i).emit(c, i)
        inputs, mask = [], collective.mask
        for x in collective.inputs:
            name = x.name if isinstance(x, Register) else x
            if name not in slots:
                slots[name] = size
                value = c.value(x, "b32") if isinstance(x, Register) else x
                lines.append(f"s_[{size}] = {value};")
                size += 1
            inputs.append(str(slots[name]))
        work, site = collective.work, c.site(i)
        operations.append(f"{{{work}, &{site}, {{{', '.join(inputs)}}}, {size}}}")
        for result, kind in collective.results:
            if isinstance(result, Register):
                slots[result.name] = size
                results[result.name] = c.assign(result, kind, f"s_[{size}]")
            size += 1
    listed = c.define("const Operation", operations, is_array=True)
    program = c.define("const Program", [listed, str(len(batch))])
    run = f"run_together({program}, {mask}, s_);"
    return " ".join([f"uint32_t s_[{size}];", *lines, run, *results.values()])
