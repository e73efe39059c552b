"""The KV cache does not change results: for any split of the tokens, any row lengths, and reused rows."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tinystories.config import ModelConfig
from tinystories.model import GPT, KVCache

quick = settings(deadline=None, max_examples=12)


def random_tokens(rows: int, length: int, seed: int) -> Tensor:
    return torch.randint(61, (rows, length), generator=torch.Generator().manual_seed(seed))


@quick
@given(parts=st.lists(st.integers(1, 6), min_size=1, max_size=4), slack=st.integers(0, 24), seed=st.integers(0, 2**32))
def test_any_split_of_the_tokens_gives_the_same(model: GPT, parts: list[int], slack: int, seed: int) -> None:
    """Also for any kv_len that covers the tokens."""
    tokens = random_tokens(2, sum(parts), seed)
    cache = KVCache(model.config, batch=2)
    cache.kv_len = min(sum(parts) + slack, model.config.n_ctx)
    with torch.no_grad():
        hidden = torch.cat([model(part, cache) for part in tokens.split(parts, dim=1)], dim=1)
        torch.testing.assert_close(hidden, model(tokens), rtol=1e-4, atol=1e-5)
    assert cache.length.tolist() == [sum(parts)] * 2


@quick
@given(
    lengths=st.lists(st.integers(0, 15), min_size=2, max_size=4), steps=st.integers(1, 3), seed=st.integers(0, 2**32)
)
def test_rows_of_different_lengths_share_a_step(model: GPT, lengths: list[int], steps: int, seed: int) -> None:
    """Fill each row through its own view, then step all together: every row behaves as if it were alone."""
    tokens = random_tokens(len(lengths), 24, seed)
    cache = KVCache(model.config, batch=len(lengths))
    with torch.no_grad():
        for row, length in enumerate(lengths):
            if length:
                model(tokens[row : row + 1, :length], cache.view_rows(row, row + 1))
        for _ in range(3):
            new = torch.stack([tokens[row, at : at + steps] for row, at in enumerate(cache.length.tolist())])
            before = cache.length.tolist()
            hidden = model(new, cache)
            for row, at in enumerate(before):
                alone = model(tokens[row : row + 1, : at + steps])[0, at:]
                torch.testing.assert_close(hidden[row], alone, rtol=1e-4, atol=1e-5)
    assert cache.length.tolist() == [length + 3 * steps for length in lengths]


def test_a_view_of_rows_touches_only_its_rows(model: GPT) -> None:
    cache = KVCache(model.config, batch=4)
    with torch.no_grad():
        model(random_tokens(4, 5, 0), cache)
        before = cache.k.clone(), cache.v.clone()
        view = cache.view_rows(1, 3)
        model(random_tokens(2, 4, 1), view)
    assert cache.length.tolist() == [5, 9, 9, 5]
    for now, then in zip((cache.k, cache.v), before, strict=True):
        changed = (now != then).flatten(2).any(-1)
        assert changed[:, 1:3].all()
        assert not changed[:, [0, 3]].any()
    assert view.kv_len == cache.kv_len


def test_a_reused_row_remembers_nothing(model: GPT) -> None:
    """An engine frees a slot by setting its length to zero; old keys and values remain but must be masked."""
    tokens = random_tokens(2, 10, 2)
    cache = KVCache(model.config, batch=2)
    with torch.no_grad():
        model(random_tokens(2, 20, 3), cache)
        cache.length.zero_()
        torch.testing.assert_close(model(tokens, cache), model(tokens), rtol=1e-4, atol=1e-5)


def test_running_past_the_end_is_an_error_and_not_a_story(model: GPT) -> None:
    cache = KVCache(model.config, batch=1)
    with torch.no_grad():
        model(random_tokens(1, model.config.n_ctx, 4), cache)
        with pytest.raises(IndexError):
            model(random_tokens(1, 1, 5), cache)


def test_grouped_heads_shrink_the_cache(tiny: Callable[..., ModelConfig]) -> None:
    full, grouped = KVCache(tiny(), batch=3), KVCache(tiny(n_kv_head=1), batch=3)
    assert full.k.shape == (2, 3, 4, 24, 6)
    assert grouped.k.numel() * 4 == full.k.numel()
    assert grouped.v.shape == grouped.k.shape
