"""The table of PTX instructions, which the `rules_*` files fill: opcode -> how it reads in C++.

A rule names the types and modifiers that it knows. Whatever no rule knows, be it one modifier, is
an error at translation.
"""

from collections.abc import Callable
from dataclasses import dataclass

from emulator.parse import SIZES, Instruction, PtxError

SIGNED = "s8 s16 s32 s64"
UNSIGNED = "u8 u16 u32 u64"
INTEGERS = f"{SIGNED} {UNSIGNED}"
BITS = "b8 b16 b32 b64"
FLOATS = "f32 f64"
HALVES = "f16 bf16 f16x2 bf16x2"
C_TYPES = {"f32": "float", "f64": "double", "pred": "bool"} | {
    name: f"{'int' if name[0] == 's' else 'uint'}{8 * size}_t"
    for name, size in SIZES.items()
    if name not in ("f32", "f64")
}


@dataclass(frozen=True)
class Rule:
    emit: Callable
    types: frozenset[str]  # of the last modifier; empty: it is a modifier like the others
    modifiers: frozenset[str]
    needs: frozenset[str]  # of the modifiers
    is_collective: bool

    def fits(self, instruction: Instruction) -> bool:
        modifiers = list(instruction.modifiers)
        if not self.needs.issubset(modifiers):
            return False
        if self.types and (not modifiers or modifiers.pop() not in self.types):
            return False
        return self.modifiers.issuperset(modifiers)


_rules: dict[str, list[Rule]] = {}


def rule(
    opcodes: str, types: str = "", modifiers: str = "", needs: str = "", is_collective: bool = False
) -> Callable:
    """Makes a function of (context, instruction), which returns C++, the rule for `opcodes`.

    It returns a `together.Collective` where `is_collective`: a warp does it together.
    """

    def register(emit: Callable) -> Callable:
        for opcode in opcodes.split():
            known = Rule(
                emit, *(frozenset(x.split()) for x in (types, modifiers, needs)), is_collective
            )
            _rules.setdefault(opcode, []).append(known)
        return emit

    return register


def find(instruction: Instruction) -> Rule:
    for known in _rules.get(instruction.opcode, []):
        if known.fits(instruction):
            return known
    raise PtxError(f"{instruction.source}: no rule for the instruction `{instruction.text}`")


def bits(kind: str) -> int:
    return 8 * SIZES[kind]


def unsigned(kind: str) -> str:
    return f"u{bits(kind)}"
