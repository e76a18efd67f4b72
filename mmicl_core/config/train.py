"""Settings of training."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from mmicl_core.config.base import Config
from mmicl_core.config.episodes import Part

__all__ = ["CheckpointConfig", "ElasticWorkers", "TrainConfig", "ValidationConfig", "ZeroConfig"]

OffloadPlace = Literal["cpu", "nvme"]
Role = Literal["vision_tower", "projector", "language_model", "head", "module"]


class ElasticWorkers(Config):
    """As many workers as the cluster has room for; a run goes on from its last checkpoint when that
    changes."""

    min: int = Field(ge=1)
    """Fewest workers to train with; with room for less, training waits."""

    max: int = Field(ge=1)
    """Most workers to train with."""

    look_every_seconds: float = Field(default=60, gt=0)
    """Time between looks for room for more."""

    @model_validator(mode="after")
    def _min_is_not_above_max(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max}): exchange them")
        return self


class ZeroConfig(Config):
    """What DeepSpeed's ZeRO spreads over the workers, and what it keeps outside of their devices."""

    stage: Literal[0, 1, 2, 3] = 3
    """0 spreads nothing, 1 the optimiser's states, 2 gradients too, 3 parameters too, those of the frozen
    model among them."""

    offload_optimizer: OffloadPlace | None = None
    """Where the optimiser's states lie instead of on the device; `cpu` from stage 1 on, `nvme` with stage
    3."""

    offload_parameters: OffloadPlace | None = None
    """Where parameters lie while no layer computes with them; with stage 3."""

    nvme_path: str | None = None
    """Folder on a fast local disk of every node, for what is offloaded to `nvme`; DeepSpeed compiles the code
    that reads it, so the workers need a compiler and libaio."""

    @field_validator("stage", mode="before")
    @classmethod
    def _is_a_number_on_the_command_line_too(cls, stage: Any) -> Any:
        return int(stage) if isinstance(stage, str) and stage.isdecimal() else stage

    @model_validator(mode="after")
    def _offloads_what_the_stage_spreads(self) -> Self:
        places = {"offload_optimizer": self.offload_optimizer, "offload_parameters": self.offload_parameters}
        for name, place in places.items():
            least = 3 if place == "nvme" or name == "offload_parameters" else 1
            if place is not None and self.stage < least:
                raise ValueError(f"{name} {place!r} needs stage {least}, but stage is {self.stage}")
            if place == "nvme" and self.nvme_path is None:
                raise ValueError(f"{name} is 'nvme', but nvme_path is None: name a folder on a local disk")
        return self


class CheckpointConfig(Config):
    """When a run is written down, and what of it is kept."""

    every: int = Field(default=200, ge=1)
    """Steps between checkpoints; a validation writes one too."""

    keep_last: int = Field(default=1, ge=1)
    """Newest checkpoints that are kept."""

    keep_best: int = Field(default=1, ge=1)
    """Checkpoints of lowest validation loss that are kept beside the newest."""

    mirror: str | None = None
    """Folder or URI (s3://, gs://, ...) that finished checkpoints are copied to while training goes on; a run
    whose own folder has none goes on from there."""


class ValidationConfig(Config):
    """The loss on held-out episodes during training."""

    every: int | None = Field(default=None, ge=1)
    """Steps between validations; None validates never, and the result is the last step's."""

    episodes: int = Field(default=200, ge=1)
    """Held-out episodes, drawn like the first stage of training's; the same ones each time."""

    part: Part = "held_out_concepts"
    """Pictures that they come from."""

    patience: int | None = Field(default=None, ge=1)
    """Validations without a lower loss after which training stops; None never does."""

    @model_validator(mode="after")
    def _validates_what_is_held_out(self) -> Self:
        if self.part == "train":
            raise ValueError("part is 'train', which is trained on: choose what is held out")
        if self.patience is not None and self.every is None:
            raise ValueError(f"patience is {self.patience}, but every is None: say how often to validate")
        return self


class TrainConfig(Config):
    """One training run. What follows from the hardware is derived and printed, not set here."""

    steps: int = Field(default=600, ge=1)
    """Optimiser steps."""

    global_batch: int = Field(default=32, ge=1)
    """Episodes (or pictures) of one optimiser step, over all workers."""

    micro_batch: int = Field(default=16, ge=1)
    """Most episodes that one worker puts through the model at once."""

    learning_rate: float = Field(default=3e-3, gt=0)
    """Peak learning rate of AdamW."""

    muon_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of Muon, which then takes all matrices but embeddings; None leaves them to
    AdamW. From nothing, Muon needs several times fewer pictures; an aggregator needs none of it."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How learning rates go on after the rise."""

    final_rate: float = Field(default=0.01, ge=0, le=1)
    """Share of the peak that a cosine or a line ends at."""

    warmup_steps: int = Field(default=50, ge=0)
    """Steps over which the learning rate rises from 0."""

    role_rates: dict[Role, float] = Field(default_factory=dict)
    """Factor on the learning rates of what is trained in a role of the backbone, or in the method's own
    `module`; 1 for roles that are left out."""

    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW weight decay of matrices; vectors have none."""

    gradient_clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient; without effect where Muon trains."""

    ema: float | None = Field(default=None, gt=0, lt=1)
    """The result is an exponential moving average of the parameters, of this decay a step; None takes the
    parameters themselves."""

    num_workers: int | ElasticWorkers = 2
    """Processes that train together, one GPU each where there are GPUs; `{min, max}` takes what there is."""

    threads_per_worker: int = Field(default=1, ge=1)
    """CPU threads of one worker's arithmetic, reserved in the cluster as CPUs."""

    gpu: bool | None = None
    """Whether each worker holds a GPU. None takes GPUs where the cluster has enough of them when training
    starts; true waits until a cluster that grows by itself brings them in."""

    zero: ZeroConfig = ZeroConfig()
    """How DeepSpeed spreads the run over its workers."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """What the model computes in; of what is trained, a 32-bit copy is kept in any case. `auto` is bf16 on
    GPUs and fp32 without."""

    autocast: bool | Literal["auto"] = False
    """Where the model is in fp32, multiply matrices in bf16 and keep everything else in 32 bits; `auto` does
    so where the processor multiplies bf16 in hardware (AMX), as one without takes many times longer for
    it."""

    gradient_checkpointing: bool = False
    """Compute the layers of the language model again on the way back instead of keeping what they gave: a
    third more arithmetic, far less memory."""

    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """The attention code of transformers that training runs; beside `autocast`, `eager` takes less time for
    prompts of a few hundred tokens."""

    picture_variants: int = Field(default=1, ge=1)
    """Versions of each training picture whose features are computed once: the picture itself and
    augmented ones."""

    validation: ValidationConfig = ValidationConfig()
    """The loss on what is held out, during training."""

    checkpoints: CheckpointConfig = CheckpointConfig()
    """What is written down of a run that goes on."""

    log_every: int = Field(default=10, ge=1)
    """Steps between lines of the training log."""

    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Where the log also goes; each needs the package of its name."""

    max_failures: int = Field(default=3, ge=0)
    """How often a run whose workers are lost goes on from its last checkpoint by itself."""

    bad_steps: int = Field(default=5, ge=1)
    """Steps in a row without a finite loss and gradient, each of them skipped, that end training."""

    stall_seconds: float = Field(default=600, gt=0)
    """Seconds without a sign of life from a worker that end training."""

    seed: int = 0
    """Seeds the order of the episodes, augmentation, initialisation and dropout."""

    @field_validator("num_workers")
    @classmethod
    def _somebody_works(cls, value: int | ElasticWorkers) -> int | ElasticWorkers:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"at least 1 worker has to train, not {value}")
        return value

    @property
    def worker_range(self) -> tuple[int, int]:
        """Fewest and most workers."""
        if isinstance(self.num_workers, int):
            return self.num_workers, self.num_workers
        return self.num_workers.min, self.num_workers.max

    def decisive(self, *, batches_matter: bool) -> dict[str, Any]:
        """The settings that the result depends on, but for rounding: a run goes on under others of the rest.

        Args:
            batches_matter: the loss compares what a worker puts through the model at once.
        """
        without = [name for name in INDIFFERENT if name not in BATCHES or not batches_matter]
        return self.model_dump(mode="json", exclude=set(without))

    @model_validator(mode="after")
    def _every_worker_has_an_episode(self) -> Self:
        most = self.worker_range[1]
        if self.global_batch < most:
            raise ValueError(
                f"global_batch ({self.global_batch}) must be at least num_workers ({most}): every worker "
                "takes its share of a step"
            )
        return self

    @model_validator(mode="after")
    def _muon_has_what_it_needs(self) -> Self:
        if self.muon_learning_rate is not None and (self.zero.stage != 3 or self.zero.offload_optimizer):
            raise ValueError(
                f"muon_learning_rate is {self.muon_learning_rate}, but zero has stage {self.zero.stage} and "
                f"offload_optimizer {self.zero.offload_optimizer!r}: Muon trains under stage 3, on the device"
            )
        return self


BATCHES = ("micro_batch", "num_workers")
INDIFFERENT = (
    *BATCHES,
    "threads_per_worker",
    "gpu",
    "zero",
    "gradient_checkpointing",
    "attention",
    "checkpoints",
    "log_every",
    "trackers",
    "max_failures",
    "bad_steps",
    "stall_seconds",
)
