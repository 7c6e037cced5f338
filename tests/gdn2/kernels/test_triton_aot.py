"""Kernels compiled ahead of time, no GPU: in a process of its own, since Triton runs interpreted in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

from gdn2.errors import UserError
from gdn2.kernels.triton import aot

COMPILE = """
import json, sys
from dataclasses import asdict
from gdn2.kernels.triton import aot
pairs = json.loads(sys.argv[1])
out = [asdict(r) | {"fits": r.fits} for name, target in pairs for r in aot.compile_config(name, target)]
sys.stdout.write(json.dumps(out))
"""
QUICK = [("decode gdn2", "sm_80"), ("decode gdn2", "sm_90"), ("decode gdn2", "sm_100"),
         ("layer gdn2", "sm_90"), ("gdn2", "sm_90")]  # fmt: skip
PRODUCTS = {
    "scores_kernel", "channel_scores_kernel", "carry_kernel", "merge_kernel", "reverse_kernel", "pairs_kernel",
    "inputs_kernel", "channel_inputs_kernel", "attend_kernel",
}  # fmt: skip
"""Kernels whose matrix products belong on the tensor cores."""


def compile_apart(root: Path, pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-c", COMPILE, json.dumps(pairs)]  # Triton warns of options left open
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def quick(root: Path) -> list[dict[str, Any]]:
    return compile_apart(root, QUICK)


def test_each_launched_kernel_is_compiled(quick: list[dict[str, Any]]) -> None:
    assert {(r["config"], r["target"]) for r in quick} == set(QUICK)
    layer = {r["kernel"] for r in quick if r["config"] == "layer gdn2"}
    assert layer == {
        "conv_kernel", "conv_backward_kernel", "conv_step_kernel", "fold_kernel", "fold_backward_kernel",
        "gated_norm_kernel", "gated_norm_backward_kernel",
    }  # fmt: skip
    assert {r["kernel"] for r in quick if r["config"] == "decode gdn2"} == {"delta_tokens_kernel"}
    assert all(r["fits"] and 0 < r["registers"] <= 255 for r in quick)


def test_nothing_spills(quick: list[dict[str, Any]]) -> None:
    for r in quick:
        assert r["local_loads"] + r["local_stores"] == 0, r


def test_no_register_is_read_before_it_is_written(quick: list[dict[str, Any]]) -> None:
    assert [r["kernel"] for r in quick if r["unset"]] == []
    lost = """
        /*0170*/                   UIADD3 UR26, UP1, UR26, 0x40, URZ ;
        /*0180*/                   UMOV UR24, 0x400 ;
        /*0190*/              @!P0 ULDC.64 UR28, c[0x0][0x208] ;
        /*01a0*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR24], RZ, !UPT ;
        /*01b0*/                   HGMMA.64x32x16.F32.BF16 R24, R40, gdesc[UR26], R24 ;
        /*01c0*/               @P1 STG.E.128 desc[UR28][R2.64], R16 ;
    """
    assert aot.unset_reads(lost) == 1 + 2  # UR26 by the sum; UR25 and UR27 by the first product


def test_the_operator_uses_tensor_cores(quick: list[dict[str, Any]]) -> None:
    operator = [r for r in quick if r["config"] == "gdn2"]
    assert len(operator) >= 4 and all(r["hgmma"] > 0 for r in operator)


def test_decoding_moves_the_state_and_its_rows_once(quick: list[dict[str, Any]]) -> None:
    state = 64 * 16 * 128 * 128 * 4
    step = min(r["nbytes"] for r in quick if r["config"] == "decode gdn2")
    rows = 64 * 16 * 128 * (2 * 5 + 4) + 64 * 8  # q, k, e, z, o in bf16, g in fp32, slots
    assert step == state + rows


@pytest.mark.slow  # minutes: `make compiled`
@pytest.mark.parametrize("name", aot.CONFIGS)
def test_every_kernel_compiles_and_is_as_the_table_says(root: Path, name: str) -> None:
    found = compile_apart(root, [(name, target) for target in aot.TARGETS])
    for r in found:
        assert r["fits"] and not r["unset"], r
        assert r["target"] != "sm_90" or r["local_loads"] + r["local_stores"] == 0, r
        assert r["kernel"] not in PRODUCTS or r["hgmma"] + r["hmma"] + r["utcmma"] > 0, r
    readme = (root / "gdn2" / "kernels" / "README.md").read_text()
    if f"Triton {triton.__version__}. Two rows of one kernel" in readme:
        kept = [[cell.strip() for cell in line.strip("|").split("|")] for line in readme.splitlines()]
        hopper = [
            [name, r["kernel"], str(r["warps"]), str(r["registers"]), f"{r['shared'] / 1024:.1f}", "0",
             str(r["hgmma"]), str(r["hmma"]), f"{r['nbytes'] / 1e6:.1f}"]
            for r in found if r["target"] == "sm_90"
        ]  # fmt: skip
        assert [row for row in kept if row[0] == name] == hopper


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(UserError, match="unknown configuration 'gdn3'"):
        aot.compile_config("gdn3", "sm_90")
    with pytest.raises(UserError, match="unknown target 'sm_75'"):
        aot.compile_config("gdn2", "sm_75")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are not interpreted here")
def test_an_interpreted_process_cannot_compile() -> None:
    with pytest.raises(UserError, match="TRITON_INTERPRET is set"):
        aot.compile_config("gdn2", "sm_90")


def test_a_spilling_row_says_so() -> None:
    row = aot.Compiled("c", "k", "sm_90", 4, 255, 300 * 1024, 3, 4, 0, 1, 2, 10**6)
    assert row.spills == 7 and not row.fits
    assert len(aot.cells(row)) == len(aot.HEADER) and "too much" in str(aot.cells(row)[5])
