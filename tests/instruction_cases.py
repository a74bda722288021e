"""Instructions on integers and bits, alone, with what Python's integers say."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

N = 1000
# PTX type -> C type, constraint of inline assembly, numpy type. f16 and bf16 are held as bits.
TYPES = {
    "s16": ("short", "h", np.int16),
    "u16": ("unsigned short", "h", np.uint16),
    "s32": ("int", "r", np.int32),
    "u32": ("unsigned", "r", np.uint32),
    "s64": ("long long", "l", np.int64),
    "u64": ("unsigned long long", "l", np.uint64),
    "f32": ("float", "f", np.float32),
    "f64": ("double", "d", np.float64),
    "f16": ("unsigned short", "h", np.uint16),
    "bf16": ("unsigned short", "h", np.uint16),
    "f16x2": ("unsigned", "r", np.uint32),
    "bf16x2": ("unsigned", "r", np.uint32),
}
HALF_TYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
EDGES = [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, 1e-40, -1e-40, 3e38, -3e38, 65519.0, 65520.0]
SPECIAL = [math.inf, -math.inf, math.nan]


class Case(NamedTuple):
    text: str  # %0 is the result
    inputs: str
    output: str
    expected: Callable  # of numpy arrays
    draw: Callable | None = None  # inputs, where not any will do

    @property
    def assembly(self) -> str:
        if "%0" in self.text:
            return self.text
        operands = ", ".join(f"%{i}" for i in range(len(self.inputs.split()) + 1))
        return f"{self.text} {operands};"


def exact(function):
    """Elementwise on Python's integers; the result wraps around."""

    def expected(*arrays):
        rows = zip(*(a.tolist() for a in arrays), strict=True)
        return np.array([function(*row) & 2**64 - 1 for row in rows], dtype=np.uint64)

    return expected


def bits(kind):
    return int(kind[1:])


def quotient(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def nonzero(kinds, generator):
    a, b = (draw(kind, generator) for kind in kinds)
    return [a, np.where(b == 0, 3, b).astype(b.dtype)]


def counts(kinds, generator):
    """Where a field begins, and its length, or by how much to shift: at the end."""
    arrays = [draw(kind, generator) for kind in kinds]
    n = 1 + (len(kinds) > 2)
    return arrays[:-n] + [(a % 80).astype(a.dtype) for a in arrays[-n:]]


def draw(kind, generator):
    dtype = TYPES[kind][2]
    if kind in ("f32", "f64"):
        x = generator.standard_normal(N) * 10.0 ** generator.integers(-12, 12, N)
        x[: len(EDGES + SPECIAL)] = EDGES + SPECIAL
        return generator.permutation(x).astype(dtype)
    info = np.iinfo(dtype)
    x = generator.integers(info.min, info.max, N, dtype=dtype, endpoint=True)
    small = generator.integers(0, 20, N // 4)
    x[: N // 4] = (small - 10 * (info.min < 0)).astype(dtype)
    x[-4:] = [info.min, info.max, 0, 1]
    return generator.permutation(x)


def extract(kind):
    width = bits(kind)

    def expected(a, begin, length):
        if length == 0:
            return 0
        field = 0
        top = min(begin + length - 1, width - 1)
        sign = (a >> top & 1) if kind[0] == "s" else 0
        for i in range(width):
            bit = a >> (begin + i) & 1 if i < length and begin + i < width else sign
            field |= bit << i
        return field

    return exact(expected)


def insert(width):
    def expected(field, a, begin, length):
        for i in range(length):
            if begin + i < width:
                a = a & ~(1 << begin + i) | (field >> i & 1) << begin + i
        return a

    return exact(expected)


def permute_bytes(a, b, selector):
    data = (a | b << 32).to_bytes(8, "little")
    result = 0
    for i in range(4):
        select = selector >> 4 * i & 15
        byte = data[select & 7]
        if select & 8:
            byte = 255 if byte & 128 else 0
        result |= byte << 8 * i
    return result


def lookup(table):
    def expected(a, b, c):
        return sum(
            (table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i
            for i in range(32)
        )

    return exact(expected)


def dot_bytes(a, b, c):
    signed = [int.from_bytes(bytes([a >> 8 * i & 255]), signed=True) for i in range(4)]
    return c + sum(signed[i] * (b >> 8 * i & 255) for i in range(4))


CASES = []
for t in ("s16", "u16", "s32", "u32", "s64", "u64"):
    b = f"b{bits(t)}"
    CASES += [
        Case(f"add.{t}", f"{t} {t}", t, exact(lambda a, b: a + b)),
        Case(f"sub.{t}", f"{t} {t}", t, exact(lambda a, b: a - b)),
        Case(f"mul.lo.{t}", f"{t} {t}", t, exact(lambda a, b: a * b)),
        Case(f"mul.hi.{t}", f"{t} {t}", t, exact(lambda a, b, t=t: (a * b) >> bits(t))),
        Case(f"mad.lo.{t}", f"{t} {t} {t}", t, exact(lambda a, b, c: a * b + c)),
        Case(f"div.{t}", f"{t} {t}", t, exact(quotient), nonzero),
        Case(f"rem.{t}", f"{t} {t}", t, exact(lambda a, b: a - quotient(a, b) * b), nonzero),
        Case(f"min.{t}", f"{t} {t}", t, exact(min)),
        Case(f"max.{t}", f"{t} {t}", t, exact(max)),
        Case(f"shl.{b}", f"{t} u32", t, exact(lambda a, n: a << n), counts),
        Case(f"shr.{t}", f"{t} u32", t, exact(lambda a, n: a >> n), counts),
        Case(f"and.{b}", f"{t} {t}", t, exact(lambda a, b: a & b)),
        Case(f"or.{b}", f"{t} {t}", t, exact(lambda a, b: a | b)),
        Case(f"xor.{b}", f"{t} {t}", t, exact(lambda a, b: a ^ b)),
        Case(f"not.{b}", t, t, exact(lambda a: ~a)),
    ]
    if t[0] == "s":
        CASES += [Case(f"neg.{t}", t, t, exact(lambda a: -a)), Case(f"abs.{t}", t, t, exact(abs))]
    if bits(t) < 64:
        wide = t[0] + str(2 * bits(t))
        CASES += [
            Case(f"mul.wide.{t}", f"{t} {t}", wide, exact(lambda a, b: a * b)),
            Case(f"mad.wide.{t}", f"{t} {t} {wide}", wide, exact(lambda a, b, c: a * b + c)),
        ]
    if bits(t) > 16:
        CASES.append(Case(f"bfe.{t}", f"{t} u32 u32", t, extract(t), counts))
    for name, compare in {
        "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b,
        "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    }.items():  # fmt: skip
        CASES.append(
            Case(
                f"{{.reg .pred p; setp.{name}.{t} p, %1, %2; selp.u32 %0, 7, 0, p;}}",
                f"{t} {t}",
                "u32",
                exact(lambda a, b, compare=compare: 7 * compare(a, b)),
            )
        )
for width in (32, 64):
    u = f"u{width}"
    CASES += [
        Case(f"popc.b{width}", u, "u32", exact(int.bit_count)),
        Case(f"clz.b{width}", u, "u32", exact(lambda a, w=width: w - a.bit_length())),
        Case(f"brev.b{width}", u, u, exact(lambda a, w=width: int(f"{a:0{w}b}"[::-1], 2))),
        Case(f"bfi.b{width}", f"{u} {u} u32 u32", u, insert(width), counts),
    ]
CASES += [
    *(
        Case(f"lop3.b32 %0, %1, %2, %3, {table};", "u32 u32 u32", "u32", lookup(table))
        for table in (0x96, 0xE8, 0x1B)
    ),
    Case("prmt.b32", "u32 u32 u32", "u32", exact(permute_bytes)),
    Case("dp4a.s32.u32", "u32 u32 u32", "u32", exact(dot_bytes)),
    Case(
        "shf.l.wrap.b32",
        "u32 u32 u32",
        "u32",
        exact(lambda a, b, n: ((b << 32 | a) << n % 32) >> 32),
    ),
    Case("shf.r.wrap.b32", "u32 u32 u32", "u32", exact(lambda a, b, n: (b << 32 | a) >> n % 32)),
    Case(
        "shf.r.clamp.b32",
        "u32 u32 u32",
        "u32",
        exact(lambda a, b, n: (b << 32 | a) >> min(n, 32)),
    ),
    Case(
        "{.reg .pred p, q, r; setp.lt.s32 r, %1, %3; setp.gt.and.s32 p|q, %1, %2, !r;"
        " selp.u32 %0, 1, 0, p; @q add.u32 %0, %0, 2;}",
        "s32 s32 s32",
        "u32",
        exact(lambda a, b, c: (a > b and a >= c) + 2 * (a <= b and a >= c)),
    ),
    Case("cvt.s32.s8 %0, %1;", "s32", "s32", exact(lambda a: (a + 128) % 256 - 128)),
    Case("cvt.u32.u8 %0, %1;", "s32", "u32", exact(lambda a: a % 256)),
    Case("cvt.s64.s32", "s32", "s64", exact(int)),
    Case("cvt.u64.u32", "u32", "u64", exact(int)),
    Case("cvt.u16.u32", "u32", "u16", exact(int)),
    Case("cvt.sat.s8.s32 %0, %1;", "s32", "s32", exact(lambda a: min(max(a, -128), 127))),
    Case("cvt.sat.u8.s32 %0, %1;", "s32", "u32", exact(lambda a: min(max(a, 0), 255))),
    Case("{.reg .b32 a; mov.b64 {a, %0}, %1;}", "u64", "u32", exact(lambda a: a >> 32)),
    Case("mov.b64 %0, {%1, %2};", "u32 u32", "u64", exact(lambda a, b: a | b << 32)),
]
