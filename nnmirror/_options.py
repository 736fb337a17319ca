"""The options of `python -m nnmirror`, and the answers that need no torch."""

import argparse
import signal
import sys

DESCRIPTION = """\
Run a PyTorch script, unmodified, with nnmirror in place of torch.nn and torch.optim.

python -m nnmirror script.py args...             instead of: python script.py args...
python -m nnmirror -m package.module args...     instead of: python -m package.module args...
python -m nnmirror --check script.py args...     compare what it prints and saves on both libraries
python -m nnmirror --report script.py            list the names it uses, and which are mirrored
"""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m nnmirror",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python -m nnmirror [options] (script.py | -m module) [args ...]",
        allow_abbrev=False,
    )
    version = sys.modules["nnmirror"].__version__  # of a package that is being imported
    made.add_argument("--version", action="version", version=f"nnmirror {version}")
    made.add_argument(
        "--check",
        action="store_true",
        help="run it on PyTorch and on nnmirror, in exact mode; compare what it prints and saves",
    )
    made.add_argument(
        "--report",
        action="store_true",
        help="list the names of torch.nn and torch.optim that it uses; run nothing",
    )
    made.add_argument(
        "--backend",
        choices=["nnmirror", "torch"],
        default="nnmirror",
        help="what the script gets as torch.nn and torch.optim (default: nnmirror)",
    )
    made.add_argument("--seed", type=int, help="seed the random generators first")
    made.add_argument(
        "--keep",
        metavar="LIBRARY",
        action="append",
        default=[],
        help="leave the models of this library to PyTorch; may be given several times",
    )
    made.add_argument(
        "--mirror",
        metavar="LIBRARY",
        action="append",
        default=[],
        help="run this library, if it is written in Python, as a part of the script",
    )
    made.add_argument(
        "-m", dest="module", nargs=argparse.REMAINDER, help="a module to run, and its arguments"
    )
    made.add_argument("script", nargs=argparse.REMAINDER, help="a script to run, and its arguments")
    return made


def parsed(argv: list[str]) -> argparse.Namespace:
    """The options; it prints the help, the version or what is wrong with them, and exits."""
    options = parser()
    if not argv:
        options.print_help()
        sys.exit()
    found = options.parse_args(argv)
    if not (found.module or found.script):
        options.error("a script to run, or -m and a module")
    return found


def answer_at_once() -> None:
    """Called while Python looks for the module named by `-m`: is it this package?

    If so, it exits here for options that run nothing. Until a script runs, Ctrl-C ends the process
    silently, since a traceback would only show imports.
    """
    named = sys.orig_argv[-len(sys.argv) :][0]
    if named.removeprefix("-m") not in ("nnmirror", "nnmirror.__main__"):
        return
    parsed(sys.argv[1:])
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
