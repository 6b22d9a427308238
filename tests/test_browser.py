import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from playwright.sync_api import expect
from test_reports import visit

from mmsae_helpers.errors import InputError
from mmsae_helpers.suite import browser

expect.set_options(timeout=20_000)  # a loaded machine draws late
HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked=2'>"
N_IMAGES, K, BINS, GRID = 150, 9, 12, (4, 5)
WORDS = ["red", "blue", "circle", HOSTILE, "", 'before "white"']


def material(rows=400):
    """Arguments of `browser.write`: two layers, every 40th feature dead, each 10th else rare, images of mixed modes."""
    rng = np.random.default_rng(0)
    number = np.arange(rows)
    n_images = np.where(number % 40 == 7, 0, np.where(number % 10 == 3, 2, rng.integers(K, N_IMAGES, rows)))
    alive = n_images > 0
    table = pd.DataFrame({"layer": np.where(number < rows // 2, 1, 5), "feature": number % (rows // 2) * 3})
    table["label"] = [WORDS[i % len(WORDS)] for i in number]
    table["n_images"], table["frequency"] = n_images, n_images / N_IMAGES
    table["similarity"], table["purity"] = np.where(alive, rng.random((2, rows)), np.nan)
    table["about"] = np.where(alive, [f"color={WORDS[i % 2]}" for i in number], "")
    table["max"] = np.where(alive, rng.random(rows) * 9, np.nan)
    ids = np.where(np.arange(K) < n_images[:, None], rng.integers(0, N_IMAGES, (rows, K)), -1)
    images = [
        Image.new(["RGB", "L", "RGBA"][i % 3], (30 + i % 7, 40), 17 * i % 255 if i % 3 == 1 else (i, 99, 200))
        for i in range(N_IMAGES)
    ]
    return dict(
        table=table,
        top_ids=ids,
        top_values=-np.sort(-rng.random((rows, K)) * 9) * (ids >= 0),
        heat=np.broadcast_to(number[:, None, None, None] % 256, (rows, K, *GRID)).astype(np.uint8),
        images=images,
        histograms=rng.integers(0, 900, (rows, BINS)) * alive[:, None],
        bin_edges=np.linspace(0, 9, BINS + 1),
        tokens=[[(HOSTILE, 2.5, 3), ("a", 1.0, 40)] if a else [] for a in alive],
        neighbours=((number[:, None] + [1, 2, 201]) % rows, np.full((rows, 3), 0.5)),
        title="Features & <captions>",
        note=f"A note {HOSTILE} {{script}}",
        heat_note="cross-attention at the caption token where it fires",
        n_tokens=5000,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = browser.write(tmp_path_factory.mktemp("report") / "browser", **material())
    return path.parent


@pytest.fixture
def opened(chromium, folder):
    """A function that opens the browser at a hash; afterwards nothing foreign was asked for, nothing complained."""
    seen = []

    def go(link="#1/0", plain=True, **context):
        """``plain``: all features, dead ones too, in their own order."""
        seen.append(visit(chromium, folder / "index.html", link, **context))
        if plain:
            seen[-1][0].evaluate(
                """() => { for (const [id, value] of [["state", "all"], ["sort", "order"], ["direction", "1"]])
                document.getElementById(id).value = value;
                document.getElementById("filter").dispatchEvent(new Event("input", { bubbles: true })); }"""
            )
            passes(seen[-1][0], 400)
        return seen[-1][0]

    yield go
    for page, requests, complaints in seen:
        assert page.evaluate("window.hacked") is None and complaints == []
        assert requests and all(url.startswith(folder.as_uri() + "/") for url in requests)
        page.context.close()


def title(page):
    return page.locator("#feature h2").inner_text()


def shown(page, key):
    page.wait_for_selector(f'#feature[data-shown="{key}"]')


def passes(page, rows, of=400):
    """Wait until the filter, which acts in the next frame, has left so many features."""
    left = f"{int(rows):,} of" if rows else "None of"
    expect(page.locator("#count")).to_have_text(re.compile(f"^{left} {of} features"))


def test_first_view(opened):
    page = opened()
    shown(page, "1/0")
    assert title(page) == "Layer 1, feature 0: red"
    assert "400 features in 2 layers, measured on 150 images and 5,000 tokens" in page.inner_text("#summary")
    assert "10 are dead (fire on no image), 40 rare (on 1 to 8 images)" in page.inner_text("#summary")
    assert "fewer than 9 images come last" in page.inner_text("#last")
    assert page.locator("#state option[value=rare]").inner_text() == "rare only: 1 to 8 images"
    assert page.locator(".row").count() < 60
    assert page.locator(".thumb").count() == 9 and page.locator("canvas.heat").count() == 9
    assert "cross-attention at the caption token" in page.inner_text("#feature")
    assert page.locator(".thumb").first.get_attribute("aria-label").endswith("of 4 by 5 patches")
    pixel = "c => Array.from(c.getContext('2d').getImageData(20, 20, 1, 1).data)"
    assert page.locator("svg rect").count() == BINS and page.locator("svg text").count() > 6
    assert page.locator("canvas.heat").first.evaluate(pixel.replace("20, 20", "0, 0"))[3] > 0
    assert HOSTILE in page.inner_text("#feature") and page.locator("#feature script, #feature img").count() == 0


def test_it_opens_on_the_most_informative_living_feature(opened):
    """Dead features are hidden until asked for; how much a feature tells is purity times the bits of its firing."""
    page, table = opened("", plain=False), material()["table"]
    passes(page, (table.n_images > 0).sum())
    f = table.frequency.clip(1e-12, 1 - 1e-12)
    tells = table.purity * -(f * np.log2(f) + (1 - f) * np.log2(1 - f))
    best = table.loc[tells.where(table.n_images >= K).idxmax()]
    shown(page, f"{best.layer}/{best.feature}")
    expect(page.locator(".row .id").first).to_have_text(f"{best.layer}/{best.feature}")
    page.select_option("#state", "dead")
    passes(page, (table.n_images == 0).sum())


def test_search_filter_and_sort(opened):
    page = opened()
    shown(page, "1/0")
    page.fill("#search", "red")
    table = material()["table"]
    passes(page, ((table.label == "red") | (table.about == "color=red")).sum())
    page.fill("#search", "circle color=red")
    passes(page, ((table.label == "circle") & (table.about == "color=red")).sum())
    page.fill("#search", "5/0")
    expect(page.locator(".row .id").first).to_have_text("5/0")
    page.fill("#search", "<script>window")
    passes(page, (table.label == HOSTILE).sum())
    page.fill("#search", "nothing has this")
    passes(page, 0)
    page.click("text=Reset")
    passes(page, (table.n_images > 0).sum())
    page.select_option("#state", "all")
    passes(page, 400)
    page.select_option("#state", "alive")
    passes(page, (table.n_images > 0).sum())
    page.select_option("#state", "dead")
    passes(page, (table.n_images == 0).sum())
    page.select_option("#state", "rare")
    passes(page, 40)
    page.select_option("#state", "all")
    page.select_option("#layer", label="5")
    passes(page, 200)
    page.fill("#frequency-min", "50")
    page.fill("#similarity-max", "0.5")
    page.fill("#purity-min", "0.25")
    passing = (table.layer == 5) & (table.frequency >= 0.5) & (table.similarity <= 0.5) & (table.purity >= 0.25)
    assert 0 < passing.sum() < 200
    passes(page, passing.sum())
    page.select_option("#sort", "similarity")
    page.select_option("#direction", "-1")
    best = table[passing & (table.n_images >= K)].sort_values("similarity", ascending=False).iloc[0]
    expect(page.locator(".row .id").first).to_have_text(f"5/{best.feature}")


@pytest.mark.parametrize("score", ["similarity", "purity"])
def test_features_on_few_images_come_last_by_score(opened, score):
    page = opened()
    shown(page, "1/0")
    page.select_option("#sort", score)
    page.select_option("#direction", "-1")
    table = material()["table"]
    parts = [table[table.n_images >= K], table[table.n_images < K]]
    many, few = (part.sort_values(score, ascending=False, kind="stable") for part in parts)
    assert few[score].max() > many[score].min(), "the order is not that of the score alone"
    order = [f"{row.layer}/{row.feature}" for row in pd.concat([many, few]).itertuples()]
    chosen = page.locator('[role=option][aria-selected="true"]')
    expect(chosen).to_have_attribute("aria-posinset", str(order.index("1/0") + 1))  # once sorted
    page.focus("#list")
    for press, at in [("Home", 0), ("ArrowDown", 1), ("End", -1)]:  # the last is dead and has no score
        page.keyboard.press(press)
        shown(page, order[at])
    page.select_option("#state", "rare")
    passes(page, 40)
    expect(page.locator(".row .id").first).to_have_text(order[len(many)])


def test_keys_step_through_what_passes_the_filter(opened):
    page = opened()
    shown(page, "1/0")
    page.fill("#search", "blue")
    steps = material()["table"]
    blue = (steps.label == "blue") | (steps.about == "color=blue")
    passes(page, blue.sum())
    steps = steps[blue].feature.tolist()
    for press, at in [("ArrowDown", 0), ("ArrowDown", 1), ("ArrowDown", 2), ("ArrowUp", 1)]:
        page.keyboard.press(press)
        shown(page, f"1/{steps[at]}")
        assert page.url.endswith(f"#1/{steps[at]}")
    page.focus("#list")
    page.keyboard.press("j")
    shown(page, f"1/{steps[2]}")
    chosen = page.locator('[role=option][aria-selected="true"]')
    assert page.get_attribute("#list", "aria-activedescendant") == chosen.get_attribute("id")
    assert chosen.get_attribute("aria-posinset") == "3" and chosen.get_attribute("aria-setsize") == str(len(steps))
    assert f"Layer 1, feature {steps[2]}" in page.inner_text("#spoken")
    page.keyboard.press("k")
    page.keyboard.press("End")
    page.wait_for_function("document.querySelector('#list').scrollTop > 1000")
    assert page.locator('[role=option][aria-selected="true"]').is_visible()
    page.keyboard.press("h")
    assert not page.is_checked("#heat") and page.locator("canvas.heat").first.is_hidden()
    page.keyboard.press("/")
    page.keyboard.type("jk/h")  # letters, not commands, in a field
    assert page.input_value("#search") == "jk/h"


def test_links(opened):
    page = opened("#5/30")
    shown(page, "5/30")
    assert title(page).startswith("Layer 5, feature 30")
    page.evaluate("location.hash = '#1/15'")
    shown(page, "1/15")
    assert title(page) == 'Layer 1, feature 15: before "white"'
    page.evaluate("location.hash = '#5/30'")
    shown(page, "5/30")
    near = page.locator("#feature a[href='#5/33']")
    near.click()
    shown(page, "5/33")
    assert page.url.endswith("#5/33")
    page.go_back()
    shown(page, "5/30")
    page.evaluate("location.hash = '#5/31'")
    page.wait_for_selector("[role=alert]")
    assert "There is no feature “5/31” here" in page.inner_text("#feature") and "1, 5" in page.inner_text("#feature")
    page.evaluate("location.hash = '#<img src=x onerror=window.hacked=3>'")
    expect(page.locator("#feature")).to_contain_text("<img src=x")
    unknown = opened("#9/%E0%A4%A")
    assert "There is no feature" in unknown.inner_text("[role=alert]")


def test_a_dead_feature_says_so(opened):
    page = opened("#1/21")
    shown(page, "1/21")
    text = page.inner_text("#feature")
    assert "dead: on none of 150 images" in text and "It fires on no image." in text and "It fires on no token" in text


def test_names_roles_and_narrow_screens(opened):
    page = opened()
    shown(page, "1/0")
    nameless = (
        "[...document.querySelectorAll('input, select, button, a, svg, .thumb')]"
        ".filter(e => !(e.ariaLabel || e.labels?.length || e.textContent.trim())).length"
    )
    assert page.evaluate(nameless) == 0
    narrow = opened(viewport={"width": 420, "height": 800})
    shown(narrow, "1/0")
    assert narrow.evaluate("document.documentElement.scrollWidth") <= 420
    dark = opened(color_scheme="dark", reduced_motion="reduce")
    paper = dark.evaluate("getComputedStyle(document.body).backgroundColor")
    dark.click("#theme")
    assert dark.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)" != paper


def test_a_missing_file_is_named(chromium, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "part")
    for lost, said in [
        ("details/00000.js", "The file details/00000.js is missing"),
        ("table.js", "table.js is missing"),
    ]:
        (tmp_path / "part" / lost).unlink()
        page, *_ = visit(chromium, tmp_path / "part/index.html", "#1/0")
        assert said in page.inner_text("[role=alert]")
        page.context.close()


def test_what_is_written(folder, tmp_path):
    data = material()
    again = browser.write(tmp_path / "b", **data | {"heat": np.zeros((400, K, *GRID), np.uint8)})
    assert not list(tmp_path.glob("*.part")) and len(list((folder / "details").iterdir())) == 7
    sheet = Image.open(folder / "sprites/00000.jpg")
    first = data["images"][data["top_ids"][0, 0]].convert("RGB").getpixel((0, 0))
    assert sheet.size == (512, 512) and np.abs(np.subtract(sheet.getpixel((32, 32)), first)).max() < 12
    sizes = {p.name: p.stat().st_size for p in again.parent.rglob("*.*")}
    assert sizes["index.html"] < 60_000
    (tmp_path / "b/old.txt").write_text("x")
    browser.write(tmp_path / "b", **data)
    assert not (tmp_path / "b/old.txt").exists()
    content = (tmp_path / "b/details/00000.js").read_text()
    row = json.loads(content.removeprefix("mmsae.chunk(0,").removesuffix(")"))
    assert row["grid"] == list(GRID) and row["ids"][0] == data["top_ids"][0].tolist() and row["cosines"][0] == [0.5] * 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"top_ids": np.zeros((3, 9), int)}, r"top_ids is \[3, 9\]; for this table it must be \[400, 9\]"),
        ({"top_ids": np.full((400, K), 150)}, "top_ids must be whole numbers from -1 .none. to 149"),
        ({"top_values": np.zeros((400, 2))}, "top_values is"),
        ({"bin_edges": np.zeros(4)}, r"bin_edges is \[1, 4\]"),
        ({"tokens": []}, "tokens has 0 lists"),
        ({"neighbours": (np.zeros((400, 2), int), np.zeros((400, 3)))}, "neighbours' cosines is"),
        ({"heat": np.zeros((400, K, 4, 5))}, "heat is float64"),
        ({"table": material()["table"].drop(columns="purity")}, "table has no column 'purity'"),
        ({"table": material()["table"].assign(feature=0)}, "feature 0 of layer 1 is in the table twice"),
        ({"table": material()["table"][:0]}, "no rows"),
    ],
)
def test_bad_input(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        browser.write(tmp_path / "b", **material() | change)
    assert not (tmp_path / "b").exists()
