"""The processor of a model folder, for pictures and text alone.

Several families hold a video processor beside their image processor, and that one needs torchvision. No
video is ever shown to a model here, so where torchvision is missing a stand-in takes its place:

    folder --AutoTokenizer, AutoImageProcessor--> parts + stand-in --> the family's own processor class
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, TokenizersBackend
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.processing_utils import ProcessorMixin
from transformers.utils.import_utils import is_torchvision_available
from transformers.video_processing_utils import BaseVideoProcessor

from mmicl_core.errors import BackboneError

__all__ = ["load_processor"]

# Where a processor class may be named, in the order in which transformers looks.
NAMING_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "config.json")


class PixtralProcessor(ProcessorMixin):
    """As transformers' own, which cannot be imported without torchvision though nothing in it needs that.

    Of a picture it writes rows of image tokens, each ended by a break token and the last by an end token.
    """

    text_kwargs: Any = {"return_tensors": "pt"}
    images_kwargs: Any = {"return_tensors": "pt"}

    # transformers reads from these parameters which parts and settings a folder may hold.
    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int = 16,
        spatial_merge_size: int = 1,
        chat_template: str | None = None,
        image_token: str = "[IMG]",
        image_break_token: str = "[IMG_BREAK]",
        image_end_token: str = "[IMG_END]",
        **_: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)  # type: ignore[no-untyped-call]
        self.patch_size = patch_size
        self.spatial_merge_size = spatial_merge_size
        self.image_token = image_token
        self.image_break_token = image_break_token
        self.image_end_token = image_end_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.image_token_ids = tokenizer.convert_tokens_to_ids(
            [image_token, image_break_token, image_end_token]
        )

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_: Any) -> str:
        """The tokens that stand for a picture."""
        side = self.patch_size * self.spatial_merge_size
        rows, columns = (int(size) // side for size in image_inputs["image_sizes"][image_idx])
        text = (self.image_token * columns + self.image_break_token) * rows
        return text.removesuffix(self.image_break_token) + self.image_end_token

    def _process_images(self, images: Any, **settings: Any) -> Any:
        # A picture's sides must be whole numbers of merged patches.
        return super()._process_images(
            images, **settings | {"patch_size": self.patch_size * self.spatial_merge_size}
        )


class _NoVideos(BaseVideoProcessor):
    """Stands in a video processor's place, takes nothing, and is saved as what the folder said of videos."""

    # SmolVLM asks for these whenever it renders its chat template.
    num_frames: int | None = None
    fps: float | None = None

    def __init__(self, said: Mapping[str, Any]) -> None:
        # The constructor of the base class needs torchvision.
        self._said = dict(said)

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse.

        Raises:
            BackboneError: always.
        """
        raise BackboneError("videos are not prepared here: show the model single pictures instead")

    def to_dict(self) -> dict[str, Any]:
        """What is written into the processor's folder."""
        return dict(self._said)


def load_processor(folder: Path) -> Any:
    """What `AutoProcessor.from_pretrained` gives, also without torchvision; videos it then refuses.

    Raises:
        BackboneError: the folder holds no processor, or one that lacks a file, a token or a package.
    """
    if not folder.is_dir():
        raise BackboneError(f"{folder} is no folder: name the folder that the model was saved in")
    try:
        processor = _load(folder)
    except BackboneError:
        raise
    except ImportError as error:
        raise BackboneError(
            f"the processor in {folder} needs a package that is not installed: {str(error).strip()}"
        ) from error
    # Of a torn file the tokenizer library tells by a bare Exception.
    except Exception as error:
        raise BackboneError(
            f"the processor in {folder} cannot be loaded: {str(error).strip()}: put the processor's and "
            "tokenizer's files there as the model was published"
        ) from error
    if not isinstance(processor, ProcessorMixin):
        raise BackboneError(
            f"{folder} holds a {type(processor).__name__} and no processor of pictures and text: add the "
            "model's processor_config.json or preprocessor_config.json"
        )
    return processor


def _load(folder: Path) -> Any:
    if is_torchvision_available():
        return AutoProcessor.from_pretrained(folder)
    name = _class_name(folder)
    kind: Any = PixtralProcessor if name == PixtralProcessor.__name__ else getattr(transformers, name, None)
    if kind is None or (kind is not PixtralProcessor and "video_processor" not in kind.get_attributes()):
        return AutoProcessor.from_pretrained(folder)
    said, _ = kind.get_processor_dict(folder)
    parts = [_part(part, kind, folder) for part in kind.get_attributes()]
    # Every part is compared with a class, and that of video processors cannot be looked up.
    unchecked: Any = type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda *_: None})
    processor: Any = unchecked.from_args_and_dict(parts, said)
    processor.__class__ = kind
    return processor


def _class_name(folder: Path) -> str:
    for file in NAMING_FILES:
        path = folder / file
        said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if named := said.get("processor_class"):
            return str(named)
    known = PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(folder)), None)
    return str(getattr(known, "__name__", ""))


def _part(part: str, kind: Any, folder: Path) -> Any:
    if part == "video_processor":
        return _NoVideos(_said_of_videos(folder))
    if part == "image_processor":
        return AutoImageProcessor.from_pretrained(folder)
    if part == "tokenizer":
        # Folders of Mistral name a tokenizer class that would split words differently.
        source: Any = TokenizersBackend if kind is PixtralProcessor else AutoTokenizer
        return source.from_pretrained(folder)
    raise BackboneError(
        f"the {kind.__name__} in {folder} has a {part}, which is loaded only together with its video "
        "processor: install the package torchvision"
    )


def _said_of_videos(folder: Path) -> Mapping[str, Any]:
    try:
        said, _ = BaseVideoProcessor.get_video_processor_dict(folder)
    # It says nothing.
    except OSError:
        return {}
    return said
