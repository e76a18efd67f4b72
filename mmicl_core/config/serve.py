"""Settings of the server."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from mmicl_core.config.base import Config

__all__ = ["ADAPTER_MARK", "DemonstrationMode", "ReplicasConfig", "ServeConfig", "VllmConfig"]

DemonstrationMode = Literal["full", "fused", "auto"]
ADAPTER_MARK = "@"
"""Between the name of the base model and that of an adapter, in the `model` of requests."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class ReplicasConfig(Config):
    """How many processes a deployment has, and when there are more or fewer."""

    fewest: int = Field(default=1, ge=0)
    """Replicas while nothing is asked; 0 ends the last one too, and the next request waits until one has
    loaded."""

    most: int = Field(default=1, ge=1)
    """Replicas under load."""

    requests_each: float = Field(default=8, gt=0)
    """Requests under way, for each replica, that the number of replicas is steered to."""

    at_once: int = Field(default=16, ge=1)
    """Requests that one replica takes at the same time; others wait in the queue."""

    queued: int = Field(default=64, ge=1)
    """Requests that wait for a replica; further ones are refused with 429 and Retry-After."""

    upscale_seconds: float = Field(default=5, ge=0)
    """Of load before replicas are added."""

    downscale_seconds: float = Field(default=300, ge=0)
    """Without load before replicas end."""

    cpus: float = Field(default=0.5, ge=0)
    """Of a node, reserved for each replica."""

    gpus: float | None = Field(default=None, ge=0)
    """The same of GPUs; None shares those of the cluster evenly among all replicas."""

    @model_validator(mode="after")
    def _steers_within_bounds(self) -> Self:
        if self.fewest > self.most:
            raise ValueError(f"fewest ({self.fewest}) must not exceed most ({self.most})")
        if self.requests_each > self.at_once:
            raise ValueError(
                f"requests_each ({self.requests_each:g}) must not exceed at_once ({self.at_once}), which a "
                "replica never has more of: no replica would ever be added"
            )
        return self


class VllmConfig(Config):
    """vLLM in the place of the project's own engine: it runs the language model of the backbone alone, on
    prompts as embeddings."""

    language_model: str
    """Folder of the language model, in the form that vLLM loads."""

    memory_share: float = Field(default=0.6, gt=0, le=1)
    """Of the GPU's memory that vLLM takes; the vision tower needs room beside it."""


class ServeConfig(Config):
    """The OpenAI-compatible server: an ingress, compressor replicas and generator replicas."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 answers other machines too, which needs `keys`."""

    port: int = Field(default=8000, ge=1, le=65535)
    """TCP port."""

    model_name: str = "nano"
    """The `model` that names the base model in requests."""

    adapters: dict[str, str] = {"aim": "embedded:nano_aim"}
    """Folders of trained adapters by name; requests name one as MODEL_NAME@NAME."""

    demonstrations: DemonstrationMode = "auto"
    """What becomes of earlier turns where a request does not say: `full` writes them out, `fused` fuses them
    all, `auto` fuses those with pictures that come first, where the model named can."""

    ingress_replicas: int = Field(default=1, ge=1)
    """Processes that take HTTP apart. Of two, one takes over at once what is asked again when the other dies.
    Limits of keys and metrics are those of each."""

    ingress_per_node: int | None = Field(default=None, ge=1)
    """The most of them on one node; None leaves it to Ray, which may put all on the same. With 1, a node that
    is lost takes one of them along, and a cluster needs as many nodes."""

    compressor: ReplicasConfig = ReplicasConfig()
    """Replicas that turn demonstrations into fused tokens."""

    generator: ReplicasConfig = ReplicasConfig()
    """Replicas that answer."""

    rows: int = Field(default=16, ge=1)
    """Answers that grow at the same time in one generator."""

    prefix_bytes: int = Field(default=256 * 2**20, ge=0)
    """Of keys and values of packs and earlier turns that a generator keeps; 0 keeps none."""

    batch_image_tokens: int = Field(default=4096, ge=1)
    """Visual tokens that the compressor reads in one pass; it bounds the pass's memory."""

    batch_wait_ms: float = Field(default=2, ge=0)
    """Milliseconds that the compressor waits for further demonstrations to read in the same pass."""

    bank: str = "runs/bank"
    """Folder of the demonstration bank, which keeps packs over a restart. Replicas on several nodes need one
    that all of them see: a shared file system."""

    bank_memory_bytes: int = Field(default=64 * 2**20, ge=0)
    """Of fused tokens that a replica keeps in memory before the bank's files."""

    bank_disk_bytes: int = Field(default=2 * 2**30, ge=0)
    """Of fused tokens of demonstrations without a pack that are kept on disk; those not used for longest go
    first."""

    max_new_tokens: int = Field(default=64, ge=1)
    """Tokens of an answer where the request does not say."""

    max_choices: int = Field(default=8, ge=1)
    """Most answers of one request (`n`)."""

    max_images: int = Field(default=64, ge=1)
    """Most pictures of one request."""

    max_text_characters: int = Field(default=2**17, ge=1)
    """Most characters of all texts of one request: a generator takes texts apart while all others wait."""

    max_image_bytes: int = Field(default=4 * 2**20, ge=1024)
    """Largest picture, as sent."""

    max_image_pixels: int = Field(default=16_000_000, ge=1)
    """Largest picture, decoded: a small file can hold a huge one."""

    max_packs: int = Field(default=1000, ge=1)
    """Most packs that one tenant keeps."""

    request_seconds: float = Field(default=120, gt=0)
    """Until a request ends with 504; requests may ask for less (`timeout_seconds`)."""

    media_hosts: tuple[str, ...] = ()
    """Hosts that pictures may be loaded from by http(s) URL; a leading dot allows all below it. None by
    default."""

    media_networks: tuple[str, ...] = ()
    """Networks (10.1.0.0/16) that `media_hosts` may lie in although they are not public."""

    media_seconds: float = Field(default=10, gt=0)
    """To load one picture."""

    keys: str | None = None
    """File of API keys, hashed, as `mmicl serve keys add` writes it; without one everybody is let in."""

    requests_per_minute: int | None = Field(default=None, ge=1)
    """Of one key; further ones are refused with 429. Without keys, of all together."""

    requests_at_once: int | None = Field(default=None, ge=1)
    """Of one key that are under way; further ones are refused with 429. Without keys, of all together."""

    playground: bool = True
    """Whether `/` is a page to try the server."""

    vllm: VllmConfig | None = None
    """Answer by vLLM; see its limits in `pipelines.serve.vllm_generator`."""

    @field_validator("model_name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        if NAME.fullmatch(name) is None:
            raise ValueError(f"{name!r} is no name: use letters, digits, dots, dashes and underscores")
        return name

    @field_validator("adapters")
    @classmethod
    def _are_named(cls, adapters: dict[str, str]) -> dict[str, str]:
        for name in adapters:
            cls._is_a_name(name)
        return adapters

    @model_validator(mode="after")
    def _strangers_need_a_key(self) -> Self:
        if self.host not in LOOPBACK and self.keys is None:
            raise ValueError(
                f"host {self.host} answers other machines, but keys is none, which lets everybody in: make "
                "some with `mmicl serve keys add NAME --file FILE` and set keys to FILE"
            )
        return self

    def model_id(self, adapter: str | None) -> str:
        """The `model` of requests to the base model (None), or to it with an adapter."""
        return self.model_name if adapter is None else f"{self.model_name}{ADAPTER_MARK}{adapter}"

    @property
    def model_ids(self) -> tuple[str, ...]:
        """All that requests may name, the base model first."""
        return tuple(self.model_id(adapter) for adapter in (None, *self.adapters))
