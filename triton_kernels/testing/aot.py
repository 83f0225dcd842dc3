"""Compile a kernel for a GPU that is not there, and read what the assembler made of it.

The triton wheel carries NVIDIA's assembler and disassemblers, so that any Linux machine can turn a kernel into machine
code for any architecture and count: registers, spills, instructions by name. What a kernel costs before memory does is
the number of instructions in its main loop per weight, so a test on these counts is a test of speed without a GPU.

Needs a process in which TRITON_INTERPRET is not set: an interpreted kernel cannot be compiled.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Assembly", "compile_kernel"]

_OPCODE = re.compile(r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\b.*?;")
_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_BRANCH = re.compile(r"\bBRA\b.*?(\.L_x_\d+)")
_RESOURCES = re.compile(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:\d+\s+LOCAL:(\d+)")

SMALLEST_LOOP = 5
"""A program ends in a branch to itself; a loop has more instructions than that."""


@dataclass(frozen=True)
class Assembly:
    """One kernel as machine code for one architecture.

    registers : of one thread
    spilled_bytes : of one thread: what did not fit into registers
    warps : in one block of threads
    program : the opcodes in their order, such as "LDG.E.128" and "HMMA.SP.16832.F32.BF16"
    loop : those of the main loop (the longest one); the whole program if it has none
    """

    registers: int
    spilled_bytes: int
    warps: int
    program: tuple[str, ...]
    loop: tuple[str, ...]

    def count(self, name: str, *, everywhere: bool = False) -> int:
        """How many instructions of the main loop (or of the whole program) bear a name.

        name : "LDG" counts every load from global memory; "LDG.128" those whose suffixes hold 128, in any place
        """
        head, *parts = name.split(".")
        found = [opcode.split(".") for opcode in (self.program if everywhere else self.loop)]
        return sum(words[0] == head and set(parts) <= set(words) for words in found)


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, object],
    *,
    capability: int = 90,
    warps: int = 4,
    stages: int = 3,
    aligned: Collection[str] | None = None,
) -> Assembly:
    """Compile a Triton or Gluon kernel without a GPU.

    Parameters
    ----------
    kernel : what `triton.jit` or `gluon.jit` made
    signature : type of each argument that is no constant: "*bf16", "*i32", "i32"
    constants : value of each `constexpr` argument
    capability : of the GPU, 80 for an A100, 90 for an H100
    aligned : the arguments of which 16 is a divisor, as a launch would find out; None: all pointers. Without it loads
        of 16 bytes are never made
    """
    import triton
    from triton.backends.compiler import GPUTarget

    pointers = [name for name, kind in signature.items() if kind.startswith("*")]
    aligned = pointers if aligned is None else aligned
    names = list(kernel.arg_names)
    kinds = {name: "constexpr" if name in constants else signature[name] for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = _source_class(kernel)(kernel, signature=kinds, constexprs=values, attrs=hints)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _read(compiled)


def _source_class(kernel: Any) -> Any:
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    return GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource


def _read(compiled: Any) -> Assembly:
    """Disassemble what triton compiled."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        listing = _run("nvdisasm", "-c", cubin)
        resources = _RESOURCES.search(_run("cuobjdump", "--dump-resource-usage", cubin))
    if resources is None:
        raise RuntimeError("cuobjdump told no registers of the kernel: its output has another form than expected")
    registers, stack, local = (int(number) for number in resources.groups())
    program, loop = _parse(listing)
    return Assembly(
        registers=registers,
        spilled_bytes=stack + local,
        warps=int(compiled.metadata.num_warps),
        program=program,
        loop=loop,
    )


def _run(tool: str, *arguments: object) -> str:
    """Standard output of one of the wheel's own tools."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    done = subprocess.run([path, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip()}")
    return done.stdout


def _parse(listing: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The opcodes of a program, and those of its longest loop: from a label to the last branch back to it."""
    program: list[str] = []
    labels: dict[str, int] = {}
    loops = [(0, 0)]
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(program)
        elif opcode := _OPCODE.match(line):
            program.append(opcode[1])
            branch = _BRANCH.search(line)
            if branch and branch[1] in labels:
                loops.append((labels[branch[1]], len(program)))
    start, end = max(loops, key=lambda loop: loop[1] - loop[0])
    long_enough = end - start >= SMALLEST_LOOP
    return tuple(program), tuple(program[start:end] if long_enough else program)
