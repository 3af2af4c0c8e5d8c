"""Compiles one recorded launch ahead of time and reads registers, memory traffic and instructions off the result."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastgrpo_kernels._launch import hip_options

from .devices import Device

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.uint8: "u8",
}
_TYPE_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "f64": 8, "i32": 4, "i64": 8, "i16": 2, "i8": 1, "i1": 1}


class Launch(NamedTuple):
    """A launch that was recorded instead of run."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, int]

    def touches_latents(self, elements: int) -> bool:
        tensors = [a for a in self.arguments.values() if isinstance(a, torch.Tensor)]
        return any(t.numel() >= elements for t in tensors)


def compile_launch(launch: Launch, device: Device) -> Any:
    """What Triton's launcher would compile for these arguments: same types, same specialization, pointers aligned."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        plain = not (parameter.do_not_specialize or isinstance(value, torch.Tensor))
        if parameter.is_constexpr or value is None or (plain and type(value) is int and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
            continue
        signature[name] = _type_of(value)
        aligned = type(value) is int and value % 16 == 0 and plain
        if isinstance(value, torch.Tensor) or aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(
        source, target=GPUTarget(device.backend, device.arch, device.warp), options=options_on(launch, device)
    )


def options_on(launch: Launch, device: Device) -> dict[str, int]:
    """The launch's options as they are on a device."""
    return hip_options(launch.options, device.warp) if device.backend == "hip" else launch.options


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def examine(launch: Launch, device: Device) -> dict[str, Any]:
    """Figures of one kernel on one target: what a program uses, and what it does an element of its tile."""
    compiled = compile_launch(launch, device)
    threads = options_on(launch, device)["num_warps"] * device.warp
    accesses = _memory(compiled.asm["ttgir"])
    figures = _nvidia(compiled) if device.backend == "cuda" else _amd(compiled)
    widths = {"load": figures.pop("loads"), "store": figures.pop("stores")}
    tile = max((numel for _, numel, _ in accesses), default=1)
    tile_bytes = {kind: sum(n * size for k, n, size in accesses if k == kind and n == tile) for kind in widths}
    figures |= {
        "tile": tile,
        **{f"{kind}_bits": _width(widths[kind], tile_bytes[kind] // threads) for kind in widths},
        "tile_bytes": sum(tile_bytes.values()),
        # Slots of partial sums, which the last program of a row reads, are one element a program.
        "scalar_bytes": sum(size for _, numel, size in accesses if numel < tile),
        "thread_instructions": figures.pop("instructions") * threads,
        "shared_bytes": compiled.metadata.shared,
    }
    return figures


def _memory(ttgir: str) -> list[tuple[str, int, int]]:
    """Loads and stores as (kind, elements, bytes an element); scalars have one element.

    What follows a second counter's increment is done once a launch, by the last program of the last row, and left out.
    """
    found, arrivals = [], 0
    for line in ttgir.splitlines():
        arrivals += "atomic_rmw" in line
        if arrivals == 2:
            break
        access = re.search(r"(?:tt|amdg|amdgpu)\.(?:buffer_)?(load|store) ", line)
        if not access:
            continue
        if tile := re.search(r"tensor<((?:\d+x)+)(?:!tt\.ptr<)?(\w+)", line.rsplit(" : ", 1)[-1]):
            numel = math.prod(int(extent) for extent in tile.group(1).split("x")[:-1])
            found.append((access.group(1), numel, _TYPE_BYTES[tile.group(2)]))
        elif scalar := re.search(r"!tt\.ptr<(\w+)>", line):
            found.append((access.group(1), 1, _TYPE_BYTES[scalar.group(1)]))
    return found


def _width(widths: Counter[int], thread_bytes: int) -> int | str:
    """Bits of the narrowest access that is needed to make up what a thread moves of its tiles, widest first."""
    if not thread_bytes:
        return ""
    for bits in sorted(widths, reverse=True):
        thread_bytes -= widths[bits] * bits // 8
        if thread_bytes <= 0:
            return bits
    return 0


def _nvidia(compiled: Any) -> dict[str, Any]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, sass = (
            subprocess.run([tool, flag, cubin.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    used = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = [m.group(1) for m in re.finditer(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass)]
    # The end of a kernel is a branch to itself and padding.
    real = opcodes[: len(opcodes) - opcodes[::-1].index("EXIT")] if "EXIT" in opcodes else []
    common = _until_arrival(real, r"ATOMG?\b", r"EXIT|BRA")
    ptx = compiled.asm["ptx"]
    fp64 = [o for o in real if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)|MUFU\.\w*64H|[FI]2[FI]\S*\.F64", o)]
    return {
        "registers": used["REG"],
        "stack_bytes": used["STACK"],
        "local": sum(o.startswith(("LDL", "STL")) for o in real),
        "fp64": len(fp64),
        "instructions": common,
        "loads": _ptx_widths(ptx, "ld"),
        "stores": _ptx_widths(ptx, "st"),
    }


def _ptx_widths(ptx: str, instruction: str) -> Counter[int]:
    pattern = rf"\b{instruction}\.(?:\w+\.)*?global(?:\.L\w+::\w+)*(?:\.v(\d))?\.b(\d+)"
    return Counter(int(count or 1) * int(bits) for count, bits in re.findall(pattern, ptx))


def _until_arrival(opcodes: list[str], atomic: str, branch: str) -> int:
    """Instructions of all programs but the last of a row: up to the branch that follows the counter's increment."""
    arrival = next((i for i, opcode in enumerate(opcodes) if re.match(atomic, opcode)), None)
    if arrival is None:
        return len(opcodes)
    return next(i for i, opcode in enumerate(opcodes) if i > arrival and re.match(branch, opcode)) + 1


def _amd(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]

    def noted(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", text)[0])

    body = text[: text.rindex("s_endpgm") + len("s_endpgm")]
    opcodes = re.findall(r"^\t([a-z]\w+)", body, re.MULTILINE)
    return {
        "registers": noted("vgpr_count"),
        "stack_bytes": noted("private_segment_fixed_size")
        + 4 * (noted("vgpr_spill_count") + noted("sgpr_spill_count")),
        "local": sum(o.startswith("scratch_") for o in opcodes),
        "fp64": sum("_f64" in o for o in opcodes),
        "instructions": _until_arrival(opcodes, "global_atomic", "s_cbranch|s_endpgm"),
        "loads": _amd_widths(opcodes, "load"),
        "stores": _amd_widths(opcodes, "store"),
    }


def _amd_widths(opcodes: list[str], direction: str) -> Counter[int]:
    widths = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    widths |= {"short": 16, "ushort": 16, "byte": 8, "ubyte": 8}
    found: Counter[int] = Counter()
    for opcode in opcodes:
        if match := re.match(rf"(?:global|buffer)_{direction}_(dwordx\d|[a-z]+)", opcode):
            found[widths[match.group(1)]] += 1
    return found
