"""A multimodal language model out of a stock Hugging Face image-text-to-text model, frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.modeling_outputs import BaseModelOutput

from mmicl_core.backbones.deep_prompts import soft_tokens_replaced
from mmicl_core.backbones.families import Family, family_of, part
from mmicl_core.backbones.language import Embedded, embed, language_inputs, positions_of
from mmicl_core.backbones.processors import load_processor
from mmicl_core.backbones.vision import PictureBatch, Vision
from mmicl_core.data.collate import NOT_SCORED, Packed
from mmicl_core.data.files import folder_digest
from mmicl_core.data.pictures import PreparedPicture
from mmicl_core.errors import BackboneError, ConfigError, DataError
from mmicl_core.prompts import ChatFormat

__all__ = [
    "ROLES",
    "HuggingFaceBackbone",
    "backbone_identity",
    "is_model_folder",
    "load_backbone",
    "load_for_inference",
    "outline_backbone",
]

ROLES = ("vision_tower", "projector", "language_model", "head")
LARGEST_FILE, LARGE_FILE = "7MB", "4GB"
SMALL_MODEL = 64 << 20
MEASURED_WORDS = 4096
READ_BY_THE_MODEL = (".bin", ".json", ".jinja", ".model", ".safetensors", ".txt")


class HuggingFaceBackbone(nn.Module):
    """What the methods need from a model, by the roles of its row in `families.FAMILIES`.

    Shapes (letters in `mmicl_core.shapes`). A picture is R states of width W behind the vision tower and V
    visual tokens of width D behind the projector; a prompt is L tokens of width D.

    Args:
        model: what `AutoModelForImageTextToText` gave.
        processor: its image processor and tokenizer.
        identity: names the weights.

    Raises:
        BackboneError: the model has no row, or its parts are not where the row says.
    """

    # Modules of a foreign library: what they take and give is not known to a type checker.
    model: Any
    vision_tower: Any
    projector: Any
    language_model: Any
    head: Any

    def __init__(self, model: Any, processor: Any, identity: str) -> None:
        super().__init__()
        self.family: Family = family_of(model.config)
        self.model = model
        self.processor = processor
        self.identity = identity
        self.vision_tower = part(model, self.family.vision_tower)
        self.projector = part(model, self.family.projector[0])
        self.language_model = part(model, self.family.language_model)
        self.head = part(model, self.family.head)
        self.vision = Vision(self._root, self.family, processor, self.projector)
        self._computes_again = False
        self.requires_grad_(requires_grad=False)
        self.eval()

    def train(self, mode: bool = True) -> HuggingFaceBackbone:
        """Only roles that are trained whole take the mode: what is frozen, also beside a few trained
        matrices, stays as it is used, without dropout."""
        super().train(False)
        self.training = mode
        modules = dict(self.model.named_modules())
        for role in ROLES:
            parameters = [parameter for _, parameter in self.role_parameters(role)]
            if parameters and all(parameter.requires_grad for parameter in parameters):
                for path in self.family.roles[role]:
                    if path in modules:
                        modules[path].train(mode)
        if self._computes_again:
            for block in self.layers:
                # Of a frozen block, only the flag that has it computed again; its parts stay as they are
                # used.
                block.training = mode
        return self

    def checkpoint_gradients(self) -> None:
        """In training, compute the blocks of the language model again on the way back instead of keeping what
        they gave.

        Raises:
            ConfigError: the library cannot do so with this model.
        """
        if not getattr(self.model, "supports_gradient_checkpointing", False):
            raise ConfigError(
                f"this {self.model.config.model_type} cannot compute its layers again: set "
                "train.gradient_checkpointing to false"
            )
        self.model.activation_checkpointing_enable({"use_reentrant": False})
        self._computes_again = True
        for block in self.layers:
            if not any(parameter.requires_grad for parameter in block.parameters()):
                for name in ("dropout", "activation_dropout"):
                    if isinstance(getattr(block, name, None), float):
                        # Blocks that read their own flag would drop activations, which frozen ones never do.
                        setattr(block, name, 0.0)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return self.processor.tokenizer

    @property
    def chat(self) -> ChatFormat:
        """How turns are written for this model."""
        return ChatFormat(self.processor, self.vision.image_token, self.family.chat_template)

    @property
    def text_config(self) -> Any:
        """The configuration of the language model."""
        return self.model.config.get_text_config()

    @property
    def width(self) -> int:
        """D."""
        return int(self.text_config.hidden_size)

    @property
    def vision_width(self) -> int:
        """W, of the states that the projector takes."""
        return self.family.tower_width(self.model.config)

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks of the language model, or of its encoder."""
        return self._blocks(self.language_model, self.family.layers)

    @property
    def vision_layers(self) -> nn.ModuleList | None:
        """The blocks of the vision tower, if patches run through such as a sequence."""
        layers = self.family.vision_layers
        return self._blocks(self.vision_tower, layers) if layers is not None else None

    @property
    def dtype(self) -> torch.dtype:
        """The type that the weights are computed in."""
        return next(self.language_model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.language_model.parameters()).device

    @property
    def language_side(self) -> nn.Module:
        """The language model, of an encoder-decoder with its decoder; the head may be in it."""
        return part(self.model, self.family.language_side)

    def role_parameters(self, role: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of a role, one of `ROLES`, by their names in the model; each belongs to one role."""
        for name, parameter in self.model.named_parameters():
            owner = next((owner for owner, paths in self.family.roles.items() if _inside(name, paths)), None)
            if owner == role:
                yield name, parameter

    def unfreeze(self, role: str) -> None:
        """Let a role be trained, but for modules whose output no one reads."""
        unread = self.family.unread(self.model.config)
        for name, parameter in self.role_parameters(role):
            parameter.requires_grad_(not _inside(name, unread))

    def prepare(self, pictures: Sequence[Image.Image]) -> list[PreparedPicture]:
        """Decoded pictures -> what this model takes of each."""
        return self.vision.prepare(pictures)

    @torch.no_grad()
    def embedding_spread(self) -> float:
        """Standard deviation of the token embeddings as they enter the language model; some families scale
        what they look up. Of a model without weights it is 1."""
        words = self.model.get_input_embeddings()
        if words.weight.is_meta:
            return 1.0
        count = words.num_embeddings
        ids = torch.linspace(0, count - 1, min(count, MEASURED_WORDS), device=self.device).long()
        return float(words(ids).float().std())

    def see(self, pictures: PictureBatch) -> Tensor | None:
        """Visual tokens of all pictures, (sum of V, D), as `Vision.see`; None where there is no picture."""
        return self.vision.see(pictures) if len(pictures) else None

    def embed(self, packed: Packed, visual: Tensor | None = None, fused: Tensor | None = None) -> Embedded:
        """Prompts with visual tokens (sum of V, D) and fused tokens (sum of T, D) at their places."""
        words = self.model.get_input_embeddings()
        mrope = self._root.get_rope_index if self.family.positions == "mrope" else None
        return embed(words, packed, visual, fused, positions_of(packed, mrope))

    def read(self, prompts: Embedded, **more: Any) -> Any:
        """The output of the language model's body: `last_hidden_state` (B, L, D), after the final norm.

        Of an encoder-decoder it is the encoder, which does not see the answers that the loss counts.

        Args:
            more: for the body itself: a cache, or that all hidden states are wanted.
        """
        if self.family.decoder is not None:
            mask_BL = prompts.mask_BL * ~prompts.answer_BL
            inputs: dict[str, Any] = {"inputs_embeds": prompts.embeds_BLD, "attention_mask": mask_BL}
        else:
            cache, config = more.get("past_key_values"), self.language_model.config
            inputs = language_inputs(prompts, self.family.attends, config, cache) | {"use_cache": False}
        with soft_tokens_replaced(self.layers, prompts):
            return self.language_model(**inputs | more)

    def logits(self, hidden_BLD: Tensor) -> Tensor:
        """(..., D) -> (..., vocabulary)."""
        logits = self.head(hidden_BLD)
        cap = getattr(self.text_config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def answer_nll(self, prompts: Embedded, packed: Packed) -> Tensor:
        """Negative log-likelihood of each scored token, in the order of the prompts.

        Only scored positions meet the vocabulary: the others would cost most of the memory for nothing.
        """
        if self.family.decoder is not None:
            return self._decoder_nll(prompts, packed)
        # Soft tokens before the prompt have no label.
        hidden_BLD = self.read(prompts).last_hidden_state[:, -packed.labels_BL.shape[1] :]
        labels = packed.labels_BL[:, 1:]
        scored = labels != NOT_SCORED
        logits = self.logits(hidden_BLD[:, :-1][scored])
        return F.cross_entropy(logits.float(), labels[scored], reduction="none")

    def decode(self, hidden_BLD: Tensor, mask_BL: Tensor, ids: Tensor, **more: Any) -> Any:
        """The decoder of an encoder-decoder behind what its encoder made: `logits` at each of `ids`."""
        return self.language_side(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden_BLD),
            attention_mask=mask_BL,
            decoder_input_ids=ids,
            **more,
        )

    def _decoder_nll(self, prompts: Embedded, packed: Packed) -> Tensor:
        answers = [labels[labels != NOT_SCORED] for labels in packed.labels_BL]
        follows_BL = packed.answer_BL.int().cumsum(1) > 0
        if (follows_BL & packed.mask_BL.bool() & ~packed.answer_BL).any():
            raise DataError(
                "an encoder-decoder gives one answer, at the end of its prompt, but a turn before the last "
                "one is scored: draw episodes with answers_scored 'last'"
            )
        targets = pad_sequence(answers, batch_first=True, padding_value=NOT_SCORED)
        start = self.text_config.decoder_start_token_id
        shifted = F.pad(targets, (1, 0), value=start)[:, :-1].clamp(min=0)
        hidden_BLD = self.read(prompts).last_hidden_state
        logits = self.decode(hidden_BLD, prompts.mask_BL * ~prompts.answer_BL, shifted).logits
        scored = targets != NOT_SCORED
        return F.cross_entropy(logits[scored].float(), targets[scored], reduction="none")

    def save(self, folder: Path) -> None:
        """Write model and processor as Hugging Face does, 16-bit; small ones in files that forges accept."""
        folder.mkdir(parents=True, exist_ok=True)
        # Tied weights stay one tensor, or they would be written twice.
        halves: dict[int, Tensor] = {}
        weights = {
            name: halves.setdefault(tensor.data_ptr(), _sixteen_bits(tensor.detach()))
            for name, tensor in self.model.state_dict().items()
        }
        small = sum(tensor.nbytes for tensor in weights.values()) < SMALL_MODEL
        self.model.config.dtype = torch.float16 if self.dtype == torch.float32 else self.dtype
        self.model.save_pretrained(
            folder, state_dict=weights, max_shard_size=LARGEST_FILE if small else LARGE_FILE
        )
        for path in folder.glob("*.safetensors"):
            # Written for their owner alone; a model is read by other users too.
            path.chmod(0o644)
        self.processor.save_pretrained(folder)

    @property
    def _root(self) -> Any:
        return part(self.model, self.family.root) if self.family.root else self.model

    def _blocks(self, module: nn.Module, path: str) -> nn.ModuleList:
        blocks = part(module, path)
        assert isinstance(blocks, nn.ModuleList)
        return blocks


def _inside(name: str, paths: Sequence[str]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def _sixteen_bits(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.dtype == torch.float32 else tensor


def load_backbone(
    folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", attention: str = "sdpa"
) -> HuggingFaceBackbone:
    """Load a model folder that `save_pretrained` wrote; `attention` names code of transformers.

    Raises:
        BackboneError: the folder is no such model, or its family is unknown.
    """
    identity = backbone_identity(folder)
    # Left to itself, the library takes sdpa for each part that has it.
    chosen = {} if attention == "sdpa" else {"attn_implementation": attention}
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, **chosen)
    # ImportError: a library that `attention` needs is not installed.
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise BackboneError(f"{folder} cannot be loaded as an image-text-to-text model: {error}") from error
    return HuggingFaceBackbone(model.to(device), load_processor(folder), identity=identity)


def outline_backbone(folder: Path) -> HuggingFaceBackbone:
    """The model without its weights, on torch's meta device: to look at and to count, whatever its size.

    Raises:
        BackboneError: the folder is no such model, or its family is unknown.
    """
    identity = backbone_identity(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model: Any = AutoModelForImageTextToText.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise BackboneError(f"{folder} is no image-text-to-text model: {error}") from error
    return HuggingFaceBackbone(model, load_processor(folder), identity=identity)


def load_for_inference(folder: Path) -> HuggingFaceBackbone:
    """The model on a GPU in bf16 where there is one, else on the CPU in 32 bits. Raises as above."""
    if torch.cuda.is_available():
        return load_backbone(folder, dtype=torch.bfloat16, device="cuda")
    return load_backbone(folder)


def is_model_folder(folder: Path) -> bool:
    """Whether a folder holds a model, and not an adapter or a part of one."""
    return (folder / "config.json").is_file()


def backbone_identity(folder: Path) -> str:
    """Digest of weights, configuration, tokenizer, chat template and picture preparation.

    Whatever changes what the model reads changes the name, so that a cache never mixes two models.

    Raises:
        BackboneError: the folder is no model.
    """
    if not is_model_folder(folder):
        raise BackboneError(f"{folder} is not a model folder: it has no config.json")
    return folder_digest(folder, READ_BY_THE_MODEL)
