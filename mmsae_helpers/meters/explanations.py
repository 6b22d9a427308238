"""What others say that features mean, and the table of paper A, which prints it."""

import gzip
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import requests

from mmsae_helpers.data import session
from mmsae_helpers.errors import InputError, first_line
from mmsae_helpers.files import write

API, URL, KEY = "neuronpedia:", "https://www.neuronpedia.org/api/feature", "NEURONPEDIA_API_KEY"
ROW = ["class", "block", "rank"]


class Explanations:
    """Explanations of the features of one SAE, of ``d_sae`` at block ``layer``: called with a feature, a text, "" where
    there is none. Of several of a feature the first counts.

    ``source``, in which {layer} stands for the block: "" for none; an export of Neuronpedia, as its bucket
    neuronpedia-datasets has it under v1/<model>/<source>/ (a .json or .jsonl file, perhaps .gz, or a folder of them);
    or ``neuronpedia:<model>/<source>``, its API, asked once for each feature, with the key in the environment variable
    NEURONPEDIA_API_KEY if there is one, and kept in ``mmsae_neuronpedia`` of the datasets cache. Raises InputError
    where it cannot be read or reached, says nothing of the block, or is about an SAE of more features or two SAEs.
    """

    def __init__(self, source: str, layer: int, d_sae: int):
        self.source, self._asked = source.replace("{layer}", str(layer)), {}
        self._api = self.source.startswith(API)
        if self._api:
            self._place = self.source.removeprefix(API)
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", self._place):
                raise InputError(f"explanations {source}: write {API}<model>/<source>, as in {API}gemma-2b/6-res-jb")
            self._file = Path(datasets.config.HF_DATASETS_CACHE) / "mmsae_neuronpedia" / f"{self._place}.json"
            self._asked = dict(json.loads(self._file.read_text())) if self._file.is_file() else {}
            if not any([self(feature) for feature in range(min(3, d_sae))]):  # before the long pass
                raise InputError(f"{URL}/{self._place} explains none of its first features: mend the source")
        elif source:
            self._asked = _exported(Path(self.source).expanduser(), layer, d_sae)

    def __call__(self, feature: int) -> str:
        key = str(int(feature))
        if self._api and key not in self._asked:
            self._asked[key] = self._answer(key)
            write(self._file, json.dumps(self._asked).encode())
        return self._asked.get(key, "")

    def _answer(self, feature: str) -> str:
        own = {"x-api-key": os.environ[KEY]} if os.environ.get(KEY) else {}
        try:
            with session(**own) as asking:
                answer = asking.get(url := f"{URL}/{self._place}/{feature}", timeout=60)
            if answer.status_code == 404:  # it keeps no feature that is dead on its text
                return ""
            answer.raise_for_status()
            return _first((answer.json() or {}).get("explanations") or [])
        except (requests.RequestException, AttributeError, TypeError) as error:
            do = f"see to the network or the key in {KEY}, or give an export"
            raise InputError(f"no explanation from {url}: {first_line(error)}; {do}") from error


def _first(rows: Sequence[dict]) -> str:
    return next(filter(None, ((row.get("description") or "").strip() for row in rows)), "")


def _exported(path: Path, layer: int, d_sae: int) -> dict[str, str]:
    """The first explanation of each feature in an export, as far as it is of the block."""
    folder = path / "explanations" if (path / "explanations").is_dir() else path
    files = [path] if path.is_file() else sorted(f for f in folder.glob("*") if re.search(r"\.jsonl?(\.gz)?$", f.name))
    if not files:
        raise InputError(f"no explanations in {path}: give a .json or .jsonl file, perhaps .gz, or a folder of them")
    found, about, seen = {}, set(), set()
    for file in files:
        for number, row in enumerate(_rows(file), 1):
            try:
                feature, of = int(row["index"]), row.get("layer", layer)
                text, block = _first([row]), int(re.match(r"\d+", str(of))[0])
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise InputError(f"row {number} of {file} has no index, layer and description: {error!r}") from error
            seen.add(str(of))
            if block != layer:
                continue
            about.add(f"{row.get('modelId')}/{of}")
            if not 0 <= feature < d_sae:
                raise InputError(f"{file} explains feature {feature}, but the SAE of block {layer} has {d_sae}")
            if text:
                found.setdefault(str(feature), text)
    if len(about) != 1:
        has = " and ".join(sorted(about or seen)[:5]) or "nothing"
        raise InputError(f"{path} explains {has}: give the export of the one SAE of block {layer}")
    return found


def _rows(file: Path) -> list:
    """Of a JSON list, or of JSON lines."""
    try:
        content = file.read_bytes()
        text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode()
        return json.loads(text) if text.lstrip()[:1] == "[" else [json.loads(x) for x in text.split("\n") if x.strip()]
    except (OSError, EOFError, ValueError, gzip.zlib.error) as error:
        raise InputError(f"cannot read the explanations in {file}: {first_line(error)}") from error


def printed() -> pd.DataFrame:
    """The features that paper A prints of four classes at five depths, two each; by `ROW`, columns feature, images (of
    100), explanation, and the model and the release of SAEs that they are of. METHODS A.1."""
    return pd.read_csv(Path(__file__).with_name("post_features.csv"), dtype={"block": str}).set_index(ROW)


def listed(found: Mapping[str, tuple], max_images: float, names: Mapping[str, int], n: int = 2) -> pd.DataFrame:
    """Paper A's table: for each class of ``names`` and each block the ``n`` features that most of its images retrieve,
    but no more than ``max_images`` in all; by `ROW`, columns feature, images, label ("–" for none), explanation.

    ``found`` {block: (counts [classes, d_sae] as `words.ImageScan.retrieved`, {feature: label}, `Explanations`)};
    ``names`` {class: row of the counts}.
    """
    rows = []
    for block, (counts, label_of, explained) in found.items():
        left = counts * (counts.sum(0) <= max_images)
        for name, at in names.items():
            for rank, feature in enumerate(np.argsort(-left[at], kind="stable")[:n].tolist(), 1):
                if images := int(left[at, feature]):
                    said = label_of.get(feature, "–"), explained(feature)
                    rows.append((name, block, rank, feature, images, *said))
    table = pd.DataFrame(rows, columns=[*ROW, "feature", "images", "label", "explanation"])
    return table.sort_values("class", key=lambda of: of.map(list(names).index), kind="stable").set_index(ROW)
