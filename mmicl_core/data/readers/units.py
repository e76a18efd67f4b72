"""The files of a corpus as pieces of work."""

from __future__ import annotations

from mmicl_core.data.readers.base import Unit
from mmicl_core.data.storage import Location
from mmicl_core.errors import DataError

__all__ = ["find_units"]


def find_units(location: Location, corpus: str, suffixes: tuple[str, ...]) -> list[Unit]:
    """One unit for each file that ends in one of `suffixes`, in name order.

    Raises:
        DataError: there is none; or two differ only in their suffix, so that their pictures would share keys.
    """
    units = [Unit(file.path, 0, file.size, file.time_ns) for file in location.find(*suffixes)]
    if not units:
        which = f" that fits {location.pattern!r}" if location.pattern else ""
        raise DataError(
            f"{location.uri} holds no {' or '.join(suffixes)} file{which}: {corpus} lies in these"
        )
    met: dict[str, str] = {}
    for unit in units:
        if unit.key in met:
            raise DataError(
                f"{location.uri} holds {met[unit.key]} and {unit.path}, whose pictures would share keys: "
                "move one of them away, or rename it"
            )
        met[unit.key] = unit.path
    return units
