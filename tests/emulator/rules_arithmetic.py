"""Integers, floating point numbers, bits, comparisons."""

from emulator.rules import BITS, C_TYPES, FLOATS, HALVES, INTEGERS, bits, rule, unsigned

OPERATORS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "rem": "%"} | {
    "and": "&",
    "or": "|",
    "xor": "^",
}


def _values(c, i, kind=None):
    return [c.value(o, kind or i.type) for o in i.operands[1:]]


def _infix(c, i):
    a, b = _values(c, i)
    return c.assign(i.operands[0], i.type, f"{a} {OPERATORS[i.opcode]} {b}")


rule("and or xor", f"{BITS} pred")(_infix)


@rule("add sub", INTEGERS)
@rule("mul", INTEGERS, "lo")
def integer_arithmetic(c, i):
    kind = unsigned(i.type)  # wraps around, whichever the sign
    a, b = (f"({C_TYPES[kind]}){v}" for v in _values(c, i, kind))
    wide = (
        "(uint64_t)" if kind == "u16" else ""
    )  # else C++ would multiply as int, which may overflow
    return c.assign(i.operands[0], kind, f"{wide}{a} {OPERATORS[i.opcode]} {b}")


@rule("mul mad", INTEGERS, "wide")
def widening_product(c, i):
    wide = f"{i.type[0]}{2 * bits(i.type)}"
    a, b = (f"({C_TYPES[wide]}){c.value(o, i.type)}" for o in i.operands[1:3])
    product = f"{a} * {b}"
    if i.opcode == "mad":
        kind = unsigned(wide)
        product = f"({C_TYPES[kind]})({product}) + {c.value(i.operands[3], kind)}"
    return c.assign(i.operands[0], unsigned(wide), product)


@rule("mad", INTEGERS, "lo")
def multiply_add(c, i):
    kind = unsigned(i.type)
    x, y, z = _values(c, i, kind)
    return c.assign(i.operands[0], kind, f"(uint64_t){x} * {y} + {z}")


@rule("mul mad", "s16 s32 s64 u16 u32 u64", "hi")
def high_half_of_product(c, i):
    wide = "__int128" if i.type[0] == "s" else "unsigned __int128"
    a, b = (f"({wide}){c.value(o, i.type)}" for o in i.operands[1:3])
    high = f"({C_TYPES[unsigned(i.type)]})(({a} * {b}) >> {bits(i.type)})"
    if i.opcode == "mad":
        high += f" + {c.value(i.operands[3], unsigned(i.type))}"
    return c.assign(i.operands[0], unsigned(i.type), high)


@rule("div rem", INTEGERS)
def integer_division(c, i):
    a, b = _values(c, i)
    call = f"{i.opcode}_checked<{C_TYPES[i.type]}>({c.site(i)}, {a}, {b})"
    return c.assign(i.operands[0], i.type, call)


@rule("min max", INTEGERS, "relu")
def integer_extremum(c, i):
    a, b = _values(c, i)
    x = f"std::{i.opcode}<{C_TYPES[i.type]}>({a}, {b})"
    if "relu" in i.modifiers:
        x = f"std::max<{C_TYPES[i.type]}>({x}, 0)"
    return c.assign(i.operands[0], i.type, x)


@rule("neg", "s16 s32 s64")
def integer_negation(c, i):
    return c.assign(
        i.operands[0], unsigned(i.type), f"0 - {c.value(i.operands[1], unsigned(i.type))}"
    )


@rule("abs", "s16 s32 s64")
def integer_magnitude(c, i):
    a, kind = c.value(i.operands[1], i.type), unsigned(i.type)
    b = c.value(i.operands[1], kind)
    return c.assign(i.operands[0], kind, f"{a} < 0 ? ({C_TYPES[kind]})(0 - {b}) : {b}")


@rule("add sub mul", FLOATS, "rn ftz")
@rule("div", FLOATS, "rn full approx ftz")
@rule("fma", FLOATS, "rn ftz")
def float_arithmetic(c, i):
    """Approximations are exact here."""
    flush = "flush" if "ftz" in i.modifiers else ""
    values = [f"{flush}({v})" for v in _values(c, i)]
    if i.opcode == "fma":
        result = f"std::fma({', '.join(values)})"
    else:
        result = f" {OPERATORS[i.opcode]} ".join(values)
    return c.assign(i.operands[0], i.type, f"{flush}({result})")


@rule("min max", FLOATS, "NaN ftz")
def float_extremum(c, i):
    flush = "flush" if "ftz" in i.modifiers else ""
    a, b = (f"{flush}({v})" for v in _values(c, i))
    name = f"{i.opcode}{'_nan' if 'NaN' in i.modifiers else ''}"
    return c.assign(i.operands[0], i.type, f"float_{name}({a}, {b})")


FUNCTIONS = {
    "neg": "-{}",
    "abs": "std::fabs({})",
    "sqrt": "std::sqrt({})",
    "rsqrt": "1 / std::sqrt({})",
    "rcp": "1 / {}",
    "ex2": "std::exp2({})",
    "lg2": "std::log2({})",
    "sin": "std::sin({})",
    "cos": "std::cos({})",
    "tanh": "std::tanh({})",
}


@rule("neg abs", FLOATS, "ftz")
@rule("sqrt rcp", FLOATS, "rn")
@rule("sqrt rcp rsqrt ex2 lg2 sin cos tanh", "f32", "approx ftz")
@rule("rsqrt", "f64", "approx")
def float_function(c, i):
    """Approximations are exact here: rounded from float64."""
    flush = "flush" if "ftz" in i.modifiers else ""
    widen = "(double)" if "approx" in i.modifiers else ""
    x = f"{widen}{flush}({c.value(i.operands[1], i.type)})"
    result = f"({C_TYPES[i.type]})({FUNCTIONS[i.opcode].format(x)})"
    return c.assign(i.operands[0], i.type, f"{flush}({result})")


@rule("rcp", "f64", "approx ftz")
def coarse_reciprocal(c, i):
    """The lower half of its bits is 0."""
    return c.assign(i.operands[0], "f64", f"coarse(1 / {c.value(i.operands[1], 'f64')})")


@rule("copysign", FLOATS)
def copy_sign(c, i):
    sign, magnitude = _values(c, i)
    return c.assign(i.operands[0], i.type, f"std::copysign({magnitude}, {sign})")


@rule("add sub mul min max fma", HALVES, "rn")
@rule("neg abs", HALVES)
def half_arithmetic(c, i):
    half, width = ("BFloat16" if i.type[0] == "b" else "Half"), (2 if "x2" in i.type else 1)
    call = f"half_{i.opcode}<{half}, {width}>({', '.join(_values(c, i))})"
    return c.assign(i.operands[0], i.type, call)


@rule("not", f"{BITS} pred")
def complement(c, i):
    a = c.value(i.operands[1], i.type)
    return c.assign(i.operands[0], i.type, f"!{a}" if i.type == "pred" else f"~{a}")


@rule("shl", BITS)
@rule("shr", f"{BITS} {INTEGERS}")
def shift(c, i):
    call = f"{i.opcode}<{C_TYPES[i.type]}>"
    a, n = c.value(i.operands[1], i.type), c.value(i.operands[2], "u32")
    return c.assign(i.operands[0], i.type, f"{call}({a}, {n})")


@rule("shf", "b32", "l r wrap clamp")
def funnel_shift(c, i):
    low, high, n = _values(c, i, "u32")
    n = f"{n} & 31" if "wrap" in i.modifiers else f"std::min({n}, 32u)"
    both = f"((uint64_t){high} << 32 | {low})"
    shifted = f"({both} << ({n})) >> 32" if "l" in i.modifiers else f"{both} >> ({n})"
    return c.assign(i.operands[0], "u32", shifted)


@rule("popc clz", "b32 b64")
def count_bits(c, i):
    call = f"{i.opcode}<{C_TYPES[i.type]}>({c.value(i.operands[1], i.type)})"
    return c.assign(i.operands[0], "u32", call)


@rule("brev", "b32 b64")
def reverse_bits(c, i):
    return c.assign(i.operands[0], i.type, f"brev({c.value(i.operands[1], i.type)})")


@rule("bfe", "u32 u64 s32 s64")
def extract_field(c, i):
    a = c.value(i.operands[1], i.type)
    begin, length = (c.value(o, "u32") for o in i.operands[2:])
    return c.assign(i.operands[0], i.type, f"bfe<{C_TYPES[i.type]}>({a}, {begin}, {length})")


@rule("bfi", "b32 b64")
def insert_field(c, i):
    field, a = (c.value(o, i.type) for o in i.operands[1:3])
    begin, length = (c.value(o, "u32") for o in i.operands[3:])
    call = f"bfi<{C_TYPES[i.type]}>({field}, {a}, {begin}, {length})"
    return c.assign(i.operands[0], i.type, call)


@rule("lop3 prmt", "b32")
def bitwise(c, i):
    return c.assign(i.operands[0], "u32", f"{i.opcode}({', '.join(_values(c, i, 'u32'))})")


@rule("dp4a", "s32 u32", "s32 u32")
def dot_product_of_bytes(c, i):
    a_type, b_type = i.modifiers
    bytes_of = {"s32": "int8_t", "u32": "uint8_t"}
    call = f"dp4a<{bytes_of[a_type]}, {bytes_of[b_type]}>({', '.join(_values(c, i, 'u32'))})"
    return c.assign(i.operands[0], "u32", call)


COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
MODIFIERS = " ".join([*COMPARISONS, *UNSIGNED_NAMES, *(f"{n}u" for n in COMPARISONS), "num nan"])


@rule("setp", f"{INTEGERS} {BITS} {FLOATS} f16 bf16", f"{MODIFIERS} and or xor ftz")
def compare(c, i):
    """A name with u is true also where an operand is NaN."""
    kind = i.type
    a, b = (c.value(o, kind) for o in i.operands[1:3])
    if kind in ("f16", "bf16"):
        a, b = (f"to_float<{'BFloat16' if kind == 'bf16' else 'Half'}>({v})" for v in (a, b))
    if "ftz" in i.modifiers:
        a, b = f"flush({a})", f"flush({b})"
    name = UNSIGNED_NAMES.get(i.modifiers[0], i.modifiers[0])
    is_nan = f"({a} != {a} || {b} != {b})"
    if name in ("num", "nan"):
        result = f"!{is_nan}" if name == "num" else is_nan
    elif name in COMPARISONS:
        result = f"({a} {COMPARISONS[name]} {b})"
        if kind[0] in "f" and name == "ne":
            result = f"({result} && !{is_nan})"
    else:
        result = f"({is_nan} || {a} {COMPARISONS[name[:-1]]} {b})"
    outputs = getattr(i.operands[0], "items", (i.operands[0],))
    combine = next((m for m in i.modifiers if m in ("and", "or", "xor")), None)
    results = [result, f"!{result}"][: len(outputs)]
    if combine:
        other = c.value(i.operands[3], "pred")
        results = [f"({r}) {OPERATORS[combine]} {other}" for r in results]
    names = [f"bool p{n}_ = {r};" for n, r in enumerate(results)]
    return " ".join([*names, *(c.assign(o, "pred", f"p{n}_") for n, o in enumerate(outputs))])


@rule("selp", f"{BITS} {INTEGERS} {FLOATS}")
def select(c, i):
    a, b = (c.value(o, i.type) for o in i.operands[1:3])
    return c.assign(i.operands[0], i.type, f"{c.value(i.operands[3], 'pred')} ? {a} : {b}")
