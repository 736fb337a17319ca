"""Run a PyTorch script, unmodified, on the mirror.

python -m nnmirror script.py args...             in place of: python script.py args...
python -m nnmirror -m package.module args...     in place of: python -m package.module args...
python -m nnmirror --check script.py args...     on both: is what it prints and saves identical?
python -m nnmirror --report script.py            which names it uses, and are they mirrored?
"""

import argparse
import sys

from . import adopt, check, report, runner


def main(argv: list[str]) -> int | None:
    parser = argparse.ArgumentParser(
        prog="python -m nnmirror",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python -m nnmirror [options] (script.py | -m module) [args ...]",
        allow_abbrev=False,
    )
    parser.add_argument("--check", action="store_true", help="compare a run on each backend")
    parser.add_argument("--report", action="store_true", help="list the names, run nothing")
    parser.add_argument("--backend", choices=["nnmirror", "torch"], default="nnmirror")
    parser.add_argument("--seed", type=int, help="seed the random generators first")
    parser.add_argument(
        "--keep", metavar="LIBRARY", action="append", default=[], help="its models stay PyTorch's"
    )
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="run a module")
    parser.add_argument("script", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    arguments = args.module or args.script
    if not arguments:
        parser.error("a script to run, or -m and a module")
    what, rest = arguments[0], arguments[1:]
    if not (args.check or args.report):
        if args.seed is not None:
            runner.seed_all(args.seed)
        if args.backend == "nnmirror":
            adopt.kept.update(args.keep)
            report.warn(what, bool(args.module))
        run = runner.run_module if args.module else runner.run_script
        run(what, rest, mirror=args.backend == "nnmirror")
        return None
    try:
        sources = report.read(what, bool(args.module))
    except (OSError, SyntaxError) as e:
        parser.error(f"{what} cannot be read: {e}")
    status = 0
    if args.report:
        found = report.uses(sources, load=True)
        print(report.render(found), flush=True)
        status = 0 if all(use.mirrored for use in found) else 1
    if args.check:
        seeds = [f"{source.file}:{line}" for source in sources for line in source.seeds]
        keep = [f"--keep={library}" for library in args.keep]
        arguments = [*["-m"] * bool(args.module), *arguments]
        status |= check.check(arguments, seeds, args.seed or 0, keep)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
