"""DeepSpeed ZeRO as the `Engine` of a training step. The only file that imports deepspeed.

On CPU deepspeed compiles a shared-memory operator unless told not to; gloo does its work as fast, and
a user's machine has no compiler.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmicl_core.config.train import TrainConfig
from mmicl_core.methods.base import Method
from mmicl_core.training.checkpoint import Moments, TrainState

__all__ = ["ZERO_STAGE", "ZeroEngine", "deepspeed_config"]

ZERO_STAGE = 3
# Small modules are the point of this project; above this size deepspeed would not partition them.
KEEP_WHOLE_BELOW_ELEMENTS = 1024
ADAM_BETAS = (0.9, 0.98)
ADAM_EPSILON = 1e-8
ADAM_STATE = ("exp_avg", "exp_avg_sq")
MUON_STATE = ("momentum_buffer",)
MUON_MOMENTUM = 0.95


def deepspeed_config(train: TrainConfig, world_size: int, *, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's own settings. Batch sizes are derived from the run's, never configured twice."""
    share = train.global_batch // world_size
    micro = min(train.micro_batch, share)
    adam = {"lr": train.learning_rate, "betas": ADAM_BETAS, "eps": ADAM_EPSILON, "torch_adam": True}
    muon = {
        "momentum": MUON_MOMENTUM,
        "muon_lr": train.muon_learning_rate,
        "adam_lr": train.learning_rate,
        # In bf16; the other way is in fp16, about four times slower on a CPU with AMX.
        "ns_method": "standard",
    }
    with_muon = train.muon_learning_rate is not None
    return {
        "optimizer": {"type": "Muon", "params": adam | muon}
        if with_muon
        else {"type": "AdamW", "params": adam},
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": -(-share // micro),
        # Muon's updates are of one size by construction, and clipping comes after it: the norm of many
        # matrices together would shrink them all.
        "gradient_clipping": 0.0 if with_muon else train.gradient_clip,
        "bf16": {"enabled": bf16},
        # Weights and gradients travel between workers in 32 bits all the same.
        "torch_autocast": {
            "enabled": not bf16 and _multiplies_bf16(train.autocast),
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "zero_optimization": {
            "stage": ZERO_STAGE,
            "stage3_param_persistence_threshold": KEEP_WHOLE_BELOW_ELEMENTS,
            "stage3_gather_16bit_weights_on_model_save": False,
            "overlap_comm": bf16,
            # Muon turns whole gradients, so every worker needs all of them.
            "reduce_scatter": not with_muon,
        },
    }


def _multiplies_bf16(autocast: bool | str) -> bool:
    return bool(torch.cpu.get_capabilities()["amx_bf16"]) if autocast == "auto" else bool(autocast)


class ZeroEngine:
    """A method's parameters under ZeRO.

    Every worker must build it at the same time, with the same parameters.
    """

    def __init__(self, method: Method, train: TrainConfig, state: TrainState | None) -> None:
        # Imported here: merely importing deepspeed probes the machine for compilers and devices.
        import deepspeed

        gpu = torch.cuda.is_available()
        if not gpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
            # Deepspeed compiles Muon's products, which on CPU needs the C++ compiler that users lack.
            os.environ["TORCHDYNAMO_DISABLE"] = "1"
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="nccl" if gpu else "gloo")
        self.world_size = torch.distributed.get_world_size()
        self._parameters = method.trainable()
        self._device = method.backbone.device
        if state is not None:
            # Values go in before partitioning: set afterwards, the 16-bit copies would stay stale.
            with torch.no_grad():
                for name, moments in state.parameters.items():
                    self._parameters[name].copy_(moments.value)
        self._muon_rate = (train.muon_learning_rate or 0.0) / train.learning_rate
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=method,
            model_parameters=_groups(self._parameters, train.weight_decay),
            config=deepspeed_config(train, self.world_size, bf16=gpu),
            dist_init_required=False,
        )
        if state is not None:
            self._restore(state)

    def forward(self, batch: Any) -> Tensor:
        """Negative log-likelihood of every scored target."""
        nll: Tensor = self._engine(batch)
        return nll

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch."""
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            # Deepspeed counts micro-batches by calls of `step`; before the last one it updates nothing.
            self._engine.step()

    def step(self, learning_rate: float) -> float:
        """Update the parameters; gives the gradient's norm before clipping."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * (self._muon_rate if group.get("use_muon") else 1.0)
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def sum_over_workers(self, value: float) -> float:
        """Sum a number over all workers."""
        total = torch.tensor(value, dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(total)
        return float(total)

    def largest_partition(self) -> dict[str, Any]:
        """How the largest trained parameter lies on the workers: elements here, and of the whole."""
        # Deepspeed hangs its own attributes on parameters.
        parameters: Mapping[str, Any] = self._parameters
        name, parameter = max(parameters.items(), key=lambda item: item[1].ds_numel)
        sizes = {"shard_elements": parameter.ds_tensor.ds_numel, "full_elements": parameter.ds_numel}
        return {"partition": {"parameter": name} | {key: int(size) for key, size in sizes.items()}}

    def state(self, step: int) -> TrainState:
        """Gather the trained parameters and their moments, and nothing frozen. Collective."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameters = {}
        for name, parameter in self._parameters.items():
            states = {
                kind: safe_get_full_optimizer_state(parameter, kind).detach().cpu().clone()
                for kind in self._kinds(with_muon=getattr(parameter, "use_muon", False))
            }
            parameters[name] = Moments(safe_get_full_fp32_param(parameter).detach().cpu().clone(), states)
        return TrainState(step, parameters)

    def _restore(self, state: TrainState) -> None:
        """Put values and moments of full size into this worker's shards, padded as deepspeed pads.

        `safe_set_full_*` fails where a size is not a multiple of the world size, so shards are cut here.
        """
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        inner = self._optimizer.optimizer
        for number, flat in enumerate(self._optimizer.fp32_partitioned_groups_flat):
            # Optimisers make their state at the first step; without it there is nothing to write to.
            with_muon = self._optimizer.use_muon and self._optimizer.sub_groups_using_muon[number]
            inner.state[flat].update(
                {kind: torch.zeros_like(flat) for kind in self._kinds(with_muon=with_muon)}
            )
            if not with_muon:
                inner.state[flat]["step"] = torch.tensor(float(state.step))
        for name, moments in state.parameters.items():
            parameter = self._parameters[name]
            safe_set_local_fp32_param(parameter, self._shard(parameter, moments.value))
            for kind, full in moments.states.items():
                safe_set_local_optimizer_state(parameter, self._shard(parameter, full), kind)

    def _kinds(self, *, with_muon: bool) -> tuple[str, ...]:
        return MUON_STATE if with_muon and self._muon_rate else ADAM_STATE

    def _shard(self, parameter: Any, full: Tensor) -> Tensor:
        from deepspeed.utils import safe_get_local_fp32_param

        size = safe_get_local_fp32_param(parameter).numel()
        flat = full.flatten().to(self._device)
        padded = torch.nn.functional.pad(flat, (0, size * self.world_size - flat.numel()))
        rank = torch.distributed.get_rank()
        return padded[rank * size : (rank + 1) * size].clone()


def _groups(parameters: Mapping[str, torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors do not."""
    matrices = [p for p in parameters.values() if p.ndim > 1]
    vectors = [p for p in parameters.values() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
