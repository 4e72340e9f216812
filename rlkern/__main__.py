"""`python -m rlkern`: what is available on this machine, and why something is not."""

from . import backend_info


def main() -> None:
    for key, value in backend_info().items():
        print(f"{key:<10} {value}")


if __name__ == "__main__":
    main()
