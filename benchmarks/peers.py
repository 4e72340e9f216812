"""Unpacks what `make peers` fetched, for a machine without a network.

Wheels whole, without dependencies; of a source archive the package's Python files, for their Triton kernels.
One line for each.
"""

import sys
import tarfile
import zipfile
from pathlib import Path


def unpack_wheel(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)


def unpack_sources(path: Path, target: Path) -> None:
    with tarfile.open(path) as archive:
        for member in archive:
            file = Path(*Path(member.name).parts[1:])
            if member.isfile() and file.suffix == ".py" and file.parts[0] == path.name.split("-")[0] and ".." not in file.parts:
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                (target / file).write_bytes(archive.extractfile(member).read())


def main() -> int:
    folder, target = map(Path, sys.argv[1:])
    found = sorted([*folder.glob("*.whl"), *folder.glob("*.tar.gz")])
    if not found:
        print(f"{folder} holds no wheel and no source archive: only the peers that this Python already has are measured")
    failed = False
    for path in found:
        try:
            (unpack_wheel if path.suffix == ".whl" else unpack_sources)(path, target)
            print(f"unpacked {path.name}")
        except (OSError, ValueError, KeyError, tarfile.TarError, zipfile.BadZipFile) as error:
            failed = True
            print(f"{path.name}: {type(error).__name__}: {error}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
