"""Settings of the frozen multimodal model and of what is trained around or inside it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from mmicl_core.config.base import Config

__all__ = [
    "AimConfig",
    "BackboneConfig",
    "LclConfig",
    "LoraConfig",
    "M2ptConfig",
    "MethodConfig",
    "MmictConfig",
    "MtvConfig",
    "PromptTuningConfig",
    "SupConConfig",
]


class BackboneConfig(Config):
    """The multimodal language model."""

    path: str = "embedded:nano"
    """Folder of a Hugging Face image-text-to-text model; `embedded:NAME` is one inside the package,
    `new:nano` an untrained nano."""

    vision_tower: str | None = None
    """Folder with the vision tower of an earlier run, or of another model whose tower is of the same kind, to
    start from instead of the model's own."""


class AimConfig(Config):
    """AIM: demonstrations fused into virtual tokens (arXiv:2406.07588)."""

    type: Literal["aim"] = "aim"

    layer: int | None = Field(default=None, ge=0)
    """States are read from what enters this layer, counted from 0, which are the embeddings; None reads what
    the last layer gave, after the final norm. The paper leaves it open."""

    text: Literal["all", "answer"] = "all"
    """Which text of a demonstration is fused: all of it, or its answer alone. The abstract allows both."""

    layer_norm: bool = True
    """LayerNorm after the projection, as in the same author's SelfCP; the paper leaves it open."""

    initial: Literal["identity", "random"] = "identity"
    """How the projection begins; the paper leaves it open."""

    separator: str = ""
    """Text between fused demonstrations; the paper shows none."""

    start: str | None = None
    """Folder of an adapter to start from."""


class MmictConfig(Config):
    """MMICT: demonstrations and query through one M-Hub, an instructed Q-Former (arXiv:2312.06363)."""

    type: Literal["mmict"] = "mmict"

    demonstrations: Literal["image_text", "text", "image", "none"] = "image_text"
    """What of a demonstration reaches the language model: its text as guided by its picture (the paper's),
    its text unguided, its picture's queries alone, or nothing."""

    queries: int = Field(default=32, ge=1)
    """Learnt queries, and so visual tokens of a query's picture."""

    width: int = Field(default=768, ge=1)
    """Width of the hub."""

    layers: int = Field(default=12, ge=2)
    """Layers of the hub; every second one, from the first, looks at the picture, and what it saw reaches the
    text in the next."""

    heads: int = Field(default=12, ge=1)
    """Attention heads of the hub."""

    hidden: int = Field(default=3072, ge=1)
    """Width inside the hub's feed-forward layers."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the hub's activations and attention that training drops. BERT's 0.1 in the released code; none
    here, so that a run which was stopped and resumed ends as one that was not."""

    longest_text: int = Field(default=128, ge=1, le=512)
    """Tokens that the hub reads of a text; what is longer is cut, and counted. BERT has 512 positions."""

    start: str | None = None
    """Folder to start from: an adapter, or a BLIP-2 or InstructBLIP model whose Q-Former the hub becomes."""

    @field_validator("demonstrations", mode="before")
    @classmethod
    def _nothing_is_none(cls, value: Any) -> Any:
        # On the command line `none` is no value, of whatever setting.
        return "none" if value is None else value

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
        return self


class M2ptConfig(Config):
    """M2PT: prompts in every layer of vision tower and language model (arXiv:2409.15657)."""

    type: Literal["m2pt"] = "m2pt"

    preset: Literal["clean", "released"] = "clean"
    """`released` does what the released code does: the first visual prompt of the last set is lost, the class
    token reaches the language model, and the head is trained too."""

    visual_prompts: int = Field(default=10, ge=0)
    """Prompts in each layer of the vision tower."""

    textual_prompts: int = Field(default=10, ge=0)
    """Prompts in each layer of the language model."""

    train_projector: bool = True
    """Train the projector, the paper's cross-modality interaction."""

    train_head: bool = False
    """Train the head over the vocabulary, which the paper's 0.09 % leave out."""

    start: str | None = None
    """Folder of an adapter to start from."""

    @model_validator(mode="before")
    @classmethod
    def _released_trains_the_head(cls, given: dict[str, object]) -> dict[str, object]:
        if isinstance(given, dict) and given.get("preset") == "released":
            return {"train_head": True, **given}
        return given

    @model_validator(mode="after")
    def _has_something_to_train(self) -> Self:
        if not self.visual_prompts and not self.textual_prompts:
            raise ValueError(
                "visual_prompts (0) and textual_prompts (0) leave no prompt to train: set one of them"
            )
        return self


class LclConfig(Config):
    """Link-context learning: the language model itself learns to follow demonstrations (arXiv:2308.07891)."""

    type: Literal["lcl"] = "lcl"

    train_vision_tower: bool = False
    """Train the vision tower as well; the paper freezes it."""

    train_language_model: bool = True
    """Train the language model and its head; false trains the projector alone, as LLaVA's first stage does
    (arXiv:2304.08485)."""

    lora_rank: int = Field(default=0, ge=0)
    """Rank of updates to the language model's matrices; 0 trains all of its weights, as the paper does."""

    lora_alpha: int = Field(default=32, ge=1)
    """Scale of the updates, divided by their rank."""

    longest_turn: int = Field(default=2048, ge=1)
    """Text tokens of a turn; what is longer is cut, turn by turn, and counted. A prompt may be longer."""

    start: str | None = None
    """Folder of an adapter to start from, where `lora_rank` is not 0; a whole model is a `backbone.path`."""

    @model_validator(mode="after")
    def _updates_what_is_trained(self) -> Self:
        if self.lora_rank and not self.train_language_model:
            raise ValueError(
                f"lora_rank ({self.lora_rank}) updates the language model, which train_language_model "
                "(false) leaves as it is: set one of them"
            )
        return self

    @model_validator(mode="after")
    def _starts_from_updates(self) -> Self:
        if self.start is not None and not self.lora_rank:
            raise ValueError(
                f"start ({self.start}) is an adapter, but lora_rank (0) trains whole weights: name the model "
                "in backbone.path instead"
            )
        return self


class LoraConfig(Config):
    """Low-rank updates of the language model's matrices (arXiv:2106.09685): a baseline."""

    type: Literal["lora"] = "lora"

    rank: int = Field(default=8, ge=1)
    """Rank of each update."""

    alpha: int = Field(default=16, ge=1)
    """Scale of the updates, divided by their rank."""

    targets: tuple[str, ...] = ()
    """Names of the matrices that are updated; none takes all of the language model's linear layers."""

    start: str | None = None
    """Folder of an adapter to start from."""


class PromptTuningConfig(Config):
    """Soft tokens before every prompt (arXiv:2104.08691): a baseline."""

    type: Literal["prompt_tuning"] = "prompt_tuning"

    tokens: int = Field(default=20, ge=1)
    """Soft tokens."""

    initial: Literal["vocabulary", "random"] = "vocabulary"
    """How they begin: as embeddings of words drawn from the vocabulary, or at random."""

    start: str | None = None
    """Folder of an adapter to start from."""


class MtvConfig(Config):
    """Multimodal task vectors (arXiv:2406.15334): a baseline without training of weights."""

    type: Literal["mtv"] = "mtv"

    prompts: int = Field(default=100, ge=1)
    """Prompts of demonstrations over which activations are averaged."""

    shots: int = Field(default=4, ge=1)
    """Demonstrations of each of these prompts."""

    steps: int = Field(default=600, ge=1)
    """Steps of the search for heads by REINFORCE."""

    samples: int = Field(default=32, ge=2)
    """Sets of heads that are drawn in a step, and compared with each other."""

    learning_rate: float = Field(default=0.1, gt=0)
    """Adam's learning rate in that search."""

    batch: int = Field(default=8, ge=1)
    """Prompts that are read at once."""

    start: str | None = None
    """Folder of an adapter to start from."""


class SupConConfig(Config):
    """Vision tower pretraining by supervised contrast (arXiv:2004.11362)."""

    type: Literal["supcon"] = "supcon"

    embedding_width: int = Field(default=128, ge=8)
    """Width of the space where pictures are compared."""

    temperature: float = Field(default=0.1, gt=0)
    """Divides the cosines before the softmax."""

    pairs_in_a_row: int = Field(default=16, ge=1)
    """Pairs of the same subcategory that stand in a batch together."""

    teacher: str | None = None
    """Folder of a Hugging Face image model whose pooled features the tower learns to predict as well."""

    teacher_width: int = Field(default=1280, ge=1)
    """Width of the teacher's features."""

    teacher_weight: float = Field(default=10.0, ge=0)
    """Weight of the distance from the teacher, beside the contrast."""

    teacher_pixels: int = Field(default=112, ge=32)
    """Side of the square that the teacher sees."""


MethodConfig = Annotated[
    AimConfig
    | MmictConfig
    | M2ptConfig
    | LclConfig
    | LoraConfig
    | PromptTuningConfig
    | MtvConfig
    | SupConConfig,
    Field(discriminator="type"),
]
