"""For CMAKE_CXX_COMPILER_LAUNCHER: an object compiled before, of the same csrc/ and options, is copied.

    compile_once.py FOLDER c++ -O3 ... -o object -c .../csrc/source.cpp

The folder keeps the objects. Options are all arguments without a path. Nothing is optimised: that takes most
of the time, and the build that the other tests run on does it.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path


def main(folder: str, *command: str) -> int:
    source, compiled = (Path(command[command.index(option) + 1]) if option in command else Path() for option in ("-c", "-o"))
    if source.parent.name != "csrc":  # CMake tries the compiler, or links
        return subprocess.run(command).returncode
    key = hashlib.sha256("\n".join([source.name, *(a for a in command[1:] if "/" not in a)]).encode())
    for file in sorted(source.parent.iterdir()):
        key.update(file.name.encode() + file.read_bytes())
    kept = Path(folder, key.hexdigest())
    if not kept.exists():
        if code := subprocess.run([*command, "-O0"]).returncode:  # the last such option counts
            return code
        unfinished = kept.with_suffix(f".{os.getpid()}")
        shutil.copyfile(compiled, unfinished)
        unfinished.rename(kept)
    shutil.copyfile(kept, compiled)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
