"""Loops of machine code."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Node(Protocol):
    address: int
    target: int | None  # of a branch
    falls_through: bool


class Loop(NamedTuple):
    """As indices of instructions."""

    body: set[int]
    always: set[int]  # what each pass runs


def find_loops(code: Sequence[Node]) -> list[Loop]:
    """Natural loops: all from which a backward branch is reached without passing its target. What
    the compiler has moved out of line belongs to them."""
    index = {x.address: i for i, x in enumerate(code)}
    before = [[i - 1] if i and code[i - 1].falls_through else [] for i in range(len(code))]
    branches = [(i, index[x.target]) for i, x in enumerate(code) if x.target in index]
    for branch, target in branches:
        before[target].append(branch)

    found: dict[int, tuple[set[int], list[int]]] = {}  # by the target
    for branch, target in branches:
        if target > branch:
            continue
        body, waiting = {target}, [branch]
        while waiting:
            i = waiting.pop()
            if i not in body:
                body.add(i)
                waiting += before[i]
        if (
            target == 0 or 0 not in body
        ):  # else it is entered elsewhere: a way back from out of line
            all_of_it, ends = found.setdefault(target, (set(), []))
            all_of_it |= body
            ends.append(branch)
    return [
        Loop(body, _always_run(body, target, ends, before))
        for target, (body, ends) in found.items()
    ]


def _always_run(body: set[int], first: int, ends: list[int], before: list[list[int]]) -> set[int]:
    """What dominates all ends of a loop. Sets of dominators are bits of integers."""
    everything = sum(1 << i for i in body)
    dominators = dict.fromkeys(body, everything) | {first: 1 << first}
    order = sorted(body - {first})
    changes = True
    while changes:
        changes = False
        for i in order:
            common = everything
            for previous in before[i]:
                common &= dominators[previous]
            if dominators[i] != (new := common | 1 << i):
                dominators[i], changes = new, True
    common = everything
    for end in ends:
        common &= dominators[end]
    return {i for i in body if common >> i & 1}
