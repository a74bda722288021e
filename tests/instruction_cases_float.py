"""Instructions on floating point numbers, alone, with what Fractions, numpy and torch say."""

import math
from fractions import Fraction

import numpy as np
import torch
from instruction_cases import HALF_TYPES, TYPES, Case, N, bits, draw, exact

CASES = []


FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127)}


def rounded(x: Fraction, kind: str) -> float:
    """To nearest even, by integers alone."""
    precision, least, largest = FORMATS[kind]
    exponent = least
    while Fraction(2) ** (exponent + 1) <= abs(x):
        exponent += 1
    unit = Fraction(2) ** (exponent - precision + 1)
    result = round(x / unit) * unit
    return math.copysign(math.inf, x) if abs(result) >= 2 ** (largest + 1) else float(result)


def unit(x: float) -> Fraction:
    """Of the last place of tf32."""
    return Fraction(2) ** (max(math.frexp(x)[1] - 1, -126) - 10)


def decode(values: np.ndarray, kind: str) -> np.ndarray:
    """Halves, of which only the bits are there, as float64."""
    halves = torch.from_numpy(values.view(np.int16)).view(HALF_TYPES[kind.removesuffix("x2")])
    return halves.double().numpy()


def of_halves(function, kind):
    """`function` of Fractions, rounded once."""

    def expected(*arrays):
        rows = zip(*(decode(a, kind).tolist() for a in arrays), strict=True)
        scalar = kind.removesuffix("x2")
        return np.array([rounded(function(*map(Fraction, row)), scalar) for row in rows])

    return expected


def finite(kinds, generator):
    arrays = []
    for kind in kinds:
        if kind in ("f32", "f64"):
            a = draw(kind, generator)
            arrays.append(np.where(np.isfinite(a), a, 1.25).astype(a.dtype))
        else:
            a = generator.integers(0, 2**16, N * (1 + ("x2" in kind)), dtype=np.uint16)
            a[~np.isfinite(decode(a, kind))] = 0x3C01
            arrays.append(a.view(TYPES[kind][2]))
    return arrays


def fused(x, y, z):
    rows = zip(x.tolist(), y.tolist(), z.tolist(), strict=True)
    sums = [Fraction(a) * Fraction(b) + Fraction(c) for a, b, c in rows]
    if x.dtype == np.float32:
        return np.array([rounded(v, "f32") for v in sums], dtype=np.float32)
    return np.array([float(v) for v in sums])


def extremum(choose, takes_first):
    """Numbers before NaN, and -0 before 0."""
    return lambda a, b: np.where(a == b, np.where(takes_first(a), a, b), choose(a, b))


def to_half(kind):
    return lambda x: torch.from_numpy(x).to(HALF_TYPES[kind]).double().numpy()


def to_half_toward_zero(x):
    bits = torch.from_numpy(x).half().view(torch.int16).numpy().view(np.uint16)
    is_larger = np.abs(decode(bits, "f16")) > np.abs(x.astype(np.float64))
    return decode(np.where(is_larger, bits - 1, bits).astype(np.uint16), "f16")


def to_tf32(x):
    """10 bits of mantissa, ties away from 0."""
    numbers = x.tolist()
    units = [math.floor(abs(Fraction(v)) / unit(v) + Fraction(1, 2)) for v in numbers]
    rows = [math.copysign(n * unit(v), v) for n, v in zip(units, numbers, strict=True)]
    return np.array(rows).astype(np.float32).view(np.uint32).astype(np.uint64)


def pairs(kind):
    """cvt packs its first operand into the upper half."""
    return lambda high, low: to_half(kind)(np.stack([low, high], 1).ravel())


def to_integer(round_, kind):
    """Clamped; of NaN as the PTX ISA says."""
    info = np.iinfo(TYPES[kind][2])

    def one(x, nan):
        if math.isnan(x):
            return nan
        number = round_(x) if math.isfinite(x) else math.copysign(2**70, x)
        return min(max(int(number), int(info.min)), int(info.max))

    def expected(x):
        is_wide = bits(kind) == 64 or x.dtype == np.float64
        nan = 2 ** (bits(kind) - 1) if is_wide else 0
        return exact(lambda v: one(v, nan))(x)

    return expected


def flushed(x):
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


for t in ("f32", "f64"):
    CASES += [
        Case(f"add.rn.{t}", f"{t} {t}", t, np.add),
        Case(f"sub.{t}", f"{t} {t}", t, np.subtract),
        Case(f"mul.{t}", f"{t} {t}", t, np.multiply),
        Case(f"div.rn.{t}", f"{t} {t}", t, np.divide),
        Case(f"fma.rn.{t}", f"{t} {t} {t}", t, fused, finite),
        Case(f"sqrt.rn.{t}", t, t, np.sqrt),
        Case(f"rcp.rn.{t}", t, t, lambda x: (1 / x).astype(x.dtype)),
        Case(f"neg.{t}", t, t, np.negative),
        Case(f"abs.{t}", t, t, np.abs),
        Case(f"min.{t}", f"{t} {t}", t, extremum(np.fmin, np.signbit)),
        Case(f"max.{t}", f"{t} {t}", t, extremum(np.fmax, lambda a: ~np.signbit(a))),
        Case(f"copysign.{t}", f"{t} {t}", t, lambda sign, x: np.copysign(x, sign)),
        Case(f"selp.{t} %0, %1, %2, p;", f"{t} {t}", t, lambda a, b: np.where(a > b, a, b)),
    ]
    for name, compare in {
        "eq": np.equal, "ne": lambda a, b: (a < b) | (a > b), "lt": np.less, "ge": np.greater_equal,
        "equ": lambda a, b: ~((a < b) | (a > b)), "neu": np.not_equal,
        "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b),
        "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
        "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
        "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    }.items():  # fmt: skip
        text = f"{{.reg .pred p; setp.{name}.{t} p, %1, %2; selp.u32 %0, 1, 0, p;}}"
        CASES.append(Case(text, f"{t} {t}", "u32", compare))
    for name, round_ in {
        "rzi": math.trunc, "rni": round, "rmi": math.floor, "rpi": math.ceil,
    }.items():  # fmt: skip
        for kind in ("s32", "u32", "s64", "u64"):
            CASES.append(Case(f"cvt.{name}.{kind}.{t}", t, kind, to_integer(round_, kind)))
    for kind in ("s32", "u32", "s64", "u64"):
        dtype = TYPES[t][2]
        CASES.append(Case(f"cvt.rn.{t}.{kind}", kind, t, lambda x, d=dtype: x.astype(d)))
CASES = [
    c._replace(text=f"{{.reg .pred p; setp.gt.{c.output} p, %1, %2; {c.text}}}")
    if c.text.startswith("selp")
    else c
    for c in CASES
]
CASES += [
    Case("min.NaN.f32", "f32 f32", "f32", extremum(np.minimum, np.signbit)),
    Case("max.NaN.f32", "f32 f32", "f32", extremum(np.maximum, lambda a: ~np.signbit(a))),
    Case("add.ftz.f32", "f32 f32", "f32", lambda a, b: flushed(flushed(a) + flushed(b))),
    Case("mul.ftz.f32", "f32 f32", "f32", lambda a, b: flushed(flushed(a) * flushed(b))),
    Case("cvt.f64.f32", "f32", "f64", lambda x: x.astype(np.float64)),
    Case("cvt.rn.f32.f64", "f64", "f32", lambda x: x.astype(np.float32)),
    Case("cvt.rni.f32.f32", "f32", "f32", np.rint),
    Case("cvt.rzi.f64.f64", "f64", "f64", np.trunc),
    Case("cvt.rmi.f32.f32", "f32", "f32", np.floor),
    Case("cvt.sat.f32.f32", "f32", "f32", lambda x: np.where(x > 0, np.fmin(x, 1), 0)),
    Case("cvt.rn.f16.f32", "f32", "f16", to_half("f16")),
    Case("cvt.rz.f16.f32", "f32", "f16", to_half_toward_zero, finite),
    Case("cvt.rn.bf16.f32", "f32", "bf16", to_half("bf16")),
    Case("cvt.rn.f16.s32", "s32", "f16", lambda x: to_half("f16")(x.astype(np.float64))),
    Case("cvt.rn.f16x2.f32", "f32 f32", "f16x2", pairs("f16")),
    Case("cvt.rn.bf16x2.f32", "f32 f32", "bf16x2", pairs("bf16")),
    Case("cvt.rna.tf32.f32", "f32", "u32", to_tf32, finite),
    Case("cvt.f32.f16", "f16", "f32", lambda x: decode(x, "f16").astype(np.float32)),
]
for kind in ("f16", "bf16", "f16x2", "bf16x2"):
    functions = {
        "fma.rn": (3, lambda a, b, c: a * b + c),
        "min": (2, min),
        "max": (2, max),
        "neg": (1, lambda a: -a),
        "abs": (1, abs),
    }
    if kind[0] == "f":  # of bfloat16 from sm_90 on
        functions["add"] = (2, lambda a, b: a + b)
        functions["sub"] = (2, lambda a, b: a - b)
        functions["mul"] = (2, lambda a, b: a * b)
    CASES += [
        Case(f"{name}.{kind}", " ".join([kind] * n), kind, of_halves(function, kind), finite)
        for name, (n, function) in functions.items()
    ]

APPROXIMATE = {
    "ex2": np.exp2, "lg2": np.log2, "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
    "rsqrt": lambda x: 1 / np.sqrt(x), "rcp": lambda x: 1 / x, "sqrt": np.sqrt,
}  # fmt: skip
CASES += [
    Case(f"{name}.approx.f32", "f32", "f32", lambda x, f=f: f(x.astype(np.float64)))
    for name, f in APPROXIMATE.items()
]
