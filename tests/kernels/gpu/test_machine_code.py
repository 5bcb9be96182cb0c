"""Counting issue slots in machine code, by hand-made code whose slots are counted by hand."""

import pytest

from hashattn_kernels.triton_gpu.machine_code import instructions, loops, slots_a_key

CODE = """
        code for sm_90
                Function : some_kernel
        .headerflags    @"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;              /* 0x00000a00ff017b82 */
                                                                       /* 0x000fe20000000800 */
        /*0010*/                   LDG.E R2, [R4.64] ;                 /* 0x0000000402027981 */
        /*0020*/                   REDUX.SUM UR4, R2 ;                 /* 0x00000000020473c4 */
        /*0030*/                   MOV R6, RZ ;                        /* 0x000000ff00067202 */
        /*0040*/                   LDG.E.128 R8, desc[UR4][R4.64+0x800] ;
        /*0050*/              @!P1 LDG.E.CONSTANT R12, [R4.64] ;
        /*0060*/                   LOP3.LUT R8, R8, UR6, RZ, 0x3c, !PT ;
        /*0070*/                   POPC R9, R8 ;
        /*0080*/                   IDP.4A.U8.U8 R9, R8, R7, R9 ;
        /*0090*/                   STG.E desc[UR4][R4.64], R9 ;
        /*00a0*/                   ISETP.NE.AND P0, PT, R3, 0x10, PT ;
        /*00b0*/               @P0 BRA 0x40 ;
        /*00c0*/                   MOV R3, RZ ;
        /*00d0*/                   LDG.E.64 R8, [R4.64] ;
        /*00e0*/                   SHF.L.U32 R9, R8, 0x1, RZ ;
        /*00f0*/                   SHFL.BFLY PT, R9, R9, 0x1, 0x1f ;
        /*0100*/              @!P2 BRA 0xf0 ;
        /*0110*/              @UP0 UIADD3 UR4, UR4, 0x1, URZ ;
        /*0120*/                   BRA.U UP1, 0xd0 ;
        /*0130*/                   IADD3 R3, R3, 0x1, RZ ;
        /*0140*/              @!P3 BRA 0x130 ;
        /*0150*/                   BRA 0x160 ;
        /*0160*/                   ATOMG.E.ADD.STRONG.GPU PT, R2, desc[UR4][R4.64], R3 ;
        /*0170*/                   LDG.E R2, [R4.64] ;
        /*0180*/               @P0 BRA 0x170 ;
        /*0190*/                   EXIT ;
        /*01a0*/                   BRA 0x1a0;
"""


def test_every_instruction_of_a_dump_is_found():
    found = instructions(CODE)
    assert [each.address for each in found] == list(range(0, 0x1B0, 0x10))
    assert found[5].operation == "LDG.E.CONSTANT" and found[17].operation == "UIADD3"
    jumps = {each.address: each.target for each in found if each.target is not None}
    assert jumps == {0xB0: 0x40, 0x100: 0xF0, 0x120: 0xD0, 0x140: 0x130, 0x150: 0x160,
                     0x180: 0x170, 0x1A0: 0x1A0}  # fmt: skip
    assert [each.words_loaded for each in found[1:6]] == [1, 0, 0, 4, 1]


def test_a_loop_is_what_a_branch_backwards_encloses_without_inner_loops():
    found = [(loop[0].address, loop[-1].address, len(loop)) for loop in loops(instructions(CODE))]
    assert found == [(0x40, 0xB0, 8), (0xD0, 0x120, 4), (0xF0, 0x100, 2), (0x130, 0x140, 2),
                     (0x170, 0x180, 2)]  # fmt: skip


@pytest.mark.parametrize("keys", [1, 4, 0.5])
def test_slots_of_the_loops_over_keys(keys):
    """Two loops load keys before the atomic: 14 slots and 5 words, and 5 slots without those of the
    loop inside it and 2 words. What loads nothing, or after the atomic, is not over keys."""
    first = 2 + 2 + 1 + 4 + 1 + 2 + 1 + 1
    second = 2 + 1 + 1 + 1
    assert slots_a_key(CODE, keys) == sorted([first / 5 / keys, second / 2 / keys])


def test_without_an_atomic_every_loop_that_loads_counts():
    code = CODE.replace("ATOMG.E.ADD.STRONG.GPU PT", "MOV")
    assert sorted(slots_a_key(code, 1)) == sorted([14 / 5, 5 / 2, 3])


def test_code_without_loops_has_none():
    assert slots_a_key(CODE.split("/*0040*/")[0], 1) == []
