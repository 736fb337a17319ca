"""`python -m nnmirror`: see `_options.py` for what it does."""

import argparse
import signal
import sys

from . import adopt, check, report, runner
from ._options import parsed, parser

INTERRUPTED = 128 + signal.SIGINT  # as a shell has it


def main(argv: list[str]) -> int | None:
    args = parsed(argv)
    if args.check or args.report:
        try:
            return look_at(args)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
    what, *rest = args.module or args.script
    if args.seed is not None:
        runner.seed_all(args.seed)
    if args.backend == "nnmirror":
        adopt.kept.update(args.keep)
        runner.as_scripts.update(args.mirror)
        report.warn(what, bool(args.module))
    run = runner.run_module if args.module else runner.run_script
    run(what, rest, mirror=args.backend == "nnmirror")
    return None


def look_at(args: argparse.Namespace) -> int:
    """`--report`, `--check` or both; the exit status."""
    is_module, arguments = bool(args.module), args.module or args.script
    what = arguments[0]
    try:
        sources = report.read(what, is_module)
    except (OSError, SyntaxError) as e:
        parser().error(f"{what} cannot be read: {e}")
    status = 0
    if args.report:
        found = report.uses(sources, load=True)
        print(report.render(found), flush=True)
        status = 0 if all(use.mirrored for use in found) else 1
    if args.check:
        seeds = [f"{source.file}:{line}" for source in sources for line in source.seeds]
        libraries = [f"--keep={library}" for library in args.keep]
        libraries += [f"--mirror={library}" for library in args.mirror]
        status |= check.check([*["-m"] * is_module, *arguments], seeds, args.seed or 0, libraries)
    return status


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see answer_at_once
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
