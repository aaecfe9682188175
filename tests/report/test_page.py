"""The page in a browser: clicked through, with the keyboard alone, in the dark."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fusionpass
from fusionpass import Arch, Config
from fusionpass.commands.load import load
from fusionpass.report.advice import advise
from fusionpass.report.html import contents
from fusionpass.report.trace import Report
from tests.profiles import by_night
from tests.report.stack import Stack, rows
from tests.report.test_html import EVIL, evil_report

LAYERS = 5


@pytest.fixture(scope="module")
def report() -> Report:
    torch.manual_seed(0)
    config = Config(target=Arch("sm_90"), disable=frozenset({"norm.add"}))
    return fusionpass.explain(Stack(LAYERS, odd=(3,)), rows(), config=config)


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Any:
    """`opened(report)`: its page, which at the end must have logged nothing and asked for nothing."""
    complaints: list[str] = []
    pages = []

    def open_page(shown: Report, **options: Any) -> Any:
        page = browser.new_page(viewport={"width": 1400, "height": 900}, **options)
        pages.append(page)
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith("file:") or complaints.append(asked.url))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.goto(shown.write_html(tmp_path / f"{len(pages)}.html").as_uri())
        return page

    yield open_page
    for page in pages:
        page.close()
    assert complaints == []


def _shown(page: Any) -> int:
    return int(re.match(r"(\d+) of", page.inner_text("#shown"))[1])


def _kinds(page: Any) -> set[str]:
    return set(page.eval_on_selector_all("#list tbody tr", "rows => rows.map(row => row.dataset.kind)"))


def test_each_filter_changes_what_is_shown(opened: Any, report: Report) -> None:
    assert report.fused
    assert report.refused
    assert report.missed
    _try_the_filters(opened(report), report, "EXPECTED a cast")


def _try_the_filters(page: Any, report: Report, words: str) -> None:
    """Each filter alone shows the sites that the report has of it; `words` are in some reason or line."""
    records = {kind: getattr(report, kind) for kind in ("fused", "refused", "missed")}
    everything = [record for kind in records.values() for record in kind]
    there, total = {kind for kind, found in records.items() if found}, len(everything)
    assert (_shown(page), _kinds(page)) == (total, there)
    for kind in records:
        page.uncheck(f"#kinds [name={kind}]")
        assert _kinds(page) == there - {kind}
        assert _shown(page) == total - len(records[kind])
        page.check(f"#kinds [name={kind}]")
    for field in ("op", "rule"):
        names = {getattr(record, field) for record in everything} - {""}
        assert set(page.eval_on_selector_all(f"#{field} option", "all => all.map(one => one.value)")) == names | {""}
        for name in sorted(names):
            page.select_option(f"#{field}", name)
            assert _shown(page) == sum(getattr(record, field) == name for record in everything)
        page.select_option(f"#{field}", "")
    page.fill("#text", words)
    told = [(site["count"], f"{site['reason']}\n{site['source']}".lower()) for site in contents(report)["sites"]]
    assert _shown(page) == sum(count for count, text in told if words.lower() in text) > 0
    page.fill("#text", "no such words")
    assert _shown(page) == 0
    page.click("text=Clear")
    page.get_by_text(f"{total} of {total} sites").wait_for()


SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
}  # fmt: skip


@by_night
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "config", "words"),
    [("llama", SMOLLM2, "modeling_llama"), ("qwen3", QWEN3, "modeling_qwen3")],
    ids=["SmolLM2-135M", "Qwen3-8B"],
)
def test_whole_models(opened: Any, tmp_path: Path, kind: str, config: dict[str, Any], words: str) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.AutoConfig.for_model(kind, **config).save_pretrained(tmp_path / "model")
    program = load(str(tmp_path / "model"), 16)
    program.quantize("fp8_token")
    report = program.explain(Config(target=Arch("sm_90")))
    layers = config["num_hidden_layers"]
    fusionpass.assert_fused(report, "add_rms_norm_quantize", 2 * layers - 1)
    assert len(report.write_html(tmp_path / "report.html").read_bytes()) < 2 * 2**20
    page = opened(report)
    _try_the_filters(page, report, words)
    page.click("#tab-layers")
    choices = page.locator("#chooser button")
    assert f"model.layers.1 and {layers - 2} alike" in choices.all_inner_texts()
    for index in range(choices.count()):
        choices.nth(index).click()
        for side in ("before", "after"):
            nodes = page.locator(f"#graph .group [data-side={side}]")
            assert nodes.count()
            nodes.first.click()
            assert "Line of the model" in page.inner_text("#details")
    page.click("#tab-run")
    assert page.locator("#run table").count()


def test_a_module_in_the_tree_filters_and_opens_its_layer(opened: Any, report: Report) -> None:
    page = opened(report)
    page.click("#tree [data-path='layers.3'] > .label")
    everything = [*report.fused, *report.refused, *report.missed]
    chosen = page.eval_on_selector_all(
        "#list tbody tr td:nth-child(5)", "cells => cells.map(cell => cell.innerText.split('\\n')[0])"
    )
    assert any(place.startswith("layers.3") for place in chosen)
    assert _kinds(page) == {"fused", "missed", "refused"}
    page.click("#tab-layers")
    assert page.inner_text("#chooser [aria-checked=true]") == "layers.3"
    page.click("#tab-sites")
    page.click("#tree [data-path='layers.3'] > .label")
    assert _shown(page) == len(everything), "chosen again, it filters no more"
    page.click("#tree [data-path='norm'] > .label")
    assert _shown(page) == sum(record.where == "norm" for record in everything)


def test_a_site_leads_to_its_node_and_a_node_tells_all(opened: Any, report: Report) -> None:
    page = opened(report)
    (missed,) = report.missed
    page.click("#list tr[data-kind=missed] button.to")
    assert page.is_visible("#layers")
    assert not page.is_visible("#sites")
    assert page.get_attribute("#graph .node[aria-pressed=true]", "data-name") == missed.node
    details = page.inner_text("#details")
    line = missed.source.split(":", 1)[1]
    for told in (missed.reason, missed.rule, "layers.3", line, "aten.rsqrt.default(", advise("missed", missed)):
        assert told in details
    page.click("#chooser button:has-text('layers.1')")
    page.click("#graph .group.fused [data-side=after] >> nth=0")
    details = page.inner_text("#details")
    layer = contents(report)["layers"][1]
    row = next(row for row in layer["rows"] if row.get("kind") == "fused")
    for told in (
        row["record"]["op"],
        "triton",
        " → ".join(row["record"]["rules"]),
        f"{row['operators']} by 1",
        "saved",
    ):
        assert told in details


def test_edges_go_to_what_a_node_reads_and_to_who_reads_it(opened: Any, report: Report) -> None:
    page = opened(report)
    page.click("#tab-layers")
    page.click("#chooser button:has-text('layers.1')")
    layer = contents(report)["layers"][1]
    nodes = [node for row in layer["rows"] for node in row["before"]]
    names = {node["name"] for node in nodes}
    for node in nodes:
        page.click(f"#graph [data-side=before][data-name='{node['name']}']")
        reads = set(page.eval_on_selector_all("#graph .reads", "all => all.map(one => one.dataset.name)"))
        readers = set(page.eval_on_selector_all("#graph .readby", "all => all.map(one => one.dataset.name)"))
        assert reads == names & set(node.get("inputs", ()))
        assert readers == {other["name"] for other in nodes if node["name"] in other.get("inputs", ())}
        assert page.locator("#graph path.in").count() == len(reads)
        assert page.locator("#graph path.out").count() == len(readers)


def test_views_can_be_left_out(opened: Any, report: Report) -> None:
    page = opened(report)
    page.click("#tab-layers")
    visible = "all => all.filter(one => one.offsetParent).length"
    before = page.eval_on_selector_all("#graph .node", visible)
    page.uncheck("#moves")
    after = page.eval_on_selector_all("#graph .node", visible)
    assert after == page.locator("#graph .node:not(.moves)").count()
    assert 0 < after < before


_NAME = (
    "(one => one.id || one.name || one.getAttribute('role') || one.className || one.tagName)(document.activeElement)"
)
_OUTLINED = """(one => [one, one.firstElementChild].some(it => it && getComputedStyle(it).outlineStyle !== 'none'))(
    document.activeElement)"""


def test_all_of_it_with_the_keyboard(opened: Any, report: Report) -> None:
    page = opened(report)
    focused = "document.activeElement"
    seen = []
    for _ in range(100):
        page.keyboard.press("Tab")
        seen.append(page.evaluate(_NAME))
        if seen[-1] == "BODY":
            break
        assert page.evaluate(_OUTLINED), seen[-1]
    assert seen[0] == "treeitem"
    assert {"tab-sites", "missed", "refused", "fused", "op", "rule", "text", "to"} <= set(seen)
    # The tree: down, close, open, choose.
    page.focus("#tree [tabindex='0']")
    assert page.evaluate(f"{focused}.dataset.path") == "layers"
    page.keyboard.press("ArrowLeft")
    assert page.get_attribute("#tree [data-path='layers']", "aria-expanded") == "false"
    page.keyboard.press("ArrowDown")
    assert page.evaluate(f"{focused}.dataset.path") == "norm", "what is folded away is passed over"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(f"{focused}.dataset.path") == "layers.0"
    page.keyboard.press("Enter")
    assert page.get_attribute("#tree [data-path='layers.0']", "aria-selected") == "true"
    assert page.inner_text("#shown").endswith("in layers.0")
    # The tabs.
    page.focus("#tab-sites")
    page.keyboard.press("ArrowRight")
    assert page.is_visible("#layers")
    assert page.evaluate(f"{focused}.id") == "tab-layers"
    # The layers and the graph.
    page.focus("#chooser [tabindex='0']")
    page.keyboard.press("End")
    assert page.locator("#chooser button").last.get_attribute("aria-checked") == "true"
    page.keyboard.press("Home")
    page.focus("#graph [tabindex='0']")
    first = page.evaluate(f"{focused}.dataset.name")
    page.keyboard.press("ArrowDown")
    assert page.evaluate(f"{focused}.dataset.name") != first
    page.keyboard.press("ArrowRight")
    assert page.evaluate(f"{focused}.dataset.side") == "after"
    page.keyboard.press("Enter")
    assert page.evaluate(f"{focused}.getAttribute('aria-pressed')") == "true"
    assert page.inner_text("#details dd >> nth=0").startswith(page.evaluate(f"{focused}.dataset.name"))
    page.focus("#tab-layers")
    page.keyboard.press("End")
    assert page.is_visible("#run")


def test_every_control_has_a_name(opened: Any, report: Report) -> None:
    page = opened(report)
    for tab in ("#tab-sites", "#tab-layers", "#tab-run"):
        page.click(tab)
        unnamed = page.eval_on_selector_all(
            "button, input, select, [role=treeitem], [role=group], [role=tree], [role=tablist]",
            "all => all.filter(one => one.offsetParent && !(one.innerText || '').trim() && !one.ariaLabel"
            " && !one.labels?.length && !one.getAttribute('aria-labelledby')).map(one => one.outerHTML)",
        )
        assert unnamed == []


def _contrast(page: Any, selector: str) -> float:
    """WCAG 2's contrast ratio of the first element's text on what is behind it."""
    colours = page.eval_on_selector(
        selector,
        """one => {
          const own = getComputedStyle(one).color;
          let behind = one;
          const colour = () => getComputedStyle(behind || document.body).backgroundColor;
          while (behind && colour() === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
          return [own, colour()];
        }""",
    )

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted(map(luminance, colours), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_light_and_dark_differ_and_can_be_read(opened: Any, report: Report) -> None:
    backgrounds = set()
    for scheme in ("light", "dark"):
        page = opened(report, color_scheme=scheme)
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        for selector in (
            "h1",
            "td.missed",
            "td.refused",
            "td.fused",
            "button.to",
            "td .source",
            "#shown",
            "#tree .count",
        ):
            assert _contrast(page, selector) >= 4.5, (scheme, selector)
        page.click("#tab-layers")
        page.click("#chooser button:has-text('layers.1')")
        page.click("#graph .node >> nth=0")
        for selector in (
            ".group .node:not(.moves)",
            ".group .type",
            ".badge",
            ".node[aria-pressed=true]",
            ".row > .side .node.moves",
            "#details dt",
        ):
            assert _contrast(page, selector) >= 4.5, (scheme, selector)
    assert len(backgrounds) == 2


def test_names_from_the_model_run_nothing(opened: Any) -> None:
    page = opened(evil_report())
    assert page.inner_text("h1") == EVIL
    for tab in ("#tab-sites", "#tab-layers", "#tab-run"):
        page.click(tab)
    page.click("#tab-layers")
    for node in page.query_selector_all("#graph .node"):
        node.click()
    assert page.locator("script").count() == 2
    assert EVIL in page.inner_text("#details")
    page.click("#tab-run")
    assert EVIL in page.inner_text("#run")


def test_a_report_of_nothing_opens(opened: Any) -> None:
    page = opened(Report("Tiny"))
    assert page.inner_text("h1") == "Tiny"
    page.click("#tab-layers")
    assert page.inner_text("#about") == "No graph was traced."
    page.click("#tab-run")
    assert "0 CUDA graphs" in page.inner_text("#run")
