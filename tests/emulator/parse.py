"""PTX text to a tree: variables, functions, and their instructions with resolved names."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

SIZES = {
    name: bits // 8
    for bits, names in {
        8: "b8 u8 s8",
        16: "b16 u16 s16 f16 bf16",
        32: "b32 u32 s32 f32 f16x2 bf16x2",
        64: "b64 u64 s64 f64",
    }.items()
    for name in names.split()
}  # bytes of a type


class PtxError(ValueError):
    """PTX that the emulator doesn't know; the message names where it stands."""


@dataclass(frozen=True)
class Register:
    name: str  # unique in its function
    type: str
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    text: str

    @property
    def number(self) -> int:
        return int(self.text.rstrip("U"), 0)


@dataclass(frozen=True)
class Symbol:
    """A variable, parameter, label, function or special register, plus a number of bytes."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Address:
    base: Register | Immediate | Symbol
    offset: int = 0
    coordinates: tuple = ()  # in a tensor map


@dataclass(frozen=True)
class Vector:
    items: tuple


Operand = Register | Immediate | Symbol | Address | Vector


@dataclass(frozen=True)
class Instruction:
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    source: str  # "adam.cu:12", or "" without -lineinfo
    text: str

    @property
    def type(self) -> str:
        return self.modifiers[-1]


@dataclass(frozen=True)
class Label:
    name: str


@dataclass(frozen=True)
class Variable:
    name: str
    space: str
    type: str
    count: int
    align: int
    values: tuple[str, ...] = ()  # of each element, as written

    @property
    def size(self) -> int:
        return SIZES[self.type] * self.count


@dataclass(frozen=True)
class Cluster:
    """What an entry says of the clusters that it is launched in."""

    is_required: bool
    size: tuple[int, ...]  # zeros: the launch's
    max_blocks: int  # 0: not said


@dataclass
class Function:
    name: str
    is_kernel: bool
    results: list[Variable]
    parameters: list[Variable]
    max_threads: int
    cluster: Cluster
    body: list[Instruction | Label] = field(default_factory=list)
    registers: list[Register] = field(default_factory=list)
    variables: list[Variable] = field(default_factory=list)  # local, shared and call parameters


@dataclass
class Module:
    architecture: int  # 80, 90
    is_specific: bool  # sm_90a and the like
    variables: list[Variable]
    functions: list[Function]


DECLARATION = re.compile(
    r"(?:\.(?:visible|weak|common|extern)\s+)*\.(?P<space>global|const|shared|local|param)\s+"
    r"(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?"
    r"(?P<name>[\w$]+)\s*(?:\[(?P<count>\d*)\])?\s*(?:=\s*(?P<value>.*))?$",
    re.S,
)
FUNCTION = re.compile(
    r"\.(?P<kind>entry|func)\s*(?:\((?P<results>[^)]*)\))?\s*(?P<name>[\w$]+)\s*"
    r"(?:\((?P<parameters>[^)]*)\))?(?P<attributes>[^{;]*)(?P<end>[{;])"
)
STATEMENT = re.compile(
    r"\s*(?:(?P<open>\{)|(?P<close>\})|(?P<label>[\w$]+)\s*:(?!:)|\.loc\s+(?P<loc>[^\n]*)"
    r"|(?P<statement>[^;]*);)"
)


def parse(text: str) -> Module:
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.S)
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M))
    text = re.sub(r"^\s*\.file\b.*$", "", text, flags=re.M)
    text = re.split(r"\n\s*\.section\b", text)[0]  # debug strings, last
    target = re.search(r"\.target\s+sm_(\d+)(\w?)", text)
    variables, functions, position = [], [], 0
    for match in FUNCTION.finditer(text):
        if match.start() < position:
            continue
        variables += _declarations(text[position : match.start()])
        position = match.end()
        if match["end"] == "{":
            end = _closing(text, position)
            functions.append(_function(match, text[position:end], files))
            position = end + 1
    variables += _declarations(text[position:])
    return Module(int(target[1]), bool(target[2]), variables, functions)


def split(text: str) -> list[str]:
    """At the commas that stand in no brackets."""
    parts, depth, part = [], 0, ""
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += c
    return [*parts, part.strip()] if part.strip() else parts


def _closing(text: str, begin: int) -> int:
    depth = 1
    for match in re.finditer(r"[{}]", text[begin:]):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return begin + match.start()
    raise PtxError("a function's end is missing")


def _variable(text: str) -> Variable:
    match = DECLARATION.search(text.strip())
    if match is None or match["type"] not in SIZES:
        raise PtxError(f"unknown declaration `{text.strip()[:200]}`")
    value = (match["value"] or "").strip()
    values = split(value[1:-1]) if value.startswith("{") else [value] if value else []
    size = SIZES[match["type"]]
    count = int(match["count"] or 0) if match["count"] is not None else 1
    align = int(match["align"] or size)
    return Variable(match["name"], match["space"], match["type"], count, align, tuple(values))


def _declarations(text: str) -> list[Variable]:
    statements = (s.strip() for s in text.split(";"))
    return [
        _variable(s)
        for s in (re.sub(r"\.(version|target|address_size)[^\n]*", "", s) for s in statements)
        if re.search(r"\.(global|const|shared)\b", s)
    ]


def _numbers(directive: str, attributes: str) -> list[int]:
    found = re.search(rf"\.{directive}\s+([\d, ]+)", attributes)
    return [int(n) for n in found[1].split(",")] if found else []


def _function(match: re.Match, body: str, files: dict[str, str]) -> Function:
    attributes = match["attributes"]
    threads = math.prod(_numbers("(?:max|req)ntid", attributes) or [1024])
    if ".blocksareclusters" in attributes:
        raise PtxError(f"{match['name']}: no rule for .blocksareclusters")
    results, parameters = (
        [_variable(v) for v in split(match[group] or "")] for group in ("results", "parameters")
    )
    size = _numbers("reqnctapercluster", attributes)
    cluster = Cluster(
        ".explicitcluster" in attributes,
        (*size, 1, 1)[:3] if size else (0, 0, 0),
        math.prod(_numbers("maxclusterrank", attributes) or [0]),
    )
    is_kernel = match["kind"] == "entry"
    function = Function(match["name"], is_kernel, results, parameters, threads, cluster)
    _Body(function, files).read(body)
    return function


class _Scope:
    """The names of a pair of braces; inside inline assembly they hide those outside."""

    def __init__(self, number: int, labels: list[str]) -> None:
        self.suffix = f"_{number}" if number else ""
        self.labels = set(labels)
        self.names: dict[str, Register | Variable] = {}


class _Body:
    def __init__(self, function: Function, files: dict[str, str]) -> None:
        self.function, self.files = function, files
        self.scopes: list[_Scope] = []
        self.num_scopes = 0
        self.source = ""
        self.targets: dict[str, Vector] = {}  # of brx, by their list's label

    def read(self, text: str) -> None:
        self._open(text)
        position = 0
        while match := STATEMENT.match(text, position):
            position = match.end()
            if match["open"]:
                self._open(text[position : _closing(text, position)])
            elif match["close"]:
                self.scopes.pop()
            elif match["label"]:
                self.function.body.append(Label(self._label(match["label"])))
            elif match["loc"]:
                self._set_source(match["loc"])
            elif match["statement"].strip():
                self._statement(" ".join(match["statement"].split()))
        if text[position:].strip():
            raise PtxError(f"{self.function.name}: can't read `{text[position:][:100]}`")

    def _open(self, text: str) -> None:
        while (flat := re.sub(r"\{[^{}]*\}", "", text)) != text:  # labels of inner scopes
            text = flat
        labels = re.findall(r"(?:^|[\s;}])([\w$]+)\s*:(?!:)", text)
        self.scopes.append(_Scope(self.num_scopes, labels))
        self.num_scopes += 1

    def _set_source(self, loc: str) -> None:
        """Of inlined code, its caller's place too; that alone for code of the toolkit's headers."""
        number, line = loc.split()[:2]
        inlined = re.search(r"inlined_at (\d+) (\d+)", loc)
        self.source = self._place(number, line)
        if inlined and "/include/" in self.files.get(number, ""):
            self.source = self._place(*inlined.groups())
        elif inlined:
            self.source += f" (in {self._place(*inlined.groups())})"

    def _place(self, number: str, line: str) -> str:
        return f"{Path(self.files.get(number, '?')).name}:{line}"

    def _statement(self, text: str) -> None:
        if text.startswith(".reg"):
            self._registers(text)
        elif text.startswith((".local", ".shared", ".param")):
            self._local_variable(text)
        elif text.startswith(".branchtargets"):
            label = self.function.body.pop()
            self.targets[label.name] = self.operand(f"{{{text.split(None, 1)[1]}}}")
        elif not text.startswith(".pragma"):
            self.function.body.append(self._instruction(text))

    def _registers(self, text: str) -> None:
        _, kind, names = text.split(None, 2)
        scope = self.scopes[-1]
        for declared in split(names):
            many = re.fullmatch(r"([%\w$]+)<(\d+)>", declared)
            for name in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [declared]:
                unique = re.sub(r"\W", "_", name.lstrip("%")) + scope.suffix
                scope.names[name] = Register(f"r_{unique}", kind[1:])
                self.function.registers.append(scope.names[name])

    def _local_variable(self, text: str) -> None:
        v = _variable(text)
        scope = self.scopes[-1]
        suffix = "" if v.space == "shared" else scope.suffix
        unique = Variable(v.name + suffix, v.space, v.type, v.count, v.align)
        scope.names[v.name] = unique
        self.function.variables.append(unique)

    def _instruction(self, text: str) -> Instruction:
        match = re.fullmatch(r"(?:@(!?[%\w$]+)\s+)?([\w.:]+)\s*(.*)", text, re.S)
        if match is None:
            raise PtxError(f"{self.source or self.function.name}: can't read `{text}`")
        opcode, *modifiers = match[2].split(".")
        operands = tuple(self.operand(o) for o in split(match[3]))
        if opcode == "brx":
            operands = (operands[0], self.targets[operands[1].name])
        guard = self.operand(match[1]) if match[1] else None
        return Instruction(opcode, tuple(modifiers), operands, guard, self.source, text)

    def operand(self, text: str) -> Operand:
        text = text.strip()
        if text.startswith(("{", "(")):
            return Vector(tuple(self.operand(o) for o in split(text[1:-1])))
        if "|" in text:
            return Vector(tuple(self.operand(o) for o in text.split("|")))
        if text.startswith("["):
            place, *coordinates = split(text[1:-1])
            base, offset = self._sum(place)
            items = self.operand(coordinates[0]).items if coordinates else ()
            return Address(self.operand(base), offset, items)
        if text.startswith("!"):
            register = self.operand(text[1:])
            return Register(register.name, register.type, negated=True)
        if re.match(r"[-\d]", text):
            return Immediate(text)
        base, offset = self._sum(text)
        found = self._find(base)
        if isinstance(found, Register):
            return found
        return Symbol(found.name if found else self._label(base), offset)

    def _sum(self, text: str) -> tuple[str, int]:
        match = re.fullmatch(r"\s*(.+?)\s*(?:\+\s*(-?\w+))?\s*", text)
        return match[1], int(match[2] or "0", 0)

    def _find(self, name: str) -> Register | Variable | None:
        return next((s.names[name] for s in reversed(self.scopes) if name in s.names), None)

    def _label(self, name: str) -> str:
        scope = next((s for s in reversed(self.scopes) if name in s.labels), None)
        return name + scope.suffix if scope else name
