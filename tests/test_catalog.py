"""`sarfm.datasets.catalog` and `sarfm.io.download`: entries are checked, files are verified, a folder needs only a YAML file."""

import hashlib
import io
import json
import random
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jsonschema
import numpy as np
import pytest
import rioxarray  # noqa: F401 (the accessor .rio)
import yaml
from PIL import Image

from sarfm.datasets import catalog
from sarfm.datasets.catalog import Scenes, check, entry_files, fetch, list_table, open_dataset, show_entry
from sarfm.datasets.entries import catalog_names, data_folder, entry_folder, entry_schema, load_entry
from sarfm.evaluation.unseen import scoreable
from sarfm.io.download import download
from sarfm.io.files import CorruptData, StoreLocked, carried, lock, read_json, sha256
from sarfm.patches.contract import InputContract
from sarfm.patches.prepare import prepare_store
from sarfm.patches.splits import Split

CONTENT = random.Random(1).randbytes(300_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def own_data_folder(tmp_path, monkeypatch):
    """Keep the tests out of the user's data folder."""
    monkeypatch.setenv("SARFM_DATA", str(tmp_path / "sarfm-data"))


# ---------------------------------------------------------------- a server that does what it is told


class Server(ThreadingHTTPServer):
    """Serve `content`, with one behaviour per request; the last behaviour stays."""

    def __init__(self, content=CONTENT, behaviours=("good",)):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.behaviours, self.asked = content, list(behaviours), []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/file.bin"


class Handler(BaseHTTPRequestHandler):
    """Answer as the server's behaviours say."""

    def do_GET(self):
        server, content = self.server, self.server.content
        how = server.behaviours.pop(0) if len(server.behaviours) > 1 else server.behaviours[0]
        asked = self.headers.get("Range")
        server.asked.append(asked)
        begin = int(asked[6:-1]) if asked and how != "ignore range" else 0
        if how.isdigit():
            return self.send_error(int(how))
        if how == "wrong range":
            begin = max(begin - 10, 0)
        if begin >= len(content):
            return self.send_error(416)
        self.send_response(206 if asked and how != "ignore range" else 200)
        if how != "no length":
            self.send_header("Content-Length", str(len(content) - begin))
        if asked and how != "ignore range":
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if how == "hang":
            time.sleep(3)
        for byte in range(begin, len(content)) if how == "drip" else ():
            try:
                self.wfile.write(content[byte : byte + 1])
            except OSError:  # the reader has left
                return None
            time.sleep(0.02)
        end = (
            random.Random(begin + len(server.asked)).randint(begin + 1, len(content)) if how == "cut" else len(content)
        )
        self.wfile.write(content[begin:end])

    def log_message(self, *_):
        """Stay quiet."""


@pytest.fixture
def serve():
    """Start servers that end with the test."""
    servers = []

    def start(*behaviours, content=CONTENT):
        servers.append(Server(content, behaviours or ("good",)))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def get(server, path, **options):
    """Download quickly and quietly."""
    return download(
        server.url, path, len(CONTENT), options.pop("checksum", DIGEST), pause_s=0.005, progress=False, **options
    )


# ---------------------------------------------------------------- downloads


@pytest.mark.row(8)
def test_ten_cut_streams_are_resumed(serve, tmp_path):
    server = serve(*["cut"] * 10, "good")
    assert get(server, tmp_path / "a.bin").read_bytes() == CONTENT
    assert all(asked for asked in server.asked[1:]), "every further request asks for the rest only"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize(
    "how",
    [
        ["cut", "ignore range"],
        ["cut", "wrong range", "good"],
        ["500", "503", "cut", "500", "good"],
        ["no length"],
        ["cut", "cut", "429", "good"],
    ],
)
def test_servers_that_misbehave(serve, tmp_path, how):
    assert get(serve(*how), tmp_path / "a.bin").read_bytes() == CONTENT


@pytest.mark.row(8)
def test_a_killed_download_continues_where_it_was(serve, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:123_456])
    server = serve("good")
    get(server, tmp_path / "a.bin")
    assert server.asked == ["bytes=123456-"] and sha256(tmp_path / "a.bin") == DIGEST


@pytest.mark.row(8)
def test_a_part_longer_than_the_file_starts_over(serve, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(CONTENT + b"more")
    assert get(serve("good"), tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_file_that_is_there_is_not_fetched_again(serve, tmp_path):
    server = serve("good")
    get(server, tmp_path / "a.bin")
    get(server, tmp_path / "a.bin")
    assert len(server.asked) == 1
    (tmp_path / "a.bin").write_bytes(b"damaged")
    get(server, tmp_path / "a.bin")
    assert sha256(tmp_path / "a.bin") == DIGEST


@pytest.mark.row(8)
def test_wrong_bytes_are_put_aside_and_never_used(serve, tmp_path):
    wrong = bytearray(CONTENT)
    wrong[5] ^= 1
    with pytest.raises(CorruptData, match=r"a\.bin\.bad.*sha256"):
        get(serve(content=bytes(wrong)), tmp_path / "a.bin")
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin.bad"]
    get(serve("good"), tmp_path / "a.bin")
    assert sha256(tmp_path / "a.bin") == DIGEST


@pytest.mark.row(8)
def test_more_bytes_than_stated_are_refused(serve, tmp_path):
    with pytest.raises(CorruptData, match="more than the 300000 bytes"):
        get(serve(content=CONTENT + b"x"), tmp_path / "a.bin")
    assert not (tmp_path / "a.bin").exists()


@pytest.mark.row(8)
def test_a_dead_server_gives_up_and_keeps_what_arrived(serve, tmp_path):
    with pytest.raises(OSError, match=r"broke off 3 times.*run the same command again"):
        get(serve("cut", "500"), tmp_path / "a.bin", retries=2)
    assert (tmp_path / "a.bin.part").stat().st_size > 0 and not (tmp_path / "a.bin").exists()


def test_a_missing_file_is_reported_at_once(serve, tmp_path):
    server = serve("404")
    with pytest.raises(OSError, match="404"):
        get(server, tmp_path / "a.bin")
    assert len(server.asked) == 1


@pytest.mark.row(8)
def test_a_silent_server_times_out_and_is_asked_again(serve, tmp_path):
    server = serve("hang", "good")
    assert get(server, tmp_path / "a.bin", timeout_s=0.3).read_bytes() == CONTENT
    assert len(server.asked) >= 2  # it didn't wait for the first answer


@pytest.mark.row(8)
def test_two_downloads_of_one_file_do_not_meet(serve, tmp_path):
    with lock(tmp_path / "a.bin"), pytest.raises(StoreLocked):
        get(serve("good"), tmp_path / "a.bin")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/a", "/etc/passwd", "data:text/plain,x"])
def test_only_http_is_fetched(tmp_path, url):
    with pytest.raises(ValueError, match="http or https"):
        download(url, tmp_path / "a", 1, "0" * 64)


# ---------------------------------------------------------------- entries


@pytest.mark.parametrize("name", catalog_names())
def test_every_entry_validates_against_the_exported_schema(name):
    schema = json.loads((carried("data_catalogs") / "schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load((carried("data_catalogs") / f"{name}.yaml").read_text()), schema)
    assert load_entry(name).id == name


@pytest.mark.parametrize("name", catalog_names())
def test_every_entry_that_comes_with_sarfm_states_its_terms(name):
    entry = load_entry(name)
    stated = ("description", "license", "providers", "citation", "attribution", "how_to_get", "sensor", "crs")
    assert [field for field in (*stated, "split") if not getattr(entry, field)] == [] and entry.split.description


def test_exported_schema_is_up_to_date():
    assert read_json(carried("data_catalogs") / "schema.json") == json.loads(json.dumps(entry_schema())), (
        "run nbs/15_datasets/01_entries.ipynb"
    )


def test_the_five_systems_are_all_described():
    assert {system for name in catalog_names() for system in load_entry(name).system} == {1, 2, 3, 4, 5}


@pytest.fixture
def entry():
    """Give a small valid entry as plain values."""
    return {
        "id": "mine", "title": "Mine", "description": "d", "license": "CC0-1.0", "providers": [{"name": "me", "roles": ["producer"]}],
        "citation": "none", "attribution": "none", "access": "open", "how_to_get": "Ask me.", "readable": True, "sensor": "Sentinel-1",
        "crs": "none", "spacing_m": 10.0, "channels": {"vv": {"units": "1", "quantity": "digital_number", "nodata": 0}}, "split": {"by": "block"},
        "read": {"scenes": "{scene}.png"},
    }  # fmt: skip


def written(folder, entry, name="mine.yaml"):
    """Write an entry as a file."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text(yaml.safe_dump(entry, sort_keys=False))
    return folder / name


ESCAPES = ["../a.png", "/etc/passwd", "a/../../b.png", r"..\a", "C:/a.png", "//proc/self/root/a"]


@pytest.mark.row(11)
@pytest.mark.parametrize("path", ESCAPES)
@pytest.mark.parametrize("where", ["files", "scenes", "targets"])
def test_paths_that_leave_the_folder_are_refused(tmp_path, entry, path, where):
    entry["targets"] = {"flood": {"description": "d", "classes": {0: {"name": "dry"}}}}
    if where == "files":
        entry["files"] = [{"path": path}]
    elif where == "scenes":
        entry["read"]["scenes"] = path + "{scene}"
    else:
        entry["read"]["targets"] = {"flood": path}
    with pytest.raises(ValueError, match=r"mine\.yaml is no valid entry.*stays inside"):
        load_entry(written(tmp_path, entry))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"licence": "CC0"}, "licence"),
        ({"access": "free"}, "access"),
        ({"id": "../x"}, "id"),
        ({"readable": False}, "read"),
        ({"channels": {"vv": {"units": "furlong", "quantity": "sigma0"}}}, "expected units of .*furlong"),
        ({"channels": {"vv": {"units": "dB", "quantity": "coherence"}}}, "expected units of .*coherence"),
        ({"channels": {"vv": {"units": "dB", "quantity": "sigma"}}}, "expected a quantity of"),
        ({"targets": {"t": {"kind": "tags", "classes": {0: {"name": "a"}}}}}, "tags are of a tile"),
        ({"targets": {"t": {"kind": "classes"}}}, "name each code"),
        ({"targets": {"vv": {"kind": "number"}}}, "channels and targets"),
        ({"split": {"by": "chance"}}, "split.by"),
        ({"access": "simulated"}, "section `simulate`"),
        ({"access": "simulated", "simulate": {"with": "nobody"}}, "no simulator 'nobody'"),
        ({"files": [{"path": "a.zip", "url": "http://h/a.zip"}]}, "bytes and sha256"),
        ({"files": [{"path": "a.zip", "url": "file:///etc/passwd", "bytes": 1, "sha256": "0" * 64}]}, "url"),
        ({"read": {"scenes": "{orbit}.png"}}, "orbit"),
        ({"read": {"scenes": "{time}/{scene}.png"}}, "times"),
        ({"read": {"scenes": "{scene}.png", "targets": {"flood": "m.png"}}}, "flood"),
        ({"read": {"scenes": "{season}/{scene}.png"}}, "seasons must list"),
        ({"read": {"scenes": "{scene}.png", "times": ["a"], "seasons": ["winter"]}}, "leave one out"),
        ({"channels": {}, "read": {"scenes": "{scene}_{channel}.png"}}, "channels must name them"),
        ({"read": {"scenes": "{scene}.nc", "reader": "other"}}, "no reader 'other'"),
        ({"read": {"scenes": "{scene}.nc", "reader": "ai4arctic", "bands": "time"}}, "leave out .*bands"),
    ],
)
def test_mistakes_are_named(tmp_path, entry, change, said):
    with pytest.raises(ValueError, match=said):
        load_entry(written(tmp_path, entry | change))


@pytest.mark.row(9)
def test_yaml_that_builds_objects_is_refused(tmp_path):
    (tmp_path / "evil.yaml").write_text(f"!!python/object/apply:os.mkdir ['{tmp_path}/canary']")
    with pytest.raises(ValueError, match=r"evil\.yaml is not plain YAML"):
        load_entry(tmp_path / "evil.yaml")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["nothing", "../borneo", "/etc/passwd"])
def test_unknown_names_list_the_known_ones(name):
    with pytest.raises(ValueError, match="borneo"):
        load_entry(name)


def test_a_missing_yaml_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml"):
        load_entry(tmp_path / "gone.yaml")


def test_folders(tmp_path, monkeypatch, entry):
    assert data_folder() == tmp_path / "sarfm-data"
    assert entry_folder("ombria") == tmp_path / "sarfm-data" / "ombria"
    assert entry_folder("ombria", tmp_path) == tmp_path
    assert entry_folder(written(tmp_path, entry)) == tmp_path
    monkeypatch.delenv("SARFM_DATA")
    assert data_folder().name == "sarfm"


# ---------------------------------------------------------------- opening


def image(path, values):
    """Write a one-band PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


@pytest.fixture
def pairs(tmp_path, entry):
    """Make a folder of three flood pairs and its YAML file."""
    rng = np.random.default_rng(0)
    for name in ("b", "a", "c"):
        for when in ("before", "after"):
            image(tmp_path / "pairs" / when / f"{name}.png", rng.integers(1, 255, (16, 24), dtype=np.uint8))
        image(
            tmp_path / "pairs" / "mask" / f"{name}.png",
            np.repeat(np.uint8([[0, 7, 255, 255]]), 6, axis=1).repeat(16, axis=0),
        )
    entry["targets"] = {"flood": {"description": "flooded", "classes": {0: {"name": "dry"}, 1: {"name": "flooded"}}}}
    entry["read"] |= {
        "scenes": "{time}/{scene}.png",
        "times": ["before", "after"],
        "targets": {"flood": "mask/{scene}.png"},
        "recode": {"flood": {255: 1}},
    }
    return written(tmp_path / "pairs", entry)


def test_a_folder_needs_only_a_yaml_file(pairs):
    scenes = open_dataset(pairs)
    assert isinstance(scenes, Scenes) and list(scenes) == ["a", "b", "c"] and "a" in scenes
    scene = scenes["b"]
    assert scene.vv.dims == ("time", "y", "x") and scene.time.values.tolist() == ["before", "after"]
    assert np.array_equal(scene.vv.sel(time="after"), np.asarray(Image.open(pairs.parent / "after" / "b.png")))
    assert np.unique(scene.flood).tolist() == [0, 1, 7] and scene.flood.attrs["flag_values"].tolist() == [0, 1]
    assert scene.attrs["licence"] == "CC0-1.0" and scene.attrs["scene"] == "b" and scene.attrs["spacing_m"] == 10.0


def test_opening_reads_nothing_until_asked(pairs):
    for path in pairs.parent.rglob("c.png"):
        path.write_bytes(b"not an image")
    scenes = open_dataset(pairs)
    assert len(scenes) == 3 and scenes["a"].sizes["x"] == 24
    with pytest.raises((ValueError, OSError), match=r"c\.png"):
        scenes["c"]


def test_one_file_per_polarisation_in_the_order_of_the_entry(tmp_path, entry):
    for pol, value in (("VH", 20), ("VV", 10)):
        image(tmp_path / f"site_{pol}.png", np.full((8, 8), value, np.uint8))
    entry["channels"] = {"vh": entry["channels"]["vv"], "vv": entry["channels"]["vv"]}
    entry["read"] |= {"scenes": "{scene}_{channel}.png"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(entry, sort_keys=False))
    scene = open_dataset(tmp_path / "mine.yaml")["site"]
    assert scene.sar.polarisations == ["vh", "vv"] and float(scene.vh[0, 0]) == 20
    (tmp_path / "site_VV.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"vv.*incomplete"):
        open_dataset(tmp_path / "mine.yaml")["site"]


def test_missing_pieces_are_named(pairs, tmp_path):
    (pairs.parent / "after" / "a.png").unlink()
    (pairs.parent / "mask" / "b.png").unlink()
    image(pairs.parent / "mask" / "c.png", np.zeros((4, 4), np.uint8))
    with pytest.warns(UserWarning, match=r"no file for \['after'\].*'?a\.png'?.*left out"):
        scenes = open_dataset(pairs)
    assert "a" not in scenes
    with pytest.raises(FileNotFoundError, match=r"target 'flood'.*b\.png"):
        scenes["b"]
    with pytest.raises(ValueError, match=r"mask/c\.png does not lie on .*4 × 4 px instead of"):
        scenes["c"]
    with pytest.raises(KeyError, match="has no scene 'z'"):
        scenes["z"]
    with pytest.raises(FileNotFoundError, match="Ask me"):
        open_dataset(pairs, tmp_path / "empty")


def test_hidden_files_are_no_scenes_and_suffixes_may_be_capitals(pairs):
    root = pairs.parent
    for kind in ("before", "after", "mask"):
        (root / kind / "b.png").rename(root / kind / "b.PNG")
        (root / kind / "._c.png").write_bytes(b"macOS")
        (root / kind / ".ipynb_checkpoints").mkdir()
        (root / kind / ".ipynb_checkpoints/c.png").write_bytes(b"JupyterLab")
    held = list(open_dataset(pairs))
    assert "b" in held and not {"._c", ".ipynb_checkpoints/c"} & set(held)
    assert open_dataset(pairs)["b"].flood.size
    (root / "before/b.png").write_bytes((root / "before/b.PNG").read_bytes())
    with pytest.raises(ValueError, match=r"before/b\.PNG and before/b\.png are the same image of scene 'b'"):
        open_dataset(pairs)


def test_linked_subfolders_are_followed_and_a_circle_ends(pairs):
    root = pairs.parent
    before = list(open_dataset(pairs))
    (root / "after").rename(root / "later")
    (root / "after").symlink_to(root / "later")
    (root / "later/back").symlink_to(root)
    assert list(open_dataset(pairs)) == before and open_dataset(pairs)[before[0]].sizes["time"] == 2
    (root / "after").unlink()
    (root / "later").rename(root / "after")
    (root / "Alias").symlink_to(root / "after")  # visited before the folder itself, which must not hide it
    assert list(open_dataset(pairs)) == before


def test_many_incomplete_scenes_are_one_warning(pairs):
    for name in ("a", "b"):
        (pairs.parent / "after" / f"{name}.png").unlink()
    with pytest.warns(UserWarning, match="left out, and 1 other scenes like it") as said:
        assert list(open_dataset(pairs)) == ["c"]
    assert len(said) == 1


def test_a_folder_for_each_event(tmp_path):
    for event in ("east", "west", "north", "south"):
        for kind in ("before", "after", "mask"):
            (tmp_path / event / kind).mkdir(parents=True)
            for name in ("a", "b"):
                grey = np.eye(8) if kind == "mask" else np.full((8, 8), 10 * len(event) + ord(name))
                image(tmp_path / event / kind / f"{name}.png", grey.astype(np.uint8))
    entry = {
        "id": "events",
        "title": "Events",
        "channels": {"vv": {"units": "1", "quantity": "digital_number", "nodata": 0}},
    }
    entry |= {"targets": {"flood": {"classes": {0: {"name": "dry"}, 1: {"name": "wet"}}}}, "split": {"by": "event"}}
    entry["read"] = {"scenes": "{event}/{time}/{scene}.png", "times": ["before", "after"]}
    entry["read"]["targets"] = {"flood": "{event}/mask/{scene}.png"}
    path = tmp_path / "events.yaml"
    path.write_text(yaml.safe_dump(entry))
    scenes = open_dataset(path, tmp_path)
    assert list(scenes) == [f"{event}/{name}" for event in ("east", "north", "south", "west") for name in "ab"]
    assert int(scenes["south/b"].vv[0, 0, 0]) == 50 + ord("b") and int(scenes["south/b"].flood.sum()) == 8
    store = prepare_store(path, tmp_path, size=8, stride=8, cache=tmp_path / "cache", progress=False)
    parts = Split(fractions=(0.5, 0.25, 0.25)).parts(store)
    of = parts.groupby(store.index["place"].str.partition("/")[0]).unique()
    assert all(len(part) == 1 for part in of) and parts.value_counts().to_dict() == {"train": 4, "val": 2, "test": 2}
    (tmp_path / "east/after/a.png").unlink()
    taken = {"channels": ["vv@0", "vv@1"], "mean": [1, 1], "std": [1, 1], "patch_size": 4, "crop_px": 8}
    found, refused = scoreable(load_entry(path), tmp_path, InputContract(quantity="digital_number", units="1", **taken))
    assert len(found) == 7, refused
    assert refused[["scene", "file"]].values.tolist() == [["east/a", "east/after/a.png"]]


@pytest.mark.row(11)
def test_links_out_of_the_folder_are_refused(pairs, tmp_path):
    image(tmp_path / "secret.png", np.ones((16, 24), np.uint8))
    (pairs.parent / "before" / "d.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="symbolic link"):
        open_dataset(pairs)


def test_the_embedded_sample(tmp_path):
    scene = open_dataset("borneo")["borneo"]
    assert dict(scene.sizes) == {"time": 4, "y": 192, "x": 400} and scene.sar.polarisations == ["vv", "vh"]
    assert scene.sar.units == "dB" and scene.rio.crs.to_epsg() == 4326 and scene.valid.all()
    assert {1, 2, 3, 255} == set(np.unique(scene.cover).tolist())
    assert scene.cover.attrs["flag_meanings"] == "water forest cleared_2017-2018"
    water, forest = (float(scene.vh.where(scene.cover == code).mean()) for code in (1, 2))
    assert water < -24 and -16 < forest < -12
    assert "Copernicus Sentinel data 2017" in scene.attrs["attribution"] and "CC BY 4.0" in scene.attrs["attribution"]
    path = carried("data_catalogs") / "borneo.nc"
    assert path.stat().st_size < 1_000_000 and check("borneo").ok.all()


# ---------------------------------------------------------------- many quantities, seasons, numbers and tags

SEASONS = ["winter", "spring", "summer", "autumn"]
TILES = {
    "id": "tiles", "title": "Tiles of four seasons", "read": {"scenes": "{scene}.nc"},
    "channels": {
        "vv": {"units": "dB", "quantity": "sigma0"}, "vv_vh": {"units": "dB", "quantity": "ratio"},
        "coherence": {"units": "1", "quantity": "coherence"}, "height": {"units": "m", "quantity": "elevation", "nodata": -32768},
    },
    "targets": {
        "trees": {"kind": "number", "units": "%", "limits": [0, 100]},
        "biomass": {"kind": "number", "of": "tile", "units": "Mg/ha"},
        "cover": {"classes": {1: {"name": "open land", "color": "#ffdb5c"}, 2: {"name": "forest", "color": "#358221"}}},
        "present": {"kind": "tags", "of": "tile", "classes": {0: {"name": "forest"}, 1: {"name": "town"}, 2: {"name": "open"}}},
        "used": {"kind": "tags", "of": "tile", "classes": {0: {"name": "pasture"}, 1: {"name": "timber"}}},
    },
}  # fmt: skip


def write_tile(path, side=12):
    """Write a tile by netCDF4 alone, and give back what was written."""
    import netCDF4

    draw = np.random.default_rng(0)
    images = {n: draw.normal(-10, 3, (4, side, side)).astype("f4") for n in ("vv", "vv_vh")}
    images["coherence"] = draw.random((4, side, side)).astype("f4")
    stated = {"vv": ("dB", "sigma0"), "vv_vh": ("dB", "ratio"), "coherence": ("1", "coherence")}
    arrays = {"height": draw.integers(0, 900, (side, side)).astype("i2"), "trees": draw.uniform(-5, 105, (side, side))}
    arrays["cover"] = draw.integers(1, 4, (side, side)).astype("u1")
    with netCDF4.Dataset(path, "w") as out:
        for name, size in {"season": 4, "y": side, "x": side, "what": 3, "use": 2}.items():
            out.createDimension(name, size)
        for name, texts in {"season": SEASONS, "what": ["town", "open", "forest"]}.items():
            out.createVariable(name, str, (name,))[:] = np.array(texts, object)
        for name, values in images.items():
            variable = out.createVariable(name, "f4", ("season", "y", "x"))
            variable[:], (variable.units, variable.quantity) = values, stated[name]
        for name, values in arrays.items():
            fill = {"fill_value": 3} if name == "cover" else {}
            variable = out.createVariable(name, values.dtype, ("y", "x"), **fill)
            variable.set_auto_mask(False)
            variable[:] = values
        out.createVariable("biomass", "f4", ())[:] = 140.0
        out.createVariable("present", "i1", ("what",))[:] = [0, 1, 1]
        out.createVariable("used", "u1", ("use",))[:] = [1, 0]
    return images, arrays


@pytest.fixture
def tiles(tmp_path):
    """Write one tile and its entry."""
    written(tmp_path, TILES, "tiles.yaml")
    return tmp_path / "tiles.yaml", write_tile(tmp_path / "a.nc")


def test_seasons_quantities_numbers_and_tags_open_by_a_pattern_alone(tiles):
    entry, (images, arrays) = tiles
    scene = open_dataset(entry)["a"]
    assert [str(c) for c in scene.sar.channels][:3] == ["vv@winter", "vv_vh@winter", "coherence@winter"]
    for name, values in images.items():
        assert scene[name].dims == ("season", "y", "x") and np.array_equal(scene[name], values)
        told = TILES["channels"][name]
        assert {k: scene[name].attrs[k] for k in told} == told
    assert scene.height.attrs["units"] == "m" and np.array_equal(scene.height, arrays["height"])
    assert np.array_equal(scene.valid, np.ones((4, 12, 12), bool)), "heights don't decide what was observed"
    known = np.where((arrays["trees"] >= 0) & (arrays["trees"] <= 100), arrays["trees"], np.nan).astype("f4")
    targets = scene.sar.targets
    np.testing.assert_array_equal(targets["trees"].encode(scene.trees.values), known)
    numbers = np.select([arrays["cover"] == 1, arrays["cover"] == 2], [0, 1], 255)
    np.testing.assert_array_equal(targets["cover"].encode(scene.cover.values), numbers)
    assert float(scene.biomass) == 140 and targets["biomass"].units == "Mg/ha" and targets["biomass"].of == "tile"
    assert scene.present.values.tolist() == [1, 0, 1], "in the entry's order: forest, town, open"
    assert scene.used.values.tolist() == [1, 0] and scene.used.dims != scene.present.dims
    assert targets["cover"] == load_entry(entry).target("cover") and targets["cover"].colors[2] == "#358221"


@pytest.mark.parametrize(
    ("where", "change", "said"),
    [
        ("channels", {"coherence": {"units": "dB", "quantity": "ratio"}}, "coherence states quantity .*'coherence'"),
        ("channels", {"vh": {"units": "dB", "quantity": "sigma0"}}, "has no 'vh'"),
        ("targets", {"trees": {"classes": {0: {"name": "a"}}}}, "trees: expected integer codes, got fractions"),
        ("targets", {"absent": {"kind": "number"}}, "has no variable 'absent'"),
        ("targets", {"present": {"kind": "tags", "of": "tile", "classes": {0: {"name": "a"}}}}, "name them alike"),
    ],
)
def test_an_entry_that_contradicts_its_files_is_refused(tiles, tmp_path, where, change, said):
    entry = TILES | {where: TILES[where] | change}
    with pytest.raises(ValueError, match=said):
        open_dataset(written(tmp_path, entry, "tiles.yaml"))["a"]


def test_a_variable_that_states_nothing_is_asked_about(tiles):
    from sarfm.scenes.open import OpenQuestion, open_scene

    with pytest.raises(OpenQuestion, match=r"\['height', 'trees', 'cover'\] state neither"):
        open_scene(tiles[0].with_name("a.nc"))
    scene = open_scene(tiles[0].with_name("a.nc"), channels=["coherence", "vv"])
    assert [str(c) for c in scene.sar.channels][:2] == ["coherence@winter", "vv@winter"]


def test_seasons_lie_in_folders_too(tmp_path, entry):
    for number, season in enumerate(("summer", "winter")):
        image(tmp_path / season / "a.png", np.full((8, 8), 10 + number, np.uint8))
    entry["read"] |= {"scenes": "{season}/{scene}.png", "seasons": ["winter", "summer"]}
    scene = open_dataset(written(tmp_path, entry))["a"]
    assert scene.season.values.tolist() == ["winter", "summer"] and scene.vv[:, 0, 0].values.tolist() == [11, 10]


def test_a_file_of_other_classes_than_its_entry_is_refused(tmp_path):
    entry = yaml.safe_load((carried("data_catalogs") / "borneo.yaml").read_text())
    entry["targets"]["cover"]["classes"][2]["name"] = "water"
    written(tmp_path, entry | {"access": "open"}, "other.yaml")
    with pytest.raises(ValueError, match=r"cover states .*forest.*but .*water.* was given"):
        open_dataset(tmp_path / "other.yaml", carried("data_catalogs"))["borneo"]


# ---------------------------------------------------------------- readers of other packages


def test_a_reader_of_another_package_is_found_by_its_name(tmp_path, monkeypatch):
    import shutil
    from pathlib import Path

    from sarfm.io.registry import registered

    toy = Path(__file__).with_name("toy")
    shutil.copytree(toy / "sarfm_toy", tmp_path / "site/sarfm_toy")
    (tmp_path / "site/sarfm_toy-0.1.dist-info").mkdir()
    shutil.copy(toy / "entry_points.txt", tmp_path / "site/sarfm_toy-0.1.dist-info")
    (tmp_path / "site/sarfm_toy-0.1.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: sarfm-toy\nVersion: 0.1\n"
    )
    shutil.copy(toy / "toy_stages.yaml", tmp_path)
    with pytest.raises(ValueError, match="no reader 'toy_npz'"):
        load_entry(tmp_path / "toy_stages.yaml")
    monkeypatch.syspath_prepend(tmp_path / "site")
    registered.cache_clear()
    stage = np.arange(64).reshape(8, 8).astype("u1") % 3 + 1
    np.savez(tmp_path / "s.npz", stage=stage, vv=stage - 20.0, vh=stage - 30.0)
    scenes = open_dataset(tmp_path / "toy_stages.yaml")
    scene = scenes["s"]
    assert np.array_equal(scene.stage, stage) and scene.sar.targets["stage"].names == ["low", "middle", "high"]
    assert scene.attrs["licence"] == "CC0-1.0" and entry_files(scenes.entry, tmp_path) == ["s.npz"]
    registered.cache_clear()


@pytest.mark.parametrize("name", [n for n in catalog_names() if not load_entry(n).readable])
def test_entries_that_are_not_readable_say_how_to_get_the_data(name):
    with pytest.raises(ValueError, match="not yet readable") as error:
        open_dataset(name)
    assert load_entry(name).how_to_get[:30] in str(error.value)
    with pytest.raises(ValueError, match="cannot be fetched by sarfm"):
        fetch(name)


# ---------------------------------------------------------------- fetching and checking


def fetchable(entry, server, content, **file):
    """Add one file with an address to an entry."""
    described = {
        "path": "data.zip",
        "url": server.url,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    return entry | {"files": [described | file]}


def zipped(**members):
    """Make a zip in memory."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/"), content)
    return buffer.getvalue()


def test_fetch_unpacks_once_and_check_agrees(serve, tmp_path, entry):
    content = zipped(inner__a="one", b="two")
    server = serve("cut", "good", content=content)
    path = written(tmp_path, fetchable(entry, server, content, unpack=True))
    assert fetch(path, progress=False) == tmp_path and (tmp_path / "inner" / "a").read_text() == "one"
    (tmp_path / "b").write_text("changed by the user")
    fetch(path, progress=False)
    assert (tmp_path / "b").read_text() == "changed by the user"
    table = check(path)
    assert table.ok.all() and table.compared_with.tolist() == ["catalogue"]


@pytest.mark.row(11)
def test_fetch_refuses_a_hostile_archive(serve, tmp_path, entry):
    content = zipped(good="1", **{"..__escaped": "2"})
    path = written(tmp_path / "set", fetchable(entry, serve(content=content), content, unpack=True))
    with pytest.raises(ValueError, match="is refused"):
        fetch(path, progress=False)
    assert not (tmp_path / "escaped").exists() and not (tmp_path / "set" / "good").exists()


def test_fetch_never_uses_a_file_with_a_wrong_checksum(serve, tmp_path, entry):
    content = zipped(a="1")
    path = written(tmp_path, fetchable(entry, serve(content=content), content, unpack=True, sha256="0" * 64))
    with pytest.raises(CorruptData, match=r"data\.zip\.bad"):
        fetch(path, progress=False)
    assert not (tmp_path / "a").exists() and not (tmp_path / "data.zip").exists()


def test_check_finds_missing_cut_and_changed_files(serve, tmp_path, entry):
    content = zipped(a="1")
    path = written(tmp_path, fetchable(entry, serve(content=content), content))
    assert not check(path).present.any()
    fetch(path, progress=False)
    assert check(path).ok.all()
    (tmp_path / "data.zip").write_bytes(content[:-1] + b"!")
    assert check(path)[["size_ok", "sha256_ok", "ok"]].iloc[0].tolist() == [True, False, False]
    (tmp_path / "data.zip").write_bytes(content[:-1])
    assert not check(path).size_ok.any()


def test_check_records_what_the_catalogue_does_not_know(pairs):
    assert len(check(pairs)) == 9 and check(pairs).ok.all()
    (pairs.parent / "mask" / "a.png").write_bytes(b"damaged")
    (pairs.parent / "mask" / "b.png").unlink()
    table = check(pairs).set_index("file")
    assert table.index[~table.ok].tolist() == ["mask/a.png", "mask/b.png"]
    assert (
        set(table.compared_with) == {"first check"} and entry_files(load_entry(pairs), pairs.parent)[0] == "after/a.png"
    )


def test_tables_for_people(tmp_path):
    table = list_table()
    assert table.name.tolist() == catalog_names() and table.set_index("name").here["borneo"]
    for name in catalog_names():
        assert load_entry(name).title in show_entry(name)


# ---------------------------------------------------------------- real data that is not shipped


REAL = {
    "ombria": ("flood/ombria_s1", 694, ["vv"], "1", "digital_number", "flood"),
    "terramesh": ("land/terramesh_s1rtc_lulc", 3, ["vv", "vh"], "dB", "gamma0", "land_cover"),
    "opera_rtc": ("land/opera_rtc_california", 5, ["vv", "vh"], "dB", "gamma0", None),
    "worldcereal": ("land/worldcereal_belgium_monthly", 1, ["vv", "vh"], "dB", "sigma0", None),
}


@pytest.mark.parametrize("name", REAL)
def test_real_data_sets_open(shared, name):
    where, count, polarisations, units, quantity, label = REAL[name]
    scenes = open_dataset(name, shared / where)
    assert len(scenes) == count
    first = scenes[next(iter(scenes))]
    assert first.sar.polarisations == polarisations and first.sar.units == units and first.sar.quantity == quantity
    assert (label in first) if label else not load_entry(name).targets


def test_ombria_fill_is_invalid_and_never_flooded(shared):
    scene = open_dataset("ombria", shared / "flood/ombria_s1")["0105"]
    assert scene.time.values.tolist() == ["before", "after"]
    fill = ~scene.valid.any("time")
    assert int(fill.sum()) == 16_564 and int((scene.flood.where(fill) == 1).sum()) == 0
    assert set(np.unique(scene.flood).tolist()) == {0, 1}


def test_opera_dates_and_order(shared):
    scene = open_dataset("opera_rtc", shared / "land/opera_rtc_california")["137-292325-IW1"]
    assert (
        scene.sizes["time"] == 22
        and str(scene.time.values[0])[:10] == "2021-11-19"
        and scene.rio.crs.to_epsg() == 32611
    )


def test_pixels_and_labels_are_those_of_the_files(shared):
    """Held against rasterio, file by file."""
    import rasterio

    folder = shared / "land/terramesh_s1rtc_lulc"
    for name, scene in open_dataset("terramesh", folder).items():
        with rasterio.open(folder / f"{name}_S1RTC.tif") as radar, rasterio.open(folder / f"{name}_LULC.tif") as cover:
            vv, vh, codes = *radar.read(), cover.read(1)
        np.testing.assert_array_equal(scene.vv, vv)
        np.testing.assert_array_equal(scene.vh, vh)
        known = np.isin(codes, list(range(1, 10)))
        np.testing.assert_array_equal(scene.land_cover.values[known], codes[known])
        encoded = scene.sar.targets["land_cover"].encode(scene.land_cover.values)
        np.testing.assert_array_equal(encoded, np.where(known, codes - 1, 255))
    folder = shared / "flood/ombria_s1"
    scenes = open_dataset("ombria", folder)
    for name in list(scenes)[::60]:
        scene, read = scenes[name], lambda kind, name=name: np.asarray(Image.open(folder / kind / f"{name}.png"))
        for number, when in enumerate(("before", "after")):
            grey = read(when).astype("f4")
            np.testing.assert_array_equal(scene.vv[number], np.where(grey == 255, np.nan, grey))
        np.testing.assert_array_equal(scene.flood, read("mask") == 255)


def test_simulated_files_are_never_written_over_files_of_others(tmp_path):
    folder = tmp_path / "SEN12FLOOD"
    (folder / "0000").mkdir(parents=True)
    (folder / "S1list.json").write_text("{}")
    (folder / "0000/S2_2018-12-10_B04.tif").write_bytes(b"mine")
    with pytest.raises(ValueError, match="nothing was written"):
        open_dataset("flood_simulated", folder)
    assert sorted(p.name for p in folder.rglob("*")) == ["0000", "S1list.json", "S2_2018-12-10_B04.tif"]
    assert (folder / "0000/S2_2018-12-10_B04.tif").read_bytes() == b"mine"


def test_a_simulation_that_was_stopped_begins_anew(tmp_path, monkeypatch):
    said = yaml.safe_load((carried("data_catalogs") / "flood_simulated.yaml").read_text())
    said["simulate"] = {"with": "flood", "sequences": 2, "images": 2, "size_px": 64, "seed": 0}
    (tmp_path / "flood_simulated.yaml").write_text(yaml.safe_dump(said))
    entry, folder = load_entry(tmp_path / "flood_simulated.yaml"), tmp_path / "files"

    def stopped(entry, folder, progress):
        (folder / "SEN12FLOOD").mkdir()
        (folder / "SEN12FLOOD/S1list.json").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(catalog, "_simulate", stopped)
        with pytest.raises(KeyboardInterrupt):
            catalog.make_files(entry, folder, progress=False)
    catalog.make_files(entry, folder, progress=False)
    assert read_json(folder / "SEN12FLOOD/S1list.json") and not (folder / ".simulating").exists()
