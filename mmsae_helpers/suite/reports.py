"""Executed notebooks as HTML pages that open from disk without a network, and the index page of a profile.

What a notebook displays is made safe before nbconvert's template sees it: HTML and Markdown are cleaned of scripts
(which then stand there as text), plotly's JSON becomes a figure, LaTeX MathML.
"""

import base64
import copy
import html
import json
import logging
import re
import shutil
from itertools import pairwise
from pathlib import Path

import bleach
import nbformat
from bleach.css_sanitizer import CSSSanitizer
from bs4 import BeautifulSoup
from jinja2 import Environment, FileSystemLoader
from math_core import LatexError, LatexToMathML
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from mmsae_helpers import files
from mmsae_helpers.suite import claims, results

TEMPLATE = Path(__file__).resolve().parent / "report_template"
PLOTLY = "application/vnd.plotly.v1+json"
TAGS = bleach.ALLOWED_TAGS.union(
    "br caption col colgroup dd del details div dl dt figcaption figure h1 h2 h3 h4 h5 h6 hr img ins kbd mark p pre q "
    "s small span sub summary sup table tbody td tfoot th thead tr u".split()
)
ATTRIBUTES = {
    "*": ["class", "id", "title", "style", "align", "colspan", "rowspan", "scope", "open"],
    "a": ["href"],
    # any other image would be a request
    "img": lambda _, name, value: name in ("alt", "width", "height") or (name, value[:11]) == ("src", "data:image/"),
}
PROGRESS = re.compile(r"\[(?:\d+:)?\d\d:\d\d[<,][^\]]{0,99}\](?:\s|\x1b\[A)*")  # the end of a bar of tqdm
DROPPED = ("application/javascript", "application/vnd.jupyter.widget-view+json", "text/vnd.mermaid")
LOG = logging.getLogger("mmsae.reports")
LOG.setLevel(logging.ERROR)  # nbconvert warns of the pictures that get their words below


def clean(markup):
    """HTML without scripts, event handlers or foreign images; a tag not let through arrives as text."""
    markup = re.sub(r"<style\b.*?</style>", "", markup, flags=re.S | re.I)  # pandas prints one with every table
    css = CSSSanitizer(allowed_css_properties=["color", "background-color", "text-align", "font-weight", "width"])
    return bleach.clean(markup, TAGS, ATTRIBUTES, protocols=["http", "https", "mailto", "data"], css_sanitizer=css)


def to_mathml(latex, block=False):
    """LaTeX as MathML; as code where it cannot be read."""
    try:
        return LatexToMathML().convert_with_local_state(latex.strip(), displaystyle=block)
    except LatexError:
        return f"<code>{html.escape(latex)}</code>"


class _Renderer(IPythonRenderer):
    """Markdown to HTML with formulas as text between two marks, to become MathML after cleaning."""

    def inline_math(self, body, marks="\ue000\ue001"):
        return marks[0] + html.escape(body) + marks[1]

    def block_math(self, body):
        return self.inline_math(body, "\ue002\ue001")

    def latex_environment(self, name, body):
        return self.block_math(f"\\begin{{{name}}}{body}\\end{{{name}}}")


def markdown(text, attachments=None):
    """Markdown with formulas as clean HTML."""
    renderer = _Renderer(escape=False, attachments=attachments, exclude_anchor_links=True)
    safe = clean(MarkdownWithMath(renderer=renderer).render(re.sub("[\ue000-\ue002]", "", text)))
    formula = re.compile("([\ue000\ue002])(.*?)\ue001", re.S)
    return formula.sub(lambda found: to_mathml(html.unescape(found[2]), found[1] == "\ue002"), safe)


def plotly_figure(figure):
    """A plotly MIME bundle as a placeholder with its JSON; the page's script draws it."""
    text = json.dumps({"data": figure["data"], "layout": figure.get("layout", {})})
    # plotly reads a few tags in its labels; every other "<" is meant as the character
    text = re.sub(r"<(?!/?(?:b|i|br|em|strong|sub|sup|s|u)\s*/?>)", "&lt;", text).replace("<", "\\u003c")
    return f'<div class="plotly-figure"><script type="application/json">{text}</script></div>'


def _prepare(notebook):
    """Replace what the notebook displays by what may stand in a page; bars of progress go."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = markdown(cell.source, cell.get("attachments"))
        for output in cell.get("outputs", []):
            if "text" in output:
                lines = (line for line in output.text.splitlines(True) if not line.endswith("\r"))
                output.text = "".join(PROGRESS.split(line)[-1] for line in lines)  # a warning may follow a bar
        cell.outputs = [o for o in cell.get("outputs", []) if o.get("text", "a figure").strip()]
        for output in cell.outputs:
            for mime in DROPPED:
                output.get("data", {}).pop(mime, None)
            if page := _markup(output):
                output.data = nbformat.from_dict({"text/html": page})


def _markup(output):
    """What stands in a page for an output; "" where that is left to the template."""
    data = output.get("data", {})
    if PLOTLY in data:
        return plotly_figure(data[PLOTLY])
    if "text/html" in data:
        page = re.sub(r"(?i)(<td[^>]*>)\s*(?:nan|None|NaT)\s*(?=</td>)", r"\1", clean(data["text/html"]))
        return f'<div class="scroll">{page}</div>'
    if "text/markdown" in data:
        page = markdown(data["text/markdown"])
        return f'<div class="figcaption">{page}</div>' if _mark(output) else page
    return to_mathml(data["text/latex"].strip("$ \n"), block=True) if "text/latex" in data else ""


def _mark(output):
    """What `figures.caption` says of a sentence: "caption", or "lead"; None for anything else."""
    return output.get("metadata", {}).get("text/markdown", {}).get("mmsae")


def _lead(notebook):
    """The outputs with the figure that carries the notebook and its caption, else with its first; none: empty."""
    pairs = [pair for cell in notebook.cells for pair in pairwise(cell.get("outputs", [])) if _mark(pair[1])]
    return min(pairs, key=lambda pair: _mark(pair[1]) != "lead", default=())


def _lead_figure(figure, words):
    """`_lead` as markup."""
    alt = html.escape(words.data["text/markdown"].replace("*", ""))
    return (_markup(figure) or f'<img src="{_png(figure)}" alt="{alt}">') + _markup(words)


def _png(output):
    png = output.get("data", {}).get("image/png", "")
    return png and "data:image/png;base64," + png.replace("\n", "")


def _claims(result):
    """What a run says about claims, each with what the claim says."""
    return [claim | {"says": claims.definitions()[claim["id"]].says} for claim in result.get("claims", [])]


def render(executed, page, status, result, single=False):
    """Write the HTML report ``page`` of the notebook ``executed`` (paths), of its ``run.json`` and ``results.json``
    (empty where it failed); ``single``: with plotly.js and the executed notebook inside instead of beside it."""
    try:
        notebook = nbformat.read(executed, as_version=4)
    except nbformat.reader.NotJSONError:  # cut off, by a full disk: its status says so, and the next run makes it anew
        executed.unlink()
        page.unlink(missing_ok=True)
        return
    has_plotly = any(PLOTLY in o.get("data", {}) for c in notebook.cells for o in c.get("outputs", []))
    title = _title(notebook, executed.stem)
    lead = _lead_figure(*_lead(notebook)) if _lead(notebook) else ""
    _prepare(notebook)
    given = notebook.metadata.get("papermill", {}).get("parameters", {})
    inside = f"data:application/x-ipynb+json;base64,{base64.b64encode(executed.read_bytes()).decode()}"
    facts = {
        "title": title,
        "parameters": {k: json.dumps(v, ensure_ascii=False) for k, v in (result.get("parameters") or given).items()},
        "provenance": result.get("provenance", {}),
        "claims": _claims(result),
        "lead": lead,
        "status": status,
        "minutes": _duration(status["duration_s"]),
        "index": "" if single else "index.html",
        "executed": inside if single else executed.name,
        "executed_name": executed.name,
        "plotly": has_plotly and ("inline" if single else "plotly.min.js"),
        "plotly_js": _plotly_js() if has_plotly and single else "",
        **_assets(),
    }
    exporter = HTMLExporter(template_name=TEMPLATE.name, extra_template_basedirs=[str(TEMPLATE.parent)], log=LOG)
    body, _ = exporter.from_notebook_node(notebook, resources={"report": facts})
    soup = BeautifulSoup(body, "html.parser")
    question = [p for p in soup.select("main section p") if p.get_text().startswith("Question.")]
    for part in [*soup.select("main h1")[:1], *question[:1]][::-1]:
        soup.find(id="head").insert(0, part.extract())
    contents = soup.find("nav", id="contents")
    for i, heading in enumerate(soup.select("main h2, main h3")):
        heading["id"] = f"section-{i}"
        item = soup.new_tag("a", href=f"#section-{i}", attrs={"class": heading.name})
        item.extend(copy.copy(part) for part in heading.contents)
        contents.append(item)
    for link in soup.select('main a[href$=".ipynb"]'):  # from notebook to notebook: here from page to page
        if "/" not in link["href"]:
            link["href"] = link["href"].replace(".ipynb", ".single.html" if single else ".html")
    if not contents.contents:
        contents.parent.decompose()
    for cell in soup.select(".jp-CodeCell"):
        captions = [c.get_text(" ", strip=True) for c in cell.select(".figcaption")]
        for image, words in zip(cell.select("img"), captions, strict=False):
            image["alt"] = words
    files.write(page, str(soup).encode())
    if has_plotly and not single and not (page.parent / "plotly.min.js").is_file():
        files.write(page.parent / "plotly.min.js", _plotly_js().encode())


def place_browser(made, folder, name):
    """Copy the feature browser in the folder ``made`` to ``folder``, with a link back to the report of ``name``."""
    part = folder.with_name(f"{folder.name}.part")
    for old in (part, folder):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(made, part)
    page, back = part / "index.html", f'<a href="../{html.escape(name)}.html">← the report</a>'
    files.write(page, page.read_text("utf-8").replace("<!--back-->", back, 1).encode())
    part.rename(folder)


def render_index(plan, names, page):
    """Write the index page: per notebook of ``plan`` (`runner.Plan`) a thumbnail, status, duration, verdicts, any
    traceback. A notebook that never ran is shown as committed."""
    cards, total = [], 0
    for name in names:
        executed, (status, result) = plan.executed(name), plan.outcome(name)
        try:
            shown = nbformat.read(executed if executed.is_file() else plan.notebook(name), as_version=4)
        except Exception:  # a broken source, which its status tells of
            shown = nbformat.v4.new_notebook()
        total += status.get("duration_s", 0)
        lead = _lead(shown)
        words = lead[1].data["text/markdown"] if lead else ""
        card = {
            "name": name,
            "title": _title(shown, name),
            "page": f"{name}.html" if executed.is_file() else "",
            "browser": f"{name}_browser/index.html" if plan.browser(name).is_file() else "",
            "thumbnail": _png(lead[0]) if lead else "",
            "minutes": _duration(status.get("duration_s", 0)),
            "claims": _claims(result),
            "lead": html.unescape(words).removeprefix("*Figure.* ").replace("*", ""),
        }
        cards.append(card | {"status": "not run"} | status)
    template = Environment(loader=FileSystemLoader(TEMPLATE), autoescape=True).get_template("overview.html.j2")
    facts = {"profile": plan.profile, "total": _duration(total), "revision": results.revision(plan.root)}
    files.write(page, template.render(cards=cards, **facts, **_assets()).encode())


def _title(notebook, fallback):
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (found := re.search(r"^#\s+(.+)$", cell.source, re.M)):
            return re.sub(r"[*`$]", "", found[1]).strip()
    return fallback


def _duration(seconds):
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _assets():
    return {kind: (TEMPLATE / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js")}


def _plotly_js():
    from plotly.offline import get_plotlyjs

    return get_plotlyjs().replace("</script", "<\\/script")
