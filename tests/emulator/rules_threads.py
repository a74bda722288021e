"""Control flow, and what threads of a block do together."""

from emulator.parse import PtxError, Register, Symbol, Vector
from emulator.rules import C_TYPES, bits, rule
from emulator.together import Collective


@rule("bra", "", "uni")
def branch(c, i):
    return f"goto {c.label(i.operands[0].name)};"


@rule("brx", "", "idx uni")
def branch_by_index(c, i):
    index, targets = i.operands
    cases = [f"case {n}: goto {c.label(target.name)};" for n, target in enumerate(targets.items)]
    other = f'default: fail("%s: no such target", {c.site(i)}.what);'
    return f"switch ({c.value(index, 'u32')}) {{ {' '.join([*cases, other])} }}"


@rule("ret exit")
def leave(c, i):
    if i.opcode == "exit" and not c.function.is_kernel:
        raise PtxError(f"{i.source}: no rule for exit in a function")
    return "return;"


@rule("trap")
def trap(c, i):
    return f'fail("%s: trap", {c.site(i)}.what);'


@rule("nanosleep", "u32")
def sleep(c, i):
    return f"give_way({c.site(i)});"


@rule("call", "", "uni")
def call(c, i):
    """Functions of the module; vprintf and __assertfail are the device's runtime."""
    operands = list(i.operands)
    results = operands.pop(0).items if isinstance(operands[0], Vector) else ()
    name, *arguments = operands
    arguments = arguments[0].items if arguments else ()
    pointers = ", ".join(c.parameter(a.name) for a in (*results, *arguments))
    return f"{c.callee(name.name, i)}({pointers});"


@rule("bar", "", "sync cta")
@rule("barrier", "", "sync cta aligned")
def barrier(c, i):
    number, count = (*(c.value(o, "u32") for o in i.operands), "0")[:2]
    return f"barrier({c.site(i)}, {number}, {count}, Reduction::none, 0);"


@rule("bar", "", "arrive cta")
@rule("barrier", "", "arrive cta aligned")
def barrier_arrive(c, i):
    number, count = (c.value(o, "u32") for o in i.operands)
    return f"barrier_arrive({c.site(i)}, {number}, {count});"


@rule("bar", "pred u32", "red cta popc and or")
@rule("barrier", "pred u32", "red cta aligned popc and or")
def barrier_reduction(c, i):
    target, number, *count, value = i.operands
    kind = {"popc": "sum", "and": "all", "or": "any"}[
        next(m for m in i.modifiers if m in ("popc", "and", "or"))
    ]
    numbers = f"{c.value(number, 'u32')}, {c.value(count[0], 'u32') if count else 0}"
    value = c.value(value, "pred")
    return c.assign(target, i.type, f"barrier({c.site(i)}, {numbers}, Reduction::{kind}, {value})")


@rule("bar", "", "warp sync")
def warp_barrier(c, i):
    return f"warp_barrier({c.site(i)}, {c.value(i.operands[0], 'u32')});"


@rule("shfl", "b32", "sync up down bfly idx", is_collective=True)
def shuffle(c, i):
    target, *values = i.operands
    value, is_in_range = [*getattr(target, "items", (target,)), Symbol("_")][:2]
    inputs = tuple(v if isinstance(v, Register) else c.value(v, "u32") for v in values[:-1])
    work = f"shuffle<Shuffle::{i.modifiers[1]}>"
    mask = c.value(values[-1], "u32")
    return Collective(work, inputs, ((value, "b32"), (is_in_range, "pred")), mask)


@rule("vote", "b32 pred", "sync ballot any all uni")
def vote(c, i):
    target, value, mask = i.operands
    mask = c.value(mask, "u32")
    ballot = f"auto v_ = ballot({c.site(i)}, {mask}, {c.value(value, 'pred')});"
    result = {
        "ballot": "v_.yes",
        "any": "v_.yes != 0",
        "all": "v_.yes == v_.lanes",
        "uni": "v_.yes == 0 || v_.yes == v_.lanes",
    }[i.modifiers[1]]
    return f"{ballot} {c.assign(target, i.type, result)}"


@rule("redux", "s32 u32 b32", "sync add min max and or xor")
def warp_reduction(c, i):
    target, value, mask = i.operands
    kind = C_TYPES[i.type]
    arguments = f"{c.value(mask, 'u32')}, {c.value(value, i.type)}"
    call = f"warp_reduce<{kind}>({c.site(i)}, Reduce::{i.modifiers[1]}_, {arguments})"
    return c.assign(target, i.type, call)


@rule("match", "b32 b64", "sync any all")
def match(c, i):
    target, value, mask = i.operands
    outputs = target.items if isinstance(target, Vector) else (target,)
    arguments = f"{c.value(mask, 'u32')}, {c.value(value, f'u{bits(i.type)}')}"
    call = f"auto m_ = match({c.site(i)}, {arguments});"
    if "any" in i.modifiers:
        return f"{call} {c.assign(outputs[0], 'u32', 'm_.equal')}"
    parts = [call, c.assign(outputs[0], "u32", "m_.equal == m_.lanes ? m_.lanes : 0u")]
    if len(outputs) > 1 and isinstance(outputs[1], Register):
        parts.append(c.assign(outputs[1], "pred", "m_.equal == m_.lanes"))
    return " ".join(parts)
