import io
import json

import pytest
import throwaway
from bs4 import BeautifulSoup
from playwright.sync_api import expect

from mmsae_helpers.suite import reports, runner

CELLS = [
    "# Is there *any* <script>window.hacked = 1</script> signal?\n\n**Question.** Is there?\n\n"
    "Inline $\\omega_k = \\frac{1}{K}$ and\n\n"
    "$$\\sum_i \\lVert x_i \\rVert^2$$\n\n## First part",
    "import matplotlib.pyplot as plt\nimport pandas as pd\nimport plotly.graph_objects as go\n"
    "from IPython.display import HTML, Javascript, Latex, Markdown, display\n\n"
    "from mmsae_helpers.suite import figures\n"
    "from mmsae_helpers.suite.observations import Observations\n\nfigures.style()",
    "fig, ax = plt.subplots()\nax.plot([1, 2])\n"
    "figures.caption(fig, 'Class <script>window.hacked = 2</script> rises.')",
    "fig = go.Figure(go.Bar(x=['<script>bar</script>'], y=[1]))\nfig.update_layout(title='a < b')\n"
    "figures.caption(fig, 'Bars.')",
    "## Second part",
    "display(pd.DataFrame({'class': ['<script>window.hacked = 3</script>']}))\n"
    "display(Markdown('Now <script>window.hacked = 4</script> <img src=x onerror=window.hacked=5> $x^2$'))\n"
    "display(HTML('<script>window.hacked = 6</script><img src=\"https://example.com/a.png\">'))\n"
    "display(Javascript('window.hacked = 7'))\ndisplay(Latex('$$y^2$$'))\n"
    "print('<script>window.hacked = 8</script>')",
    "import sys\n\nbars = ['b:  50%|█ | 5/10 [00:01<00:01]a: Warning', 'Map: 4000 examples [00:00, 9/s]', 'in full']\n"
    "print(*bars, sep='\\n', file=sys.stderr)\n"
    "pd.DataFrame({'x': [1 / 3, float('nan')]})",
    "print('inner bar [00:01<00:02, 1it/s]\\x1b[A', file=sys.stderr)\n"
    "fig, ax = plt.subplots()\nax.plot([2, 1])\nfigures.caption(fig, 'It carries the story.', lead=True)",
    "effect = Observations({(s,): 0.2 + s / 100 for s in range(3)}, 'seed')\n"
    "run.claim('A1').primary(effect, control=effect * 3)",
]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("suite")
    throwaway.write(root, "01_signal", CELLS, parameters='profile = "tiny"\nnames = ["<script>"]  # classes')
    throwaway.write(root, "02_broken", ["# Broken", "raise ValueError('<script>window.hacked = 9</script>')"])
    throwaway.write(root, "03_other", ["# No figure"])
    throwaway.write(root, "04_figure", ["# No claim", *CELLS[1:3]])
    assert runner.run(root, single=True, out=io.StringIO()) == 1
    return root / "reports/tiny"


def test_report_states_what_it_came_from(pages):
    page = BeautifulSoup((pages / "01_signal.html").read_text(), "html.parser")
    result = json.loads((pages.parents[1] / "artifacts/tiny/01_signal/results.json").read_text())
    facts, came_from = page.select_one("details.facts").get_text(" "), result["provenance"]
    for text in [
        came_from["revision"],
        came_from["versions"]["numpy"],
        came_from["device"],
        came_from["started"],
    ]:
        assert text in facts
    assert 'names ["<script>"]' in facts
    contents = [(a.get_text(), a["href"]) for a in page.select("#contents a")]
    assert contents == [("First part", "#section-0"), ("Second part", "#section-1")]
    assert len(page.select("details.code:not([open]) pre")) == len(CELLS) - 2 + 4  # papermill injects one
    assert page.select_one("a[download]")["href"] == "01_signal.ipynb"
    assert page.select_one("header a")["href"] == "index.html"
    assert page.select_one(".jp-RenderedImage img")["alt"] == "Figure. Class <script>window.hacked = 2</script> rises."
    single = BeautifulSoup((pages / "01_signal.single.html").read_text(), "html.parser")
    assert single.select_one("a[download]")["href"].startswith("data:application/x-ipynb+json;base64,")


def test_the_head_answers_before_it_explains(chromium, pages):
    """Question, the claim's sentence with both verdicts, and the figure that carries it stand above the fold."""
    page, _, _ = visit(chromium, pages / "01_signal.html", viewport={"width": 1280, "height": 800})
    head = page.locator("#head")
    said = head.inner_text()
    order = ["signal?", "Question. Is there?", "A1 · Retrieved features", "as stated ✓ replicated"]
    order += ["beyond control ✗ contradicted", "shared by more of its images", "It carries the story."]
    assert [said.index(text) for text in order] == sorted(said.index(text) for text in order)
    box = head.locator("figure img").bounding_box()
    assert box["y"] + box["height"] < 800 and head.locator(".claim").bounding_box()["y"] < 300
    assert page.locator("main h1").count() == 0 and page.locator("h1").count() == 1
    assert not page.locator("details.facts").evaluate("d => d.open"), "parameters are folded"
    shown = page.locator("main").inner_text()
    assert not [text for text in ("50%|", "examples", "inner bar", "NaN", "0.3333") if text in shown]
    assert "a: Warning\nin full" in shown and "0.333" in shown
    assert all(text.strip() for text in page.locator("main pre").all_text_contents()), "no empty output"
    page.context.close()


def test_pages_name_no_foreign_address_to_load(pages):
    for path in pages.glob("*.html"):
        page = BeautifulSoup(path.read_text(), "html.parser")
        loaded = {tag.get("src") or tag.get("href") for tag in page.select("[src], link[href]")}
        assert all(url == "plotly.min.js" or url.startswith("data:") for url in loaded), path
        assert "@import" not in (style := page.style.get_text()) and "url(" not in style


def test_plotly_is_beside_the_reports_once_or_inside_the_single_file(pages):
    assert (pages / "plotly.min.js").stat().st_size > 1e6
    assert 'src="plotly.min.js"' in (pages / "01_signal.html").read_text()
    assert "plotly" not in (pages / "03_other.html").read_text().split("<main>")[0].split("</style>")[1]
    assert (pages / "01_signal.single.html").stat().st_size > 1e6
    assert (pages / "03_other.single.html").stat().st_size < 1e5


def test_cleaning():
    assert reports.clean("<b onclick=x>a</b><script>x</script>") == "<b>a</b>&lt;script&gt;x&lt;/script&gt;"
    assert "src" not in reports.clean('<img src="//example.com/x.png"><img src="x.png">')
    assert reports.clean('<a href="javascript:x">a</a>') == "<a>a</a>"
    assert reports.clean("<style scoped>td {}</style><table></table>") == "<table></table>"
    assert "<math" in reports.markdown("$a_1 < b$ and *text*") and "<em>text</em>" in reports.markdown("*text*")
    assert reports.to_mathml(r"\nonsense{") == "<code>\\nonsense{</code>"
    figure = reports.plotly_figure({"data": [{"name": "<script>a<b>c</b>"}], "layout": {}})
    assert json.loads(figure.split(">", 2)[2].split("</script>")[0])["data"][0]["name"] == "&lt;script>a<b>c</b>"


def visit(chromium, path, link="", **context):
    """The page opened from disk with the network off, what it requested, and what went to its console."""
    page = chromium.new_context(offline=True, **context).new_page()
    requests, complaints = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri() + link)
    page.wait_for_load_state("load")
    page.wait_for_timeout(500)
    return page, [url for url in requests if not url.startswith("data:")], complaints


def test_every_page_opens_offline_without_complaint(chromium, pages):
    for path in sorted(pages.glob("*.html")):
        page, requests, complaints = visit(chromium, path)
        allowed = {path.as_uri(), (pages / "plotly.min.js").as_uri()}
        assert complaints == [] and set(requests) <= allowed, path
        assert page.evaluate("window.hacked") is None, path
        page.context.close()


@pytest.mark.parametrize("name", ["01_signal.html", "01_signal.single.html"])
def test_figures_math_and_text_are_there(chromium, pages, name):
    page, requests, _ = visit(chromium, pages / name)
    assert len(requests) == (1 if "single" in name else 2)
    expect(page.locator(".plotly-figure .bars path")).to_have_count(1)
    assert page.locator(".plotly-figure").bounding_box()["height"] > 200
    assert page.locator(".plotly-figure .xtick").first.text_content() == "<script>bar</script>"
    maths = page.locator("math")
    assert maths.count() == 4 and all(maths.nth(i).bounding_box()["height"] > 5 for i in range(4))
    shown = page.locator("body").inner_text()
    for text in [
        "window.hacked = 1",
        "window.hacked = 2",
        "window.hacked = 3",
        "window.hacked = 4",
        "window.hacked = 8",
    ]:
        assert f"<script>{text}</script>" in shown
    assert not page.locator("details.code").first.evaluate("d => d.open")
    page.click("#code")
    assert page.locator("details.code").first.evaluate("d => d.open")
    page.context.close()


def test_light_and_dark(chromium, pages):
    def paper(page):
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light, dark = (visit(chromium, pages / "01_signal.html", color_scheme=scheme)[0] for scheme in ("light", "dark"))
    assert paper(light) == "rgb(255, 255, 255)" and paper(dark) != paper(light)
    night = paper(dark)
    dark.click("#theme")
    light.click("#theme")
    assert paper(dark) == "rgb(255, 255, 255)" and paper(light) == night
    light.context.close()
    dark.context.close()


def test_readable_on_a_phone(chromium, pages):
    for path in sorted(pages.glob("*.html")):
        page, _, _ = visit(chromium, path, viewport={"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, path
        page.context.close()


def test_index_shows_each_notebook(chromium, pages):
    page, _, _ = visit(chromium, pages / "index.html")
    cards = page.locator("article")
    assert cards.count() == 4
    first, second = cards.nth(0).inner_text(), cards.nth(1).inner_text()
    assert "✓ done" in first and "A1 Retrieved features" in first and cards.nth(0).locator("img").count() == 1
    assert "✗ failed" in second and "Traceback" in second and "<script>window.hacked = 9</script>" in second
    assert "Class <script>window.hacked = 2</script> rises." in cards.nth(3).inner_text(), (
        "no claim: its lead figure's words"
    )
    page.click("article h2 a >> nth=0")
    page.wait_for_url("**/01_signal.html")
    page.context.close()
