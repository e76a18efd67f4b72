"""How many bytes one worker of a run takes: what ZeRO spreads, what passes, what is kept for the way back.

Nothing is loaded: a method around `outline_backbone` has all sizes and no weights. Of P parameters T are
trained, N workers share, and w is the bytes of a number in the compute type (2 for bf16, 4 for fp32).

**States**, Rajbhandari et al. (arXiv:1910.02054, sections 3 and 5), as DeepSpeed 0.19 holds them with
gradients summed in fp32 (`runtime/bf16_optimizer.py` for stage 1 in bf16, else
`runtime/zero/stage_1_and_2.py` and `stage3.py`):

                 stage 0   stage 1                 stage 2     stage 3
    weights      w P       w P                     w P         w P / N
    masters      0         4 T / N                 4 T / N     4 T / N    fp32, also beside fp32 weights
    gradients    4 T       4 T, in bf16 6 T        4 T / N     4 T / N
    moments      8 T       8 T / N                 8 T / N     8 T / N    Adam's two, fp32; Muon's one is less
    average      4 T       4 T / N                 4 T / N     4 T / N    where the result is one

Offloaded, the optimiser's rows but gradients are on the host, with an fp32 gradient (4 T / N), the root of
its step (4 T / N) and what it sends back (w T / N) or, in stage 3, the sums (4 T / N); offloaded parameters
leave w P / N there. With T = P, DeepSpeed's `estimate_zero2_model_states_mem_needs` says 2 P + 18 P / N: as
here, and 2 P / N of 16-bit gradients, which travel in buckets; `estimate_zero3_model_states_mem_needs` says
18 P / N, as here, and 4 times the largest layer.

**Passing**, of which only what is there at the same time counts:

    loading      w P, as the whole model stands on every device; in stage 3, w P / N and
                 the largest matrix twice
    buckets      what gradients travel in: of all that is trained, at most 5e8 numbers; w bytes each, 4 in
                 stage 1; two where stages 1 and 2 overlap travel with work (GPUs)
    gathered     stage 3: the largest module, the prefetch bucket (5e7), and what is needed again within 1e9
                 numbers (`stage3_max_reuse_distance`): at the turn from forward to backward the last 5e8;
                 at most w P
    step         the root that Adam divides by and, where sums are not in one row yet, that row: 4 bytes of
                 T / N each

**Activations**: see `Block`, `activations`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from mmicl_core.backbones.hugging_face import ROLES
from mmicl_core.config.train import TrainConfig
from mmicl_core.errors import ConfigError
from mmicl_core.methods.base import Method
from mmicl_core.training.hardware import Hardware, casts, compute_width, micro_batch_of

__all__ = [
    "Activations",
    "Block",
    "PromptShape",
    "Role",
    "States",
    "activations",
    "count_roles",
    "read_block",
    "spread",
]

REDUCE_BUCKET, PREFETCH_BUCKET, KEPT_AT_THE_TURN = 500_000_000, 50_000_000, 500_000_000
QUERY, KEY, VALUE = ("q_proj", "q", "query"), ("k_proj", "k", "key"), ("v_proj", "v", "value")
JOINT = ("qkv",)
# What activations keep that are written out in python; the others keep what they are given.
WRITTEN_OUT: Mapping[str, int] = {"QuickGELUActivation": 2, "NewGELUActivation": 4}
OUTPUT = ("o_proj", "out_proj", "o", "proj", "projection", "projection_layer")


@dataclass(frozen=True)
class Role:
    """Parameters of one role of the backbone, or of the method itself (`module`)."""

    name: str
    parameters: int
    trained: int


@dataclass(frozen=True)
class States:
    """Bytes of one worker under one way of spreading, apart from activations; on the device by kind."""

    stage: int
    offload_optimizer: bool
    offload_parameters: bool
    weights: int
    masters: int
    gradients: int
    moments: int
    average: int
    loading: int
    buckets: int
    gathered: int
    step: int
    host: int

    @property
    def held(self) -> int:
        """On the device all the time."""
        return self.weights + self.masters + self.gradients + self.moments + self.average

    def peak(self, working: int) -> int:
        """Most on the device at once, `working` being all activations: these are gone when the step is taken,
        as are the buckets but those of stage 3."""
        kept = self.buckets if self.stage == 3 else 0
        training = self.held + max(working + self.buckets + self.gathered, kept + self.step)
        return max(training, self.loading)

    @property
    def name(self) -> str:
        """As a line of the plan says it."""
        outside = ["optimizer"] * self.offload_optimizer + ["parameters"] * self.offload_parameters
        return f"stage {self.stage}" + (f", {' and '.join(outside)} on the host" if outside else "")


@dataclass(frozen=True)
class PromptShape:
    """What the longest prompt is made of."""

    tokens: int
    """L, its positions."""
    scored: int
    """Answer tokens."""
    pictures: int = 1
    """That it shows; matters where they come as pixels."""
    patches: int | None = None
    """Positions of one picture in the vision tower; None takes the square that it is made for."""


@dataclass(frozen=True)
class Activations:
    """Bytes that one micro-batch takes on one worker."""

    language: int
    """Kept for the way back by the language model."""
    vision: int
    """Kept by the vision tower, where it takes gradients."""
    beside: int
    """Kept by what is trained beside both: the projector, the method's own module; an upper bound."""
    passing: int
    """Largest of what comes and goes: scores of all words, one layer's gradients, a frozen tower's block."""

    @property
    def total(self) -> int:
        """All at once."""
        return self.language + self.vision + self.beside + self.passing


@dataclass(frozen=True)
class Block:
    """What one transformer block keeps for the way back, in numbers for each token of its input.

    What needs a gradient flows through frozen matrices too, but a frozen matrix keeps nothing: its product's
    derivative is the matrix. As torch records it (counted in the tests by `saved_tensors_hooks`):

        norms       an RMSNorm computes in fp32: its input in 4 bytes, a root; nn.LayerNorm keeps its input in
                    w bytes, mean and deviation; one that is trained also what its weight multiplies
        attention   queries, keys, values and output. Keys and values repeated for all heads where a batch is
                    padded, and then the mask in numbers, L for each token, and for each head where positions
                    are told by a bias (T5); `eager` keeps L x L for each head, in fp32 and, beside bf16, in
                    16 bits, and not the output
        inner       what goes into the activation, more where python writes it out; with a gate also what
                    comes out and what it multiplies
        matrices    of those that are trained, their inputs, once for all that share one
    """

    queries: int
    keys: int
    inner: int
    trained: int
    """Inputs of trained matrices and norms, of a low-rank update's second matrix too."""
    root_norms: tuple[int, ...]
    layer_norms: tuple[int, ...]
    biased: bool = False
    """Attention adds a bias for each head."""

    def token_bytes(self, width: int, *, heads: int, length: int, attention: str, padded: bool) -> int:
        """Bytes for each token of prompts of `length` tokens.

        Args:
            padded: prompts of a batch differ in length.
        """
        repeated = attention == "eager" or (attention == "sdpa" and padded)
        numbers = self.queries + 2 * (self.queries if repeated else self.keys) + self.inner + self.trained
        if attention == "eager":
            seen = heads * length * (4 + (width if width < 4 else 0))
        else:
            numbers += self.queries
            masks = heads if self.biased else int(padded)
            seen = 4 * heads + (width * length * masks if attention == "sdpa" else 0)
        norms = sum(4 * size + 4 for size in self.root_norms)
        norms += sum(width * size + 8 for size in self.layer_norms)
        return width * numbers + seen + norms

    def backward_bytes(self, width: int, stream: int) -> int:
        """Gradients that are there at once on the way back, for each token: of a gated layer's three inner
        values or of attention's four, and of what enters and leaves the block."""
        return width * (max(self.inner, 2 * self.queries + 2 * self.queries) + 2 * stream)


def read_block(block: nn.Module) -> Block:
    """Sizes of a block, by the names that transformers gives its matrices."""
    matrices = [
        (name.split("."), part) for name, part in block.named_modules() if isinstance(part, nn.Linear)
    ]
    plain = [(path, part) for path, part in matrices if not {"lora_A", "lora_B"} & set(path)]

    def named(names: tuple[str, ...]) -> list[nn.Linear]:
        return [part for path, part in plain if set(names) & set(path)]

    joint = named(JOINT)
    queries = joint[0].out_features // 3 if joint else named(QUERY)[0].out_features
    keys = queries if joint else named(KEY)[0].out_features
    attending = {*QUERY, *KEY, *VALUE, *JOINT}
    entering = [part for path, part in plain if attending & set(path)]
    rest = [part for path, part in plain if not (attending | set(OUTPUT)) & set(path)]
    wide = [part for part in rest if part.out_features >= part.in_features]
    acts = max(WRITTEN_OUT.get(type(part).__name__, 1) for part in block.modules())
    inner = wide[0].out_features * (acts + (2 if len(wide) > 1 else 0))
    biased = any("relative_attention_bias" in name for name, _ in block.named_modules())
    updated = {id(host) for path, part in matrices if "lora_A" in path for host in _hosts(path, plain)}
    trains = {id(part) for part in entering + rest if part.weight.requires_grad} | updated
    narrow = [part for part in rest if part not in wide]
    trained = sum(
        group[0].in_features
        for group in (entering, wide, narrow)
        if any(id(part) in trains for part in group)
    )
    trained += sum(part.out_features for path, part in matrices if "lora_A" in path)
    sizes = {"q_norm": queries, "k_norm": keys}
    root, plain_norms, kept = _norms(block, sizes)
    return Block(queries, keys, inner, trained + kept, root, plain_norms, biased)


def _norms(module: nn.Module, sizes: Mapping[str, int]) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Widths of RMSNorms and of nn.LayerNorms, and what trained ones of the first kind keep besides.

    Args:
        sizes: widths of norms by name that are put to use on each head.
    """
    root, plain, kept = list[int](), list[int](), 0
    for name, part in module.named_modules():
        weight = dict(part.named_parameters(recurse=False)).get("weight")
        if type(part).__name__.endswith("Norm") and weight is not None:
            full = sizes.get(name.rpartition(".")[2], weight.numel())
            (plain if isinstance(part, nn.LayerNorm) else root).append(full)
            kept += full if weight.requires_grad and not isinstance(part, nn.LayerNorm) else 0
    return tuple(root), tuple(plain), kept


def _around_blocks(language_model: nn.Module) -> tuple[Block, bool]:
    """What is kept beside the blocks, as a block without matrices: the last norm; and whether there are rows
    of sines and cosines."""
    last = [part for part in language_model.children() if type(part).__name__.endswith("Norm")]
    turns = any("rotary" in name for name, _ in language_model.named_children())
    root, plain, kept = _norms(nn.ModuleList(last), {})
    return Block(0, 0, 0, kept, root, plain), turns


def _hosts(path: list[str], plain: list[tuple[list[str], nn.Linear]]) -> Iterator[nn.Linear]:
    above = path[: path.index("lora_A")]
    return (part for other, part in plain if other[: len(above)] == above)


def count_roles(method: Method) -> tuple[Role, ...]:
    """Parameters by role; each belongs to one."""
    backbone, roles = method.backbone, list[Role]()
    owners = {id(p): role for role in ROLES for _, p in backbone.role_parameters(role)}
    for name in (*ROLES, "module"):
        owned = [p for p in method.parameters() if owners.get(id(p), "module") == name]
        trained = sum(p.numel() for p in owned if p.requires_grad)
        roles.append(Role(name, sum(p.numel() for p in owned), trained))
    return tuple(roles)


def spread(
    method: Method, train: TrainConfig, hardware: Hardware, stage: int, *, optimizer: bool, parameters: bool
) -> States:
    """Bytes of one worker, by the formulas above.

    Args:
        optimizer: it is offloaded, as are
        parameters.
    """
    width, share = compute_width(train, hardware), 1 if stage == 0 else hardware.workers
    everything = sum(p.numel() for p in method.parameters())
    trained = sum(role.trained for role in count_roles(method))
    largest = max(sum(p.numel() for p in part.parameters(recurse=False)) for part in method.modules())
    mine = math.ceil(trained / share)
    weights = width * (math.ceil(everything / share) if stage == 3 else everything)
    plain = stage == 1 and width == 2 and not optimizer
    summed = 4 * (mine if stage > 1 else trained) + (2 * trained if plain else 0)
    whole = stage == 0 or plain or hardware.device == "cpu"
    bucket = (width if stage > 1 else 4) * min(trained, REDUCE_BUCKET)
    twice = 2 if stage in (1, 2) and not whole else 1
    fetched = min(everything, largest + PREFETCH_BUCKET + KEPT_AT_THE_TURN) if stage == 3 else 0
    rows = 1 if stage == 0 or (stage in (1, 2) and width == 2) else 2
    average = 4 * mine if train.ema is not None else 0
    sent = 4 if stage == 3 or width == 4 else width
    host = ((4 + 8 + 4 + 4 + sent) * mine + average if optimizer else 0) + (weights if parameters else 0)
    return States(
        stage,
        optimizer,
        parameters,
        weights=0 if parameters else weights,
        masters=0 if optimizer or stage == 0 else 4 * mine,
        gradients=0 if optimizer and stage == 3 else summed,
        moments=0 if optimizer else 8 * mine,
        average=0 if optimizer else average,
        loading=width * (math.ceil(everything / share) + 2 * largest if stage == 3 else everything),
        buckets=bucket * twice,
        gathered=width * fetched,
        step=0 if optimizer else 4 * mine * rows,
        host=host,
    )


def activations(method: Method, train: TrainConfig, hardware: Hardware, prompt: PromptShape) -> Activations:
    """What one micro-batch takes, all prompts as long as the longest.

    Counted: each block (`Block`); with gradient checkpointing only what enters it, and one block again on the
    way back; sines and cosines, the final norm; scores of all words at scored positions alone, of which at
    most three sets in fp32 are there at once; under autocast the 16-bit copy of each matrix, which is kept,
    as it is what the way back multiplies by. Of an encoder-decoder the decoder counts as blocks and a half at
    scored positions. Not counted: ids, masks of whole batches, and what is read under `no_grad` beforehand,
    which comes and goes.
    """
    backbone, stored = method.backbone, compute_width(train, hardware)
    cast = stored == 4 and casts(train, hardware)
    width, batch = 2 if cast else stored, micro_batch_of(train, hardware.workers)
    padded = batch > 1 or backbone.family.attends != "causal"
    behind = any(role.trained for role in count_roles(method) if role.name != "head")
    vision, looking = _vision(method, train, width, batch * prompt.pictures, prompt.patches)
    beside = stored * batch * prompt.tokens * _beside(method)
    if method.reads == "pictures" or not behind:
        return Activations(0, vision, beside, looking)
    config, blocks = backbone.text_config, len(backbone.layers)
    block, stream, heads = read_block(backbone.layers[0]), backbone.width, int(config.num_attention_heads)
    shape: dict[str, Any] = {
        "heads": heads,
        "length": prompt.tokens,
        "attention": train.attention,
        "padded": padded,
    }
    each = block.token_bytes(width, **shape)
    kept = stored * stream if train.gradient_checkpointing else each
    rest, turns = _around_blocks(backbone.language_model)
    around = rest.token_bytes(width, heads=0, length=0, attention="sdpa", padded=False)
    around += 2 * stored * block.queries // heads if turns else 0
    language = batch * prompt.tokens * (blocks * kept + around)
    if backbone.family.decoder is not None:
        crossing = 2 * width * block.keys * prompt.tokens
        language += batch * blocks * (crossing + 3 * prompt.scored * each // 2)
    if cast:
        matrices = (part for part in backbone.language_model.modules() if isinstance(part, nn.Linear))
        language += 2 * sum(part.weight.numel() for part in matrices)
    again = each if train.gradient_checkpointing else 0
    passing = batch * prompt.tokens * (again + block.backward_bytes(width, stream))
    scores = 12 * batch * prompt.scored * int(config.vocab_size)
    return Activations(language, vision, beside, max(passing, scores, looking))


def _vision(
    method: Method, train: TrainConfig, width: int, pictures: int, patches: int | None
) -> tuple[int, int]:
    """Bytes that the vision tower keeps for the way back, and what passes; neither where it does not run."""
    backbone, blocks = method.backbone, method.backbone.vision_layers
    roles = {role.name: role.trained for role in count_roles(method)}
    if (method.takes != "pixels" and method.reads != "pictures") or blocks is None:
        return 0, 0
    about = backbone.model.config.vision_config.to_dict()
    if patches is None and "image_size" in about and "patch_size" in about:
        patches = (int(about["image_size"]) // int(about["patch_size"])) ** 2
    if patches is None:
        raise ConfigError(
            f"the vision tower of {backbone.family.model_type} takes pictures of any size, and this method "
            "trains with pixels: say how many patches a picture has"
        )
    heads = int(about.get("num_attention_heads") or about["num_heads"])
    block, stream = read_block(blocks[0]), backbone.family.block_width(backbone.model.config)
    shape: dict[str, Any] = {"heads": heads, "length": patches, "attention": train.attention, "padded": False}
    each = pictures * patches * block.token_bytes(width, **shape)
    passing = pictures * patches * block.backward_bytes(width, stream)
    # Prompts inside the tower are the method's own parameters; other methods put none before it.
    if not roles["vision_tower"] and not (method.takes == "pixels" and roles["module"]):
        return 0, each
    if train.gradient_checkpointing and roles["vision_tower"]:
        # Blocks compute again that are in training mode, as those of a trained tower are.
        return len(blocks) * pictures * patches * width * stream, each + passing
    return len(blocks) * each, passing


def _beside(method: Method) -> int:
    """Numbers that trained matrices outside of both models keep for each of their tokens, in and out."""
    backbone = method.backbone
    inside = {
        id(part)
        for module in (backbone.language_side, backbone.vision_tower, backbone.head)
        for part in module.modules()
    }
    parts = (part for part in method.modules() if isinstance(part, nn.Linear) and id(part) not in inside)
    return sum(part.in_features + part.out_features for part in parts if part.weight.requires_grad)
