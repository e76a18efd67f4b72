"""Caches with room hold what the library's own hold, however they are cut, joined and shared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, Gemma3TextConfig

from mmicl_core.backbones.caches import ROOM, changed, keeps_all, side_by_side, with_room

LAYERS, HEADS, WIDTH = 2, 3, 4


def columns(rows: int, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, HEADS, count, WIDTH)
    return [
        (torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
        for _ in range(LAYERS)
    ]


def grow(cache: Any, rows: int, count: int, seed: int) -> None:
    for number, (keys, values) in enumerate(columns(rows, count, seed)):
        cache.update(keys, values, number)


def made(rows: int, count: int, seed: int, *, roomy: bool = True) -> Any:
    cache = DynamicCache()
    grow(cache, rows, count, seed)
    return with_room(cache) if roomy else cache


def same(cache: Any, other: Any) -> bool:
    return all(
        torch.equal(getattr(one, name), getattr(two, name))
        for one, two in zip(cache.layers, other.layers, strict=True)
        for name in ("keys", "values")
    )


def test_cache_with_room_holds_the_same_after_any_number_of_tokens() -> None:
    roomy, plain = made(2, 5, 0), made(2, 5, 0, roomy=False)
    for seed in range(2 * ROOM + 3):
        grow(roomy, 2, 1, seed)
        grow(plain, 2, 1, seed)
        assert roomy.get_seq_length() == plain.get_seq_length()
    assert same(roomy, plain)


def test_token_is_written_without_a_copy_of_those_before() -> None:
    roomy = made(2, 5, 0)
    grow(roomy, 2, 1, 1)
    places = [layer.keys.data_ptr() for layer in roomy.layers]
    for seed in range(ROOM):
        grow(roomy, 2, 1, seed)
    assert [layer.keys.data_ptr() for layer in roomy.layers] == places
    grow(roomy, 2, 1, 9)
    assert [layer.keys.data_ptr() for layer in roomy.layers] != places


def test_rows_that_are_chosen_and_columns_that_are_dropped_go_on_as_without_room() -> None:
    roomy, plain = made(3, 5, 0), made(3, 5, 0, roomy=False)
    for cache in (roomy, plain):
        grow(cache, 3, 1, 1)
        cache.batch_select_indices(torch.tensor([2, 0]))
        grow(cache, 2, 1, 2)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[..., 2:, :], layer.values[..., 2:, :]
        grow(cache, 2, 1, 3)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[..., :-1, :], layer.values[..., :-1, :]
        grow(cache, 2, 2, 4)
    assert same(roomy, plain)


def test_two_that_go_on_from_one_never_write_into_each_other() -> None:
    first = made(1, 5, 0)
    grow(first, 1, 1, 1)
    before = changed(first, torch.clone)
    second = changed(first, lambda rows: rows)
    grow(second, 1, 1, 2)
    grow(first, 1, 1, 3)
    third = changed(second, lambda rows: rows)
    grow(third, 1, 1, 4)
    expected = made(1, 5, 0, roomy=False)
    for seed in (1, 2, 4):
        grow(expected, 1, 1, seed)
    assert same(third, expected)
    assert not same(first, changed(second, lambda rows: rows))
    cut = changed(first, lambda rows: rows[..., :-1, :])
    assert same(cut, before)


def test_caches_side_by_side_are_padded_on_the_left_and_grow_apart_from_their_sources() -> None:
    short, long = made(1, 2, 0), made(2, 5, 1)
    joined = side_by_side([short, long], 6)
    for layer, one, two in zip(joined.layers, short.layers, long.layers, strict=True):
        assert torch.equal(layer.keys[:1, :, 4:], one.keys) and torch.equal(
            layer.values[1:, :, 1:], two.values
        )
        assert not layer.keys[:1, :, :4].any()
    grow(joined, 3, 1, 5)
    assert joined.get_seq_length() == 7
    assert (short.get_seq_length(), long.get_seq_length()) == (2, 5)


def test_cache_that_forgets_columns_is_left_as_it_is() -> None:
    config: Any = Gemma3TextConfig(num_hidden_layers=2, sliding_window=3)
    cache = DynamicCache(config=config)
    kinds = [type(layer) for layer in cache.layers]
    assert not keeps_all(cache)
    assert [type(layer) for layer in with_room(cache).layers] == kinds
