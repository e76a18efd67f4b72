"""The models of one replica: a backbone, loaded once, and the adapters around it.

    backbone (folder) --+-- base model            NAME
                        +-- adapter, around it    NAME@ADAPTER
                        +-- its own copy -- adapter that changes the backbone (LoRA, LCL, M2PT)

Adapters are exchanged while others are answering: whoever holds a `Loaded` keeps what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mmicl_core.backbones.decoding import context_length
from mmicl_core.backbones.hugging_face import HuggingFaceBackbone, load_for_inference
from mmicl_core.config.serve import ADAPTER_MARK
from mmicl_core.errors import CheckpointError, MmiclError
from mmicl_core.methods import METHODS, load_method, read_settings
from mmicl_core.methods.adapter import adapter_identity
from mmicl_core.methods.aim import Aim
from mmicl_core.methods.base import Method, Plain
from mmicl_core.prompts import Turn
from pipelines.serve.contracts import ServedModel
from pipelines.serve.errors import UnknownModelError

__all__ = ["Loaded", "LoadedModels"]

FORMAT = "3"
"""Of what fused tokens are; another number makes packs of other ones unusable."""
BASE = "base"
WARM_UP_TOKENS = 2


@dataclass(frozen=True)
class Loaded:
    """One model, ready to be asked."""

    served: ServedModel
    method: Method
    identity: str
    """Names all weights that decide what it answers."""


class LoadedModels:
    """The base model, and one for each adapter.

    Args:
        backbone: folder of the model; it goes to a GPU where there is one.
        name: what requests call the base model.
    """

    def __init__(self, backbone: Path, name: str) -> None:
        self._folder, self._name = backbone, name
        self.backbone: HuggingFaceBackbone = load_for_inference(backbone)
        plain = Plain(self.backbone)
        self._base = Loaded(self._served(name, BASE, plain), plain, self._identity())
        self._loaded = {name: self._base}
        _warm_up(plain)

    def reload(self, adapters: Mapping[str, str]) -> None:
        """Serve these adapters and no others, all at once. Those whose files did not change stay as they are.

        Args:
            adapters: name -> folder.

        Raises:
            CheckpointError: one cannot be loaded; all stay as they were.
        """
        loaded = {self._name: self._base}
        for adapter, folder in adapters.items():
            model = f"{self._name}{ADAPTER_MARK}{adapter}"
            try:
                loaded[model] = self._load(model, Path(folder))
            except CheckpointError:
                raise
            except (MmiclError, OSError) as error:
                raise CheckpointError(f"adapter {adapter!r} in {folder} cannot be used: {error}") from error
        self._loaded = loaded

    def get(self, model: str) -> Loaded:
        """A model by what requests call it.

        Raises:
            UnknownModelError: it is not served here; names those that are.
        """
        loaded = self._loaded
        if model not in loaded:
            raise UnknownModelError(
                f"model {model!r} is not served here, these are: {', '.join(loaded)}", "model"
            )
        return loaded[model]

    def all(self) -> tuple[Loaded, ...]:
        """All of them, the base model first."""
        return tuple(self._loaded.values())

    def _load(self, model: str, folder: Path) -> Loaded:
        adapter = adapter_identity(folder)
        known = self._loaded.get(model)
        if known is not None and known.identity == self._identity(adapter):
            return known
        kind = read_settings(folder).type
        changes = METHODS[kind].changes_backbone
        method = load_method(folder, load_for_inference(self._folder) if changes else self.backbone)
        return Loaded(self._served(model, kind, method, adapter), method, self._identity(adapter))

    def _identity(self, adapter: str = BASE) -> str:
        return f"{self.backbone.identity}/{adapter}"

    def _served(self, model: str, kind: str, method: Method, adapter: str = BASE) -> ServedModel:
        maker = {
            "format": FORMAT,
            "backbone": self.backbone.identity,
            "template": method.chat.example,
            "adapter": adapter,
            # Packs from elsewhere are held to it.
            "width": str(self.backbone.width),
        }
        return ServedModel(model, kind, isinstance(method, Aim), maker, context_length(self.backbone))


def _warm_up(method: Method) -> None:
    """Answer once: what libraries prepare at their first call is not waited for by whoever asks first."""
    question = Turn(("",), "What is this?", None)
    method.answer(method.arrange([[question]], {"": method.blank_picture}, "left"), WARM_UP_TOKENS)
