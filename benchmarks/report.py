"""The GPU kernels judged without a GPU: what the compiler makes of each, for each architecture.

    python benchmarks/report.py [--arch sm_90 ...] [--all | --others | --common | --variants] [--json FILE]
        [--waves]

Exits with 2 for an unknown architecture, and where Triton or its disassemblers are missing.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

# The kernels must compile, not be interpreted, and come from this checkout if the package is not installed.
os.environ.pop("TRITON_INTERPRET", None)
for folder in (Path(__file__).parent, Path(__file__).parents[1]):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compiles every Triton kernel without a GPU, prints what became of it and the bound it predicts.")
    parser.add_argument("--arch", nargs="+", metavar="ARCH", help="architectures to compile for (default: all that are known)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="every variant on every type and row layout, minutes instead of seconds")
    which.add_argument("--others", action="store_true", help="only those that are left out without --all")
    which.add_argument("--common", action="store_true", help="of the usual variants only those in bfloat16 on the common row layout")
    which.add_argument("--variants", action="store_true", help="only the launch shapes that variants.py times on an H100")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of these only every Nth (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--waves", action="store_true", help="also predict what splitting rows over several programs is worth, by the number of rows")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compiler processes (default: one per core)")
    options = parser.parse_args(argv)
    try:
        from offline import build, cases, report, table, tokens, waves

        archs = options.arch or list(build.TARGETS)
        for arch in archs:
            build.target(arch)
        for tool in build.NVIDIA_TOOLS:
            build.nvidia_tool(tool)
    except (ImportError, FileNotFoundError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    started = time.perf_counter()
    if options.variants:
        from variants import launch_cases

        chosen = launch_cases()
    else:
        choice = "all" if options.all else "others" if options.others else "common" if options.common else "core"
        chosen = {"all": cases.all_cases, "others": cases.other_cases, "common": cases.common_cases, "core": cases.core_cases}[choice]()[
            :: options.every
        ]
    token_types = tuple(tokens.DTYPES) if options.all else ("fp64",) if options.others else ("fp32",)
    rows = report.analyse_all(chosen, archs, options.jobs)
    over_tokens = [] if options.variants else [row for arch in archs for row in tokens.analyse(arch, token_types)]
    print("\n\n".join([table.text(rows)] + ([tokens.text(over_tokens)] if over_tokens else [])))
    if options.waves:
        print(f"\n{waves.text(rows)}\n")
    print(f"{len(rows) + len(over_tokens)} kernels in {time.perf_counter() - started:.0f} s, triton {build.triton.__version__}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        document = {"triton": build.triton.__version__, "rows": table.data(rows), "tokens": tokens.data(over_tokens)}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
