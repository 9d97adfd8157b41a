"""A data set in four IDX files: found locally or downloaded, and verified either way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparring.core.errors import DataError
from sparring.data import fetch, idx, places
from sparring.data.images import Dataset, Raw
from sparring.data.named import Named, Request


@dataclass(frozen=True)
class IdxFile:
    """One file: its name without `.gz`, its rank, and the SHA-256 of its unpacked bytes.

    The unpacked bytes are what is verified, since copies get gzipped anew and servers unpack in transit.
    """

    name: str
    rank: int
    sha256: str

    @property
    def spellings(self) -> list[str]:
        """The file names under which it is accepted."""
        dotted = self.name.replace("-idx", ".idx")
        return [f"{self.name}.gz", self.name, f"{dotted}.gz", dotted]


@dataclass(frozen=True)
class IdxSet(Named):
    """A data set whose files are train images, train labels, test images and test labels."""

    classes: tuple[str, ...]
    mirrors: tuple[str, ...]
    files: tuple[IdxFile, IdxFile, IdxFile, IdxFile]

    def available(self, data_dir: Path | None) -> bool:
        return all(self._find(file, data_dir) for file in self.files)

    def load(self, request: Request) -> Dataset:
        arrays = [idx.decode(self._read(file, request), file.rank, file.name) for file in self.files]
        train, test = Raw(f"{self.name}/train", *arrays[:2]), Raw(f"{self.name}/test", *arrays[2:])
        return Dataset.checked(self.name, train, test, self.classes)

    def _find(self, file: IdxFile, data_dir: Path | None) -> Path | None:
        spots = (folder / name for folder in places.folders(self.name, data_dir) for name in file.spellings)
        return next((path for path in spots if path.is_file()), None)

    def _read(self, file: IdxFile, request: Request) -> bytes:
        path = self._find(file, request.data_dir)
        if path is None:
            return self._download(file, request)
        request.on_status(f"reading {path}")
        remedy = f"delete or replace it; files of {self.name} may have a folder {self.name}/ of their own"
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: expected a readable file, got {error}; mend or replace it") from error
        return idx.unpack(data, str(path), file.sha256, remedy)

    def _download(self, file: IdxFile, request: Request) -> bytes:
        if places.offline() or not request.download:
            forbidden = "$SPARRING_OFFLINE is set" if places.offline() else "download is off"
            raise DataError(self._missing(file, request, f"not downloaded, since {forbidden}"))
        try:
            sent, content = fetch.first_good(
                [f"{mirror}{file.name}.gz" for mirror in self.mirrors],
                lambda data, url: idx.unpack(data, url, file.sha256, "nothing was kept"),
                request.on_status,
            )
        except DataError as error:
            raise DataError(self._missing(file, request, str(error))) from error
        suffix = "" if sent == content else ".gz"
        fetch.keep(places.cache() / self.name / f"{file.name}{suffix}", sent)
        return content

    def _missing(self, file: IdxFile, request: Request, reason: str) -> str:
        looked = "\n  ".join(str(folder) for folder in places.folders(self.name, request.data_dir))
        wanted = ", ".join(f"{each.name}.gz" for each in self.files)
        return (
            f"{self.name}: expected {file.name}, gzipped or not, in one of\n  {looked}\n{reason}\n"
            f"to go on without a network, get {wanted} from {' or '.join(self.mirrors)} and put them in one "
            "of these folders, or name theirs with data_dir or $SPARRING_DATA"
        )
