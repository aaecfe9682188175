"""The HTML report as a file: one file, nothing of the model unescaped, small however many layers there are."""

import json
import re
from html.parser import HTMLParser

import pytest

import fusionpass
from fusionpass import Arch, Config
from fusionpass.report.html import contents, page
from fusionpass.report.nodes import NodeRecord
from fusionpass.report.sites import shortened
from fusionpass.report.trace import PieceRecord, Record, Report
from tests.report.stack import Stack, rows

EVIL = "</script><script>alert(1)</script><!--"


class _Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


def _parsed(text):
    parser = _Elements()
    parser.feed(text)
    return parser


def _data(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def evil_report():
    report = Report(EVIL)
    trace = report.new_trace()
    node = NodeRecord("a", f"f({EVIL})", EVIL, EVIL, f"m.py:1, {EVIL}")
    trace.before = [node, NodeRecord("b", "g(a)", inputs=("a",))]
    trace.after = [node, NodeRecord("b_1", "op(a)", inputs=("a",), replaces=("b",), where=EVIL)]
    trace.fused = [Record("op", "rule", EVIL, f"{EVIL}.norm", EVIL, EVIL, EVIL, (EVIL,), node="b_1")]
    trace.missed = [Record(EVIL, EVIL, EVIL, EVIL, EVIL, node="a")]
    trace.skipped = EVIL
    model = report.new_model_graph(EVIL, EVIL)
    model.pieces.append(PieceRecord(EVIL, 0, EVIL, EVIL, (EVIL, EVIL)))
    return report


def test_nothing_of_the_model_is_markup():
    text = page(evil_report())
    plain = page(Report(""))
    assert _parsed(text).tags == _parsed(plain).tags, "the same elements as on an empty page"
    assert text.count("<script") == plain.count("<script") == 2
    assert text.count("<!--") == plain.count("<!--") == 0
    assert _data(text)["title"] == EVIL, "and nothing is lost"
    assert _data(text) == json.loads(json.dumps(contents(evil_report())))


def test_a_title_with_a_backslash_or_braces_is_a_title():
    text = page(Report(r"\1 {{style}} \g<0>"))
    assert "<title>\\1 {{style}} \\g&lt;0&gt; – fusionpass</title>" in text


def test_one_file_that_loads_nothing():
    report = fusionpass.explain(Stack(2), rows())
    parsed = _parsed(page(report))
    assert not {"link", "img", "iframe", "object", "base"} & set(parsed.tags)
    assert not {"src", "href", "action"} & {name for name, _ in parsed.attributes}
    policy = dict(parsed.attributes)["content"]
    assert policy.startswith("default-src 'none';"), "and may load nothing"


def test_the_file_and_its_folder_are_made(tmp_path):
    report = fusionpass.explain(Stack(1), rows())
    path = report.write_html(tmp_path / "new" / "report.html")
    assert path == tmp_path / "new" / "report.html"
    assert path.read_text(encoding="utf-8") == page(report)


def test_a_report_of_nothing():
    data = contents(Report(""))
    assert (data["tree"], data["sites"], data["layers"]) == ([], [], [])
    assert data["title"] == "fusionpass"


def test_every_site_is_counted_where_it_is():
    model = Stack(6, odd=(3,))
    report = fusionpass.explain(model, rows(), config=Config(target=Arch("sm_90")))
    data = contents(report)
    summary = dict(data["summary"])
    for kind in ("fused", "refused", "missed"):
        records = getattr(report, kind)
        assert summary[kind] == len(records)
        assert sum(site["count"] for site in data["sites"] if site["kind"] == kind) == len(records)
    (missed,) = [site for site in data["sites"] if site["kind"] == "missed"]
    assert data["sites"][0] is missed, "what did not fuse comes first"
    assert missed["members"] == ["layers.3"]
    row = data["layers"][missed["layer"]]["rows"][missed["row"]]
    assert row["kind"] == "missed"
    assert row["record"]["reason"] == missed["reason"]
    folded = next(site for site in data["sites"] if site["op"] == "add_rms_norm_quantize")
    assert folded["members"] == [f"layers.{i}.norm" for i in (1, 2, 4, 5)]


def test_the_tree_counts_what_is_inside_and_folds_what_is_alike():
    report = fusionpass.explain(Stack(6, odd=(3,)), rows(), config=Config(target=Arch("sm_90")))
    tree = contents(report)["tree"]
    layers, norm = tree
    assert (layers["name"], norm["name"]) == ("layers", "norm")
    inside = [branch["name"] + (f"-{branch['last']}" if "last" in branch else "") for branch in layers["children"]]
    assert inside == ["0-2", "3", "4-5"]
    kinds = {kind: len(getattr(report, kind)) for kind in ("fused", "refused", "missed")}
    assert {kind: layers["counts"][kind] + norm["counts"][kind] for kind in kinds} == kinds
    odd = layers["children"][1]
    assert odd["counts"]["missed"] == 1
    assert odd["path"] == "layers.3"


def test_many_layers_cost_little():
    sizes = {n: len(page(fusionpass.explain(Stack(n), rows()))) for n in (3, 36)}
    assert sizes[36] < 1.25 * sizes[3]
    assert sizes[36] < 100_000


@pytest.mark.parametrize(
    ("source", "short"),
    [
        ("/a/lib/python3.11/site-packages/pkg/m.py:3, x = a/site-packages/b", "pkg/m.py:3, x = a/site-packages/b"),
        ("/usr/lib/python3/dist-packages/m.py:3, x", "m.py:3, x"),
        ("/elsewhere/m.py:3, y / 'b/site-packages/c'", "/elsewhere/m.py:3, y / 'b/site-packages/c'"),
        ("", ""),
    ],
)
def test_lines_of_packages_are_told_from_the_package_on(source, short):
    assert shortened(source) == short


def test_a_line_in_the_working_folder_is_told_from_there(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert shortened(f"{tmp_path}/model.py:3, x") == "model.py:3, x"
