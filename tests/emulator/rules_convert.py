"""Moves and conversions."""

from emulator.parse import PtxError, Vector
from emulator.rules import BITS, C_TYPES, FLOATS, HALVES, INTEGERS, bits, rule


@rule("mov", f"{BITS} {INTEGERS} {FLOATS} f16 bf16 pred")
def move(c, i):
    target, source = i.operands
    if isinstance(target, Vector):  # unpack
        width = bits(i.type) // len(target.items)
        parts = [f"uint{bits(i.type)}_t x_ = {c.value(source, f'b{bits(i.type)}')};"]
        for n, item in enumerate(target.items):
            parts.append(c.assign(item, f"u{width}", f"x_ >> {n * width}"))
        return " ".join(parts)
    if isinstance(source, Vector):  # pack
        width = bits(i.type) // len(source.items)
        whole = f"uint{bits(i.type)}_t"
        parts = [
            f"({whole}){c.value(s, f'u{width}')} << {n * width}" for n, s in enumerate(source.items)
        ]
        return c.assign(target, f"u{bits(i.type)}", " | ".join(parts))
    return c.assign(target, i.type, c.value(source, i.type))


SHARED = {"shared", "shared::cta", "shared::cluster"}


@rule("cvta", "u32 u64", f"to global local const param {' '.join(SHARED)}")
def convert_address(c, i):
    """Generic addresses are the host's; those of shared memory: `runtime/clusters.h`."""
    address = c.value(i.operands[1], "u64")
    if SHARED.intersection(i.modifiers):
        address = f"to_{'shared' if 'to' in i.modifiers else 'generic'}({address})"
    return c.assign(i.operands[0], i.type, address)


ROUNDINGS = {"rni": "std::nearbyint", "rzi": "std::trunc", "rmi": "std::floor", "rpi": "std::ceil"}
HALF_TYPES = {"f16": "Half", "bf16": "BFloat16", "f16x2": "Half", "bf16x2": "BFloat16"}


@rule(
    "cvt",
    f"{INTEGERS} {FLOATS} f16 bf16",
    f"{INTEGERS} {FLOATS} {HALVES} {' '.join(ROUNDINGS)} rn rz ftz sat relu",
)
def convert(c, i):
    target, source = i.modifiers[-2:]
    modifiers = set(i.modifiers[:-2])
    x = c.value(i.operands[1], source)
    if source in HALF_TYPES:
        x, source = f"to_float<{HALF_TYPES[source]}>({x})", "f32"
    if target in ("f16x2", "bf16x2"):
        return _pack_halves(c, i, target, modifiers)
    if source not in ("f32", "f64"):
        return _from_integer(c, i, target, x, modifiers)
    if "ftz" in modifiers:
        x = f"flush({x})"
    rounding = next((ROUNDINGS[m] for m in modifiers if m in ROUNDINGS), None)
    if rounding:
        x = f"{rounding}({x})"
    if target in HALF_TYPES:
        return c.assign(i.operands[0], target, _to_half(target, x, modifiers))
    if target in ("f32", "f64"):
        _refuse(i, modifiers & {"rz", "relu"} if source == "f64" else modifiers & {"relu"})
        x = f"({C_TYPES[target]})({x})"
        if "sat" in modifiers:
            x = f"saturate({x})"
        return c.assign(i.operands[0], target, f"flush({x})" if "ftz" in modifiers else x)
    if rounding is None:
        _refuse(i, {"no rounding"})
    return c.assign(i.operands[0], target, f"to_integer<{C_TYPES[target]}>({x})")


def _refuse(i, what: set[str]) -> None:
    if what:
        raise PtxError(f"{i.source}: no rule for {' '.join(what)} in `{i.text}`")


def _to_half(target, x, modifiers):
    toward_zero = "_toward_zero" if "rz" in modifiers else ""
    x = f"float_max({x}, 0.0f)" if "relu" in modifiers else x
    return f"to_half{toward_zero}<{HALF_TYPES[target]}>({x})"


def _pack_halves(c, i, target, modifiers):
    high, low = (_to_half(target, c.value(o, "f32"), modifiers) for o in i.operands[1:])
    return c.assign(i.operands[0], target, f"(uint32_t){high} << 16 | {low}")


def _from_integer(c, i, target, x, modifiers):
    if target in C_TYPES and target[0] in "su":
        clamp = f"clamp<{C_TYPES[target]}>({x})" if "sat" in modifiers else x
        return c.assign(i.operands[0], target, clamp)
    _refuse(i, modifiers - {"rn"})
    if target in HALF_TYPES:  # a double holds 32 bits; 64 would be rounded twice
        _refuse(i, {"64 bits"} if i.modifiers[-1][1:] == "64" else set())
        return c.assign(i.operands[0], target, f"to_half<{HALF_TYPES[target]}>((double){x})")
    return c.assign(i.operands[0], target, f"({C_TYPES[target]}){x}")
