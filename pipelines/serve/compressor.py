"""Deployment: demonstrations -> fused tokens, with the bank in front.

    request --> each demonstration: bank? --no--> pictures prepared (pool) --> batcher --> pass (one thread)
            <-- all of them, or packed              kept in the bank  <------------------------'

Demonstrations of all requests meet in the batcher. One that is wanted twice at the same time, by one tenant,
is read once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from mmicl_core.assets import resolve
from mmicl_core.bank import Bank, Demonstration, Fused, Known, PackEntry, UnknownPackError, pack_id
from mmicl_core.bank.entries import demonstration_key, digest_arrays
from mmicl_core.config.serve import ServeConfig
from mmicl_core.errors import BankError, DataError
from mmicl_core.methods import METHODS, read_settings
from mmicl_core.methods.aim import Aim
from pipelines.serve.batcher import Batcher
from pipelines.serve.contracts import Embeddings, FusedTokens, Fusion, PackReference
from pipelines.serve.errors import RequestError
from pipelines.serve.flights import Flights
from pipelines.serve.fusing import Laid, lay_out, read_demonstrations, read_pictures, show, unit_mean
from pipelines.serve.loaded import Loaded, LoadedModels

__all__ = ["Compressor"]

log = logging.getLogger("ray.serve")

PREPARING_THREADS = 2
UNIT_TOLERANCE = 1e-3

Result = TypeVar("Result")


def _as_it_is(fused: tuple[Fused, ...]) -> FusedTokens:
    return fused


class Compressor:
    """Reads each demonstration alone and projects what the backbone made of its text.

    All arithmetic runs on one thread, so that the event loop stays free to accept, answer and cancel.
    Adapters come with `reconfigure`.

    Args:
        backbone: folder of the model, loaded once for all adapters.
        config: of the server.
        put: makes a reference of fused tokens, which travels in their place.
    """

    def __init__(
        self, backbone: Path, config: ServeConfig, put: Callable[[tuple[Fused, ...]], FusedTokens] = _as_it_is
    ) -> None:
        self._config, self._put = config, put
        self._models = LoadedModels(backbone, config.model_name)
        # Models that are known, but not loaded here: they do not fuse.
        self._others = frozenset[str]()
        self._exchange = asyncio.Lock()
        self._bank = Bank(
            Path(config.bank),
            memory_bytes=config.bank_memory_bytes,
            disk_bytes=config.bank_disk_bytes,
            max_packs=config.max_packs,
        )
        self._device = self._models.backbone.device
        self._arithmetic = ThreadPoolExecutor(1, "arithmetic", _one_thread_of_a_cpu, (self._device,))
        self._preparing = ThreadPoolExecutor(PREPARING_THREADS, "preparing")
        self._batcher = Batcher(self._arithmetic, config.batch_image_tokens, config.batch_wait_ms / 1000)
        self._flights = Flights[tuple[Known, bool]]()

    def close(self) -> None:
        """End the threads; what waits fails."""
        for threads in (self._preparing, self._arithmetic):
            threads.shutdown(wait=False, cancel_futures=True)

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Serve these adapters and no others; work under way ends with those that it began with.

        Args:
            user_config: {"adapters": {name: {"folder": ...}}}.

        Raises:
            CheckpointError: one cannot be loaded; all stay as they were.
        """
        folders = {name: resolve(about["folder"]) for name, about in user_config["adapters"].items()}
        async with self._exchange:
            await asyncio.to_thread(self._reload, folders)

    async def check_health(self) -> None:
        """Compute a little, which fails where a GPU has been lost."""

        def compute() -> float:
            return float(torch.ones(1, device=self._device).sum())

        await asyncio.get_running_loop().run_in_executor(self._arithmetic, compute)

    async def fuse(self, model: str, tenant: str, demonstrations: Sequence[Demonstration]) -> Fusion:
        """Fuse; what the bank has of the tenant's demonstrations is not read again.

        Raises:
            DataError: a demonstration cannot be read; says which.
            UnknownModelError: no such model.
            RequestError: the model does not fuse.
        """
        read = await self._read_all(self._fusing(model), tenant, demonstrations)
        known = sum(found for _, found in read)
        return self._fusion([one.fused for one, _ in read], [one.tokens_full for one, _ in read], known)

    async def register(self, model: str, tenant: str, demonstrations: Sequence[Demonstration]) -> PackEntry:
        """Fuse and store as a pack; an equal pack of the tenant is given back as it is.

        Raises:
            BankError: the pack cannot be stored; besides, as `fuse` does.
        """
        loaded = self._fusing(model)
        stored = await asyncio.to_thread(self._stored, loaded, tenant, demonstrations)
        if stored is not None:
            return stored
        known = [one for one, _ in await self._read_all(loaded, tenant, demonstrations)]
        if any(one.vector is None for one in known):
            # A pack without pictures somewhere cannot be chosen from.
            known = [replace(one, vector=None) for one in known]
        maker = loaded.served.maker
        return await asyncio.to_thread(self._bank.put_pack, tenant, model, maker, demonstrations, known)

    async def select(self, model: str, pack: PackReference, pictures: Sequence[bytes], count: int) -> Fusion:
        """The demonstrations of a pack that are nearest to pictures, nearest last (RICES, Yang et al.,
        arXiv:2109.05014); of those that are equally near, the earlier one counts as nearer.

        Raises:
            DataError: a picture cannot be read; says which.
            BankError: the pack is unknown, damaged or of another model.
            RequestError: the pack has fewer demonstrations, or they or the question have no pictures.
        """
        loaded = self._fusing(model)
        stored = await asyncio.to_thread(self._bank.load, pack.tenant, pack.pack_id, loaded.served.maker)
        held = len(stored.fused)
        if not 0 < count <= held:
            raise RequestError(
                f"{count} demonstrations are to be selected of the {held} of pack {pack.pack_id}: ask for 1 "
                f"to {held}",
                "demo_pack.select",
            )
        if stored.vectors is None:
            raise RequestError(
                f"pack {pack.pack_id} has demonstrations without pictures, and the nearest are found by "
                "pictures: leave `select` out",
                "demo_pack.select",
            )
        if not pictures:
            raise RequestError(
                "the question has no pictures, and the nearest demonstrations are found by them: leave "
                "`select` out",
                "demo_pack.select",
            )
        query = unit_mean([vector for vector, _ in await self._look(pictures)])
        if stored.vectors.shape[1] != len(query):
            raise BankError(
                f"pack {pack.pack_id} has vectors of {stored.vectors.shape[1]} numbers, the model's have "
                f"{len(query)}: register its demonstrations again"
            )
        lengths = np.linalg.norm(stored.vectors.astype(np.float64), axis=1)
        if np.any(np.abs(lengths - 1) > UNIT_TOLERANCE):
            # A file that was imported may say anything.
            raise BankError(
                f"pack {pack.pack_id} has vectors of other lengths than 1: register its demonstrations again"
            )
        # All have length 1, so that products are cosines; digits behind those of the vectors tell nothing.
        cosines = np.round(stored.vectors @ query, 6)
        order = np.argsort(-cosines, kind="stable")
        chosen = order[:count][::-1].tolist()
        tokens_full = [stored.entry.tokens_full[number] for number in chosen]
        return self._fusion([stored.fused[number] for number in chosen], tokens_full, count)

    async def embed(self, pictures: Sequence[bytes]) -> Embeddings:
        """Pictures as vectors, in which near ones look alike.

        Raises:
            DataError: a picture cannot be read; says which.
        """
        looked = await self._look(pictures)
        vectors = tuple(tuple(vector.tolist()) for vector, _ in looked)
        return Embeddings(vectors, sum(tokens for _, tokens in looked))

    def _reload(self, folders: Mapping[str, Path]) -> None:
        fuses = {
            name: issubclass(METHODS[read_settings(folder).type], Aim) for name, folder in folders.items()
        }
        self._models.reload({name: str(folders[name]) for name in folders if fuses[name]})
        self._others = frozenset(self._config.model_id(name) for name in folders if not fuses[name])

    def _fusing(self, model: str) -> Loaded:
        loaded = None if model in self._others else self._models.get(model)
        if loaded is None or not loaded.served.fuses:
            able = [other.served.id for other in self._models.all() if other.served.fuses]
            remedy = f"name one that does ({', '.join(able)})" if able else "serve an AIM adapter"
            raise RequestError(f"model {model!r} does not fuse demonstrations: {remedy}", "model")
        return loaded

    async def _read_all(
        self, loaded: Loaded, tenant: str, demonstrations: Sequence[Demonstration]
    ) -> list[tuple[Known, bool]]:
        """What the model makes of each demonstration, and whether the bank had it."""
        if not demonstrations:
            raise DataError("there are no demonstrations to fuse: give one or more")
        keys = await asyncio.to_thread(_keys, loaded, tenant, demonstrations)

        async def read(number: int) -> tuple[Known, bool]:
            demonstration = demonstrations[number]
            try:
                return await self._flights.join(
                    keys[number], lambda: self._read(loaded, tenant, demonstration)
                )
            except (DataError, BankError) as error:
                kind = DataError if isinstance(error, DataError) else BankError
                raise kind(f"demonstration {number + 1} of {len(demonstrations)}: {error}") from error

        return await _together([read(number) for number in range(len(demonstrations))])

    async def _read(self, loaded: Loaded, tenant: str, demonstration: Demonstration) -> tuple[Known, bool]:
        found = await self._prepare(self._find, loaded, tenant, demonstration)
        if isinstance(found, Known):
            return found, True
        known = await self._batcher.submit(read_demonstrations, found)
        await asyncio.to_thread(self._bank.keep, tenant, loaded.served.maker, demonstration, known)
        return known, False

    def _find(self, loaded: Loaded, tenant: str, demonstration: Demonstration) -> Known | Laid:
        known = self._bank.get(tenant, loaded.served.maker, demonstration)
        if known is not None:
            return known
        return lay_out(loaded, demonstration, self._config.max_image_pixels)

    async def _look(self, pictures: Sequence[bytes]) -> list[tuple[Fused, int]]:
        """Vectors of pictures, and how many visual tokens each took."""

        async def look(number: int) -> tuple[Fused, int]:
            try:
                shown = await self._prepare(
                    show, self._models.backbone, pictures[number], self._config.max_image_pixels
                )
            except DataError as error:
                raise DataError(f"picture {number + 1} of {len(pictures)}: {error}") from error
            return await self._batcher.submit(read_pictures, shown), shown.cost

        return await _together([look(number) for number in range(len(pictures))])

    def _stored(
        self, loaded: Loaded, tenant: str, demonstrations: Sequence[Demonstration]
    ) -> PackEntry | None:
        maker = loaded.served.maker
        try:
            entry = self._bank.load(tenant, pack_id(maker, demonstrations), maker).entry
        except UnknownPackError:
            return None
        except BankError as error:
            log.warning("%s; they are here, and are fused anew", error)
            return None
        # What the file of an imported pack says that it was made of, nobody has seen.
        return None if entry.imported else entry

    def _fusion(self, fused: Sequence[Fused], tokens_full: Sequence[int], known: int) -> Fusion:
        arrays = tuple(fused)
        lengths = tuple(len(array) for array in arrays)
        return Fusion(digest_arrays(arrays, None), tuple(tokens_full), lengths, known, self._put(arrays))

    async def _prepare(self, work: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._preparing, work, *arguments)


def _keys(loaded: Loaded, tenant: str, demonstrations: Sequence[Demonstration]) -> list[str]:
    return [demonstration_key(tenant, loaded.served.maker, one) for one in demonstrations]


def _one_thread_of_a_cpu(device: torch.device) -> None:
    """See `fusing`. The number is the process's, which a replica has to itself."""
    if device.type == "cpu":
        torch.set_num_threads(1)


async def _together(work: Sequence[Awaitable[Result]]) -> list[Result]:
    """All results, or the first error; nothing of the others then goes on."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
