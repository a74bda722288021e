"""In which order the emulator does what a warp does together."""

import re

import pytest
from emulator import translate  # noqa: F401  its rules
from emulator.parse import parse
from emulator.together import arrange

# Of a, b and c, a warp's operations; `[a b]`: done at one meeting.
ORDERS = {
    "all at once": ("a = x; b = a; c = y;", "[a b c]"),
    "what touches nothing else goes before": ("a = x; i = 1; b = i;", "i [a b]"),
    "what needs a result waits, and what needs that": (
        "a = x; i = a; j = i; b = j; c = x;",
        "[a c] i j [b]",
    ),
    "inputs stay until they are read": ("a = x; x = 1; b = x;", "[a] x [b]"),
    "results aren't overwritten early": ("a = x; a = 1; i = a;", "[a] a i"),
    "nor by what waits": ("a = x; i = a; i = 1; j = i;", "[a] i i j"),
    "nor overwrite what is still to be read": ("a = x; i = a + j; j = 1; i = j;", "[a] i j i"),
    "memory keeps its place": ("a = x; [p] = 1; b = x;", "[a] store [b]"),
    "a condition is read": ("a = x; q = a; @q i = 1; b = i;", "[a] q i [b]"),
}


def order_of(text: str) -> str:
    """Operations of a warp have the targets a to c."""
    lines = []
    for statement in text.rstrip(";").split(";"):
        guard, left, right = re.fullmatch(r"\s*(@\w )?(.*) = (.*)", statement).groups()
        operands = [*right.split(" + "), "0"]
        if left == "[p]":
            lines.append("st.global.u32 [p], 1;")
        elif left in "abc" and operands[0] in "abcxyij":
            lines.append(f"shfl.sync.idx.b32 {left}, {operands[0]}, 0, 31, -1;")
        elif left == "q":
            lines.append(f"setp.eq.u32 q, {operands[0]}, 0;")
        else:
            lines.append(f"{guard or ''}add.u32 {left}, {operands[0]}, {operands[1]};")
    names = ".reg .b32 a, b, c, x, y, i, j; .reg .pred q; .reg .b64 p;"
    ptx = f".target sm_80\n.visible .entry kernel() {{ {names} {' '.join(lines)} }}"
    words = []
    for item in arrange(parse(ptx).functions[0].body):
        if isinstance(item, list):
            words.append(f"[{' '.join(i.operands[0].name[2:] for i in item)}]")
        else:
            words.append("store" if item.opcode == "st" else item.operands[0].name[2:])
    return " ".join(words)


@pytest.mark.parametrize("name", ORDERS)
def test_operations_of_a_warp_are_brought_together(name):
    text, expected = ORDERS[name]
    assert order_of(text).replace("_0", "") == expected
