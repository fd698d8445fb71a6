"""The command line: ``python -m vattn`` and the console script ``vattn``.

Exit status: 0 fine; 1 a check failed (a token that was not what was written, tokens that differ) or the machine did; 2
bad usage or bad input, with one line on standard error and no traceback. Each command's module is imported when it
runs, so ``info`` needs nothing but Python. Thread: the main one.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from vattn.errors import Error
from vattn.tools import options
from vattn.tools.options import CheckError, Parser, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = make_parser()
    try:
        args = parser.parse_args(argv)
        if args.version or args.cmake_dir or args.pkgconfig_dir:
            return _about(args)
        if args.command is None:
            parser.error("give a command: info, plan, replay, demo or bench")
        status = _run(args)
        sys.stdout.flush()
        return status
    except UsageError as error:
        return _fail(2, f"error: {_one_line(error)}")
    except CheckError as error:
        return _fail(1, f"check failed: {_one_line(error)}")
    except Error as error:
        return _fail(1, f"{type(error).__name__}: {_one_line(error)}")
    except BrokenPipeError:
        # The reader has gone (`vattn plan | head`): say nothing, and keep the interpreter's own flush at exit quiet
        # too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _fail(130, "interrupted")


def _fail(status: int, message: str) -> int:
    print(f"vattn: {message}", file=sys.stderr)
    return status


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _run(args: argparse.Namespace) -> int:
    if args.command == "info":
        from vattn.tools.info import run
    elif args.command == "plan":
        from vattn.tools.plan import run
    elif args.command == "replay":
        from vattn.tools.replay import run
    elif args.command == "bench":
        from vattn.bench.runner import run
    else:
        from vattn.tools.demo import run
    return run(args)


def _about(args: argparse.Namespace) -> int:
    from vattn.tools.info import version

    if args.version:
        print(f"vattn {version()}")
    if args.cmake_dir:
        print(_folder_of("lib/cmake/vattn", "vattnConfig.cmake"))
    if args.pkgconfig_dir:
        print(_folder_of("lib/pkgconfig", "vattn.pc"))
    return 0


def _folder_of(folder: str, file: str) -> str:
    """The package's folder of that name, with the file that a C++ project's build looks for in it."""
    import vattn

    # Every place of the package: an editable install keeps its Python files in one and what was built in another.
    places = [Path(place) / folder for place in vattn.__path__]
    for place in places:
        if (place / file).is_file():
            return str(place.resolve())
    raise UsageError(f"no {file} in {places[0]}: this copy of vattn is not an installed one; run pip install on it")


def make_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(prog="vattn", description="Growable contiguous tensors for LLM KV caches.")
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("--cmake-dir", action="store_true", help="print the folder that holds vattnConfig.cmake")
    help_pkgconfig = "print the folder that holds vattn.pc, for PKG_CONFIG_PATH"
    parser.add_argument("--pkgconfig-dir", action="store_true", help=help_pkgconfig)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_info(commands)
    _add_plan(commands)
    _add_replay(commands)
    _add_demo(commands)
    _add_bench(commands)
    return parser


def _add_info(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "info", help="what is there and what is missing", description="What is there and what is missing."
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def _add_plan(commands: argparse._SubParsersAction[Parser]) -> None:
    about = "How many requests fit a budget, what pages cost, and which to use, by arithmetic."
    parser = commands.add_parser("plan", help="how many requests fit a budget", description=about)
    options.add_geometry(parser)
    options.add_pages(parser, page_size="2MiB")
    parser.add_argument(
        "--memory", type=options.size, default="40GiB", metavar="SIZE", help="the budget (default: 40GiB)"
    )
    parser.add_argument(
        "--tokens",
        type=options.token_counts,
        metavar="N[,N...]",
        help="typical lengths of a request, prompt and answer together (default: 1000,4000,16000 up to --max-seq-len)",
    )
    help_waste = "what the suggested pages may waste of the memory of the shortest of --tokens (default: 5)"
    parser.add_argument("--max-waste", type=options.percent, default=5.0, metavar="PERCENT", help=help_waste)
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def _add_replay(commands: argparse._SubParsersAction[Parser]) -> None:
    about = (
        "Continuous batching of a request trace through a real cache, beside paging with blocks of 16 tokens and a "
        "static cache on the same budget. The trace is a CSV file with the columns TIMESTAMP, ContextTokens and "
        "GeneratedTokens."
    )
    parser = commands.add_parser("replay", help="run a request trace through a cache", description=about)
    parser.add_argument("trace", metavar="TRACE.csv")
    options.add_geometry(parser)
    options.add_pages(parser, page_size="64KiB on cpu, else 2MiB")
    parser.add_argument("--device", type=_device, default="meta", metavar="meta|cpu|cuda[:N]", help="(default: meta)")
    help_memory = "the budget (default: 40GiB on meta, elsewhere a share of what is free)"
    parser.add_argument("--memory", type=options.size, metavar="SIZE", help=help_memory)
    parser.add_argument("--max-batch", type=options.positive, default=256, metavar="N", help="slots (default: 256)")
    parser.add_argument("--requests", type=options.positive, metavar="N", help="only the first N (default: all)")
    help_iteration = "simulated time of an iteration (default: 25)"
    parser.add_argument("--iteration-ms", type=options.positive_number, default=25.0, metavar="MS", help=help_iteration)
    help_speed = "arrivals X times as fast (default: 1)"
    parser.add_argument("--speed", type=options.positive_number, default=1.0, metavar="X", help=help_speed)
    help_lookahead = (
        "tokens the mapper thread keeps mapped ahead of every request; 0: no such thread (default: the library's on a "
        "device with memory, a page or 64, whichever is more; on meta too)"
    )
    parser.add_argument("--lookahead", type=options.non_negative, metavar="TOKENS", help=help_lookahead)
    help_warm_up = "first prompts left out of the shares that found memory (default: 500)"
    parser.add_argument("--warm-up", type=options.non_negative, default=500, metavar="N", help=help_warm_up)
    help_verify = "write a pattern into every token and check it before the slot is freed (cpu and cuda; needs torch)"
    parser.add_argument("--verify", action="store_true", help=help_verify)
    parser.add_argument("--json", metavar="FILE", help="write the figures there too (-: to standard output, alone)")
    _add_plot(parser, "draw memory and running requests over time")


def _add_demo(commands: argparse._SubParsersAction[Parser]) -> None:
    about = (
        "Generate with DynamicCache and with VattnCache and compare, then a short replay. About a minute without a GPU."
    )
    parser = commands.add_parser("demo", help="see it work, in about a minute", description=about)
    parser.add_argument("--device", type=_device, metavar="cpu|cuda[:N]", help="(default: cuda where there is a GPU)")
    parser.add_argument("--trace", metavar="TRACE.csv", help="replay this trace (default: one made up on the spot)")
    _add_plot(parser, "draw the memory of both caches against tokens")


def _add_plot(parser: Parser, what: str) -> None:
    parser.add_argument("--plot", metavar="FILE.png", help=f"{what} (.png, .svg or .pdf; pip install 'vattn[bench]')")


def _add_bench(commands: argparse._SubParsersAction[Parser]) -> None:
    about = (
        "Measure, beside what one would use instead: a table on the terminal, and in a folder JSON with every sample "
        "and pictures. The same command goes on where a run was cut short."
    )
    parser = commands.add_parser("bench", help="measure it on this machine", description=about)
    parser.add_argument("--suite", choices=("host", "gpu", "all"), default="host", help="(default: host)")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases: about a minute")
    help_out = "the folder (default: vattn-bench-<machine>)"
    parser.add_argument("--out", type=Path, metavar="DIR", help=help_out)
    parser.add_argument("--only", action="append", metavar="NAME", help="this benchmark (may be given again)")
    parser.add_argument("--list", action="store_true", help="print the benchmarks and their questions, and end")
    help_trace = "of the replay (default: VATTN_TRACE, else a made-up one)"
    parser.add_argument("--trace", metavar="TRACE.csv", help=help_trace)
    parser.add_argument("--device", type=_device, default="cuda:0", metavar="cuda[:N]", help="of the GPU suite")
    parser.add_argument("--carried", metavar="DIR", help="kernels carried to a machine without a network")
    parser.add_argument("--fake-cuda", metavar="LIB", help="run the CUDA driver on this fake one: no figure of a GPU")
    help_minutes = "begin no case after so many minutes; the same command goes on"
    parser.add_argument("--minutes", type=options.positive_number, metavar="N", help=help_minutes)
    parser.add_argument("--fresh", action="store_true", help="measure again what is already in the folder")
    parser.add_argument("--check", action="store_true", help="exit with status 1 where a bound is not held")


def _device(text: str) -> str:
    if not re.fullmatch(r"meta|cpu|cuda(:\d{1,4})?", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not meta, cpu, cuda or cuda:N")
    return text
