"""`python -m rlkern`: what is available here. `python -m rlkern doctor`: whether it works."""

import argparse
import math
import sys

from . import __version__, backend_info
from .doctor import doctor, speed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rlkern", description="What is available on this machine, and why something is not.")
    parser.add_argument("--version", action="version", version=f"rlkern {__version__}")
    commands = parser.add_subparsers(dest="command")
    of_doctor = commands.add_parser(
        "doctor", help="test every backend against float64, compare with eager PyTorch, say what to mend; 1 if anything is wrong"
    )
    of_doctor.add_argument("--seconds", type=float, default=speed.SECONDS, help="for the comparison of speed (default: %(default)g; 0 leaves it out)")
    arguments = parser.parse_args()
    if arguments.command == "doctor":
        if not 0 <= arguments.seconds < math.inf:
            of_doctor.error(f"--seconds must be a number from 0 on, got {arguments.seconds}")
        return doctor(arguments.seconds)
    for key, value in backend_info().items():
        print(f"{key:<10} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
