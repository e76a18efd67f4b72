"""What a run needs before it starts: parameters by role, bytes of a worker, hazards, and the stage that fits.

    method around an outline, settings, hardware --make_plan--> Plan --lines--> a table

How bytes are counted, `mmicl_core.training.memory` says, and how operations, `mmicl_core.training.flops`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from mmicl_core.config.train import TrainConfig
from mmicl_core.errors import ConfigError
from mmicl_core.methods.base import Method
from mmicl_core.training.flops import arithmetic_of
from mmicl_core.training.hardware import Hardware, casts, compute_width, micro_batch_of
from mmicl_core.training.memory import (
    Activations,
    PromptShape,
    Role,
    States,
    activations,
    count_roles,
    spread,
)
from mmicl_core.training.order import micro_batches_of_step

__all__ = ["Plan", "make_plan"]

# Left to the CUDA context, to NCCL and to what the allocator cannot use: ours, not measured.
USABLE = 0.9
# With what glibc keeps of freed blocks, at most: tests/benchmarks/test_plan.py measures 1.2 to 1.8.
KEPT_BY_GLIBC = 1.8
# A round speed to count hours by: about a third of an A100's peak.
TFLOPS = 100
COLUMNS = ("weights", "masters", "gradients", "moments", "average", "buckets", "gathered", "step", "host")
WHY = (
    "At one small batch stage 2 is 1.3 to 1.4 times faster than stage 3, which gathers every layer's weights "
    "(OpenTau issue 446, of 33 B frozen); stage 3 pays where frozen weights leave no room for a larger batch"
)
# Stage, optimiser offloaded, parameters offloaded: fastest first, as what is offloaded waits for the host.
WAYS = (
    *((stage, False, False) for stage in (0, 1, 2, 3)),
    *((stage, True, False) for stage in (1, 2, 3)),
    (3, False, True),
    (3, True, True),
)


@dataclass(frozen=True)
class Plan:
    """What `make_plan` found."""

    hardware: Hardware
    roles: tuple[Role, ...]
    width: int
    """Bytes of a number in the compute type."""
    micro_batch: int
    micro_batches: int
    """Of one worker in an optimiser step."""
    global_batch: int
    steps: int
    operations: float
    """Floating-point operations of a step, at least, were all prompts as long as the longest."""
    activations: Activations
    states: tuple[States, ...]
    chosen: States
    """What the settings say; `nvme` counts as the host."""
    hazards: tuple[str, ...]
    recommended: States | None
    """The first that fits: without offloading, then the lowest stage."""
    advice: str

    @property
    def hours(self) -> float:
        """GPU hours of all steps, at `TFLOPS` a GPU."""
        return self.operations * self.steps / (TFLOPS * 10**12) / 3600

    def lines(self) -> list[str]:
        """A readable table; the settings' own line has a star."""
        parts = asdict(self.activations)
        told = ", ".join(f"{name} {_size(count)}" for name, count in parts.items())
        every = Role("all", sum(r.parameters for r in self.roles), sum(r.trained for r in self.roles))
        header = "".join(f"{name:>10}" for name in (*COLUMNS, "peak"))
        return [
            f"planned for {self.hardware.name}, {_size(self.hardware.device_bytes)} for each worker",
            *(
                f"  {role.name:<16}{role.parameters:>16,} parameters, {role.trained:>14,} trained"
                for role in (*self.roles, every)
            ),
            f"micro-batch of {self.micro_batch}, {self.micro_batches} a step: activations "
            f"{_size(self.activations.total)} ({told})",
            f"a step of {self.global_batch:,}: {self.operations / 10**15:.3g} PFLOP at least; "
            f"{self.steps:,} steps: {self.hours:,.3g} GPU hours at {TFLOPS} TFLOP/s",
            f"  {'a worker holds':<46}{header}",
            *(self._line(row) for row in self.states),
            *(f"hazard: {hazard}" for hazard in self.hazards),
            f"advice: {self.advice}",
        ]

    def as_json(self) -> dict[str, Any]:
        """Plain values, with peaks."""
        plain = asdict(self)
        for row, states in zip(plain["states"], self.states, strict=True):
            row["peak"] = states.peak(self.activations.total)
        return plain

    def _line(self, row: States) -> str:
        values, working = asdict(row), self.activations.total
        sizes = [*(values[name] for name in COLUMNS), row.peak(working)]
        mark = "*" if row == self.chosen else " "
        fits = "" if fits_in(row, working, self.hardware) else "  too much"
        return f"{mark} {row.name:<46}" + "".join(f"{_size(size):>10}" for size in sizes) + fits


def make_plan(method: Method, train: TrainConfig, hardware: Hardware, prompt: PromptShape) -> Plan:
    """What training `method` takes of each worker.

    Args:
        method: around `outline_backbone`.
        prompt: the longest.

    Raises:
        ConfigError: nothing takes a gradient, or the tower takes pictures of any size and the prompt does not
            say how many patches one has.
    """
    roles = count_roles(method)
    if not any(role.trained for role in roles):
        raise ConfigError("the method is fitted without gradients, in one task: there is nothing to plan")
    working = activations(method, train, hardware, prompt)
    rows = tuple(_ways(method, train, hardware))
    zero = train.zero
    optimizer, parameters = zero.offload_optimizer is not None, zero.offload_parameters is not None
    chosen = spread(method, train, hardware, zero.stage, optimizer=optimizer, parameters=parameters)
    fitting = next((row for row in rows if fits_in(row, working.total, hardware)), None)
    return Plan(
        hardware,
        roles,
        compute_width(train, hardware),
        micro_batch_of(train, hardware.workers),
        micro_batches_of_step(train.global_batch, hardware.workers, train.micro_batch),
        train.global_batch,
        train.steps,
        _operations(method, train, prompt),
        working,
        rows if chosen in rows else (*rows, chosen),
        chosen,
        (
            *_memory_hazards(method, train, hardware, working, chosen),
            *_other_hazards(method, train, hardware, prompt.tokens),
        ),
        fitting,
        _advice(method, train, hardware, chosen, fitting, prompt),
    )


def _operations(method: Method, train: TrainConfig, prompt: PromptShape) -> float:
    counted = arithmetic_of(method, recomputes=train.gradient_checkpointing)
    return train.global_batch * counted.of(prompt.tokens, prompt.scored)


def fits_in(row: States, working: int, hardware: Hardware) -> bool:
    """Whether a worker has room, a tenth of it left free."""
    host = hardware.host_bytes is None or row.host <= USABLE * hardware.host_bytes
    return row.peak(working) <= USABLE * hardware.device_bytes and host


def _ways(method: Method, train: TrainConfig, hardware: Hardware) -> Iterator[States]:
    """All that training takes, fastest first. Stage 0 keeps no fp32 sums beside bf16, and Muon is at home in
    stage 3."""
    bf16, muon = compute_width(train, hardware) == 2, train.muon_learning_rate is not None
    for stage, optimizer, parameters in WAYS:
        taken = not (stage == 0 and bf16) and not (muon and (stage != 3 or optimizer))
        if taken and not (hardware.device == "cpu" and (optimizer or parameters)):
            yield spread(method, train, hardware, stage, optimizer=optimizer, parameters=parameters)


def _memory_hazards(
    method: Method, train: TrainConfig, hardware: Hardware, working: Activations, chosen: States
) -> Iterator[str]:
    room = USABLE * hardware.device_bytes
    if chosen.loading > room:
        yield (
            f"loading takes {_size(chosen.loading)} of every device, as only stage 3 spreads the model, "
            f"but there are {_size(hardware.device_bytes)}: set train.zero.stage to 3"
        )
    elif chosen.stage < 3 and chosen.held > room:
        yield (
            f"stage {chosen.stage} keeps all weights on every device and with what is trained holds "
            f"{_size(chosen.held)}, but there are {_size(hardware.device_bytes)}: set train.zero.stage to 3"
        )
    free = room - chosen.held - chosen.buckets - chosen.gathered
    if not train.gradient_checkpointing and working.total > free > 0:
        yield (
            f"activations of a micro-batch take {_size(working.total)}, but beside what is held there are "
            f"{_size(int(free))}: set train.gradient_checkpointing to true, or train.micro_batch below "
            f"{micro_batch_of(train, hardware.workers)}"
        )
    peak = int(KEPT_BY_GLIBC * chosen.peak(working.total))
    if hardware.device == "cpu" and peak > room:
        yield (
            f"glibc keeps freed blocks between others, so that a worker may take {_size(peak)} of its "
            f"{_size(hardware.device_bytes)}: export MALLOC_MMAP_THRESHOLD_=65536"
        )
    if hardware.host_bytes is not None and chosen.host > USABLE * hardware.host_bytes:
        yield (
            f"{_size(chosen.host)} are offloaded by each worker, but its share of the machine's memory is "
            f"{_size(hardware.host_bytes)}"
        )


def _other_hazards(method: Method, train: TrainConfig, hardware: Hardware, tokens: int) -> Iterator[str]:
    zero, workers, share = train.zero, hardware.workers, micro_batch_of(train, hardware.workers)
    filled = micro_batches_of_step(train.global_batch, workers, train.micro_batch) * workers * share
    if filled != train.global_batch:
        yield (
            f"a global batch of {train.global_batch} is no multiple of {workers} workers x {share}: of "
            f"{filled} places in a step {filled - train.global_batch} are empty or run for nothing"
        )
    if zero.stage == 3 and method.takes == "pixels":
        yield (
            "stage 3 makes all workers call the same modules, and this method looks at pixels: a worker "
            "without a picture looks at a blank one"
        )
    if "nvme" in (zero.offload_optimizer, zero.offload_parameters) and not hardware.has_compiler:
        yield "what is offloaded to nvme is read by code that DeepSpeed compiles, but no C++ compiler is here"
    bf16 = compute_width(train, hardware) == 2
    if hardware.device == "cpu" and not hardware.amx and (bf16 or casts(train, hardware)):
        name = "train.precision is 'bf16'" if bf16 else "train.autocast is true"
        yield f"{name}, but this CPU does not multiply bf16 in hardware, and takes many times longer for it"
    if bf16 and train.autocast is True:
        yield "train.autocast has no effect on a model in bf16"
    if hardware.device == "cpu" and train.attention == "flash_attention_2":
        yield "train.attention is 'flash_attention_2', which runs on GPUs alone"
    known = method.backbone.text_config.to_dict().get("max_position_embeddings")
    if known is not None and tokens > known:
        yield f"prompts of {tokens} tokens are longer than the {known} positions that the model has seen"
    fewest, most = train.worker_range
    if not fewest <= workers <= most:
        yield f"the plan is for {workers} workers, but train.num_workers asks for {_range(fewest, most)}"


def _advice(
    method: Method,
    train: TrainConfig,
    hardware: Hardware,
    chosen: States,
    fitting: States | None,
    prompt: PromptShape,
) -> str:
    if fitting is not None:
        what = "as it is set" if fitting == chosen else f"instead of {chosen.name}"
        return f"{fitting.name}, {what}: the fastest that fits. {WHY}."
    tries = ({"gradient_checkpointing": True}, {"gradient_checkpointing": True, "micro_batch": 1})
    for changes in tries:
        other = train.model_copy(update=changes)
        working = activations(method, other, hardware, prompt).total
        rows = _ways(method, other, hardware)
        fitting = next((row for row in rows if fits_in(row, working, hardware)), None)
        if fitting is not None:
            told = " and ".join(f"train.{name} {str(value).lower()}" for name, value in changes.items())
            return f"nothing fits as it is set; {fitting.name} does with {told}"
    return (
        f"nothing fits in {_size(hardware.device_bytes)} for each worker, not even one prompt of "
        f"{prompt.tokens} tokens at a time with checkpointing: take larger devices, or shorter prompts"
    )


def _range(fewest: int, most: int) -> str:
    return str(fewest) if fewest == most else f"{fewest} to {most}"


def _size(count: int) -> str:
    if count < 10**9:
        return f"{count / 10**6:.1f} MB" if count else "-"
    return f"{count / 10**9:.1f} GB"
