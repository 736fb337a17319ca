"""Run a script on PyTorch and on the mirror, and compare what it prints and saves.

Each run starts in a copy of the current directory at the same path, so that the second run does not
see the files of the first and both print the same paths. It compares standard output byte for byte;
every file that was made or changed (files written by torch.save or pickle by their contents: the
bits of tensors, the names of classes and their state, where a class of torch.nn equals the mirror's
of the same name; all others byte for byte); and, if both fail, the last line of the error. Both
runs are in exact mode.
"""

import contextlib
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any, TextIO

import torch

from .testing.compare import number, units_apart

BIG = 64 * 2**20  # bytes: files above are not copied but linked to
MOST = 2 * 2**30  # bytes: more is not copied
_LEFT_OUT = {"__pycache__", "node_modules", "site-packages"}
_BY_DEFAULT = (
    "Both ran in exact mode. By default some layers' gradients differ in the last bits:"
    " nnmirror/exact/README.md"
)
_EVEN_SO = "Both ran in exact mode. The gradients that differ even so: nnmirror/exact/README.md"


@dataclass
class Run:
    """The outcome of one run."""

    name: str
    status: int
    seconds: float
    printed: bytes
    error: bytes  # the last line on standard error
    place: bytes  # the file and the line of the script where a traceback there ends
    directory: Path
    files: list[str]


def check(
    arguments: list[str], seeds: list[str], seed: int = 0, options: Sequence[str] = ()
) -> int:
    """Run `python -m nnmirror arguments` on both, print the differences; 0 if there are none.

    `seeds` are the lines where the script seeds the generators itself, `options` further options of
    the command line.
    """
    with tempfile.TemporaryDirectory(prefix="nnmirror-check-") as name:
        runs = [_run(b, arguments, seed, Path(name), options) for b in ("torch", "nnmirror")]
        if seeds:
            print(f"seed: set by the script ({', '.join(seeds)})")
        else:
            print(f"seed: the script sets none; both runs were seeded with {seed}")
        same = _compare(*runs)
    if all(run.status == 0 for run in runs):
        print(_BY_DEFAULT if same else _EVEN_SO)
    print("identical" if same else "DIFFERENT", flush=True)
    return 0 if same else 1


# `python -m nnmirror` of this installation, from any directory. Ctrl-C reaches it too, and ends it
# silently.
_RUN = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
sys.path.append({str(Path(__file__).resolve().parent.parent)!r})
from nnmirror.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def _run(
    backend: str, arguments: list[str], seed: int, where: Path, options: Sequence[str] = ()
) -> Run:
    work = where / "work"
    _copy(Path.cwd(), work)
    before = {name: _mark(work / name) for name in _files(work)}
    if arguments[0] != "-m":
        arguments = [_script_in(work, arguments[0]), *arguments[1:]]
    command = [sys.executable, "-c", _RUN, "--backend", backend, "--seed", str(seed), *options]
    environment = {"PYTHONHASHSEED": "0", **os.environ, "PYTHONUNBUFFERED": "1"}
    environment["NNMIRROR_EXACT"] = "1"  # all bits are compared
    start = time.perf_counter()
    # Its standard error is shown as it comes, with the original paths.
    with subprocess.Popen(
        [*command, *arguments],
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        errors = _Relay(process.stderr, sys.stderr, work)
        prints = _Relay(process.stdout, sys.stdout, work, f"{backend:8} | ")
        try:
            for relay in (errors, prints):
                relay.join()
            status = process.wait()
        except KeyboardInterrupt:
            process.terminate()  # if only this process got it
            process.wait()
            for relay in (errors, prints):  # a child process may keep a pipe open
                relay.join(timeout=1)
            raise
    seconds = time.perf_counter() - start
    print(f"{backend + ':':9} {seconds:.1f} s, exit status {status}", flush=True)
    changed = [name for name in _files(work) if before.get(name) != _mark(work / name)]
    kept = where / backend
    work.rename(kept)
    said = errors.text().rstrip()
    places = re.findall(rb'^  File "(.*)", line (\d+)', said, re.M)
    places = [place for place in places if not _is_librarys(os.fsdecode(place[0]))] or places
    return Run(
        name=backend,
        status=status,
        seconds=seconds,
        printed=prints.text(),
        error=said.rpartition(b"\n")[2],
        place=b"%b:%b" % places[-1] if places else b"",
        directory=kept,
        files=sorted(changed),
    )


def _is_librarys(file: str) -> bool:
    """Is it a file of this package or of an installed one?"""
    path = Path(file)
    return "site-packages" in path.parts or path.is_relative_to(Path(__file__).parent)


class _Relay(threading.Thread):
    """Shows what comes through a pipe, and keeps it, with the original path in place of `work`."""

    def __init__(self, pipe: IO[bytes] | None, sink: TextIO, work: Path, prefix: str = "") -> None:
        super().__init__(daemon=True)
        assert pipe is not None
        self.pipe = pipe
        self.sink = sink
        self.prefix = prefix
        self.renamed = {
            os.fsencode(p): os.fsencode(Path.cwd()) for p in (os.path.realpath(work), work)
        }
        self.parts: list[bytes] = []
        self.start()

    def run(self) -> None:
        rest = b""
        while chunk := os.read(self.pipe.fileno(), 65536):
            rest += chunk
            # Whole lines, so that no path is cut in two; a progress bar ends its lines with \r.
            end = max(rest.rfind(b"\n"), rest.rfind(b"\r")) + 1
            self._show(rest[:end])
            rest = rest[end:]
        self._show(rest, end="\n")

    def _show(self, text: bytes, end: str = "") -> None:
        if not text:
            return
        for old, new in self.renamed.items():
            text = text.replace(old, new)
        self.parts.append(text)
        shown = text.decode(errors="backslashreplace")
        if self.prefix:
            shown = "".join(self.prefix + line for line in shown.splitlines(keepends=True))
        self.sink.write(shown + end)
        self.sink.flush()

    def text(self) -> bytes:
        return b"".join(self.parts)


def _script_in(work: Path, script: str) -> str:
    """The script's path for a run in `work`: its copy there, as it may write files beside
    itself."""
    full, here = Path(os.path.realpath(script)), Path(os.path.realpath(Path.cwd()))
    copied = work / full.relative_to(here) if full.is_relative_to(here) else None
    if copied is None or not copied.exists():
        return os.path.abspath(script)
    return str(copied) if os.path.isabs(script) else str(copied.relative_to(work))


def _copy(source: Path, target: Path) -> None:
    """Copy a directory, without hidden and installed files, and with large files as links."""

    def leave_out(directory: str, names: list[str]) -> list[str]:
        return [
            name
            for name in names
            if name in _LEFT_OUT
            or name.startswith(".")
            or os.path.exists(os.path.join(directory, name, "pyvenv.cfg"))
        ]

    copied = 0

    def copy(source: str, target: str) -> None:
        nonlocal copied
        size = os.path.getsize(source)
        if size > BIG:
            os.symlink(source, target)
            return
        copied += size
        if copied > MOST:
            sys.exit(
                "nnmirror: --check runs in copies of the current directory, which holds more than"
                f" {MOST >> 30} GiB; start it in a directory of the script's own"
            )
        shutil.copy2(source, target)

    shutil.copytree(
        source, target, ignore=leave_out, copy_function=copy, ignore_dangling_symlinks=True
    )


def _files(directory: Path) -> Iterator[str]:
    for folder, names, files in os.walk(directory):
        names[:] = [name for name in names if name not in _LEFT_OUT]
        for file in files:
            yield os.path.relpath(os.path.join(folder, file), directory)


def _mark(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size


# -- comparing -----------------------------------------------------------------------------


def _compare(expected: Run, actual: Run) -> bool:
    same = True
    if expected.status != actual.status:
        print(f"exit status: PyTorch {expected.status}, nnmirror {actual.status}")
        for run in (expected, actual):
            if run.status != 0:
                print(_why(run))
        same = False
    elif expected.status != 0 and expected.error == actual.error:
        print("both fail: alike")
    elif expected.status != 0:
        print(f"both fail, with different errors\n{_why(expected)}\n{_why(actual)}")
        same = False
    difference = _first_difference(expected.printed, actual.printed)
    size = len(expected.printed)
    print(f"printed: {difference or f'identical ({size:,} bytes)'}")
    same = same and difference is None
    for name in sorted({*expected.files, *actual.files}):
        if name not in expected.files or name not in actual.files:
            by = "PyTorch" if name in expected.files else "nnmirror"
            difference = f"saved on {by} alone"
        else:
            difference = compare_files(expected.directory / name, actual.directory / name)
        print(f"saved {name}: {difference or 'identical'}")
        same = same and difference is None
    return same


_NAMES = {"torch": "PyTorch", "nnmirror": "nnmirror"}


def _why(run: Run) -> str:
    """The error with which a run ended, and where, as far as it wrote that."""
    error = run.error.decode(errors="backslashreplace")[:300] or "(nothing on standard error)"
    place = f"\n{'':12}at {os.fsdecode(run.place)}" if run.place else ""
    return f"  {_NAMES[run.name] + ':':9} {error}{place}"


def _first_difference(expected: bytes, actual: bytes) -> str | None:
    if expected == actual:
        return None
    lines = zip_longest(expected.split(b"\n"), actual.split(b"\n"), fillvalue=b"(the end)")
    number, (e, a) = next((i, pair) for i, pair in enumerate(lines, 1) if pair[0] != pair[1])
    show = [line.decode(errors="backslashreplace")[:300] for line in (e, a)]
    return f"line {number} differs\n  PyTorch:  {show[0]}\n  nnmirror: {show[1]}"


def compare_files(expected: Path, actual: Path) -> str | None:
    """Where two files first differ; None if they are alike."""
    one, other = expected.read_bytes(), actual.read_bytes()
    if one == other:
        return None
    # A pickled tensor is never the same bytes twice: its storage is named by its address.
    for load in (_load_saved, _load_pickled):
        with contextlib.suppress(Exception):  # not written by torch.save, not a pickle
            return _unlike(load(expected), load(actual), "it", {})
    place = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    if place is None:
        place = min(len(one), len(other))
    return f"differs from byte {place:,} on ({len(one):,} and {len(other):,} bytes)"


class _Object:
    """Stands for an object of any other class in a file: what it was pickled with."""

    args: tuple[object, ...]
    state: object = None
    items: list[object]  # of a subclass of list, dict or set

    def __new__(cls, *args: object, **kwargs: object) -> "_Object":
        made = super().__new__(cls)
        made.args = (*args, *sorted(kwargs.items()))
        made.items = []
        return made

    def __setstate__(self, state: object) -> None:
        self.state = state

    def append(self, item: object) -> None:
        self.items.append(item)

    add = append

    def __setitem__(self, key: object, value: object) -> None:
        self.items.append((key, value))


def _leaf(data: torch.Tensor, requires_grad: bool) -> _Object:
    return _Object(data, bool(requires_grad))


class _Unpickler(pickle.Unpickler):
    """Reads tensors and plain data; of every other class only the name and the state."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, requires_grad, hooks: _leaf(data, requires_grad)
        if (module, name) == ("nnmirror.tensor", "rebuild"):
            return lambda cls, data, requires_grad: _leaf(data, requires_grad)
        if module in ("torch._utils", "torch.storage", "torch", "collections", "_codecs"):
            return super().find_class(module, name)
        if module in ("builtins", "__builtin__") and name in (
            "dict",
            "set",
            "frozenset",
            "complex",
            "slice",
            "range",
        ):
            return super().find_class(module, name)
        return type(name, (_Object,), {})


_PICKLE = types.SimpleNamespace(Unpickler=_Unpickler, load=None, __name__="pickle")


def _load_saved(file: Path) -> object:
    return torch.load(file, pickle_module=_PICKLE, weights_only=False, map_location="cpu")


def _load_pickled(file: Path) -> object:
    """All that was pickled to the file, one after another."""
    values = []
    with open(file, "rb") as opened:
        size = os.path.getsize(file)
        while opened.tell() < size:
            values.append(_Unpickler(opened).load())
    return values[0] if len(values) == 1 else values


def _unlike(expected: Any, actual: Any, where: str, seen: dict[object, object]) -> str | None:
    """Where two loaded values first differ. `seen` are the pairs that are being compared."""
    pair = id(expected), id(actual)
    if pair in seen:  # an object that holds itself, or one met before
        return None
    seen[pair] = expected, actual
    if isinstance(expected, torch.Tensor) and isinstance(actual, torch.Tensor):
        for name in ("dtype", "shape"):
            e, a = getattr(expected, name), getattr(actual, name)
            if e != a:
                return f"{where}.{name}: {e} and {a}"
        if not expected.numel():
            return None
        one, other = (t.detach().contiguous().view(-1) for t in (expected, actual))
        differ = (one.view(torch.uint8) != other.view(torch.uint8)).view(len(one), -1).any(-1)
        if not differ.any():
            return None
        i = int(differ.nonzero()[0])
        count = int(differ.sum())
        first = f"{number(one[i])} and {number(other[i])}"
        text = f"{where}: {count} of {len(one)} elements differ, the first: {first}"
        if not (one.is_floating_point() or one.is_complex()):
            return text
        units = units_apart(one, other)
        if units == float("inf"):
            return text
        return f"{text}; the furthest by {units:.2g} units in the last place of the largest"
    if isinstance(expected, _Object) and isinstance(actual, _Object):
        names = [type(value).__name__ for value in (expected, actual)]
        if names[0] != names[1]:
            return f"{where}: {names[0]} and {names[1]}"
        return next(
            filter(
                None,
                (
                    _unlike(e, a, where, seen)
                    for e, a in (
                        (expected.args, actual.args),
                        (expected.items, actual.items),
                        (_public(expected.state), _public(actual.state)),
                    )
                ),
            ),
            None,
        )
    if type(expected) is not type(actual):
        return f"{where}: {type(expected).__name__} and {type(actual).__name__}"
    if isinstance(expected, dict) and any(isinstance(key, _Object) for key in expected):
        # Keys may be objects, as in an optimiser's state: they equal no key of the other dict.
        return _unlike(list(expected.items()), list(actual.items()), where, seen)
    if isinstance(expected, dict):
        if set(expected) != set(actual):
            return f"{where}: keys differ: {sorted(map(repr, set(expected) ^ set(actual)))}"
        items = [(f"{where}[{key!r}]", expected[key], actual[key]) for key in expected]
    elif isinstance(expected, list | tuple):
        if len(expected) != len(actual):
            return f"{where}: {len(expected)} and {len(actual)} items"
        items = [
            (f"{where}[{i}]", *two) for i, two in enumerate(zip(expected, actual, strict=True))
        ]
    else:
        same = repr(expected) == repr(actual)
        return None if same else f"{where}: {expected!r} and {actual!r}"
    return next(filter(None, (_unlike(e, a, w, seen) for w, e, a in items)), None)


_CONTENTS = ("_parameters", "_buffers", "_modules")


def _public(state: object) -> object:
    """A pickled module's state without the private parts of either library."""
    if not isinstance(state, dict):
        return state
    return {k: v for k, v in state.items() if k in _CONTENTS or not str(k).startswith("_")}
