"""Models, questions and answers for tests of generators."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mmicl_core.backbones.decoding import generate
from mmicl_core.backbones.hugging_face import load_backbone
from mmicl_core.backbones.language import Embedded
from mmicl_core.backbones.vision import join
from mmicl_core.bank import Fused
from mmicl_core.config.serve import ServeConfig
from mmicl_core.methods import load_method
from mmicl_core.methods.aim import Aim
from mmicl_core.prompts import Turn
from mmicl_core.serving.sampling import Sampling
from pipelines.serve.contracts import Event, Finished, Fusion, Piece, Question, Started
from pipelines.serve.pictures import prepare_pictures
from tests.fakes import draw_picture, encode_picture, tiny_backbone
from tests.methods import make_method

__all__ = [
    "ADAPTERS",
    "MAX_PIXELS",
    "by_hand",
    "config_of",
    "demonstrations",
    "finished",
    "fuse",
    "piece_texts",
    "question",
    "started",
    "text",
    "use",
    "user_config",
    "write_models",
    "written_out",
]

MAX_PIXELS, VISUAL_TOKENS = 10_000, 25
ADAPTERS = ("aim", "prompt_tuning", "m2pt", "lora", "mtv")


def write_models(root: Path, adapters: Sequence[str] = ADAPTERS) -> Path:
    tiny_backbone().save(root / "backbone")
    for name in adapters:
        make_method(name, load_backbone(root / "backbone")).save(root / name, {})
    return root


def config_of(folder: Path, **more: Any) -> ServeConfig:
    given = {"model_name": "tiny", "max_image_pixels": MAX_PIXELS, "bank": str(folder / "bank"), **more}
    return ServeConfig.model_validate(given)


def user_config(folder: Path, *names: str) -> dict[str, Any]:
    return {"adapters": {name: {"folder": str(folder / name), "identity": ""} for name in names}}


def use(generator: Any, *questions: Question) -> list[tuple[Event, ...]]:
    """Answers to questions that are asked at the same time."""

    async def all_of_them() -> list[tuple[Event, ...]]:
        return list(await asyncio.gather(*(generator.answer(one) for one in questions)))

    return asyncio.run(all_of_them())


def question(words: str = "This is", *, most: int = 6, **more: Any) -> Question:
    """About one picture, behind `before` with its `pictures`."""
    turns = (*more.pop("before", ()), Turn(more.pop("about", ("query",)), words, None))
    pictures = {**more.pop("pictures", {}), "query": encode_picture(draw_picture(99))}
    shown = {key for turn in turns for key in turn.pictures}
    samplings = more.pop("samplings", (Sampling(most),))
    seconds, model = more.pop("seconds", 60.0), more.pop("model", "tiny")
    kept = {key: picture for key, picture in pictures.items() if key in shown}
    return Question(model, turns, kept, samplings, seconds, **more)


def demonstrations(count: int) -> list[tuple[bytes, str, str]]:
    return [(encode_picture(draw_picture(seed)), "This is", "bako" * (1 + seed % 3)) for seed in range(count)]


def written_out(count: int, prefix: str | None = None) -> dict[str, Any]:
    """Earlier turns of a question."""
    shown = demonstrations(count)
    turns = [Turn((f"{number}",), asked, said) for number, (_, asked, said) in enumerate(shown)]
    pictures = {f"{number}": picture for number, (picture, _, _) in enumerate(shown)}
    return {"before": turns, "pictures": pictures, "prefix": prefix}


def fuse(folder: Path, count: int, adapter: str = "aim") -> Fusion:
    """Demonstrations as the adapter fuses them."""
    backbone = load_backbone(folder / "backbone")
    method = load_method(folder / adapter, backbone)
    assert isinstance(method, Aim)
    pictures = dict(
        zip("abcdefgh", backbone.prepare([draw_picture(seed) for seed in range(count)]), strict=False)
    )
    turns = [
        Turn((key,), asked, said)
        for key, (_, asked, said) in zip(pictures, demonstrations(count), strict=True)
    ]
    with torch.no_grad():
        states_TD = method.reader.read(method.reader.pack(turns, pictures))
        arrays = tuple(one.numpy() for one in method.fuse_to_keep(states_TD))
    for array in arrays:
        array.setflags(write=False)
    full = tuple(len(array) + VISUAL_TOKENS for array in arrays)
    lengths = tuple(len(array) for array in arrays)
    return Fusion(f"{adapter}/{count}", full, lengths, 0, arrays)


def by_hand(folder: Path, asked: Question, fused: Sequence[Fused] = ()) -> str:
    """Prefix, fused tokens, turns, put together one by one: what `generate` says to them."""
    backbone = load_backbone(folder / "backbone")
    chat = backbone.chat
    pictures = dict(
        zip(
            asked.pictures, prepare_pictures(backbone, list(asked.pictures.values()), MAX_PIXELS), strict=True
        )
    )

    def embed(piece: Any) -> Any:
        if piece.kind == "image":
            return backbone.see(join([pictures[piece.reference]]))
        return backbone.model.get_input_embeddings()(torch.tensor(piece.ids))

    parts = [
        *map(embed, chat.prefix()),
        *map(torch.tensor, fused),
        *(embed(piece) for turn in asked.turns for piece in chat.turn(turn)),
    ]
    embeds_BLD = torch.cat(parts)[None]
    mask_BL = torch.ones(embeds_BLD.shape[:2], dtype=torch.long)
    nothing_BL = torch.zeros_like(mask_BL, dtype=torch.bool)
    prompt = Embedded(embeds_BLD, mask_BL, nothing_BL, nothing_BL, mask_BL.cumsum(1) - 1)
    (ids,) = generate(backbone, prompt, asked.samplings[0].max_new_tokens)
    return chat.decode(ids)


def started(events: Sequence[Event]) -> Started:
    (first,) = [event for event in events if isinstance(event, Started)]
    assert events[0] is first
    return first


def finished(events: Sequence[Event]) -> Mapping[int, Finished]:
    return {event.index: event for event in events if isinstance(event, Finished)}


def piece_texts(events: Sequence[Event], index: int = 0) -> list[str]:
    return [event.text for event in events if isinstance(event, Piece) and event.index == index]


def text(events: Sequence[Event], index: int = 0) -> str:
    return "".join(piece_texts(events, index))
