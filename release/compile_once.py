"""For CMAKE_CXX_COMPILER_LAUNCHER: an object compiled before, of the same csrc/ and options, is copied.

    compile_once.py [--unoptimised] FOLDER c++ -O3 ... -o object -c .../csrc/source.cpp

The folder keeps the objects. What they depend on is csrc/, the options that are no paths, and which Python's
headers are among the paths. Optimising takes most of the time: the tests of packaging do without.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path


def main(folder: str, *command: str) -> int:
    quick = ["-O0"] if folder == "--unoptimised" else []  # the last such option counts
    if quick:
        folder, *command = command
    source, compiled = (Path(command[command.index(option) + 1]) if option in command else Path() for option in ("-c", "-o"))
    if source.parent.name != "csrc":  # CMake tries the compiler, or links
        return subprocess.run(command).returncode
    options = [argument for argument in (*command[1:], *quick) if "/" not in argument]
    key = hashlib.sha256("\n".join([source.name, *options, *sorted(set(re.findall(r"python3\.\d+", " ".join(command))))]).encode())
    for file in sorted(source.parent.iterdir()):
        key.update(file.name.encode() + file.read_bytes())
    kept = Path(folder, key.hexdigest())
    if not kept.exists():
        if code := subprocess.run([*command, *quick]).returncode:
            return code
        unfinished = kept.with_suffix(f".{os.getpid()}")
        shutil.copyfile(compiled, unfinished)
        unfinished.rename(kept)
    shutil.copyfile(kept, compiled)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
