"""Loads, stores, atomics. Every access is checked: alignment, and that it lies in known memory."""

from emulator.parse import SIZES, Address, Symbol, Vector
from emulator.rules import BITS, C_TYPES, FLOATS, HALVES, INTEGERS, bits, rule

SPACES = ("global", "shared", "local", "param", "const")
# Who sees an access when, and caches: threads run one after another here, on one memory.
STRONG = {"relaxed", "acquire", "release", "acq_rel", "volatile"}
ORDERS = "relaxed acquire release acq_rel volatile weak cta cluster gpu sys noftz"
CACHES = "nc ca cg cs cv wb wt L1::no_allocate L1::evict_last L2::64B L2::128B L2::256B"
DATA = f"{BITS} {INTEGERS} {FLOATS} f16 bf16"


def space_of(instruction):
    if "shared::cluster" in instruction.modifiers:
        return "cluster"
    modifiers = (m.split("::")[0] for m in instruction.modifiers)
    return next((m for m in modifiers if m in SPACES), "generic")


def pointer(c, i, address: Address, size: int, kind: str) -> str:
    """C++ for the checked pointer to `size` bytes; `kind` is Read, Write or both (Update)."""
    space = space_of(i)
    if isinstance(address.base, Symbol) and (storage := c.parameter(address.base.name)):
        return f"{storage} + {address.base.offset + address.offset}"
    base = c.value(address.base, "u32" if space in ("shared", "cluster") else "u64")
    return f"{space}_pointer<{kind}, {size}>({c.site(i)}, {base} + {address.offset})"


def shared_offset(c, i, address: Address, size: int, kind: str) -> str:
    return f"(uint32_t)({pointer(c, i, address, size, kind)} - block.smem)"


def shared_place(c, i, address: Address, size: int, kind: str) -> str:
    """Of any block of the cluster."""
    return f"(uint32_t)({pointer(c, i, address, size, kind)} - cluster.smem)"


def _access(c, i, address, value, kind):
    """The pointer, and each element with its offset and its type."""
    items = value.items if isinstance(value, Vector) else (value,)
    width = SIZES[i.type]
    p = pointer(c, i, address, width * len(items), kind)
    return f"auto* p_ = {p};", [(item, f"p_ + {n * width}") for n, item in enumerate(items)]


def _ordered(i, text: str) -> str:
    """Acquire and release order no more than a fence does, nor less."""
    before = {"release", "acq_rel"}.intersection(i.modifiers)
    after = {"acquire", "acq_rel"}.intersection(i.modifiers)
    return f"{'fence(); ' if before else ''}{text}{' fence();' if after else ''}"


STATES = "global shared shared::cta shared::cluster local param const v2 v4 v8"


@rule("ld ldu", DATA, f"{STATES} {ORDERS} {CACHES}")
def load(c, i):
    target, address = i.operands
    kind = "StrongRead" if STRONG.intersection(i.modifiers) else "Read"
    declare, items = _access(c, i, address, target, kind)
    # Into variables at first: an address may be in a register that is loaded.
    kind = C_TYPES[i.type]
    loads = [f"{kind} x{n}_ = load<{kind}>({p});" for n, (_, p) in enumerate(items)]
    assigns = [c.assign(item, i.type, f"x{n}_") for n, (item, _) in enumerate(items)]
    return _ordered(i, " ".join([declare, *loads, *assigns]))


@rule("st", DATA, f"{STATES} {ORDERS} {CACHES}")
def store(c, i):
    address, value = i.operands
    kind = "StrongWrite" if STRONG.intersection(i.modifiers) else "Write"
    declare, items = _access(c, i, address, value, kind)
    stores = [f"store<{C_TYPES[i.type]}>({p}, {c.value(item, i.type)});" for item, p in items]
    return _ordered(i, " ".join([declare, *stores]))


@rule(
    "atom red",
    f"{BITS} {INTEGERS} {FLOATS} {HALVES}",
    f"global shared shared::cta shared::cluster {ORDERS} add min max and or xor exch cas inc dec",
)
def atomic(c, i):
    operands = list(i.operands)
    target = operands.pop(0) if i.opcode == "atom" else Symbol("_")
    address, *values = operands
    operation = next(m for m in i.modifiers if m in OPERATIONS)
    kind = C_TYPES[i.type]
    p = pointer(c, i, address, bits(i.type) // 8, "Update")
    arguments = ["old_", *(c.value(v, i.type) for v in values)]
    if i.type in HALVES.split():
        half, width = ("BFloat16" if i.type[0] == "b" else "Half"), (2 if "x2" in i.type else 1)
        new = f"half_{operation}<{half}, {width}>({', '.join(arguments)})"
    else:
        new = OPERATIONS[operation].format(*arguments, type=kind)
    update = f"auto* p_ = {p}; {kind} old_ = load<{kind}>(p_); store<{kind}>(p_, {new});"
    return _ordered(i, f"{update} {c.assign(target, i.type, 'old_')}")


OPERATIONS = {
    "add": "({type})({0} + {1})",
    "min": "std::min<{type}>({0}, {1})",
    "max": "std::max<{type}>({0}, {1})",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "xor": "{0} ^ {1}",
    "exch": "{1}",
    "cas": "{0} == {1} ? {2} : {0}",
    "inc": "{0} >= {1} ? 0 : {0} + 1",
    "dec": "{0} == 0 || {0} > {1} ? {1} : {0} - 1",
}


@rule("membar", "", "cta gl sys")
@rule("fence", "", "acq_rel sc cta cluster gpu sys")
def fence(c, i):
    """Threads run one after another on one memory: it is for finding races alone."""
    return "fence();"
