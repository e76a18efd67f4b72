"""Where ZeRO keeps the 32-bit values and optimiser states of a parameter: the piece of this worker.

    stage 3          an equal piece of each parameter on every worker, padded at its end
    stages 1, 2      pieces of one long row of all parameters: of a parameter, all, some or nothing
    without ZeRO     all of it on every worker

Deepspeed's own `safe_set_full_*` fail where a size is not a multiple of the world size, and leave the copy
that the model computes with as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["VALUE", "Shards"]

VALUE = "value"


class Shards:
    """The pieces of trained parameters on this worker.

    Args:
        parameters: by name, as deepspeed has left them.
        optimizer: what `deepspeed.initialize` gave.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], optimizer: Any) -> None:
        # Deepspeed hangs its own attributes on parameters.
        self._parameters: Mapping[str, Any] = parameters
        self._optimizer = optimizer
        self._inner = getattr(optimizer, "optimizer", optimizer)
        names = {id(parameter): name for name, parameter in parameters.items()}
        self._rows = {names[id(member)]: row for row, members in self._flat_groups() for member in members}
        """What the inner optimiser updates in place of each parameter."""
        self.gathered_elements = 0

    def numel(self, name: str) -> int:
        """Elements of a whole parameter."""
        parameter = self._parameters[name]
        return int(parameter.ds_numel if hasattr(parameter, "ds_id") else parameter.numel())

    def local(self, name: str, kind: str = VALUE) -> Tensor:
        """This worker's piece of a 32-bit value or state, flat; writing into it changes it, unless it is
        offloaded to a disk."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        parameter = self._parameters[name]
        if hasattr(parameter, "ds_id"):
            piece: Tensor = (
                safe_get_local_fp32_param(parameter)
                if kind == VALUE
                else safe_get_local_optimizer_state(parameter, kind)
            )
            return piece
        if hasattr(parameter, "_hp_mapping"):
            mapping = parameter._hp_mapping
            if mapping is None:
                return torch.empty(0, device=parameter.device)
            if kind == VALUE:
                fragment: Tensor = mapping.get_hp_fragment()
                return fragment
            # Deepspeed's own way to a state knows only what was there when it first looked.
            place = mapping.get_hp_fragment_address()
            state: Tensor = self._inner.state[self._rows[name]][kind]
            return state.narrow(0, place.start, place.numel)
        whole: Tensor = parameter.data if kind == VALUE else self._optimizer.state[parameter][kind]
        return whole.flatten()

    def gather(self, name: str, kind: str) -> Tensor:
        """The whole of a value or state, in its shape. Collective."""
        return self.gather_tensor(name, self.local(name, kind))

    def gather_tensor(self, name: str, piece: Tensor) -> Tensor:
        """The whole of what each worker has a piece of, laid out as the parameter's pieces are.
        Collective."""
        size, place = self.numel(name), self._place(name)
        self.gathered_elements += size
        shape = self._shape(name)
        if place is None:
            return piece.detach().clone().reshape(shape)
        parameter = self._parameters[name]
        device = parameter.device
        whole = torch.zeros(size, dtype=torch.float32, device=device)
        start, length = place
        whole[start : start + length] = piece[:length].to(device)
        torch.distributed.all_reduce(whole)
        return whole.reshape(shape)

    def cut(self, name: str, full: Tensor) -> Tensor:
        """This worker's piece of a whole, flat, padded with zeros as deepspeed pads."""
        flat, place = full.detach().flatten().float(), self._place(name)
        mine = self.local(name)
        if place is None:
            return flat.to(mine.device)
        start, length = place
        piece = torch.zeros(mine.numel(), device=mine.device)
        piece[:length] = flat[start : start + length].to(mine.device)
        return piece

    @torch.no_grad()
    def put(self, name: str, kind: str, full: Tensor) -> None:
        """Put this worker's piece of a whole in its place."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        parameter, piece = self._parameters[name], self.cut(name, full)
        if not hasattr(parameter, "ds_id"):
            self.local(name, kind).copy_(piece)
        elif kind == VALUE:
            safe_set_local_fp32_param(parameter, piece)
        else:
            safe_set_local_optimizer_state(parameter, piece, kind)

    def begin_states(self, kinds_of: Callable[[str], tuple[str, ...]], step: int) -> None:
        """Make the states that optimisers only make at their first step, as after `step` steps."""
        for name, row in self._rows.items():
            kinds = kinds_of(name)
            if kinds[0] not in self._inner.state[row]:
                self._inner.state[row].update({kind: torch.zeros_like(row) for kind in kinds})
                if len(kinds) > 1:
                    self._inner.state[row]["step"] = torch.tensor(float(step))

    def _flat_groups(self) -> list[tuple[Any, list[Any]]]:
        """What the inner optimiser updates, with the parameters that lie in it."""
        optimizer = self._optimizer
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):
            return list(zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True))
        if hasattr(optimizer, "single_partition_of_fp32_groups"):
            return list(zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True))
        if hasattr(optimizer, "fp32_groups_flat_partition"):
            return list(zip(optimizer.fp32_groups_flat_partition, optimizer.bf16_groups, strict=True))
        return [(parameter, [parameter]) for parameter in self._parameters.values()]

    def _shape(self, name: str) -> tuple[int, ...]:
        parameter = self._parameters[name]
        return tuple(parameter.ds_shape if hasattr(parameter, "ds_id") else parameter.shape)

    def _place(self, name: str) -> tuple[int, int] | None:
        """Start and length of this worker's piece in the whole; None where every worker has all of it."""
        parameter = self._parameters[name]
        if hasattr(parameter, "ds_id"):
            size = self.local(name).numel()
            start = min(torch.distributed.get_rank() * size, self.numel(name))
            return start, min(size, self.numel(name) - start)
        if not hasattr(parameter, "_hp_mapping"):
            return None
        if parameter._hp_mapping is None:
            return 0, 0
        address = parameter._hp_mapping.lp_fragment_address
        return int(address.start), int(address.numel)
