"""What the machine code of a compiled kernel (sm_90) does with uniform registers, which a warp's lanes share.

ptxas 12.8, which comes with Triton 3.6, now and then leaves out the instruction that writes one of them: the address of
an operand of a warp group's product is then what the kernel before has left there. Such a kernel gives numbers that are
off by their own size, or ends with an illegal memory access (seen on an H200). ptxas 12.9 does not do it.
"""

import re

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+\s+)?(\S+)\s*(.*?)\s*;")
UNIFORM = re.compile(r"\bUR(\d+)\b")
DESCRIPTOR = re.compile(r"(g?)desc\[UR(\d+)\]")


def unwritten_registers(sass: str) -> list[str]:
    """The instructions that read a uniform register which no instruction above them has written."""
    written: set[int] = set()
    found = []
    for name, rest in INSTRUCTION.findall(sass):
        operands = [part.strip() for part in rest.split(",")]
        while operands and re.fullmatch(r"!?U?P[0-9T]+", operands[0]):  # predicates that it writes
            del operands[0]
        target = re.fullmatch(r"UR(\d+)", operands[0]) if operands and _writes_uniform(name) else None
        sources = operands[1:] if target or operands[:1] == ["URZ"] else operands
        if _read(name, sources) - written:
            found.append(f"{name} {rest}")
        if target:
            width = 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name else 1
            written |= set(range(int(target[1]), int(target[1]) + width))
    return found


def _writes_uniform(name: str) -> bool:
    return name.startswith(("U", "R2UR", "S2UR", "VOTEU", "REDUX", "LDCU"))


def _read(name: str, sources: list[str]) -> set[int]:
    """The uniform registers that an instruction reads."""
    text = ",".join(sources)
    # The first operand of a product may come from registers; then the descriptor's first half is not looked at.
    of_registers = name.startswith("HGMMA") and len(sources) > 1 and re.match(r"R\d+", sources[1]) is not None
    read: set[int] = set()
    for product, first in DESCRIPTOR.findall(text):
        begin = int(first)
        read |= set(range(begin + 2 * of_registers, begin + 4)) if product else {begin, begin + 1}
    for register in map(int, UNIFORM.findall(DESCRIPTOR.sub("", text))):
        read |= {register, register + 1} if name == "UIADD3.64" else {register}
    return read
