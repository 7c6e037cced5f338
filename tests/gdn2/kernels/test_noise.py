"""The noise that sampled answers are made of: known numbers, the right distribution, the same bits everywhere."""

import math
import os
import subprocess
import sys

import pytest
import torch
from scipy import stats

from gdn2.kernels import noise, numba

# Vigna's splitmix64.c begun with 1234567.
SPLITMIX = [
    6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
]  # fmt: skip
KNOWN = [1048995514, 1048579735, 1037770456, 1055050887]  # bits of the first noise of seed 77, in fp32
WORDS = (0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPILE = """
import sys
from gdn2.kernels.triton import aot
with aot.recording(90) as launches:
    aot.CONFIGS["noise"]()
((kernel, _),) = launches
sys.stdout.write(kernel.asm["ptx"] + kernel.asm["sass"])
"""


def keys(n, seed=77):
    return noise.splitmix(torch.tensor([noise.counter(seed, at) for at in range(n)]))


def fmix(x, key):
    x ^= x >> 16
    x = (x * 0x85EBCA6B + key) & 0xFFFFFFFF
    x ^= x >> 13
    x = x * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ (x >> 16)


def exact(key, v):
    """The noise by its definition, in fp64."""
    word = fmix(fmix(v, 0) ^ (key & 0xFFFFFFFF), (key >> 32) & 0xFFFFFFFF)
    half = (word ^ 0xFFFFFFFF if word >> 31 else word) + 0.5
    return -math.log(-math.log(half * 2.0**-32) if word >> 31 else -math.log1p(-half * 2.0**-32))


def test_counters_give_splitmix64s_numbers():
    numbers = noise.splitmix(torch.tensor([noise.counter(1234567, at) for at in range(5)]))
    assert [x & (2**64 - 1) for x in numbers.tolist()] == SPLITMIX
    moved = torch.tensor([noise.counter(1234567, 0)]).add_(noise.signed(noise.GAMMA))
    assert moved.item() == noise.counter(1234567, 1)
    assert noise.counter(2**64 - 1, 10**9) == noise.counter(-1, 10**9)


def test_the_hash_is_murmurs_last_step():
    assert fmix(0, 0) == 0 and fmix(1, 0) == 0x514E28B7  # as published
    words = torch.tensor([noise.signed(w, 32) for w in WORDS], dtype=torch.int32)
    for key in (0, 12345, 0xDEADBEEF):
        found = noise._mixed(words, noise.signed(key, 32))
        assert [x & 0xFFFFFFFF for x in found.tolist()] == [fmix(w, key) for w in WORDS]


def test_noise_is_its_definition():
    made = noise.plain(keys(3), 500)
    wanted = torch.tensor([[exact(key, v) for v in range(500)] for key in keys(3).tolist()], dtype=torch.float64)
    assert (made - wanted).abs().max() < 4e-6
    # So that no change of an order or a constant goes unseen.
    assert made[0, :4].view(torch.int32).tolist() == KNOWN


def test_both_ends_are_finite_and_fine():
    """The words of the smallest and largest distances from 0 and 1."""
    words = torch.tensor([0, -1, 2**31 - 1, -(2**31)], dtype=torch.int32)
    near = (words ^ (words >> 31)).float().add_(0.5).mul_(2.0**-32)
    power, rest = noise._parts(near)
    first = noise._log(torch.where(words < 0, power, 0), torch.where(words < 0, rest, near))
    assert first.tolist() == pytest.approx([2.0**-33, 33 * math.log(2), math.log(2), math.log(2)], rel=3e-6)
    assert noise._log(*noise._parts(first)).isfinite().all()


def test_the_distribution_is_gumbels():
    made = noise.gumbel(torch.tensor([noise.counter(5, at) for at in range(64)]), 4096).double()
    assert stats.kstest(made.flatten().numpy(), "gumbel_r").pvalue > 0.01
    # Neighbours in the row, and the same place at neighbouring positions and seeds, have nothing to do with each other.
    other = noise.gumbel(torch.tensor([noise.counter(6, at) for at in range(64)]), 4096).double()
    for a, b in ((made[:, 1:], made[:, :-1]), (made[1:], made[:-1]), (made, other)):
        pair = torch.stack([a.flatten(), b.flatten()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 4 / math.sqrt(pair.shape[1])


@pytest.mark.skipif(not numba.available(), reason="numba does not support this Python")
@pytest.mark.parametrize("width", [1, 7, 64, 1000])
def test_the_compiled_loop_has_the_bits_of_torchs_operations(width):
    made = numba.gumbel(keys(9), width)
    assert torch.equal(made, noise.plain(keys(9), width))
    assert torch.equal(made[3:4], numba.gumbel(keys(9)[3:4], width))
    assert torch.equal(made, numba.gumbel(keys(9), 1000)[:, :width])


@pytest.mark.parametrize("width", [1, 1000, 2049])
def test_the_kernel_has_the_bits_of_torchs_operations(width):
    from gdn2.kernels.triton import noise as kernel

    made = kernel.gumbel(keys(5).to(DEVICE), width).cpu()
    assert torch.equal(made, noise.plain(keys(5), width))
    assert kernel.gumbel(keys(5)[:0].to(DEVICE), width).shape == (0, width)


def test_nothing_is_fused_in_the_kernels_machine_code(root):
    """A fused product and sum is rounded once instead of twice."""
    compiled = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=root, env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    ptx_and_sass = compiled.stdout
    assert ptx_and_sass.count("FMUL") > 10 and "FFMA" not in ptx_and_sass and "fma.rn" not in ptx_and_sass


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_a_gpu_has_the_bits_of_a_cpu(implementation):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    counters = torch.tensor([noise.counter(5, at) for at in range(40)])
    found = noise.gumbel(counters.cuda(), 33_000, implementation)
    assert torch.equal(found.cpu(), noise.gumbel(counters, 33_000, "torch"))
