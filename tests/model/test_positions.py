"""Positional encodings against naive implementations of the formulas in the papers."""

import cmath
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinystories.model.positional_encoding import apply_rope, build_rope_tables, build_sinusoid_table


@pytest.mark.parametrize(("n_ctx", "n_embd"), [(7, 2), (50, 10), (3, 512)])
def test_sinusoid_table_is_the_papers_formula(n_ctx: int, n_embd: int) -> None:
    table = build_sinusoid_table(n_ctx, n_embd)
    assert table.shape == (n_ctx, n_embd)
    assert table.dtype == torch.float32
    for p in range(n_ctx):
        for i in range(n_embd // 2):
            angle = p / 10000 ** (2 * i / n_embd)
            assert table[p, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-7)
            assert table[p, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-7)


def test_tables_stay_exact_far_from_the_start() -> None:
    """Angles in single precision would be off by a thousandth here."""
    far = 100_000
    frequency = 10000 ** (-2 / 16)
    assert build_sinusoid_table(far + 1, 16)[far, 2].item() == pytest.approx(math.sin(far * frequency), abs=1e-7)
    cos, sin = build_rope_tables(far + 1, 16, 10000.0)
    assert cos[far, 1].item() == pytest.approx(math.cos(far * frequency), abs=1e-7)
    assert sin[far, 9].item() == pytest.approx(math.sin(far * frequency), abs=1e-7)


@pytest.mark.parametrize(("head_dim", "base"), [(2, 10000.0), (6, 100.0), (16, 1e6)])
def test_rotation_turns_each_pair_by_its_angle(head_dim: int, base: float) -> None:
    """As complex numbers: (x[i] + x[i + D/2] j) times exp(j p base^(-2i/D))."""
    n_ctx, half = 9, head_dim // 2
    x = torch.randn(1, 1, n_ctx, head_dim, generator=torch.Generator().manual_seed(0))
    turned = apply_rope(x, *build_rope_tables(n_ctx, head_dim, base))
    for p in range(n_ctx):
        for i in range(half):
            pair = complex(x[0, 0, p, i].item(), x[0, 0, p, i + half].item())
            expected = pair * cmath.exp(1j * p * base ** (-2 * i / head_dim))
            found = complex(turned[0, 0, p, i].item(), turned[0, 0, p, i + half].item())
            assert abs(found - expected) < 1e-6


@settings(deadline=None, max_examples=50)
@given(m=st.integers(0, 400), n=st.integers(0, 400), shift=st.integers(0, 600), seed=st.integers(0, 2**32))
def test_rotated_products_see_distances_only(m: int, n: int, shift: int, seed: int) -> None:
    """<R(m) q, R(n) k> depends on m - n: moving both changes nothing."""
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    cos, sin = build_rope_tables(1001, 16, 10000.0)

    def product(at_q: int, at_k: int) -> float:
        turned_q = apply_rope(q, cos[at_q, None].double(), sin[at_q, None].double())
        turned_k = apply_rope(k, cos[at_k, None].double(), sin[at_k, None].double())
        return float((turned_q * turned_k).sum())

    assert product(m + shift, n + shift) == pytest.approx(product(m, n), abs=1e-5)


def test_rotation_keeps_lengths_and_leaves_the_start_alone() -> None:
    x = torch.randn(2, 3, 8, 10, generator=torch.Generator().manual_seed(1))
    turned = apply_rope(x, *build_rope_tables(8, 10, 10000.0))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[:, :, 0], x[:, :, 0])
    assert not torch.allclose(turned[:, :, 1:], x[:, :, 1:])
