"""`python -m rlkern`: what is available here. `python -m rlkern doctor`: whether it works."""

import argparse
import sys

from . import backend_info
from .doctor import doctor, speed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rlkern", description="What is available on this machine, and why something is not.")
    commands = parser.add_subparsers(dest="command")
    of_doctor = commands.add_parser(
        "doctor", help="test every backend against float64, compare with eager PyTorch, say what to mend; 1 if anything is wrong"
    )
    of_doctor.add_argument("--seconds", type=float, default=speed.SECONDS, help="for the comparison of speed (default: %(default)g; 0 leaves it out)")
    arguments = parser.parse_args()
    if arguments.command == "doctor":
        if not arguments.seconds >= 0:
            parser.error(f"--seconds must be at least 0, got {arguments.seconds}")
        return doctor(arguments.seconds)
    for key, value in backend_info().items():
        print(f"{key:<10} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
