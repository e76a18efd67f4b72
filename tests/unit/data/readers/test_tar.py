from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mmicl_core.config.corpus import WebdatasetConfig
from mmicl_core.data import reasons
from mmicl_core.data.readers.webdataset import WebdatasetReader
from mmicl_core.data.storage import Location
from tests.fakes import write_tar
from tests.unit.data.readers.shards import (
    BLOCK,
    Elsewhere,
    ends_of_members,
    picture_bytes,
    read,
    sample,
    told,
    zipped,
)


def torn(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Beginnings of a file, in steps that fall into headers, contents and paddings alike."""
    for cut in range(0, len(data), 59):
        yield cut, data[:cut]


def as_it_is(data: bytes) -> bytes:
    return data


@pytest.mark.parametrize(
    ("name", "pack", "where"),
    [("s.tar", as_it_is, Location), ("s.tar", as_it_is, Elsewhere), ("s.tar.gz", zipped, Location)],
)
def test_tar_reader_keeps_every_whole_sample_before_the_place_where_a_shard_ends_early(
    name: str, pack: Callable[[bytes], bytes], where: type[Location], tmp_path: Path
) -> None:
    samples = [sample(f"s{number}", number) for number in range(4)]
    data = write_tar(tmp_path / "whole", [m for members in samples for m in members]).read_bytes()
    _, json_end, first_end, *_ = members_end = ends_of_members(data, 12)
    ends = members_end[2::3]
    for cut, beginning in torn(data[: ends[-1] + BLOCK]):
        (tmp_path / name).write_bytes(pack(beginning))
        *kept, last = read(tmp_path, where=where)
        assert told([last]) == [(name, reasons.BROKEN_FILE)], cut
        # Before another sample, nothing says that a caption is to follow.
        if kept and cut < first_end:
            assert json_end <= cut < first_end - len(samples[0][2][1])
            continue
        whole = sum(end <= cut for end in ends)
        assert told(kept) == [(f"s/s{number}", None) for number in range(whole)], cut
        assert [picture_bytes(tmp_path, row) for row in kept] == [samples[n][0][1] for n in range(whole)]


def test_tar_reader_keeps_every_whole_sample_before_the_place_where_a_gzip_stream_ends(
    tmp_path: Path,
) -> None:
    plain = write_tar(tmp_path / "whole", [m for n in range(4) for m in sample(f"s{n}", n)]).read_bytes()
    ends = ends_of_members(plain, 12)[2::3]
    for _, beginning in torn(zipped(plain)):
        (tmp_path / "s.tgz").write_bytes(beginning)
        *kept, last = read(tmp_path)
        can_be_had = zlib.decompressobj(wbits=31).decompress(beginning)
        whole = sum(end <= len(can_be_had) for end in ends)
        assert told(kept) == [(f"s/s{number}", None) for number in range(whole)]
        assert told([last]) == [("s.tgz", reasons.BROKEN_FILE)]


def test_tar_reader_does_not_give_a_sample_whose_last_member_is_cut(tmp_path: Path) -> None:
    # The picture and the label are there, and the end of the archive is within the caption.
    data = write_tar(tmp_path / "whole", sample("a")).read_bytes()
    (tmp_path / "s.tar").write_bytes(data[: ends_of_members(data, 3)[-1] - 1])
    (row,) = read(tmp_path)
    assert row.skipped == reasons.BROKEN_FILE and "'a.txt'" in row.detail


def overwritten(data: bytes, start: int, filler: bytes) -> bytes:
    return data[:start] + filler + data[start + len(filler) :]


@pytest.mark.parametrize("filler", [b"\xff" * 100, bytes(BLOCK), bytes(4096)], ids=["noise", "zeros", "page"])
@pytest.mark.parametrize("where", [Location, Elsewhere])
def test_tar_reader_says_so_when_a_header_in_the_middle_is_lost(
    filler: bytes, where: type[Location], tmp_path: Path
) -> None:
    members = [m for number in range(6) for m in sample(f"s{number}", number)]
    data = write_tar(tmp_path / "whole", members).read_bytes()
    third_sample = -(-ends_of_members(data, 6)[-1] // BLOCK) * BLOCK
    (tmp_path / "s.tar").write_bytes(overwritten(data, third_sample, filler))
    rows = read(tmp_path, where=where)
    assert told(rows) == [("s/s0", None), ("s/s1", None), ("s.tar", reasons.BROKEN_FILE)]


def test_tar_reader_says_so_when_a_checksum_of_gzip_is_wrong(tmp_path: Path) -> None:
    data = bytearray(write_tar(tmp_path / "s.tar.gz", sample("a")).read_bytes())
    data[-8] ^= 1
    (tmp_path / "s.tar.gz").write_bytes(data)
    assert told(read(tmp_path))[-1] == ("s.tar.gz", reasons.BROKEN_FILE)


def with_size(data: bytes, size: bytes) -> bytes:
    header = bytearray(overwritten(data[:BLOCK], 124, size.ljust(12, b"\0")))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[BLOCK:]


# In base 256: -512 bytes, and more than there are.
@pytest.mark.parametrize("size", [b"\xff" * 10 + b"\xfe\x00", b"\x80" + b"\x00" * 5 + b"\x40" + b"\x00" * 5])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz"])
def test_tar_reader_does_not_believe_the_size_of_a_forged_header(
    name: str, kind: bytes, size: bytes, tmp_path: Path
) -> None:
    data = write_tar(tmp_path / "whole", sample("a")).read_bytes()
    data = with_size(overwritten(data, 156, kind), size)
    (tmp_path / name).write_bytes(zipped(data) if name.endswith("gz") else data)
    rows = read(tmp_path)
    assert [row.skipped for row in rows if row.pair["picture"] == name] == [reasons.BROKEN_FILE]
    assert len(rows) < 3


def test_tar_reader_gives_no_picture_of_less_than_nothing(tmp_path: Path) -> None:
    picture, about, caption = sample("a")
    before = write_tar(tmp_path / "before", [caption, about]).read_bytes()[: 4 * BLOCK]
    forged = with_size(write_tar(tmp_path / "picture", [picture]).read_bytes(), b"\xff" * 10 + b"\xfe\x00")
    (tmp_path / "s.tar").write_bytes(before + forged)
    assert told(read(tmp_path)) == [("s.tar", reasons.BROKEN_FILE)]


def test_tar_reader_reads_no_header_that_is_as_long_as_a_picture(tmp_path: Path) -> None:
    size = 2**21
    member = tarfile.TarInfo("././@LongLink")
    member.size, member.type = size, tarfile.GNUTYPE_LONGNAME
    data = (
        member.tobuf(tarfile.GNU_FORMAT)
        + b"x" * size
        + write_tar(tmp_path / "whole", sample("a")).read_bytes()
    )
    (tmp_path / "s.tar.gz").write_bytes(zipped(data))
    (row,) = read(tmp_path)
    assert row.skipped == reasons.BROKEN_FILE and "2097152 bytes, 1048576 are read at most" in row.detail


def test_tar_reader_says_so_when_headers_never_end(tmp_path: Path) -> None:
    member = tarfile.TarInfo("a.jpg")
    member.pax_headers = {"comment": "x"}
    extended_header = member.tobuf(tarfile.PAX_FORMAT)[: 2 * BLOCK]
    (tmp_path / "s.tar").write_bytes(extended_header * 2000)
    assert told(read(tmp_path)) == [("s.tar", reasons.BROKEN_FILE)]


def test_tar_reader_does_not_take_a_file_with_holes_for_one_piece(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in sample("a"):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            if name == "a.jpg":
                member.pax_headers = {"GNU.sparse.size": "1000", "GNU.sparse.map": f"0,1,999,{len(data) - 1}"}
            archive.addfile(member, io.BytesIO(data))
    assert told(read(tmp_path)) == [("s/a", reasons.NO_PICTURE)]


@pytest.mark.parametrize("content", [b"", b"<html>no such shard</html>" * 100, bytes(100)])
@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz"])
def test_tar_reader_says_so_when_a_shard_is_no_archive(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert told(read(tmp_path)) == [(name, reasons.BROKEN_FILE)]


def test_tar_reader_says_so_when_a_shard_is_gone_once_it_was_listed(tmp_path: Path) -> None:
    reader = WebdatasetReader(Location(str(tmp_path)), WebdatasetConfig())
    shard = write_tar(tmp_path / "s.tar", sample("a"))
    (unit,) = reader.units()
    shard.unlink()
    assert told(list(reader.read(unit))) == [("s.tar", reasons.BROKEN_FILE)]
