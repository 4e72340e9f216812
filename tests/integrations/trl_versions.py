"""The TRL tests with each known release: `make trl-versions`. Prints the table of docs/trainers/trl.md.

Every release is installed without its dependencies into a folder that goes before the installed one, and is
thrown away afterwards.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

RELEASES = ("1.16.0", "1.15.0", "1.14.2")
HERE = Path(__file__).resolve().parent


def tests_with(release: str) -> tuple[bool, str]:
    """Whether they passed, and pytest's last line."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-deps", "--target", folder, f"trl=={release}"]
        subprocess.run(pip, check=True)
        environment = os.environ | {"PYTHONPATH": folder}
        check = [sys.executable, "-W", "ignore", "-c", "import trl; print(trl.__version__)"]
        imported = subprocess.run(check, env=environment, capture_output=True, text=True, check=True).stdout.strip()
        if imported != release:
            raise RuntimeError(f"asked for TRL {release}, Python imports {imported}")
        files = [str(HERE / name) for name in ("test_trl.py", "test_trl_runs.py", "test_trl_distillation.py", "test_trl_distillation_runs.py")]
        command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", *files, *sys.argv[1:]]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parent.parent)
        if result.returncode:
            print(result.stdout[-6000:])
        return result.returncode == 0, result.stdout.strip().splitlines()[-1]


def main() -> int:
    others = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "accelerate", "peft", "torch"))
    failed, rows = False, []
    for release in RELEASES:
        passed, line = tests_with(release)
        failed |= not passed
        counts = ", ".join(re.findall(r"\d+ (?:passed|failed|skipped|error\w*)", line))
        rows.append(f"| {release} | {'yes' if passed else 'NO'} | {counts} |")
        print(f"TRL {release}: {line}", flush=True)
    print(f"\nWith {others}, Python {sys.version.split()[0]}:\n\n| TRL | works | tests |\n|---|---|---|\n" + "\n".join(rows))
    return failed


if __name__ == "__main__":
    sys.exit(main())
