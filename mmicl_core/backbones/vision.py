"""The side of a model that looks: pictures -> visual tokens, and what lies between.

    picture --processor--> inputs --vision tower--> states (R, W) --projector--> visual tokens (V, D)

A processor is asked about each picture alone, so that what a picture becomes never depends on what else is
in its batch; the model then takes the pictures of a batch in one call.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from mmicl_core.backbones.families import Family
from mmicl_core.data.pictures import VISUAL, PreparedPicture
from mmicl_core.errors import BackboneError
from mmicl_core.prompts import Turn

__all__ = ["PictureBatch", "Vision", "join", "look_up"]

GRID = "image_grid_thw"
INSTRUCTION = ("qformer_input_ids", "qformer_attention_mask")


@dataclass(frozen=True)
class PictureBatch:
    """Pictures side by side, N of them."""

    visual_tokens: tuple[int, ...]
    """V of each."""
    inputs: Mapping[str, Tensor]
    """What the vision part reads, all pictures in one; empty where `features` are kept."""
    features: tuple[Tensor, ...] | None = None
    """What it gave of each, (V, D) or (R, W), where that is kept."""
    questions: tuple[str, ...] = ()
    """What is asked about each, for projectors that read it."""

    def __len__(self) -> int:
        return len(self.visual_tokens)


def look_up(
    turns: Iterable[Turn], pictures: Mapping[str, PreparedPicture]
) -> tuple[list[PreparedPicture], PictureBatch]:
    """The pictures of turns in their order, one by one and side by side with what is asked about them."""
    shown = [(pictures[key], turn.question) for turn in turns for key in turn.pictures]
    prepared = [picture for picture, _ in shown]
    return prepared, join(prepared, [question for _, question in shown])


def join(pictures: Sequence[PreparedPicture], questions: Sequence[str] = ()) -> PictureBatch:
    """Put pictures side by side; what differs in size is padded with zeros at its end, as processors do."""
    asked = tuple(questions)
    visual = tuple(sum(token == VISUAL for token in picture.ids) for picture in pictures)
    if pictures and all(picture.features is not None for picture in pictures):
        # Arrays may be mapped from disk, read-only, which torch insists on copying.
        kept = tuple(torch.tensor(picture.features) for picture in pictures)
        return PictureBatch(visual, {}, kept, asked)
    names = pictures[0].inputs if pictures else {}
    inputs = {name: _stack([picture.inputs[name] for picture in pictures]) for name in names}
    return PictureBatch(visual, inputs, questions=asked)


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    sizes = [max(tensor.shape[axis] for tensor in tensors) for axis in range(1, tensors[0].ndim)]
    padded = []
    for tensor in tensors:
        missing = [size - have for size, have in zip(sizes, tensor.shape[1:], strict=True)]
        # Padding is told from the last axis to the first.
        padded.append(F.pad(tensor, [pad for size in reversed(missing) for pad in (0, size)]))
    return torch.cat(padded)


class Vision:
    """Tower and projector of one model, by its own `get_image_features`.

    Args:
        root: the module that has it.
        family: what else is known.
        processor: the model's own.
        entrance: the module that takes the tower's states.
    """

    def __init__(self, root: Any, family: Family, processor: Any, entrance: nn.Module) -> None:
        self._root, self._family, self._processor, self._entrance = root, family, processor, entrance
        entrance.register_forward_pre_hook(_together)
        self._names = set(inspect.signature(root.get_image_features).parameters)
        self._image_token = str(getattr(processor, family.image_token, "<image>"))
        self._ids: tuple[int, ...] | None = None
        if family.visual is not None:
            self._ids = (VISUAL,) * family.visual(root.config)

    @property
    def image_token(self) -> str:
        """Stands for a picture in what the chat template renders."""
        return self._image_token

    @property
    def placeholder_id(self) -> int:
        """The token id that a processor writes for each visual token."""
        return int(self._root.config.image_token_id)

    def prepare(self, pictures: Sequence[Image.Image]) -> list[PreparedPicture]:
        """Decoded pictures -> what this model takes of each."""
        if not self._family.one_size:
            return [self._prepare(picture) for picture in pictures]
        # The processor's text side costs more than its picture side, and says the same for every picture.
        if self._ids is None:
            self._ids = self._prepare(pictures[0]).ids
        pixels = self._processor.image_processor(list(pictures), return_tensors="pt")["pixel_values"]
        return [PreparedPicture(self._ids, inputs={"pixel_values": one[None]}) for one in pixels]

    def _prepare(self, picture: Image.Image) -> PreparedPicture:
        try:
            told = self._processor(
                text=[self._image_token], images=[[picture]], return_tensors="pt", add_special_tokens=False
            )
        # Settings that a processor lacks come to light where it computes with them.
        except (TypeError, ValueError, AttributeError) as error:
            raise BackboneError(
                f"the {type(self._processor).__name__} cannot prepare a picture ({error}): save it as the "
                "model was published, with the settings that its class asks for (LLaVA: patch_size and "
                "vision_feature_select_strategy)"
            ) from error
        ids = tuple(
            VISUAL if token == self.placeholder_id else token for token in told["input_ids"][0].tolist()
        )
        inputs = {name: torch.as_tensor(value) for name, value in told.items() if name in self._names}
        grid = tuple(inputs[GRID][0].tolist()) if GRID in inputs else ()
        return PreparedPicture(ids, grid, inputs)

    def see(self, batch: PictureBatch) -> Tensor:
        """Visual tokens of all pictures, one picture after the other, (sum of V, D).

        Models that put features of earlier vision layers into their first language layers too give them
        beside: (sum of V, D + K D).

        Raises:
            BackboneError: the model gives other numbers of visual tokens than its processor says.
        """
        if batch.features is not None:
            device, dtype = self._place()
            # They are kept in 16 bits, which autocast on a CPU cannot join.
            return torch.cat([features.to(device, dtype) for features in batch.features])
        output = self._root.get_image_features(**self.inputs(batch), return_dict=True)
        deep = [_flat(features) for features in getattr(output, "deepstack_features", None) or ()]
        visual = torch.cat([_flat(output.pooler_output), *deep], dim=-1)
        if len(visual) != sum(batch.visual_tokens):
            raise BackboneError(
                f"the model makes {len(visual)} visual tokens of {len(batch)} pictures, its processor has "
                f"places for {sum(batch.visual_tokens)}: the processor was saved for another model"
            )
        return visual

    def tower_states(self, pictures: Sequence[PreparedPicture]) -> list[Tensor]:
        """What the tower hands to the projector of each picture, (R, W)."""
        if pictures[0].features is not None:
            device, dtype = self._place()
            return [torch.tensor(picture.features).to(device, dtype) for picture in pictures]
        if not self._family.one_size:
            return [self._states(join([picture])).flatten(0, -2) for picture in pictures]
        return list(self._states(join(pictures)))

    def tower_states_of(self, pixels: Tensor) -> Tensor:
        """(N, 3, height, width), for models that read pictures so -> (N, R, W)."""
        return self._states(PictureBatch((0,) * len(pixels), {"pixel_values": pixels}))

    def _states(self, batch: PictureBatch) -> Tensor:
        seen = list[Tensor]()

        def keep(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen.append(named["encoder_hidden_states"] if "encoder_hidden_states" in named else given[0])

        hook = self._entrance.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            # What the projector reads besides does not matter here.
            unasked = replace(batch, questions=("",) * len(batch))
            self._root.get_image_features(**self.inputs(unasked), return_dict=True)
        finally:
            hook.remove()
        return seen[0]

    def project_states(self, states_SW: Tensor) -> Tensor:
        """Visual tokens of S pictures that are one state all over, one token of each, (S, D).

        Args:
            states_SW: as the blocks of the tower give them, for a projector that does not resample.
        """
        config, count = self._root.config, len(states_SW)
        assert self._family.merges is not None
        rows = self._family.merges(config)
        device, dtype = self._place()
        side_by_side = self._family.tower_width(config) // states_SW.shape[1]
        states_SRW = states_SW.to(device, dtype).repeat(1, side_by_side)[:, None].repeat(1, rows, 1)
        if "image_sizes" in inspect.signature(self._entrance.forward).parameters:
            side = math.isqrt(rows) * config.vision_config.patch_size
            tokens = self._entrance(states_SRW.flatten(0, 1), [(side, side)] * count)
        else:
            tokens = self._entrance(states_SRW)
        return tokens.reshape(count, -1, tokens.shape[-1])[:, 0]

    def inputs(self, batch: PictureBatch) -> dict[str, Tensor]:
        """Arguments of the model's `get_image_features`."""
        device, dtype = self._place()
        inputs = {
            name: tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
            for name, tensor in batch.inputs.items()
        }
        if self._family.instructed:
            assert len(batch.questions) == len(batch), "this projector reads what is asked about each picture"
            told = self._processor.qformer_tokenizer(list(batch.questions), padding=True, return_tensors="pt")
            inputs |= {name: told[name.removeprefix("qformer_")].to(device) for name in INSTRUCTION}
        return inputs

    def _place(self) -> tuple[torch.device, torch.dtype]:
        weight = next(self._entrance.parameters())
        return weight.device, weight.dtype


def _together(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """States without the class token lie apart, and those of several pictures are then multiplied in another
    way than those of one, which on some processors ends in other bits."""
    return tuple(one.contiguous() if isinstance(one, Tensor) else one for one in given)


def _flat(features: Tensor | Sequence[Tensor]) -> Tensor:
    """(N, V, D), or (V, D) of each -> (sum of V, D)."""
    if isinstance(features, Tensor):
        return features.reshape(-1, features.shape[-1])
    return torch.cat([_flat(one) for one in features])
