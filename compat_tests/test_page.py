"""Explanation.html: the page that shows a net's forward and backward."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch

import nnmirror
from nnmirror import functional as F
from nnmirror import nn
from nnmirror.explaining.page import page

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


class ByHand(nn.Module):
    """A shared module, a branch, and a name longer than a line."""

    LONG = "a_long_name_" * 12

    def __init__(self):
        super().__init__()
        self.first, self.shared = nn.Linear(2, 3), nn.Linear(3, 3)
        self.add_module(self.LONG, nn.Linear(3, 1))
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        h = torch.tanh(self.first(x))
        h = h + F.relu(self.shared(h))
        h = h + F.relu(self.shared(h)) * self.scale
        return getattr(self, self.LONG)(h)


def by_hand():
    net, x, t = ByHand(), torch.randn(4, 2), torch.randn(4, 1)
    return ((net(x) - t) ** 2).mean(), net


def fifty_layers():
    net = nn.Sequential(*[layer for _ in range(25) for layer in (nn.Linear(4, 4), nn.Tanh())])
    return nn.MSELoss()(net(torch.randn(3, 4)), torch.zeros(3, 4)), net


def odd_names():
    net = nn.Sequential()
    net.add_module("</script><b>&\"'", nn.Linear(2, 2))
    x = torch.randn(3, 2, requires_grad=True)
    return net(x).sum(), net


def odd_numbers():
    x = nn.Parameter(torch.tensor([float("nan"), float("inf"), 0.0, 1e-40, -3.0]))
    return (x * x.clamp(min=0)).sum(), None


def many_results():
    net = nn.Embedding(5, 3)
    a, b, _ = net(torch.tensor([0, 1])).unbind(-1)
    return (a * b).sum(), net


def large():
    net = nn.Linear(300, 200)
    return net(torch.randn(2, 300)).pow(2).mean(), net


MADE = [by_hand, fifty_layers, odd_names, odd_numbers, many_results, large]


def explained(make):
    torch.manual_seed(0)
    loss, net = make()
    return nnmirror.explain(loss, *([] if net is None else [net]))


class Read(HTMLParser):
    """Parses a page: its tags, its text and its JSON data. Each tag must be closed."""

    VOID = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.data = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        tag, attrs = self.open[-1] if self.open else ("", {})
        if attrs.get("id") == "data":
            self.data += data
        elif tag not in ("script", "style"):
            self.text.append(data)


@pytest.fixture(params=MADE, ids=lambda make: make.__name__)
def shown(request, tmp_path):
    explanation = explained(request.param)
    explanation.html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    read = Read(text)
    assert read.open == []
    return explanation, text, read, json.loads(read.data)


def test_a_page_is_one_file_that_loads_nothing(shown):
    _, text, read, _ = shown
    assert not re.search(r"https?:|url\(|@import", text)
    assert not [tag for tag, _ in read.tags if tag in ("link", "img", "iframe")]
    assert not [a for _, a in read.tags if a.keys() & {"src", "href", "onclick", "onload"}]
    assert [a for tag, a in read.tags if tag == "html"] == [{"lang": "en"}]


def test_every_operation_has_a_row_forward_and_back(shown):
    explanation, _, read, data = shown
    nodes = [row["node"] for row in data["rows"] if "node" in row]
    assert nodes == [o.node for o in reversed(explanation.operations)]
    cells = [a for tag, a in read.tags if "cell" in a.get("class", "").split()]
    assert len(cells) == 2 * len(data["rows"])
    words = " ".join(read.text)
    for operation in explanation.operations:
        assert operation.formula in words or operation.gradient is None
    for row in data["rows"]:
        assert row["label"] in words
    assert [leaf["name"] for leaf in data["leaves"]] == list(explanation.leaves)


def test_the_lines_between_the_rows_are_the_edges_of_the_graph(shown):
    explanation, _, _, data = shown
    rows = [row for row in data["rows"] if "node" in row]
    place = {
        o.index: data["rows"].index(r)
        for o, r in zip(reversed(explanation.operations), rows, strict=True)
    }
    for operation in explanation.operations:
        row = data["rows"][place[operation.index]]
        expected = {place[x.operation] for x in operation.inputs if x.operation is not None}
        inputs = {s for s in row["sources"] if "node" not in data["rows"][s]}
        assert set(row["sources"]) - inputs == expected
        assert all(s < place[operation.index] for s in row["sources"])


def test_numbers_of_small_tensors_are_there(shown):
    explanation, _, _, data = shown
    for leaf, said in zip(explanation.leaves.values(), data["leaves"], strict=True):
        told = data["tensors"][said["gradient"]]
        assert told["shape"] == str(tuple(leaf.gradient.shape))
        if leaf.gradient.numel() > 400:
            assert "rows" not in told
            continue
        numbers = torch.tensor([float(v) for row in told["rows"] for v in row])
        torch.testing.assert_close(
            numbers, leaf.gradient.flatten(), rtol=1e-5, atol=1e-44, equal_nan=True
        )
    sizes = [sum(map(len, t.get("rows", []))) for t in data["tensors"]]
    assert max(sizes) <= 400


def test_what_the_rows_say():
    e = explained(by_hand)
    text = html.unescape(re.sub(r"<[^>]+>", " ", page(e).partition('id="code"')[0]))
    text = " ".join(text.split())
    assert "shared #2" in text, "the module's second call"
    norm = torch.linalg.vector_norm(e.leaves["first.weight"].gradient).item()
    assert f"d weight {norm:.4g}" in text
    assert "no gradient is asked for" in text, "for the input"


def test_a_notebook_shows_it():
    shown = explained(odd_names)._repr_html_()
    read = Read(shown)
    ((tag, attrs),) = read.tags
    assert tag == "iframe"
    assert attrs["srcdoc"] == page(explained(odd_names))


# Presses keys and clicks, and records what the page shows; runs after the page's own script.
STEPS = """
<script>
(() => {
  const seen = [];
  const look = () => seen.push([...document.querySelectorAll(".now")].map(x => [x.dataset.row, x.dataset.phase, x.getAttribute("aria-current")]).concat([[
    document.querySelectorAll(".cell.f.later").length, document.querySelectorAll(".cell.b.later").length,
    document.getElementById("said").textContent, document.getElementById("detail").innerText]]));
  const press = key => { document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true })); look(); };
  look();
  press("ArrowLeft");
  press("ArrowRight"); press("ArrowRight");
  press("End"); press("ArrowLeft");
  press("Home");
  document.querySelector('#row2 button.b').click(); look();
  const details = document.querySelector("#detail details");
  details.open = true;
  setTimeout(() => {
    seen.push([...details.querySelectorAll("td")].map(x => x.textContent));
    const widths = () => [document.documentElement.scrollWidth, innerWidth, document.getElementById("detail").scrollWidth, document.getElementById("detail").clientWidth];
    const before = widths();
    press("End"); seen.pop();
    seen.push([before, widths()]);
    document.body.dataset.seen = JSON.stringify(seen);
  }, 50);
})();
</script>
"""


@pytest.mark.skipif(not CHROMIUM, reason="no browser")
def test_in_a_browser(tmp_path):
    e = explained(by_hand)
    path = tmp_path / "page.html"
    e.html(path)
    path.write_text(
        path.read_text(encoding="utf-8").replace("</body>", STEPS + "</body>"), encoding="utf-8"
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command += ["--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--window-size=1366,768", "--virtual-time-budget=3000", "--dump-dom"]
    ran = subprocess.run(
        [*command, path.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    (body,) = [attrs for tag, attrs in Read(ran.stdout).tags if tag == "body"]
    first, left, one, two, end, last, home, clicked, values, width = json.loads(body["data-seen"])
    rows = len(e.operations) + 1
    assert first == left == home == [[0, 0, "all operations", first[0][3]]]
    assert "fc" not in first[0][3]
    assert "first.weight" in first[0][3]
    assert one[0] == ["0", "f", "step"]
    assert one[1][:3] == [rows - 1, rows, f"forward 1 of {rows}: first_input"]
    assert two[0] == ["1", "f", "step"]
    assert two[1][:3] == [rows - 2, rows, f"forward 2 of {rows}: first"]
    assert "first.weight" in two[1][3]
    assert end[0][:3] == [0, 0, "the end"]
    assert last[0] == ["1", "b", "step"]
    assert last[1][:3] == [0, 1, f"backward {rows - 1} of {rows - 1}: first"], "the input's is pale"
    assert clicked[0] == ["2", "b", "step"]
    assert "dx = g (1 - y^2)" in clicked[1][3]
    assert "sum of those from shared + add" in clicked[1][3]
    (tanh,) = [o for o in e.operations if o.node == "TanhBackward0"]
    assert [float(v) for v in values] == pytest.approx(tanh.gradient.flatten().tolist(), rel=1e-3)
    for page_is, page_has, detail_is, detail_has in width:
        assert page_is <= page_has, "nothing to scroll to the side"
        assert detail_is <= detail_has
