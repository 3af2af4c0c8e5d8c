"""Compiles one recorded launch ahead of time and reads registers, memory traffic and instructions off the result."""

from __future__ import annotations

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

from .devices import Device

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
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
    return triton.compile(source, target=GPUTarget(device.backend, device.arch, device.warp), options=launch.options)


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
    threads = launch.options["num_warps"] * device.warp
    tensors, scalar_bytes, scalars = _memory(compiled.asm["ttgir"])
    figures = _nvidia(compiled) if device.backend == "cuda" else _amd(compiled)
    loads, stores = figures.pop("loads"), figures.pop("stores")
    # What is not of a scalar belongs to tiles.
    loads[32] -= min(scalars["load"], loads[32])
    stores[32] -= min(scalars["store"], stores[32])
    tile = max((numel for _, numel, _ in tensors), default=0)
    figures |= {
        "tile": tile,
        "load_bits": _narrowest(loads) if any(kind == "load" for kind, *_ in tensors) else "",
        "store_bits": _narrowest(stores) if any(kind == "store" for kind, *_ in tensors) else "",
        "tile_bytes": sum(numel * size for _, numel, size in tensors),
        "scalar_bytes": scalar_bytes,
        "thread_instructions": figures.pop("instructions") * threads,
        "shared_bytes": compiled.metadata.shared,
    }
    return figures


def _memory(ttgir: str) -> tuple[list[tuple[str, int, int]], int, Counter[str]]:
    """Tile loads and stores as (kind, elements, bytes an element); bytes of scalar ones, and how many of each kind."""
    tensors, scalar_bytes, scalars = [], 0, Counter()
    for line in ttgir.splitlines():
        access = re.search(r"(?:tt|amdg|amdgpu)\.(?:buffer_)?(load|store) ", line)
        if not access:
            continue
        kind = access.group(1)
        if tile := re.search(r"tensor<((?:\d+x)+)(?:!tt\.ptr<)?(\w+)", line.rsplit(" : ", 1)[-1]):
            numel = 1
            for extent in tile.group(1).split("x")[:-1]:
                numel *= int(extent)
            tensors.append((kind, numel, _TYPE_BYTES[tile.group(2)]))
        elif scalar := re.search(r"!tt\.ptr<(\w+)>", line):
            scalar_bytes += _TYPE_BYTES[scalar.group(1)]
            scalars[kind] += 1
    return tensors, scalar_bytes, scalars


def _narrowest(widths: Counter[int]) -> int:
    return min((bits for bits, count in widths.items() if count > 0), default=0)


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
    # The tail of a kernel is a branch to itself and padding.
    real = opcodes[: len(opcodes) - opcodes[::-1].index("EXIT")] if "EXIT" in opcodes else []
    ptx = compiled.asm["ptx"]
    fp64 = [o for o in real if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)|MUFU\.\w*64H|[FI]2[FI]\S*\.F64", o)]
    return {
        "registers": used["REG"],
        "stack_bytes": used["STACK"],
        "local": sum(o.startswith(("LDL", "STL")) for o in real),
        "fp64": len(fp64),
        "instructions": len(real),
        "loads": _ptx_widths(ptx, "ld"),
        "stores": _ptx_widths(ptx, "st"),
    }


def _ptx_widths(ptx: str, instruction: str) -> Counter[int]:
    pattern = rf"\b{instruction}\.(?:\w+\.)*?global(?:\.L\w+::\w+)*(?:\.v(\d))?\.b(\d+)"
    return Counter(int(count or 1) * int(bits) for count, bits in re.findall(pattern, ptx))


def _amd(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]

    def noted(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", text)[0])

    body = text[: text.index("s_endpgm") + len("s_endpgm")] if "s_endpgm" in text else text
    opcodes = re.findall(r"^\t([a-z]\w+)", body, re.MULTILINE)
    return {
        "registers": noted("vgpr_count"),
        "stack_bytes": noted("private_segment_fixed_size")
        + 4 * (noted("vgpr_spill_count") + noted("sgpr_spill_count")),
        "local": sum(o.startswith("scratch_") for o in opcodes),
        "fp64": sum("_f64" in o for o in opcodes),
        "instructions": len(opcodes),
        "loads": _amd_widths(opcodes, "load"),
        "stores": _amd_widths(opcodes, "store"),
    }


def _amd_widths(opcodes: list[str], direction: str) -> Counter[int]:
    widths = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128, "short": 16, "byte": 8, "ushort": 16}
    found: Counter[int] = Counter()
    for opcode in opcodes:
        if match := re.match(rf"(?:global|buffer)_{direction}_(dwordx\d|[a-z]+)", opcode):
            found[widths[match.group(1)]] += 1
    return found
