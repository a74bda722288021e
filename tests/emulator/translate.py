"""A parsed module to C++, against `runtime/ptx.h`: a function each, and a table of the kernels."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from emulator import (  # noqa: F401
    rules,
    rules_arithmetic,
    rules_clusters,
    rules_convert,
    rules_hopper,
    rules_matrices,
    rules_memory,
    rules_threads,
    rules_wgmma,
)
from emulator.parse import (
    Address,
    Function,
    Immediate,
    Instruction,
    Label,
    Module,
    Operand,
    PtxError,
    Register,
    Symbol,
    Variable,
    Vector,
    parse,
)
from emulator.rules import C_TYPES, bits
from emulator.together import arrange, emit

SPECIAL_REGISTERS = {
    f"%{register}.{axis}": f"{place}.{axis}"
    for register, place in {
        "tid": "current->index",
        "ntid": "block.size",
        "ctaid": "block.index",
        "nctaid": "block.grid",
        "clusterid": "cluster.index",
        "nclusterid": "cluster.grid",
        "cluster_ctaid": "place_in_cluster()",
        "cluster_nctaid": "cluster.size",
    }.items()
    for axis in "xyz"
} | {
    "%laneid": "current->lane",
    "%warpid": "(current->warp % (cluster.thread_stride / 32))",
    "%cluster_ctarank": "block.rank",
    "%cluster_nctarank": "cluster.blocks()",
    "%is_explicit_cluster": "cluster.is_explicit",
    "%lanemask_eq": "(1u << current->lane)",
    "%lanemask_lt": "((1u << current->lane) - 1)",
    "%lanemask_le": "((2u << current->lane) - 1)",
    "%lanemask_gt": "(~1u << current->lane)",
    "%lanemask_ge": "(~0u << current->lane)",
    "%dynamic_smem_size": "block.dynamic_smem",
    "WARP_SZ": "32",
}
MAX_LOCAL_BYTES = 64 * 1024  # of a thread; a stack has 256 KiB


def translate(ptx: Sequence[str], register: str) -> str:
    """`ptx`: of the same source, for several architectures.

    `register`: the C function that nvcc's host code calls for it, which returns a table of them.
    """
    modules = [parse(text) for text in ptx]
    parts = ['#include "hopper.h"', "using namespace emulator;"]
    names = [f"sm_{m.architecture}{'a' * m.is_specific}" for m in modules]
    for module, name in zip(modules, names, strict=True):
        parts += [f"namespace {name} {{ namespace {{", *_module(module), "} }"]
    table = ", ".join([*(f"&{name}::module_" for name in names), "nullptr"])
    parts.append(
        f'extern "C" void** {register}(void*) {{ static const Module* modules[] = {{{table}}}; '
        "return (void**)modules; }"
    )
    return "\n".join(parts) + "\n"


def _module(module: Module) -> list[str]:
    symbols = {v.name: f"v_{_c_name(v.name)}" for v in module.variables if v.space != "shared"}
    parts = [_definition(v, symbols) for v in module.variables if v.space != "shared"]
    parts += [f"{_signature(f)};" for f in module.functions]
    kernels = []
    for function in module.functions:
        context = Context(function, module, symbols)
        parts += context.definition()
        if function.is_kernel:
            kernels.append(context.table_row(parts))
    parts.append(_table("Kernel", "kernels", kernels))
    variables = [f'{{"{name}", {c}, sizeof {c}}}' for name, c in symbols.items()]
    parts.append(_table("Variable", "variables", variables))
    specific = str(module.is_specific).lower()
    parts.append(
        f"const Module module_{{kernels, {len(kernels)}, variables, {len(variables)}, "
        f"{module.architecture}, {specific}}};"
    )
    return parts


def bit_cast(c_type: str, value: str) -> str:
    """Not by a template of ours, whose lookups took the compiler a third of its time."""
    return f"__builtin_bit_cast({c_type}, {value})"


def _table(kind: str, name: str, rows: list[str]) -> str:
    return f"const {kind} {name}[] = {{{', '.join([*rows, '{}'])}}};"


def _c_name(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _signature(function: Function) -> str:
    names = [_c_name(v.name) for v in (*function.results, *function.parameters)]
    arguments = "" if function.is_kernel else ", ".join(f"unsigned char* {n}" for n in names)
    return f"void f_{_c_name(function.name)}({arguments})"


def _definition(v: Variable, symbols: dict[str, str]) -> str:
    def value(text: str) -> str:
        text = re.sub(r"generic\(([\w$]+)\)", r"\1", text)
        if re.match(r"0[fFdD][0-9a-fA-F]", text):
            return f"0x{text[2:]}u"
        symbol = re.match(r"([A-Za-z_$][\w$]*)(?:\s*\+\s*(\d+))?$", text)
        if symbol:
            return f"(uint64_t){symbols[symbol[1]]} + {symbol[2] or 0}"
        return f"({kind}){text}"

    kind = f"uint{bits(v.type)}_t"
    values = ", ".join(value(t) for t in v.values)
    return f"alignas({v.align}) {kind} {symbols[v.name]}[{max(v.count, 1)}] = {{{values}}};"


@dataclass
class Layout:
    """Offsets of variables that follow one another."""

    size: int = 0

    def add(self, v: Variable) -> int:
        offset = -(-self.size // v.align) * v.align
        self.size = offset + v.size
        return offset


class Context:
    """The function that is translated: how rules write its operands."""

    def __init__(self, function: Function, module: Module, symbols: dict[str, str]) -> None:
        self.function, self.module = function, module
        self.symbols = {name: f"(uint64_t){c}" for name, c in symbols.items()}
        self.places: dict[str, str] = {}  # parameters, the function's and those of its calls
        self.statics: list[str] = []
        self.arrays: list[str] = []  # of addresses of registers
        self._lay_out()

    def _lay_out(self) -> None:
        layout = Layout()
        self.offsets = []
        for p in self.function.parameters:
            self.offsets.append((layout.add(p), p.size))
            offset = self.offsets[-1][0]
            is_kernel = self.function.is_kernel
            self.places[p.name] = f"block.parameters + {offset}" if is_kernel else _c_name(p.name)
        self.parameter_bytes = layout.size
        for p in self.function.results:
            self.places[p.name] = _c_name(p.name)
        local = [v for v in self.function.variables if v.space != "shared"]
        for v in local:
            self.places[v.name] = f"l_{_c_name(v.name)}"
            self.symbols[v.name] = f"(uint64_t)l_{_c_name(v.name)}"
        self.local = local
        if sum(v.size for v in local) > MAX_LOCAL_BYTES:
            raise PtxError(
                f"{self.function.name}: more than {MAX_LOCAL_BYTES} bytes of local memory"
            )
        for name, place in self.places.items():
            self.symbols.setdefault(name, f"(uint64_t)({place})")
        self._lay_out_shared_memory()

    def _lay_out_shared_memory(self) -> None:
        """The function's; the module's that it names; last, at one place, those whose size is the
        launch's."""
        named = {o.name for i in self.function.body for o in _symbols(i)}
        shared = [v for v in self.function.variables if v.space == "shared"]
        shared += [v for v in self.module.variables if v.space == "shared" and v.name in named]
        if shared and not self.function.is_kernel:
            raise PtxError(f"{self.function.name}: shared memory in a function that isn't inlined")
        layout = Layout()
        for v in sorted(shared, key=lambda v: v.count == 0):
            self.symbols[v.name] = f"{layout.add(v)}u"
        self.static_smem = layout.size

    # ---- What rules ask for ----

    def value(self, operand: Operand, kind: str) -> str:
        c_type = C_TYPES[kind]
        if isinstance(operand, Register):
            if kind == "pred" or operand.type == "pred":
                return f"{'!' if operand.negated else ''}{operand.name}"
            if kind in ("f32", "f64"):
                return bit_cast(c_type, operand.name)
            return f"(({c_type}){operand.name})"
        if isinstance(operand, Immediate):
            return self._immediate(operand.text, kind)
        if isinstance(operand, Symbol):
            known = self.symbols.get(operand.name) or SPECIAL_REGISTERS.get(operand.name)
            if known:
                return f"(({c_type})({known} + {operand.offset}))"
            if operand.name in ("%clock", "%clock64", "%globaltimer"):
                return f"(({c_type})block.instructions)"
        raise PtxError(f"{self.where}: no rule for the operand {operand}")

    def _immediate(self, text: str, kind: str) -> str:
        if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
            return bit_cast("float", f"0x{match[1]}u") if kind == "f32" else f"0x{match[1]}u"
        if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
            return bit_cast("double", f"0x{match[1]}ull") if kind == "f64" else f"0x{match[1]}ull"
        if not re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
            raise PtxError(f"{self.where}: no rule for the operand {text}")
        number = Immediate(text).number
        if kind == "pred":
            return str(number != 0).lower()
        return f"(({C_TYPES[kind]}){number & 2**64 - 1}ull)"

    def assign(self, target: Operand, kind: str, expression: str) -> str:
        """Narrow signed values are extended to the register's width, like unsigned ones."""
        if isinstance(target, Symbol) and target.name == "_":
            return f"(void)({expression});"
        if not isinstance(target, Register):
            raise PtxError(f"{self.where}: no rule for the destination {target}")
        if kind == "pred":
            return f"{target.name} = {expression};"
        if kind in ("f32", "f64"):
            value = f"({C_TYPES[kind]})({expression})"
            return f"{target.name} = {bit_cast(f'uint{bits(kind)}_t', value)};"
        return f"{target.name} = (uint{bits(target.type)}_t)({C_TYPES[kind]})({expression});"

    def parameter(self, name: str) -> str | None:
        """C++ for the pointer to a parameter, of this function or of a call; None if it is none."""
        return self.places.get(name)

    def callee(self, name: str, instruction: Instruction) -> str:
        if name in ("vprintf", "__assertfail"):
            return f"device_{name.strip('_')}"
        if all(f.name != name for f in self.module.functions):
            raise PtxError(f"{instruction.source}: no rule for a call of {name}")
        return f"f_{_c_name(name)}"

    def label(self, name: str) -> str:
        return f"L_{_c_name(name)}"

    def site(self, instruction: Instruction) -> str:
        """A place that memory is accessed, or that threads meet, as messages name it."""
        name = ".".join((instruction.opcode, *instruction.modifiers))
        return self.define("Site", [f'"{name}"', f'"{instruction.source}"'])

    def define(self, kind: str, values: list[str], is_array: bool = False) -> str:
        """A static variable of the function."""
        name = f"static_{len(self.statics)}"
        declared = f"{name}[]" if is_array else name
        self.statics.append(f"static {kind} {declared} = {{{', '.join(values)}}};")
        return name

    def addresses(self, registers: Sequence[Register]) -> str:
        """An array of them, for what is written later."""
        name = f"addresses_{len(self.arrays)}"
        items = ", ".join(f"&{r.name}" for r in registers)
        self.arrays.append(f"uint32_t* const {name}[] = {{{items}}};")
        return name

    # ---- The function ----

    def definition(self) -> list[str]:
        body = self._body()
        lines = [f"{_signature(self.function)} {{", *self.statics]
        lines += [
            f"{'bool' if r.type == 'pred' else f'uint{bits(r.type)}_t'} {r.name} = 0;"
            for r in self.function.registers
        ]
        lines += self.arrays
        for v in self.local:
            name = self.places[v.name]
            lines.append(f"alignas({max(v.align, 16)}) unsigned char {name}[{v.size}];")
            lines.append(f"memset({name}, 0xff, sizeof {name});")
        return [*lines, *body, "}"]

    def _body(self) -> list[str]:
        """Each stretch without jumps counts its instructions at its beginning."""
        lines, stretch = [], []

        def flush() -> None:
            if stretch:
                lines.append(f"block.instructions += {len(stretch)};")
                lines.extend(self._statement(item) for item in arrange(stretch))
                stretch.clear()

        for item in self.function.body:
            if isinstance(item, Label):
                flush()
                lines.append(f"{self.label(item.name)}:;")
                continue
            stretch.append(item)
            if item.opcode in ("bra", "brx", "ret", "exit"):
                flush()
        flush()
        return lines

    def _statement(self, item: Instruction | list[Instruction]) -> str:
        first = item[0] if isinstance(item, list) else item
        self.where = first.source or self.function.name
        if isinstance(item, list):
            statement = emit(self, item)
        else:
            statement = rules.find(item).emit(self, item)
        if first.guard:
            return f"if ({self.value(first.guard, 'pred')}) {{ {statement} }}"
        return f"{{ {statement} }}"

    def table_row(self, parts: list[str]) -> str:
        name = _c_name(self.function.name)
        offsets = ", ".join(f"{{{offset}, {size}}}" for offset, size in self.offsets)
        parts.append(f"const Parameter p_{name}[] = {{{offsets or '{}'}}};")
        cluster = self.function.cluster
        size = ", ".join(map(str, cluster.size))
        bounds = f"{{{str(cluster.is_required).lower()}, {{{size}}}, {cluster.max_blocks}}}"
        return (
            f'{{"{self.function.name}", f_{name}, p_{name}, {len(self.offsets)}, '
            f"{self.parameter_bytes}, {self.static_smem}, {self.function.max_threads}, {bounds}}}"
        )


def _symbols(item: Instruction | Label) -> list[Symbol]:
    found, todo = [], list(getattr(item, "operands", ()))
    while todo:
        operand = todo.pop()
        if isinstance(operand, Symbol):
            found.append(operand)
        elif isinstance(operand, Address):
            todo.append(operand.base)
        elif isinstance(operand, Vector):
            todo += operand.items
    return found
