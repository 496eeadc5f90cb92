"""Uniform registers that nothing has written are found in machine code."""

import pytest

from .machine_code import unwritten_registers

#: What ptxas 12.8 made of the address of an operand, and what it should have made of it.
LOST = """
        /*0340*/                   UMOV UR5, 0x400 ;
        /*0d70*/                   USHF.R.U32.HI UR8, URZ, 0x4, UR5 ;
        /*0df0*/                   UIADD3 UR38, UP0, UR38, 0x40, URZ ;
"""
KEPT = LOST.replace("UP0, UR38", "UP0, UR8")
#: A descriptor is four registers, of which the first two do not count if the first operand comes from others.
DESCRIPTOR = """
        /*0010*/                   ULDC.64 UR24, c[0x0][0x208] ;
        /*0020*/              @!P0 R2UR P0, UR26, R4 ;
        /*0030*/                   UIADD3.64 UR26, UR24, 0x2, URZ ;
        /*0040*/                   HGMMA.64x16x16.F32.BF16 R24, FIRST gdesc[UR24], R24, gsb0 ;
"""


def test_lost_registers_are_found() -> None:
    assert unwritten_registers(LOST) == ["UIADD3 UR38, UP0, UR38, 0x40, URZ"]
    assert unwritten_registers(KEPT) == []


@pytest.mark.parametrize(("first", "lacks"), [("", "UR24"), ("R8,", "UR26"), ("R8,", None), ("", None)])
def test_descriptors_are_four_registers(first: str, lacks: str | None) -> None:
    lines = [line.replace("FIRST", first) for line in DESCRIPTOR.splitlines()]
    if lacks is not None:  # what writes it is not there
        lines = [line for line in lines if f"{lacks}," not in line.partition("*/")[2].replace("UR24, 0x2", "")]
    assert bool(unwritten_registers("\n".join(lines))) == (lacks is not None)
