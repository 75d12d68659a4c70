"""Predictions from machine code, of a loop that is written down here."""

from __future__ import annotations

import pytest

pytest.importorskip("benches.sass")
from benches import sass

# As nvdisasm prints it: a loop with two loads of 16 bytes under way, and one that is used at once.
LISTING = """
.text._ZN4samk4cuda11gram_kernelENS0_6PackedE:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
	//## File "{folder}/phases.cuh", line 1 inlined at "{folder}/work.cuh", line 2
	//## File "{folder}/work.cuh", line 2
        /*0010*/                   LDG.E.128.STRONG.GPU R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128.STRONG.GPU R8, desc[UR4][R2.64+0x10] ;
        /*0030*/                   F2F.F64.F32 R12, R5 ;
        /*0040*/              @!P0 LDG.E.64 R14, desc[UR4][R2.64+0x20] ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   EXIT ;
"""


@pytest.fixture
def listing(tmp_path):
    (tmp_path / "phases.cuh").write_text("for (; i < share.end; i += share.stride) {\n")
    (tmp_path / "work.cuh").write_text("\ncase Path::Float32: run_range<A>(work, body, 0, whole); break;\n")
    return LISTING.format(folder=tmp_path)


def test_instructions(listing):
    [(name, found, labels)] = sass.instructions_of(listing)
    assert name == "_ZN4samk4cuda11gram_kernelENS0_6PackedE" and labels == {".L_x_1": 0x10}
    assert [own.name.split(".")[0] for own in found] == ["LDC", "LDG", "LDG", "F2F", "LDG", "BRA", "EXIT"]
    assert [own.size for own in found[1:5]] == [16, 16, 4, 8]
    assert [line.rpartition("/")[2] for line in found[1].lines] == ["phases.cuh:1", "work.cuh:2"]


def loop_of(listing, **changes):
    [(_, found, _)] = sass.instructions_of(listing)
    settings = {
        "kernel": "gram_kernel",
        "what": "Gram matrix, 1 list",
        "path": "float32",
        "vectors": 1,
        "registers": 64,
    }
    return sass.Loop(**(settings | changes), body=found[1:6])


def test_what_a_loop_has_under_way(listing):
    loop = loop_of(listing)
    assert (loop.bytes_read, loop.bytes_ahead, loop.blocks) == (40, 32, 2)
    assert loop_of(listing, registers=33).blocks == 3
    assert loop.bytes == 40 and loop_of(listing, what="ascent_kernel").bytes == 72


def test_the_slowest_rate_decides(listing):
    """And each takes something."""
    loop = loop_of(listing)
    assert set(loop.rates()) == {"latency", "instructions", "conversions"}
    slowest = min(loop.rates().values())
    for device, bandwidth in sass.COPY.items():
        memory = bandwidth / (sass.MULTIPROCESSORS * sass.CLOCK)
        assert 0.5 * min(1.0, slowest / memory) < loop.share_of_copy(device) < min(1.0, slowest / memory)
    assert loop.share_of_copy("H200") < loop.share_of_copy("H100")


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        (
            ["i = walk<A, true, kPairsAhead>(work, share, i);", "case 2: gram_phase_of<2>(p, shared);"],
            ("Gram matrix, 2 lists", True, 2),
        ),
        (
            ["kGradientsAhead : kPairsAhead>(work, share, i);", "case 1: gram_phase_of<1>(p, shared);"],
            ("Gram matrix, 1 list", False, 4),
        ),
        (
            ["walk<A, false, 1>(work, share, i);", "case 3: gram_phase_of<3>(p, shared);"],
            ("Gram matrix, 3 lists", False, 1),
        ),
    ],
)
def test_names_of_loops(lines, wanted):
    what, ahead = sass.what_of(lines)
    assert (what, ahead) == (wanted[0] + (", weighted" if wanted[1] else ""), wanted[2])
