"""A script with a backward and the values that it needs: `Explanation.save`."""

import base64
import os
import textwrap
from collections.abc import Mapping

import torch

from .._types import StrPath

_SMALL = 64  # a tensor with more numbers is packed
_WIDTH = 96


def save(source: str, given: Mapping[str, torch.Tensor], path: StrPath) -> None:
    """Write the function `source` and its arguments."""
    text = written(source, given)
    with open(os.fspath(path), "w", encoding="utf-8") as file:
        file.write(text)


def written(source: str, given: Mapping[str, torch.Tensor]) -> str:
    """The text of the file."""
    lines = [
        '"""The backward of one graph, written by nnmirror.explain. It needs torch alone.',
        "",
        "Run, it prints the gradients. `backward(**values())` returns them.",
        '"""',
        "",
    ]
    literals = {name: source_of(value) for name, value in given.items()}
    packed = any("packed(" in text for text in literals.values())
    lines += ["import base64", ""] if packed else []
    lines += [source, "", "def values():"]
    lines.append('    """What the graph had kept, and the leaves."""')
    lines.append("    return {")
    for name, text in literals.items():
        lines.append(f'        "{name}": {text},')
    lines += ["    }", ""]
    if packed:
        lines += [_PACKED]
    lines += [_MAIN]
    return "\n".join(lines)


_PACKED = '''
def packed(dtype, text):
    """The numbers of a tensor, in a row."""
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=dtype)

'''
_MAIN = """
if __name__ == "__main__":
    for name, gradient in backward(**values()).items():
        print(f"{name}:", gradient)
"""


def source_of(value: torch.Tensor) -> str:
    """An expression for a tensor with the same numbers and strides."""
    plain = value.detach().cpu()
    device = "" if value.device.type == "cpu" else f'.to("{value.device}")'
    if plain.layout is not torch.strided:
        raise NotImplementedError(
            f"nnmirror: a tensor of layout {plain.layout} is not written to a file; read"
            " Explanation.source instead"
        )
    if plain.is_contiguous():
        return _numbers(plain, tuple(plain.shape)) + device
    shape, strides = tuple(plain.shape), plain.stride()
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    extent = 0 if 0 in shape else extent
    memory = plain.as_strided((extent,), (1,))
    return f"{_numbers(memory, (extent,))}.as_strided({shape}, {strides}){device}"


def _numbers(plain: torch.Tensor, shape: tuple[int, ...]) -> str:
    if plain.numel() <= _SMALL:
        text = literal(plain.tolist(), plain.dtype)
        dtype = "" if plain.dtype is torch.float32 else f", dtype={plain.dtype}"
        if 0 in shape:
            return f"torch.empty({shape}{dtype})"
        if plain.dtype is torch.bool or (plain.dtype is torch.int64 and "." not in text):
            dtype = ""
        made = eval(f"torch.tensor({text}{dtype})", {"torch": torch})
        if made.dtype is plain.dtype and _same(made, plain):
            return f"torch.tensor({_wrapped(text)}{dtype})"
    row = plain.contiguous().view(-1).view(torch.uint8) if plain.numel() else plain
    raw = base64.b64encode(bytes(row.tolist())).decode()
    text = "\n".join(textwrap.wrap(raw, _WIDTH))
    return f'packed({plain.dtype}, """\n{text}\n""").view({shape})'


def _same(made: torch.Tensor, plain: torch.Tensor) -> bool:
    one, other = (
        t.contiguous().view(-1).view(torch.uint8) if t.dtype is not torch.bool else t
        for t in (made.view(-1), plain.contiguous().view(-1))
    )
    return torch.equal(one, other)


def literal(value: object, dtype: torch.dtype) -> str:
    """A number, or nested lists of numbers, in few digits that give the same bits in `dtype`."""
    if isinstance(value, list):
        return f"[{', '.join(literal(v, dtype) for v in value)}]"
    if not isinstance(value, float):
        return repr(value)
    if value != value or abs(value) == float("inf"):
        return f'float("{value}")'
    if dtype is not torch.float64:
        for digits in range(6, 17):
            short = f"{value:.{digits}g}"
            if torch.tensor(float(short), dtype=dtype).item() == value:
                return short if "." in short or "e" in short else f"{short}.0"
    return repr(value)


def _wrapped(text: str) -> str:
    if len(text) <= _WIDTH - 24:
        return text
    inner = textwrap.fill(text, _WIDTH - 12, break_long_words=False, break_on_hyphens=False)
    return "\n" + textwrap.indent(inner, " " * 12) + "\n        "
