"""Prompts inside a model's layers, put in at the entrance of every block by hooks that last for one pass.

A block of the language model finds the soft tokens at the head of its sequence and gets others in their
place. A block of the vision tower gets prompts before every picture and gives their positions back: nothing
outside of it (windows, mergers, masks, features of earlier layers) ever meets them.

    language   hidden_BLD = [soft tokens; prompt] -> block([soft_SD; prompt])
    vision     block(states_RW) -> block([prompts_SW; states_RW]) without its first S positions

Towers read pictures side by side, (N, R, W), or one after the other, (R, W) or (1, R, W), bounded by lengths
or by a mask; prompts then stand before every stretch that sees itself alone, be it a picture or a window.
They have no position: rotation by cos 1 and sin 0 leaves them as they are.

The hooks are removed at the end of the pass, so that nobody else who uses the model meets them; they run
outside of what gradient checkpointing repeats. In between, the model belongs to this pass: a second thread
that runs it at the same time would get the prompts too. Hooks that record a tower's states see them without
prompts, except what enters its very first block.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmicl_core.backbones.language import Embedded

__all__ = ["class_states", "prompts_before_pictures", "prompts_beside_states", "soft_tokens_replaced"]

# What tells the blocks of a tower where stretches end, and how long the longest is, by attention code.
BOUNDS = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")
LONGEST = ("max_seqlen", "max_length_q", "max_length_k")


@contextmanager
def soft_tokens_replaced(blocks: Iterable[nn.Module], prompts: Embedded) -> Iterator[None]:
    """Give every block but the first its own soft tokens, if the prompts have such."""
    if prompts.soft_KSD is None or prompts.soft_BL is None:
        yield
        return
    soft_BL1 = prompts.soft_BL[..., None]

    def overwrite(soft_SD: Tensor) -> Callable[..., Any]:
        def run(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden_BLD, *others = given
            soft_BSD = soft_SD.to(hidden_BLD.dtype).expand(len(hidden_BLD), -1, -1)
            return hidden_BLD.masked_scatter(soft_BL1, soft_BSD), *others

        return run

    with ExitStack() as hooks:
        for block, soft_SD in zip(list(blocks)[1:], prompts.soft_KSD, strict=True):
            hooks.callback(block.register_forward_pre_hook(overwrite(soft_SD)).remove)
        yield


@contextmanager
def prompts_before_pictures(
    blocks: Iterable[nn.Module], prompts_KSW: Iterable[Tensor], *, one_sequence: bool
) -> Iterator[None]:
    """Put prompts before every picture inside each of K blocks of a vision tower.

    Args:
        one_sequence: the tower reads all pictures as one sequence.
    """
    with ExitStack() as hooks:
        for block, prompts_SW in zip(blocks, prompts_KSW, strict=True):
            lengthened = _Lengthened(prompts_SW, _into_stretches if one_sequence else _before_each)
            hooks.callback(block.register_forward_pre_hook(lengthened.enter, with_kwargs=True).remove)
            # Before hooks that record what the block gives.
            hooks.callback(block.register_forward_hook(lengthened.leave, prepend=True).remove)
        yield


@contextmanager
def prompts_beside_states(entrance: nn.Module, prompts_SW: Tensor) -> Iterator[None]:
    """Let a projector that resamples read prompts beside the states of every picture."""

    def append(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        inputs = _named(module, given, named)
        crossed = "encoder_hidden_states" in inputs
        states = "encoder_hidden_states" if crossed else "image_hidden_states"
        mask = "encoder_attention_mask" if crossed else "attention_mask"
        states_NRW = inputs[states]
        prompts_NSW = prompts_SW.to(states_NRW.dtype).expand(len(states_NRW), -1, -1)
        inputs[states] = torch.cat([states_NRW, prompts_NSW], dim=1)
        inputs[mask] = F.pad(inputs[mask], (0, len(prompts_SW)), value=1)
        return (), inputs

    hook = entrance.register_forward_pre_hook(append, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def class_states(block: nn.Module) -> Iterator[list[Tensor]]:
    """Keep what a block of a vision tower gives in the place of the class token, (N, W) of each pass."""
    seen: list[Tensor] = []
    hook = block.register_forward_hook(lambda _, given, states_NRW: seen.append(states_NRW[:, 0]))
    try:
        yield seen
    finally:
        hook.remove()


class _Lengthened:
    """One block while it reads prompts too."""

    def __init__(self, prompts_SW: Tensor, lengthen: Callable[[dict[str, Any], Tensor], Tensor]) -> None:
        self._prompts_SW, self._lengthen = prompts_SW, lengthen

    def enter(self, block: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        inputs = _named(block, given, named)
        prompts_SW = self._prompts_SW.to(inputs["hidden_states"].dtype)
        self._own = self._lengthen(inputs, prompts_SW)
        # Gradient checkpointing follows what is given by its place.
        return (inputs.pop("hidden_states"),), inputs

    def leave(self, _: nn.Module, given: tuple[Any, ...], states: Tensor) -> Tensor:
        return states[..., self._own, :]


def _named(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(inspect.signature(module.forward).parameters, given, strict=False)) | named


def _before_each(inputs: dict[str, Any], prompts_SW: Tensor) -> Tensor:
    """Lengthen pictures side by side, (N, R, W); gives the numbers of their own positions."""
    states_NRW, count = inputs["hidden_states"], len(prompts_SW)
    prompts_NSW = prompts_SW.expand(len(states_NRW), -1, -1)
    inputs["hidden_states"] = torch.cat([prompts_NSW, states_NRW], dim=1)
    mask = inputs.get("attention_mask")
    if mask is not None:
        # One that is added knows 0 for what is seen. What prompts see does not matter, if they see anything.
        seen = 0 if mask.is_floating_point() else 1
        queries = (count, 0) if mask.ndim == 4 and mask.shape[-2] > 1 else ()
        inputs["attention_mask"] = F.pad(mask, (count, 0, *queries), value=seen)
    return torch.arange(count, count + states_NRW.shape[1], device=states_NRW.device)


def _into_stretches(inputs: dict[str, Any], prompts_SW: Tensor) -> Tensor:
    """Lengthen one sequence, (R, W) or (1, R, W), by prompts before every stretch of it; gives as above."""
    states_RW, count = inputs["hidden_states"], len(prompts_SW)
    stretch_R = _stretches(inputs, states_RW.shape[-2])
    number = int(stretch_R[-1]) + 1
    of_prompts = torch.arange(number, device=stretch_R.device).repeat_interleave(count)
    stretch = torch.cat([of_prompts, stretch_R])
    order = stretch.argsort(stable=True)

    def lengthen(rows: Tensor, before: Tensor) -> Tensor:
        joined = torch.cat([before.expand(*rows.shape[:-2], -1, -1), rows], dim=-2)
        return joined[..., order, :]

    inputs["hidden_states"] = lengthen(states_RW, prompts_SW.repeat(number, 1))
    cos_RE, sin_RE = inputs["position_embeddings"]
    none = cos_RE.new_zeros(len(of_prompts), cos_RE.shape[-1])
    inputs["position_embeddings"] = lengthen(cos_RE, none + 1), lengthen(sin_RE, none)
    for name in BOUNDS:
        if name in inputs:
            bounds = inputs[name]
            inputs[name] = bounds + count * torch.arange(len(bounds), device=bounds.device).to(bounds.dtype)
    for name in LONGEST:
        if inputs.get(name) is not None:
            inputs[name] = inputs[name] + count
    mask = inputs.get("attention_mask")
    if mask is not None:
        other = stretch[order][:, None] != stretch[order]
        hidden = torch.finfo(mask.dtype).min
        inputs["attention_mask"] = mask.new_zeros(other.shape).masked_fill(other, hidden)[None, None]
    return (order >= len(of_prompts)).nonzero()[:, 0]


def _stretches(inputs: dict[str, Any], rows: int) -> Tensor:
    """The number of the stretch that each row of one sequence belongs to, (R,)."""
    bounds = next((inputs[name] for name in BOUNDS if name in inputs), None)
    if bounds is not None:
        numbers = torch.arange(len(bounds) - 1, device=bounds.device)
        return numbers.repeat_interleave(bounds.diff(), output_size=rows)
    # Where a row does not see the next one, a stretch ends.
    return F.pad((inputs["attention_mask"][0, 0].diagonal(1) < 0).cumsum(0), (1, 0))
