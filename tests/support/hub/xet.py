"""
The xet path of the test Hub. The real hf_xet accepts `local://<folder>` in place of a server and writes its xorbs
(compressed chunks) and shards (the chunks of each file) there. This module reads them.
"""

from pathlib import Path

_SHARD_END = b"\xff" * 32
_HAS_VERIFICATION, _HAS_METADATA = 0x80000000, 0x40000000
_ENTRY = 48  # bytes of each record of a shard, its header included


class LocalXet:
    """The files that hf_xet has written to a folder, by SHA-256."""

    def __init__(self, root: Path):
        self.root = root.absolute()
        self.root.mkdir(parents=True, exist_ok=True)
        self._seen: set[str] = set()
        self._files: dict[str, list[tuple[str, int, int]]] = {}  # sha256: [(xorb, first chunk, chunk after the last)]

    @property
    def url(self) -> str:
        """The address that the client writes to."""
        return f"local://{self.root}"

    def read(self, sha256: str) -> bytes | None:
        """The content of a file; `None` if it was never uploaded."""
        if sha256 not in self._files:
            self._scan()
        if sha256 not in self._files:
            return None
        return b"".join(self._chunks(*segment) for segment in self._files[sha256])

    def _scan(self) -> None:
        for path in self.root.glob("xet/xorbs/shards/*.mdb"):
            if path.name not in self._seen:
                self._seen.add(path.name)
                self._read_shard(path.read_bytes())

    def _read_shard(self, data: bytes) -> None:
        at = _ENTRY
        while data[at : at + 32] != _SHARD_END:
            flags, count = _integer(data, at + 32), _integer(data, at + 36)
            at += _ENTRY
            records = range(at, at + _ENTRY * count, _ENTRY)
            segments = [(_hash(data, r), _integer(data, r + 40), _integer(data, r + 44)) for r in records]
            at += _ENTRY * count * (2 if flags & _HAS_VERIFICATION else 1)
            if flags & _HAS_METADATA:
                self._files[_hash(data, at)] = segments
                at += _ENTRY

    def _chunks(self, xorb: str, first: int, after: int) -> bytes:
        data, at, out = (self.root / "xet/xorbs/xorbs" / f"default.{xorb}").read_bytes(), 0, []
        for index in range(after):
            packed, scheme, size = _integer(data, at + 1, 3), data[at + 4], _integer(data, at + 5, 3)
            if index >= first:
                chunk = data[at + 8 : at + 8 + packed]
                out.append(
                    _ungroup(_lz4_frame(chunk), size) if scheme == 2 else _lz4_frame(chunk) if scheme else chunk
                )
                assert len(out[-1]) == size
            at += 8 + packed
        return b"".join(out)


def _integer(data: bytes, at: int, size: int = 4) -> int:
    return int.from_bytes(data[at : at + size], "little")


def _hash(data: bytes, at: int) -> str:
    """Text of a hash: four little-endian 64-bit numbers."""
    return "".join(f"{_integer(data, at + 8 * i, 8):016x}" for i in range(4))


def _ungroup(data: bytes, size: int) -> bytes:
    """Undo the grouping of every fourth byte, which makes floats compress better."""
    out, at = bytearray(size), 0
    for i in range(4):
        length = (size - i + 3) // 4
        out[i::4] = data[at : at + length]
        at += length
    return bytes(out)


def _lz4_frame(data: bytes) -> bytes:
    assert data[:4] == b"\x04\x22\x4d\x18", "not an LZ4 frame"
    flags, at, out = data[4], 6, bytearray()
    at += 8 * bool(flags & 8) + 4 * bool(flags & 1) + 1
    while size := _integer(data, at):
        at += 4
        block = data[at : at + (size & 0x7FFFFFFF)]
        at += len(block) + 4 * bool(flags & 16)
        if size & 0x80000000:
            out += block
        else:
            _lz4_block(block, out)
    return bytes(out)


def _lz4_block(data: bytes, out: bytearray) -> None:
    at = 0

    def length(nibble: int) -> int:
        nonlocal at
        total = nibble
        while nibble == 15:
            total += data[at]
            at += 1
            if data[at - 1] != 255:
                break
        return total

    while at < len(data):
        token = data[at]
        at += 1
        literals = length(token >> 4)
        out += data[at : at + literals]
        at += literals
        if at >= len(data):
            return
        offset = _integer(data, at, 2)
        at += 2
        matched = length(token & 15) + 4
        pattern = bytes(out[-offset:])
        out += (pattern * (matched // offset + 1))[:matched]
