"""The IDX format of MNIST: a magic number, the sizes, then one unsigned byte a value.

Big-endian: two zero bytes, 0x08 for unsigned bytes, the rank, a 32-bit size for each dimension.
Source: Y. LeCun, C. Cortes, C. Burges, The MNIST database of handwritten digits, 1998.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib

import numpy as np
from numpy.typing import NDArray

from sparring.core.errors import DataError


def unpack(data: bytes, source: str, sha256: str, remedy: str) -> bytes:
    """The content of `data`, gzipped or not; `DataError` naming `source` unless it has this SHA-256."""
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            found = f"a damaged gzip ({error})"
            raise DataError(f"{source}: expected unpacked SHA-256 {sha256}, got {found}; {remedy}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise DataError(f"{source}: expected unpacked SHA-256 {sha256}, got {found}; {remedy}")
    return data


def decode(data: bytes, rank: int, source: str) -> NDArray[np.uint8]:
    """The array in `data`, of `rank` dimensions; `DataError` unless every byte is accounted for."""
    magic = bytes([0, 0, 8, rank])
    if data[:4] != magic:
        raise DataError(f"{source}: expected the IDX magic {magic.hex()}, got {data[:4].hex() or 'nothing'}")
    header = 4 + 4 * rank
    if len(data) < header:
        raise DataError(f"{source}: expected an IDX header of {header} bytes, got {len(data)}")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", count=rank, offset=4))
    if len(data) != header + math.prod(shape):
        raise DataError(f"{source}: expected {header + math.prod(shape)} bytes for {shape}, got {len(data)}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
