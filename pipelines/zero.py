"""DeepSpeed ZeRO as the `Engine` of a training step. With `pipelines.shards` the only file that knows
deepspeed.

On CPU deepspeed compiles a shared-memory operator unless told not to; gloo does its work as fast, and
a user's machine has no compiler.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mmicl_core.backbones.hugging_face import ROLES
from mmicl_core.config.train import TrainConfig
from mmicl_core.errors import ConfigError
from mmicl_core.methods.base import Method
from mmicl_core.training.checkpoint import Moments, TrainState
from mmicl_core.training.order import micro_batches_of_step
from pipelines.shards import VALUE, Shards

__all__ = [
    "EMA",
    "ZeroEngine",
    "at_hand",
    "computes_in_bf16",
    "deepspeed_config",
    "loading_in_pieces",
    "shapes_of",
]

# Small modules are the point of this project; above this size deepspeed would not partition them.
KEEP_WHOLE_BELOW_ELEMENTS = 1024
LARGEST_BUCKET = 500_000_000
ADAM_BETAS = (0.9, 0.98)
ADAM_EPSILON = 1e-8
ADAM_STATE = ("exp_avg", "exp_avg_sq")
MUON_STATE = ("momentum_buffer",)
MUON_MOMENTUM = 0.95
EMA = "ema"
MODULE = "module"


def computes_in_bf16(train: TrainConfig) -> bool:
    """Whether the model is in bf16 on this machine."""
    return torch.cuda.is_available() if train.precision == "auto" else train.precision == "bf16"


@contextmanager
def loading_in_pieces(train: TrainConfig) -> Iterator[None]:
    """Where parameters are spread, what is loaded inside is spread as it comes: the first worker reads it,
    and no other one ever holds it whole. Collective."""
    if train.zero.stage < 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    _start_deepspeed()
    world_size = torch.distributed.get_world_size()
    # The library keeps a weak reference.
    config = HfDeepSpeedConfig(deepspeed_config(train, world_size, bf16=computes_in_bf16(train)))
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del config


@contextmanager
def at_hand(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Parameters that may be spread, whole for as long as the block runs. Collective."""
    import deepspeed

    spread = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(spread, enabled=bool(spread)):
        yield


def _start_deepspeed() -> Any:
    # Imported here: merely importing deepspeed probes the machine for compilers and devices.
    import deepspeed

    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        # Deepspeed compiles Muon's products, which on CPU needs the C++ compiler that users lack.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if gpu else "gloo")
    return deepspeed


def deepspeed_config(
    train: TrainConfig, world_size: int, *, bf16: bool, trained: int = LARGEST_BUCKET
) -> dict[str, Any]:
    """DeepSpeed's own settings. Batch sizes are derived from the run's, never configured twice.

    Args:
        trained: parameters that are trained; gradients travel in buckets of no more.

    Raises:
        ConfigError: deepspeed has no 32-bit copies for these settings.
    """
    if bf16 and train.zero.stage == 0:
        raise ConfigError(
            "train.zero.stage is 0 and the model computes in bf16, of which deepspeed then keeps no "
            "32-bit sums: set train.zero.stage to 1, which spreads the optimiser's states and is alike "
            "otherwise, or train.precision to 'fp32'"
        )
    with_muon = train.muon_learning_rate is not None
    return {
        "optimizer": _optimizer(train),
        "train_micro_batch_size_per_gpu": min(train.micro_batch, -(-train.global_batch // world_size)),
        "gradient_accumulation_steps": micro_batches_of_step(
            train.global_batch, world_size, train.micro_batch
        ),
        # Muon's updates are of one size by construction, and clipping comes after it: the norm of many
        # matrices together would shrink them all.
        "gradient_clipping": 0.0 if with_muon else train.gradient_clip,
        "bf16": {"enabled": bf16},
        # Sums of many micro-batches in bf16 would lose the small ones.
        "data_types": {"grad_accum_dtype": "fp32"},
        # Weights and gradients travel between workers in 32 bits all the same.
        "torch_autocast": {
            "enabled": not bf16 and _multiplies_bf16(train.autocast),
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "zero_optimization": {"reduce_bucket_size": min(trained, LARGEST_BUCKET)} | _zero(train),
        # A client's optimiser from torch, so that nobody needs a compiler.
        "zero_force_ds_cpu_optimizer": False,
    }


def _optimizer(train: TrainConfig) -> dict[str, Any]:
    adam = {"lr": train.learning_rate, "betas": ADAM_BETAS, "eps": ADAM_EPSILON, "torch_adam": True}
    if train.muon_learning_rate is None:
        return {"type": "AdamW", "params": adam}
    muon = {
        "momentum": MUON_MOMENTUM,
        "muon_lr": train.muon_learning_rate,
        "adam_lr": train.learning_rate,
        # In bf16; the other way is in fp16, about four times slower on a CPU with AMX.
        "ns_method": "standard",
    }
    return {"type": "Muon", "params": adam | muon}


def _zero(train: TrainConfig) -> dict[str, Any]:
    zero = train.zero
    settings: dict[str, Any] = {
        "stage": zero.stage,
        "overlap_comm": torch.cuda.is_available(),
        # Muon turns whole gradients, so every worker needs all of them.
        "reduce_scatter": train.muon_learning_rate is None,
    }
    if zero.stage == 3:
        settings |= {
            "stage3_param_persistence_threshold": KEEP_WHOLE_BELOW_ELEMENTS,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    places = {"offload_optimizer": zero.offload_optimizer, "offload_param": zero.offload_parameters}
    for name, place in places.items():
        if place is not None:
            settings[name] = {"device": place, "pin_memory": torch.cuda.is_available()}
            settings[name] |= {"nvme_path": zero.nvme_path} if place == "nvme" else {}
    return settings


def _multiplies_bf16(autocast: bool | str) -> bool:
    return bool(torch.cpu.get_capabilities()["amx_bf16"]) if autocast == "auto" else bool(autocast)


class ZeroEngine:
    """A method's parameters under ZeRO.

    Every worker must build it at the same time, with the same parameters.

    Args:
        method: on the device where it trains.
        state: where the run goes on from; None begins.
    """

    def __init__(self, method: Method, train: TrainConfig, state: TrainState | None) -> None:
        deepspeed = _start_deepspeed()
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.spreads_parameters = train.zero.stage == 3
        self._parameters = method.trainable()
        trained = sum(math.prod(shape) for shape in shapes_of(method).values())
        bf16 = computes_in_bf16(train)
        self.config = deepspeed_config(train, self.world_size, bf16=bf16, trained=trained)
        self.micro_batches = int(self.config["gradient_accumulation_steps"])
        self._device = method.backbone.device
        if state is not None:
            # Before deepspeed makes its copies: set afterwards, those of 16 bits would stay stale.
            self._exchange({name: moments.value for name, moments in state.parameters.items()})
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=method,
            model_parameters=_groups(self._parameters, roles_of(method), train),
            config=self.config,
            dist_init_required=False,
        )
        self._muon = train.muon_learning_rate is not None
        self._shards = Shards(self._parameters, self._optimizer)
        self._peaks = [float(group["lr"]) for group in self._optimizer.param_groups]
        if state is not None:
            self._restore(state)
        self._ema = self._start_ema(state) if train.ema is not None else {}
        self._decay = train.ema or 0.0

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

    def step(self, rate: float) -> float:
        """Update the parameters at a share of their peak rates; gives the gradient's norm before clipping.

        A gradient that is not finite updates nothing; its norm is not finite either.
        """
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * rate
        norm = self._step_whole() if not self._engine.zero_optimization() else self._step_spread()
        if math.isfinite(norm):
            for name, average in self._ema.items():
                average.lerp_(self._shards.local(name), 1 - self._decay)
        return norm

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without dropout, and with the average where the result is one, for as long as the block runs.
        Collective."""
        self._engine.eval()
        averages = {name: self._shards.gather_tensor(name, piece) for name, piece in self._ema.items()}
        trained = self._exchange(averages)
        yield
        # Not in a `finally`: a worker that fails alone would wait for the others, who never come.
        self._exchange(trained)
        self._engine.train()

    def _step_spread(self) -> float:
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def _step_whole(self) -> float:
        """Without ZeRO, deepspeed would update with whatever there is."""
        grads = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        norm = float(torch.stack([grad.float().norm() for grad in grads]).norm())
        if math.isfinite(norm):
            self._engine.step()
            return norm
        for grad in grads:
            grad.zero_()
        update, self._optimizer.step = self._optimizer.step, lambda: None
        try:
            self._engine.step()
        finally:
            self._optimizer.step = update
        return norm

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Every worker's numbers, by rank."""
        mine = torch.tensor(values, dtype=torch.float64, device=self._device)
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        torch.distributed.all_gather(everyone, mine)
        return [told.tolist() for told in everyone]

    def describe(self) -> dict[str, Any]:
        """What was derived: batches, and how the largest trained parameter lies on the workers."""
        name = max(self._parameters, key=self._shards.numel)
        sizes = {
            "shard_elements": self._shards.local(name).numel(),
            "full_elements": self._shards.numel(name),
        }
        return {
            "world_size": self.world_size,
            "zero_stage": self.config["zero_optimization"]["stage"],
            "micro_batch": self.config["train_micro_batch_size_per_gpu"],
            "micro_batches": self.micro_batches,
            "precision": "bf16" if self.config["bf16"]["enabled"] else "fp32",
            "trained_parameters": sum(map(self._shards.numel, self._parameters)),
            "partition": {"parameter": name} | sizes,
        }

    def state(self, facts: Mapping[str, Any], step: int) -> TrainState | None:
        """The trained parameters and what the optimiser knows of them, and nothing frozen; on the first
        worker.

        Collective: all workers have to ask for it.
        """
        parameters = {}
        for name in self._parameters:
            kinds = {kind: self._shards.gather(name, kind) for kind in self._kinds(name)}
            if self._ema:
                kinds[EMA] = self._shards.gather_tensor(name, self._ema[name])
            value = self._shards.gather(name, VALUE)
            if self.rank == 0:
                parameters[name] = Moments(value.cpu(), {kind: full.cpu() for kind, full in kinds.items()})
        return TrainState(step, parameters, dict(facts)) if self.rank == 0 else None

    @property
    def gathered_elements(self) -> int:
        """How many elements were put together for checkpoints and averages so far."""
        return self._shards.gathered_elements

    @torch.no_grad()
    def _exchange(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put whole values where the model computes with them, and nowhere else; gives what was there.
        Collective."""
        import deepspeed

        before = {}
        for name, value in values.items():
            parameter = self._parameters[name]
            spread = hasattr(parameter, "ds_id")
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=spread):
                before[name] = parameter.detach().clone()
                if self.rank == 0 or not spread:
                    parameter.copy_(value)
        return before

    def _restore(self, state: TrainState) -> None:
        self._shards.begin_states(self._kinds, state.step)
        for name, moments in state.parameters.items():
            self._shards.put(name, VALUE, moments.value)
            for kind in self._kinds(name):
                self._shards.put(name, kind, moments.states[kind])

    def _start_ema(self, state: TrainState | None) -> dict[str, Tensor]:
        averages = {name: self._shards.local(name).clone() for name in self._parameters}
        if state is not None:
            for name, moments in state.parameters.items():
                average = moments.states.get(EMA, moments.value)
                averages[name] = self._shards.cut(name, average).clone()
        return averages

    def _kinds(self, name: str) -> tuple[str, ...]:
        uses_muon = self._muon and getattr(self._parameters[name], "use_muon", False)
        return MUON_STATE if uses_muon else ADAM_STATE


def shapes_of(method: Method) -> dict[str, tuple[int, ...]]:
    """Shapes of the trained parameters by name, of spread ones too."""
    parameters: Mapping[str, Any] = method.trainable()
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}


def roles_of(method: Method) -> dict[str, str]:
    """The role of the backbone that each trained parameter is in, or `module` for the method's own."""
    backbone = method.backbone
    owners = {id(p): role for role in ROLES for _, p in backbone.role_parameters(role)}
    return {name: owners.get(id(parameter), MODULE) for name, parameter in method.trainable().items()}


def _groups(
    parameters: Mapping[str, torch.nn.Parameter], roles: Mapping[str, str], train: TrainConfig
) -> list[dict[str, Any]]:
    """Matrices decay, vectors do not; each role has its rate."""
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        matrix = parameter.ndim > 1
        factor = train.role_rates.get(roles[name], 1.0)  # type: ignore[call-overload]
        group = groups.setdefault(
            (roles[name], matrix),
            {
                "params": [],
                "weight_decay": train.weight_decay if matrix else 0.0,
                **_rates(train, factor),
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def _rates(train: TrainConfig, factor: float) -> dict[str, float]:
    if train.muon_learning_rate is None:
        return {"lr": train.learning_rate * factor}
    return {"muon_lr": train.muon_learning_rate * factor, "adam_lr": train.learning_rate * factor}
