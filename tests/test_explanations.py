"""Explanations by others, from an export or Neuronpedia's API, and the table of paper A."""

import gzip
import json
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import hub_layouts as hub_of
import numpy as np
import pytest

from mmsae_helpers.errors import InputError
from mmsae_helpers.meters import explanations
from mmsae_helpers.meters.explanations import Explanations


def test_an_export_is_read_as_a_folder_a_file_and_a_list(tmp_path):
    folder = hub_of.neuronpedia(tmp_path, "gemma-2b/6-res-jb")
    lines = b"".join(gzip.decompress(file.read_bytes()) for file in sorted(folder.rglob("*.gz")))
    (tmp_path / "lines.jsonl").write_bytes(lines)
    (tmp_path / "list.json").write_text(json.dumps([json.loads(line) for line in lines.splitlines()]))
    for source in (f"{tmp_path}/gemma-2b/{{layer}}-res-jb", str(folder / "explanations"),
                   str(tmp_path / "lines.jsonl"), str(tmp_path / "list.json")):  # fmt: skip
        said = Explanations(source, 6, 24)
        assert said(1) == f"mentions of <b>{hub_of.WORDS[1]}</b> & more"
        assert said(np.int64(3)) == f"mentions of <b>{hub_of.WORDS[3]}</b> & more" and said(5) == said(23) == ""
    assert Explanations("", 6, 24)(1) == ""


def test_a_bad_export_is_one_line(tmp_path):
    folder = hub_of.neuronpedia(tmp_path, "gemma-2b/6-res-jb")
    (tmp_path / "none").mkdir()
    contents = {"cut.jsonl.gz": gzip.compress(b"x" * 99)[:30], "text.json": b"[1, 2", "foreign.json": b"[3]"}
    contents["other.jsonl"] = b'{"index": 1, "layer": "6-res-jb"}\n{"description": "a"}\n'
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    hub_of.neuronpedia(tmp_path / "both", "gemma-2b/6-res-jb")
    two = hub_of.neuronpedia(tmp_path / "both", "gemma-2b-it/6-res-jb") / "explanations/batch-0.jsonl.gz"
    two.rename(tmp_path / "both/gemma-2b/6-res-jb/explanations/batch-9.jsonl.gz")
    for source, layer, d_sae, why in (
        ("missing", 6, 24, "no explanations in"), ("none", 6, 24, "no explanations in"),
        ("cut.jsonl.gz", 6, 24, "cannot read the explanations in"), ("text.json", 6, 24, "cannot read the expl"),
        ("foreign.json", 6, 24, "row 1 of .* has no index"), ("other.jsonl", 6, 24, "row 2 of .* has no index"),
        (folder, 6, 10, "explains feature 1., but the SAE of block 6 has 10"),
        (folder, 10, 24, "explains 6-res-jb: give the export of the one SAE of block 10"),
        ("both/gemma-2b/6-res-jb", 6, 24, "explains gemma-2b-it/6-res-jb and gemma-2b/6-res-jb: give"),
        ("neuronpedia:gemma-2b", 6, 24, "write neuronpedia:<model>/<source>"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=why) as error:
            Explanations(source if ":" in str(source) else str(tmp_path / source), layer, d_sae)
        assert "\n" not in str(error.value)


@pytest.fixture
def api(tmp_path, monkeypatch):
    """Neuronpedia's API: a feature's page, 404 for one that it does not keep, 401 without the key, 503 the first time;
    the list of paths that it was asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            index = int(self.path.split("/")[-1])
            status = (
                503 if len(asked) == 1 else 401 if self.headers["x-api-key"] != "secret" else 404 if index == 2 else 200
            )
            self.send_response(status)
            self.end_headers()
            said = [{"description": None}, {"description": f"number {index} "}] if index % 2 else []
            self.wfile.write(json.dumps({"index": str(index), "explanations": said}).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(explanations, "URL", f"http://127.0.0.1:{server.server_port}/api/feature")
    monkeypatch.setattr(explanations, "session", partial(explanations.session, tries=1, wait=0))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setenv("NEURONPEDIA_API_KEY", "secret")
    yield asked
    server.shutdown()
    server.server_close()


def test_the_api_is_asked_once_for_a_feature(api):
    said = Explanations("neuronpedia:gemma-2b/{layer}-res-jb", 6, 24)
    assert (said(1), said(7), said(4), said(2)) == ("number 1", "number 7", "", "")
    assert api == [f"/api/feature/gemma-2b/6-res-jb/{i}" for i in (0, 0, 1, 2, 7, 4)]
    assert Explanations("neuronpedia:gemma-2b/6-res-jb", 6, 24)(7) == "number 7" and len(api) == 6, "kept on disk"


def test_an_api_that_refuses_is_one_line(api, monkeypatch):
    monkeypatch.delenv("NEURONPEDIA_API_KEY")
    with pytest.raises(InputError, match="no explanation from .*/0: 401 .*the key in NEURONPEDIA_API_KEY"):
        Explanations("neuronpedia:gemma-2b/6-res-jb", 6, 24)
    monkeypatch.setattr(explanations, "URL", "http://127.0.0.1:9/api/feature")
    with pytest.raises(InputError, match="no explanation from .*see to the network") as error:
        Explanations("neuronpedia:gemma-2b/6-res-jb", 6, 24)
    assert "\n" not in str(error.value)


def test_the_posts_rows_are_all_there():
    rows = explanations.printed()
    assert len(rows) == 40 and rows.index.is_unique and rows["feature"].between(0, 16383).all()
    first = rows["images"].xs(1, level="rank").unstack("block")[["0", "6", "10", "12", "12-it"]]
    assert first.loc["dolphin"].tolist() == [30, 25, 88, 77, 60] and first.loc["cloud"].tolist() == [4, 24, 62, 92, 80]
    assert rows.loc[("dolphin", "10", 1), "feature"] == 14117
    assert (rows["release"] == "gemma-2b-it-res-jb").sum() == 8


def test_the_table_lists_what_most_images_of_a_class_retrieve():
    counts = np.array([[9, 3, 5, 5], [8, 0, 1, 0], [0, 0, 0, 0]])
    table = explanations.listed({"6": (counts, {2: "red"}, str)}, 10, {"b": 1, "a": 0, "c": 2})
    assert table.reset_index().to_numpy().tolist() == [
        ["b", "6", 1, 2, 1, "red", "2"],
        ["a", "6", 1, 2, 5, "red", "2"],
        ["a", "6", 2, 3, 5, "–", "3"],
    ]  # feature 0 is retrieved by too many images, and class c retrieves nothing
