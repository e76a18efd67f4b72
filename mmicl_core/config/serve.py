"""Settings of the server."""

from __future__ import annotations

from pydantic import Field

from mmicl_core.config.base import Config

__all__ = ["ServeConfig"]


class ServeConfig(Config):
    """The OpenAI-compatible server: an ingress, compressor replicas and generator replicas."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 answers other machines too."""

    port: int = Field(default=8000, ge=1, le=65535)
    """TCP port."""

    model_name: str = "nano"
    """The `model` that requests name."""

    adapter: str = "embedded:nano_aim"
    """Folder of the trained AIM adapter."""

    compressor_replicas: int = Field(default=1, ge=1)
    """Processes that turn demonstrations into fused tokens."""

    generator_replicas: int = Field(default=1, ge=1)
    """Processes that answer."""

    bank: str = "runs/bank"
    """Folder of the demonstration bank, which keeps packs over a restart."""

    max_new_tokens: int = Field(default=64, ge=1)
    """Tokens of an answer where the request does not say."""

    max_images: int = Field(default=64, ge=1)
    """Most pictures of one request."""

    max_image_bytes: int = Field(default=4 * 2**20, ge=1024)
    """Largest picture, as sent."""

    max_image_pixels: int = Field(default=16_000_000, ge=1)
    """Largest picture, decoded: a small file can hold a huge one."""
