"""One scene, written as anybody may write it: the same Scene each time, or a question that has an answer."""

import itertools
import shutil
import warnings
from collections import Counter

import dask
import h5py
import netCDF4
import numpy as np
import pytest
import rasterio
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyproj import CRS, Transformer
from rasterio.control import GroundControlPoint
from xarray.backends.file_manager import FILE_CACHE

from sarfm.scenes.open import OpenQuestion, open_scene
from sarfm.scenes.rasters import open_data

# ---- what is written, and where it lies ----------------------------------------------------------------------------

ROWS, COLUMNS, POLARISATIONS = 20, 24, ("VV", "VH")
DATES = ("2020-01-01", "2020-01-13")
ROW, COLUMN = np.mgrid[:ROWS, :COLUMNS]
BY_NUMBER = np.stack([ROW < 5, COLUMN > 20])  # VV and VH: no data
BY_MASK = (ROW >= 12) & (ROW < 16) & (COLUMN >= 3) & (COLUMN < 10)
DECIBELS = np.random.default_rng(5).normal([[[[-12]]], [[[-19]]]], 2, (2, 2, ROWS, COLUMNS))  # polarisation, date
MEASURES = {"dB": ("dB", "sigma0"), "power": ("1", "gamma0")}
PACKINGS = {  # of decibels and of power: scale and offset
    "dB": {"uint8": (0.25, -60.25), "int16": (0.01, -1.0), "uint16": (0.002, -100.0), "int32": (1e-5, 0.5), "float32": (0.5, 1.0), "float64": (2.0, -3.0)},
    "power": {"uint8": (0.002, -0.002), "int16": (1e-4, 0.5), "uint16": (1e-5, -0.001), "int32": (1e-8, 0.25), "float32": (0.5, 0.25), "float64": (2.0, -3.0)},
}  # fmt: skip
NO_DATA = {"uint8": (0, 255), "uint16": (0, 65535), "int16": (-32768, -9999), "int32": (-(2**31), 2**31 - 1)}
FLOATS = (np.nan, -9999.0, 0.0, -99.99, 1e20, -3.4028235e38)
BASE = {  # first corner and pixel, in the system's unit
    "32633": (5e5, 6e6, 10.0),
    "3413": (-1e6, -1.5e6, 10.0),
    "2193": (1.6e6, 5.4e6, 10.0),  # northing before easting
    "4326": (-50.0, 70.0, 1e-4),
    "km": (100.0, 200.0, 0.01),
}
PROJ4 = {
    "32633": "+proj=utm +zone=33 +datum=WGS84 +units=m +no_defs",
    "3413": "+proj=stere +lat_0=90 +lat_ts=70 +lon_0=-45 +x_0=0 +y_0=0 +datum=WGS84 +units=m +no_defs",
    "2193": "+proj=tmerc +lat_0=0 +lon_0=173 +k=0.9996 +x_0=1600000 +y_0=10000000 +ellps=GRS80 +units=m +no_defs",
    "4326": "+proj=longlat +datum=WGS84 +no_defs",
    "km": "+proj=laea +lat_0=52 +lon_0=10 +datum=WGS84 +units=km +no_defs",
}
system = {name: CRS.from_user_input(PROJ4[name] if name == "km" else int(name)) for name in BASE}


def corners(way):
    """Compute by hand where the middles of the first and last pixels lie: longitude and latitude, (2, 2)."""
    left, top, step = BASE[way["crs"]]
    x, y = np.meshgrid(left + step * np.array([0.5, COLUMNS - 0.5]), top - step * np.array([0.5, ROWS - 0.5]))
    return Transformer.from_crs(system[way["crs"]], 4326, always_xy=True).transform(x, y)


def stored(way):
    """Write the truth as this way does: numbers, truth and what is hidden, each (polarisation, date, H, W)."""
    values = DECIBELS[:, : max(1, way["dates"])]
    values = 10 ** (values / 10) if way["measure"] == "power" else values
    scale, offset = PACKINGS[way["measure"]][way["dtype"]] if way["packing"] == "scale" else (1.0, 0.0)
    numbers = 10 ** ((values + 83) / 20) if way["packing"] == "formula" else (values - offset) / scale
    numbers = (np.round(numbers) if way["dtype"][0] in "ui" else numbers).astype(way["dtype"])
    truth = 20 * np.log10(numbers) - 83 if way["packing"] == "formula" else numbers * scale + offset
    hidden = np.zeros(numbers.shape, bool)
    if way["no_data"] != "none":
        hidden |= BY_NUMBER[:, None]
        numbers = np.where(BY_NUMBER[:, None], way["value"], numbers).astype(way["dtype"])
    if way["mask"] != "none":
        hidden |= BY_MASK
    if way["mask"].startswith("valid"):  # a number that the file says to be out of range
        inside = numbers[~hidden]
        way["limits"] = inside.min(), inside.max()
        numbers = np.where(BY_MASK, inside.max() + 1, numbers).astype(way["dtype"])
    return numbers, np.where(hidden, np.nan, truth), hidden


# ---- the ways ------------------------------------------------------------------------------------------------------

IMAGES, ARRAYS = ("tif", "cog", "vrt", "one file each"), ("netcdf", "netcdf 3", "hdf5", "zarr 2", "zarr 3")
ASPECTS = {  # of every file; the first of each states most
    "dtype": ("float32", "float64", "uint8", "int16", "uint16", "int32"),
    "packing": ("none", "scale", "formula"),
    "measure": ("dB", "power"),
    "dates": (0, 1, 2),
    "swapped": (False, True),
    "rows": ("down", "up"),
    "columns": ("right", "left"),
    "crs": tuple(BASE),
    "full_circle": (False, True),  # longitudes from 0 to 360
    "no_data": ("declared", "none", "silent"),
    "which": (0, 1, 2, 3, 4, 5),
    "units": ("band", "file", "silent"),
    "quantity": ("tag", "units", "silent"),
    "read": (None, None, None, 16),
    "said": ("nothing", "number", "EPSG", "urn", "WKT1", "WKT2", "PROJ JSON", "dict", "PROJ4", "object"),
}
ASPECTS_OF = {
    "image": {
        "named": ("{}", "sigma0_{}", "tag", "name", "silent"),
        "spelt": ("WKT2", "EPSG", "WKT1", "PROJ4", "tie points", "world file"),
        "mask": ("none", "internal mask", "mask beside", "alpha"),
        "beside": ("nothing", "angle", "noise"),
        "blocks": ("strips", "tiles", "one row"),
        "interleave": ("band", "pixel"),
        "compress": ("none", "deflate", "lzw"),
    },
    "array": {
        "named": ("{}", "sigma0_{}", "tag", "polarization", "silent"),
        "spelt": ("crs_wkt", "WKT1", "ESRI", "spatial_ref", "CF", "epsg", "EPSG", "urn", "PROJ4", "init", "PROJ JSON", "json", "silent"),
        "stands": ("mapping", "extended", "only", "image", "file"),  # where the system stands
        "mapping": ("spatial_ref", "crs", "polar_stereographic"),
        "axes": ("float64", "float32", "integer", "GeoTransform", "spatial:transform", "images"),
        "axis_names": (("y", "x"), ("lat", "lon"), ("northing", "easting"), ("nj", "ni")),
        "axis_said": ("standard_name", "axis", "nothing"),
        "axis_units": (0, 1, 2, 3, 4),
        "dims": tuple(range(24)),  # permutation
        "form": ("variables", "band dimension"),
        "mask": ("none", "valid_range", "valid_min", "valid measured"),
        "fill": ("_FillValue", "missing_value", "both"),
        "group": (None, "measurement", "science/grids", "coordinates above"),
        "blocks": ("whole", "blocks", "deflate"),
        "beside": ("nothing", "angle"),
    },
}  # fmt: skip


@st.composite
def ways(draw):
    """Draw one of the ways in which a scene may be written; half of them state everything."""
    one_of = lambda options: draw(st.sampled_from(options))
    way = {"driver": one_of(IMAGES + ARRAYS), "states_all": draw(st.booleans())}
    kind = "image" if way["driver"] in IMAGES else "array"
    for aspect, options in (ASPECTS | ASPECTS_OF[kind]).items():
        if way["states_all"]:
            options = [o for o in options if o not in ("silent", "formula", "noise", "world file")]
        way[aspect] = one_of(options)
    return possible(way)


def possible(way):
    """Leave out what cannot be written together."""
    integer = way["dtype"][0] in "ui"
    if way["packing"] == "formula":
        way |= {"dtype": {"uint8": "uint16", "int16": "int32"}.get(way["dtype"], way["dtype"] if integer else "uint16")}
        way |= {"measure": "dB", "units": "silent", "which": 0, "quantity": way["quantity"].replace("units", "tag")}
        way |= {"no_data": "declared" if way["no_data"] == "none" else way["no_data"]}
    elif way["dtype"][0] == "u" or (integer and way["measure"] == "power"):  # decibels are negative, power is small
        way["packing"] = "scale"
    if way["measure"] == "power":
        way["named"] = way["named"].replace("sigma0", "gamma0")
    choices = NO_DATA.get(way["dtype"], FLOATS)
    way["value"] = 0 if way["packing"] == "formula" else choices[way["which"] % len(choices)]
    if way["units"] == "silent" and way["quantity"] == "units":
        way["quantity"] = "silent"
    if way["crs"] != "4326":
        way["full_circle"] = False
    if way["driver"] in ARRAYS:
        return possible_array(way)
    if way["spelt"] == "world file" and way["driver"] != "tif":
        way["spelt"] = "WKT2"
    way["said"] = {"tie points": "nothing"}.get(way["spelt"], way["said"])
    if (way["spelt"], way["said"]) == ("world file", "nothing") or by_number(way["crs"], way["said"]):
        way["said"] = "WKT2"
    if by_number(way["crs"], way["spelt"]):
        way["spelt"] = "WKT2"
    if way["driver"] == "one file each" or not way["dtype"][0] == "f" or way["dates"]:
        way["beside"] = "nothing"
    if way["driver"] == "cog":
        way["interleave"], way["blocks"] = "pixel", "tiles"
    return way


def by_number(crs, spelling):
    """Tell a system that has no number, and is to be spelt by one."""
    return crs == "km" and spelling in ("number", "EPSG", "epsg", "urn", "init")


def possible_array(way):
    """Leave out what cannot be written together in arrays."""
    if by_number(way["crs"], way["spelt"]):
        way["spelt"] = "crs_wkt"
    if by_number(way["crs"], way["said"]) or (way["spelt"], way["said"]) == ("silent", "nothing"):
        way["said"] = "WKT2"
    way["units"] = {"file": "band"}.get(way["units"], way["units"])
    if way["spelt"] == "CF" and way["stands"] in ("image", "file"):
        way["stands"] = "mapping"
    geographic = way["crs"] == "4326"
    if geographic or way["axis_names"] == ("lat", "lon"):
        way["axis_names"] = ("lat", "lon") if geographic and way["which"] % 2 else ("y", "x")
    if way["axes"] == "integer" and way["crs"] in ("4326", "km"):
        way["axes"] = "float64"
    if way["axis_names"] == ("nj", "ni") and way["axis_said"] == "nothing":
        way["axis_said"] = "axis"
    if way["axis_names"] == ("nj", "ni") and "ransform" in way["axes"]:
        way["axis_names"] = "y", "x"
    if way["axes"] == "images":
        way |= {"spelt": "silent", "said": "nothing", "axis_names": ("y", "x")}
    if way["crs"] == "km" and way["spelt"] == "CF":
        way |= {"said": "nothing", "axis_units": 1, "axes": "float64" if "ransform" in way["axes"] else way["axes"]}
    if way["driver"] == "netcdf 3":
        way["group"] = None
    return way


def complete(way):
    """Tell whether a way states everything, so that nothing may be asked."""
    placed = way["spelt"] != "silent" or way["axes"] == "images"
    silent = "silent" in (way["named"], way["units"]) or not placed
    unnamed_quantity = way["quantity"] == "silent" and ("0_" not in way["named"] or way.get("form") == "band dimension")
    open_number = way["no_data"] == "silent" or (
        way["no_data"] == "none" and way["dtype"][0] in "ui" and way["mask"] == "none"
    )
    undated = way["driver"] in IMAGES and way["dates"] == 2 and "{}" not in way["named"]
    elsewhere = way.get("group") is not None or way["beside"] == "noise" or way["packing"] == "formula"
    return not (silent or unnamed_quantity or open_number or undated or elsewhere)


# ---- images --------------------------------------------------------------------------------------------------------


def unit_text(way):
    """Write the unit as this way does; None where it is silent."""
    unit, quantity = MEASURES[way["measure"]]
    word = ({"dB": ("dB", "db", "decibel"), "power": ("1", "linear", "m2/m2")}[way["measure"]])[way["which"] % 3]
    if way["units"] == "silent":
        return None
    return f"{quantity} {word}" if way["quantity"] == "units" else word


def spelt_for_rasters(way):
    """Spell the system as whoever writes a GeoTIFF."""
    crs, how = system[way["crs"]], way["spelt"]
    texts = {
        "EPSG": f"EPSG:{way['crs']}",
        "WKT2": crs.to_wkt(),
        "WKT1": crs.to_wkt("WKT1_GDAL"),
        "PROJ4": PROJ4[way["crs"]],
    }
    return rasterio.CRS.from_user_input(texts[how])


def affine(way):
    """Lay the grid out as this way does."""
    left, top, step = BASE[way["crs"]]
    left += 360 * way["full_circle"]
    flipped = way["columns"] == "left", way["rows"] == "up"
    a, e = (-step if flipped[0] else step), (step if flipped[1] else -step)
    return rasterio.Affine(a, 0, left + step * COLUMNS * flipped[0], 0, e, top - step * ROWS * flipped[1])


def turned(way, image):
    """Turn an image (..., H, W) as this way lays its rows and columns out."""
    return image[..., :: -1 if way["rows"] == "up" else 1, :: -1 if way["columns"] == "left" else 1]


def tie_points(way):
    """Tie pixels to longitudes and latitudes."""
    to_lonlat = Transformer.from_crs(system[way["crs"]], 4326, always_xy=True)
    at = [(r, c) for r in range(0, ROWS + 1, 5) for c in range(0, COLUMNS + 1, 6)]
    return [GroundControlPoint(r, c, *to_lonlat.transform(*(affine(way) * (c, r)))) for r, c in at]


def place_of(way):
    """Say where a GeoTIFF lies."""
    if way["spelt"] == "tie points":
        return {"gcps": tie_points(way), "crs": rasterio.CRS.from_epsg(4326)}
    return {} if way["spelt"] == "world file" else {"crs": spelt_for_rasters(way), "transform": affine(way)}


def planes(way):
    """List what an image file holds, in order: polarisation, date, and the text that names the band."""
    order = POLARISATIONS[:: -1 if way["swapped"] else 1]
    named = "{}" in way["named"]
    dates = (
        ["_" + d.replace("-", "") for d in DATES[: way["dates"]]]
        if named and way["dates"]
        else [""] * max(1, way["dates"])
    )
    text = lambda p: way["named"].format(p).strip() if named else None
    return [(p, t, text(p) and text(p) + date) for p in order for t, date in enumerate(dates)]


def write_image(path, way, held, numbers, hidden):
    """Write planes of the scene into one GeoTIFF."""
    beside = {"angle": 38, "noise": 7}.get(way["beside"])
    alpha = way["mask"] == "alpha"
    count = len(held) + (beside is not None) + alpha
    layout = {"strips": {}, "tiles": {"tiled": True, "blockxsize": 16, "blockysize": 16}, "one row": {"blockysize": 1}}
    profile = {"driver": "GTiff", "count": count, "height": ROWS, "width": COLUMNS, "dtype": way["dtype"]} | place_of(
        way
    )
    profile |= layout[way["blocks"]] | {"interleave": way["interleave"], "compress": way["compress"]}
    profile |= {"nodata": way["value"]} if way["no_data"] == "declared" else {}
    profile |= {"PHOTOMETRIC": "MINISBLACK"} if alpha else {}
    images = [turned(way, numbers[POLARISATIONS.index(p), t]) for p, t, _ in held]
    images += [np.full((ROWS, COLUMNS), beside)] * (beside is not None)
    seen = turned(way, ~BY_MASK)
    images += [seen * 255] * alpha
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=way["mask"] == "internal mask"),
        rasterio.open(path, "w", **profile) as out,
    ):
        if alpha:
            kinds = rasterio.enums.ColorInterp
            out.colorinterp = [kinds.gray, *[kinds.undefined] * (count - 2), kinds.alpha]
        out.write(np.stack(images).astype(way["dtype"]))
        for index, plane in enumerate(held, start=1):
            describe(out, index, way, *plane)
        if beside:
            out.set_band_description(len(held) + 1, way["beside"])
        if way["packing"] == "scale":
            out.scales, out.offsets = ([v] * count for v in PACKINGS[way["measure"]][way["dtype"]])
        if way["units"] == "file" and (text := unit_text(way)):
            out.update_tags(units=text)
        if "mask" in way["mask"]:
            out.write_mask(seen)
    if way["spelt"] == "world file":
        a, b, c, d, e, f = affine(way)[:6]
        path.with_suffix(".tfw").write_text("\n".join(map(repr, map(float, (a, d, b, e, c + a / 2, f + e / 2)))))


def describe(out, index, way, polarisation, date, name):
    """Name and tag one band."""
    if name:
        out.set_band_description(index, name)
    if way["named"] in ("tag", "name"):
        out.update_tags(
            index, **{"tag": {"polarisation": polarisation}, "name": {"name": f"{polarisation} band"}}[way["named"]]
        )
    if way["units"] == "band":
        if way["which"] % 2:
            out.update_tags(index, units=unit_text(way))
        else:
            out.set_band_unit(index, unit_text(way))
    if way["quantity"] == "tag":
        out.update_tags(index, quantity=MEASURES[way["measure"]][1])


def write_images(folder, way):
    """Write the scene as image files."""
    numbers, _, hidden = stored(way)
    held = planes(way)
    known = {"channels": [p.lower() for p, _, _ in held] + [None] * (way["beside"] != "nothing"), "times": DATES}
    if way["driver"] != "one file each":
        write_image(path := folder / "a.tif", way, held, numbers, hidden)
        if way["driver"] in ("vrt", "cog"):
            rasterio.shutil.copy(
                path, path := folder / f"b.{way['driver'].replace('cog', 'tif')}", driver=way["driver"].upper()
            )
        return path, known, {}
    paths = {}
    for k, plane in enumerate(held):
        write_image(folder / f"{k}.tif", way, [plane], numbers, hidden)
        paths.setdefault(plane[0], []).append(folder / f"{k}.tif")
    return paths, known, {"times": DATES} if way["dates"] == 2 else {}


# ---- arrays --------------------------------------------------------------------------------------------------------


def spelt_for_arrays(way):
    """Spell the system as attributes."""
    crs, how = system[way["crs"]], way["spelt"]
    texts = {
        "crs_wkt": crs.to_wkt(),
        "WKT1": crs.to_wkt("WKT1_GDAL"),
        "spatial_ref": crs.to_wkt("WKT1_GDAL"),
        "PROJ4": PROJ4[way["crs"]],
    }
    texts |= {
        "PROJ JSON": crs.to_json(),
        "json": crs.to_json(),
        "init": f"+init=epsg:{way['crs']}",
        "EPSG": f"EPSG:{way['crs']}",
    }
    texts |= {"epsg": np.int32(way["crs"].replace("km", "0")), "urn": f"urn:ogc:def:crs:EPSG::{way['crs']}"}
    keys = {
        "WKT1": "crs_wkt",
        "ESRI": "spatial_ref",
        "epsg": "epsg",
        "EPSG": "epsg_code",
        "urn": "crs",
        "PROJ4": "proj4",
    }
    keys |= {"init": "proj4", "PROJ JSON": "proj:projjson", "json": "crs_wkt"}
    if how == "CF":
        return {key: value for key, value in crs.to_cf().items() if key != "crs_wkt"}
    text = crs.to_wkt("WKT1_ESRI") if how == "ESRI" else texts.get(how)
    return {} if how == "silent" else {keys.get(how, how): text}


def axes(way):
    """Write the coordinates of rows and columns: values and attributes of each."""
    a, _, c, _, e, f = affine(way)[:6]
    geographic, said = way["crs"] == "4326", way["axis_said"]
    own = "km" if way["crs"] == "km" else "m"
    unit = (
        ("degrees_{}", "degree_{}", "degrees", "degree", None) if geographic else ("m", "km", "metre", "meters", None)
    )[way["axis_units"]]
    factor = 1.0 if geographic else {"km": 1e-3}.get(unit or own, 1.0) / {"km": 1e-3}.get(own, 1.0)
    standard = ("latitude", "longitude") if geographic else ("projection_y_coordinate", "projection_x_coordinate")
    attrs = [{"units": unit.format(to)} if unit else {} for to in ("north", "east")]
    for k in (0, 1):
        attrs[k] |= {"axis": {"axis": "YX"[k]}, "standard_name": {"standard_name": standard[k]}}.get(said, {})
    kind = {"float32": "float32", "integer": "int32" if factor == 1 else "float64"}.get(way["axes"], "float64")
    lines = f + e * (np.arange(ROWS) + 0.5), c + a * (np.arange(COLUMNS) + 0.5)
    return [(line * factor).astype(kind) for line in lines], attrs


def layout(way):
    """Give everything a file holds but its images: name to dimensions, values and attributes; and its own attributes."""
    (y, x), held, own = way["axis_names"], {}, {}
    if way["axes"] in ("float64", "float32", "integer"):
        lines, attrs = axes(way)
        held |= {name: ((name,), line, said) for name, line, said in zip((y, x), lines, attrs, strict=True)}
    if way["axes"] == "images":
        a = affine(way)
        at = a.a * (np.arange(COLUMNS) + 0.5) + a.c, a.e * (np.arange(ROWS) + 0.5) + a.f
        lon, lat = Transformer.from_crs(system[way["crs"]], 4326, always_xy=True).transform(*np.meshgrid(*at))
        held |= {"lat": ((y, x), lat, {"units": "degrees_north"}), "lon": ((y, x), lon, {"units": "degrees_east"})}
    if way["dates"]:
        days = np.array([7305, 7317][: way["dates"]], "int32")
        held["time"] = (("time",), days, {"units": "days since 2000-01-01", "standard_name": "time"})
    said = spelt_for_arrays(way)
    if way["axes"] == "GeoTransform":
        said |= {"GeoTransform": " ".join(map(repr, map(float, affine(way).to_gdal())))}
    elif way["axes"] == "spatial:transform":
        own["spatial:transform"] = list(affine(way)[:6])
    if way["stands"] in ("mapping", "extended", "only"):
        held[way["mapping"]] = ((), np.int32(0), said)
        own |= {
            "mapping": {"grid_mapping": way["mapping"]},
            "extended": {"grid_mapping": f"{way['mapping']}: {x} {y}"},
        }.get(way["stands"], {})
    return held, own | (said if way["stands"] == "image" else {}), said if way["stands"] == "file" else {}


def images(way, own):
    """Give the images of a file: name to dimensions, values and attributes; and what is to be answered."""
    numbers, _, _ = stored(way)
    numbers, said, known = turned(way, numbers), image_attrs(way) | own, {}
    dims = (["time"] if way["dates"] else []) + list(way["axis_names"])
    order = POLARISATIONS[:: -1 if way["swapped"] else 1]
    chosen = [numbers[POLARISATIONS.index(p)] if way["dates"] else numbers[POLARISATIONS.index(p), 0] for p in order]
    if way["form"] == "band dimension":
        labels = np.array([1, 2] if way["named"] == "silent" else order)
        known = {f"s1/{label}": p.lower() for label, p in zip(labels, order, strict=True)}
        held = {"band": (("band",), labels, {}), "s1": mixed(way, ["band", *dims], np.stack(chosen), said)}
        return held, {"variables": known}
    held = {}
    for k, (p, image) in enumerate(zip(order, chosen, strict=True), start=1):
        name = way["named"].format(p).strip() if "{}" in way["named"] else f"C{k}{k}"
        tag = {"tag": {"polarisation": p}, "polarization": {"polarization": p.lower()}}.get(way["named"], {})
        held[name] = mixed(way, dims, image, said | tag)
        known[name] = p.lower()
    return held, {"variables": known}


def mixed(way, dims, values, attrs):
    """Put dimensions into the order of this way."""
    order = list(itertools.permutations(range(len(dims))))
    order = order[way["dims"] % len(order)]
    return [dims[k] for k in order], values.transpose(order), attrs


def write_arrays(folder, way):
    """Write the scene as NetCDF, HDF5 or Zarr."""
    held, own, said = layout(way)
    shown, known = images(way, own)
    if way["beside"] == "angle":
        angle = {"units": "degree", "quantity": "incidence_angle"}
        shown["angle"] = (way["axis_names"], np.full((ROWS, COLUMNS), 38.0, "float32"), angle)
    above = way["group"] == "coordinates above"
    group = "measurement" if above else way["group"]
    levels = {group: shown} if above else {group: held | shown}
    levels = ({None: held} if above else {None: {}} if group else {}) | levels
    if "band" in shown and above:
        levels[None] = held | {"band": shown.pop("band")}
    write = {"n": write_netcdf, "h": write_hdf5, "z": write_zarr}[way["driver"][0]]
    return write(folder, way, levels, said), known | {"group": group}, {}


def sizes(holding):
    """Tell how long each dimension is."""
    return {d: n for dims, values, _ in holding.values() for d, n in zip(dims, np.shape(values), strict=True)}


def write_netcdf(folder, way, levels, said):
    """Write with the NetCDF library."""
    classic = way["driver"] == "netcdf 3"
    with netCDF4.Dataset(folder / "a.nc", "w", format="NETCDF3_CLASSIC" if classic else "NETCDF4") as file:
        file.setncatts(said)
        known = {}
        for name, holding in levels.items():
            group = file.createGroup(name) if name else file
            for dim, size in sizes(holding).items():
                if dim not in known:
                    known[dim] = group.createDimension(dim, size)
            for variable, (dims, values, attrs) in holding.items():
                put_netcdf(group, variable, dims, np.asarray(values), dict(attrs), way)
    return folder / "a.nc"


def put_netcdf(group, name, dims, values, attrs, way):
    """Write one variable; NetCDF 3 has neither text nor unsigned numbers."""
    if way["driver"] == "netcdf 3" and values.dtype.kind == "U":
        group.createDimension("letters", 2)
        group.createVariable(name, "S1", (*dims, "letters"))[:] = np.array([list(text) for text in values], "S1")
        return
    if way["driver"] == "netcdf 3" and values.dtype.kind == "u":
        signed = lambda v: (
            v.view(f"i{v.itemsize}") if isinstance(v, (np.generic, np.ndarray)) and v.dtype.kind == "u" else v
        )
        values, attrs = signed(values), {key: signed(value) for key, value in attrs.items()} | {"_Unsigned": "true"}
    if way["driver"] == "netcdf 3" and values.dtype.kind == "i" and values.itemsize == 8:
        values = values.astype("int32")
    how = {} if way["blocks"] == "whole" or len(dims) < 2 else {"chunksizes": [min(7, n) for n in values.shape]}
    how |= {"zlib": True, "shuffle": True} if way["blocks"] == "deflate" and values.ndim > 1 else {}
    how = {} if way["driver"] == "netcdf 3" else how
    kind = str if values.dtype.kind == "U" else values.dtype
    variable = group.createVariable(name, kind, tuple(dims), fill_value=attrs.pop("_FillValue", None), **how)
    variable.set_auto_maskandscale(False)
    variable.setncatts(attrs)
    variable[...] = values.astype(object) if kind is str else values


def write_hdf5(folder, way, levels, said):
    """Write with the HDF5 library and its dimension scales."""
    with h5py.File(folder / "a.h5", "w", track_order=True) as file:
        file.attrs.update(said)
        scales = {}
        for name, holding in levels.items():
            group = file.require_group(name or "/")
            missing = {
                d: ((d,), np.arange(n), None) for d, n in sizes(holding).items() if d not in holding and d not in scales
            }
            for variable, (dims, values, attrs) in sorted(
                (missing | holding).items(), key=lambda each: list(each[1][0]) != [each[0]]
            ):
                values = np.asarray(values)
                how = (
                    {"chunks": tuple(min(7, n) for n in values.shape)}
                    if way["blocks"] != "whole" and values.ndim > 1
                    else {}
                )
                how |= {"compression": "gzip"} if way["blocks"] == "deflate" and values.ndim > 1 else {}
                text = values.dtype.kind == "U"
                made = group.create_dataset(
                    variable,
                    data=values.astype(object) if text else values,
                    dtype=h5py.string_dtype() if text else None,
                    track_order=True,
                    **how,
                )
                made.attrs.update(
                    {k: np.array([v], values.dtype) if k == "_FillValue" else v for k, v in (attrs or {}).items()}
                )
                if list(dims) == [variable]:
                    made.make_scale(
                        variable if attrs is not None else "This is a netCDF dimension but not a netCDF variable"
                    )
                    scales[variable] = made
                else:
                    for axis, dim in enumerate(dims):
                        made.dims[axis].attach_scale(scales[dim])
    return folder / "a.h5"


def write_zarr(folder, way, levels, said):
    """Write with xarray."""
    for name, holding in levels.items():
        data = xr.Dataset(
            {n: (list(dims), values, attrs) for n, (dims, values, attrs) in holding.items()}, attrs={} if name else said
        )
        blocked = (
            {}
            if way["blocks"] == "whole"
            else {
                n: {"chunks": tuple(min(7, k) for k in np.shape(v))} for n, (d, v, _) in holding.items() if len(d) > 1
            }
        )
        blocked = {n: e for n, e in blocked.items() if n in data.variables}
        data.to_zarr(
            folder / "a.zarr",
            group=name,
            mode="a",
            zarr_format=int(way["driver"][-1]),
            consolidated=False,
            encoding=blocked,
        )
    return folder / "a.zarr"


# ---- one case ------------------------------------------------------------------------------------------------------


def answered_crs(way):
    """Spell the system as an answer; None where nothing is said."""
    crs = system[way["crs"]]
    texts = {"EPSG": f"epsg:{way['crs']}", "urn": f"urn:ogc:def:crs:EPSG::{way['crs']}", "PROJ4": PROJ4[way["crs"]]}
    texts |= {
        "WKT1": crs.to_wkt("WKT1_GDAL"),
        "WKT2": crs.to_wkt(),
        "PROJ JSON": crs.to_json(),
        "dict": crs.to_json_dict(),
    }
    return {"object": crs, "number": None if way["crs"] == "km" else int(way["crs"])}.get(
        way["said"], texts.get(way["said"])
    )


def to_be_said(way, known):
    """Answer beforehand what no file can be asked about."""
    answers = {"chunks": way["read"]}
    if (crs := answered_crs(way)) is not None:
        answers["crs"] = crs
    if way["packing"] == "formula":
        answers["formula"] = "20*log10(DN)-83"
    integer = way["dtype"][0] in "ui"
    legal = way["value"] == -99.99 or (integer and (way["packing"] == "scale" or way["mask"] != "none"))
    if way["no_data"] == "silent" and legal:  # a number like others
        answers["nodata"] = way["value"]
    own_name = way["quantity"] == "tag" or way["beside"] == "angle"
    if (
        way["named"] == "silent" and own_name and "variables" in known
    ):  # a channel by its own name, or none beside others
        answers["variables"] = known["variables"]
    return answers


def opened(source, known, **answers):
    """Open a source, answering what it asks and nothing else; tell what it asked."""
    asked = []
    for _ in range(5):
        try:
            return open_scene(source, **answers), asked
        except OpenQuestion as question:
            new = [line.split("=")[0].strip() for line in str(question).splitlines()[1:]]
            assert not set(new) & set(answers), f"asked again: {question}"
            answers |= {key: known[key] for key in new}
            asked += new
    raise AssertionError("asked for ever")


def check_place(way, scene):
    """Hold longitudes and latitudes of the corners to those computed by hand; tell how the scene is turned."""
    lon, lat = (np.asarray(v)[np.ix_([0, -1], [0, -1])] for v in scene.sar.lonlat())
    truth = corners(way)
    near = 1e-6
    if way.get("axes") == "float32":
        near += 1e-5 if way["crs"] in ("4326", "km") or way["axis_units"] == 1 else 0
    turns = [(r, c) for r in (1, -1) for c in (1, -1)]
    off = [max(abs(v[::r, ::c] - t).max() for v, t in zip((lon, lat), truth, strict=True)) for r, c in turns]
    assert min(off) < near, f"corners at {lon.ravel()} {lat.ravel()}, expected {truth[0].ravel()} {truth[1].ravel()}"
    return turns[int(np.argmin(off))]


def case(way, folder):
    """Write the scene in one way, open it, and hold it to what was written; tell what was asked."""
    write = write_images if way["driver"] in IMAGES else write_arrays
    source, known, upfront = write(folder, way)
    unit, quantity = MEASURES[way["measure"]]
    number = "none" if way["no_data"] == "none" else way["value"] if not np.isnan(way["value"]) else "none"
    known |= {"units": unit, "quantity": quantity, "nodata": number}
    with dask.config.set(scheduler="synchronous"):  # five times as fast for images of this size
        scene, asked = opened(source, known, **upfront, **to_be_said(way, known))
        scene.load()
    rows, columns = check_place(way, scene)
    _, truth, hidden = stored(way)
    truth, hidden = truth[..., ::rows, ::columns], hidden[..., ::rows, ::columns]
    if way["dates"] < 2:
        truth, hidden = truth[:, 0], hidden[:, 0]
    else:
        assert [str(day)[:10] for day in scene.time.values] == list(DATES), "other dates"
    near = 1e-5 if way["measure"] == "power" else 2e-5 if way["dtype"][0] == "f" else 1e-4
    for name, values in zip(("vv", "vh"), truth, strict=True):
        assert scene[name].shape == values.shape, f"{name} has the shape {scene[name].shape}"
        assert np.array_equal(np.isnan(scene[name]), np.isnan(values)), f"other pixels of {name} are hidden"
        assert np.allclose(scene[name], values, atol=near, rtol=1e-6, equal_nan=True), f"other numbers in {name}"
        assert (scene[name].units, scene[name].quantity) == (unit, quantity), f"{name} measures something else"
    assert np.array_equal(scene.valid, ~hidden.any(axis=0)), "other pixels are valid"
    assert not (asked and complete(way)), f"it states everything and was asked {asked}"
    return asked


def image_attrs(way):
    """Say what an image says, but for its name."""
    attrs = {"units": text} if (text := unit_text(way)) else {}
    attrs |= {"quantity": MEASURES[way["measure"]][1]} if way["quantity"] == "tag" else {}
    if way["packing"] == "scale":
        scale, offset = PACKINGS[way["measure"]][way["dtype"]]
        attrs |= {"scale_factor": scale, "add_offset": offset}
    if way["no_data"] == "declared":
        fill = np.dtype(way["dtype"]).type(way["value"])
        attrs |= {key: fill for key in ("_FillValue", "missing_value") if way["fill"] in (key, "both")}
    if way["mask"].startswith("valid"):
        low, high = way["limits"]
        if way["mask"] == "valid measured" and way["packing"] == "scale" and way["dtype"][0] in "ui":
            scale, offset = PACKINGS[way["measure"]][way["dtype"]]
            low, high = (low - 0.5) * scale + offset, (high + 0.5) * scale + offset
        valid = {"valid_min": low, "valid_max": high}
        attrs |= valid if way["mask"] == "valid_min" else {"valid_range": np.array([low, high])}
    return attrs


@pytest.mark.row(24)
def test_row_24_one_scene_in_many_ways(tmp_path_factory, row):
    folder = tmp_path_factory.mktemp("ways")
    counts, seen = Counter(), set()

    @settings(max_examples=row.asked, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(ways())
    def opens_as_itself(way):
        at = folder / f"{sum(counts.values())}"
        at.mkdir()
        seen.add(repr(way))
        try:
            with warnings.catch_warnings(action="ignore"):
                asked = case(way, at)
        except Exception as error:
            raise AssertionError(f"{error}, written as {way}") from error
        finally:
            shutil.rmtree(at)
        counts["stated all" if complete(way) else "asked" if asked else "left open"] += 1

    with row.case("one scene", row.asked):
        opens_as_itself()
        total = sum(counts.values())
        assert len(seen) > 0.85 * row.asked and counts["stated all"] > 0.25 * total, (
            counts
        )  # none of those may be asked about
        assert counts["asked"] < 0.75 * total, counts
    row.note(f"{len(seen)} different ways; {counts['stated all']} stated all, {counts['asked']} were asked about")


# ---- ways that once went wrong -------------------------------------------------------------------------------------

STATED = {aspect: options[0] for aspect, options in (ASPECTS | ASPECTS_OF["array"]).items()} | {"driver": "netcdf"}
IMAGE = {aspect: options[0] for aspect, options in (ASPECTS | ASPECTS_OF["image"]).items()} | {"driver": "tif"}
ABOVE = {"group": "coordinates above"}


@pytest.mark.parametrize(
    "change",
    [
        {"crs": "2193", "said": "PROJ4"},  # its own system, spelt otherwise
        {"crs": "4326", "spelt": "ESRI", "said": "WKT2"},
        {"spelt": "PROJ JSON"},
        {
            "driver": "zarr 3",
            "form": "band dimension",
            "beside": "angle",
            "axes": "spatial:transform",
        },  # the angle comes first and states no place
        {"stands": "only", "axes": "GeoTransform"},
        {"stands": "file", **ABOVE},
        {"driver": "zarr 3", "axes": "spatial:transform", "beside": "angle", **ABOVE},  # in whichever order they come
        {"axes": "images", **ABOVE},
        {"driver": "hdf5", "axes": "GeoTransform"},  # HDF5 numbers the rows and columns
        {
            "driver": "hdf5",
            "crs": "4326",
            "axes": "spatial:transform",
            "axis_names": ("lat", "lon"),
            "which": 1,
            "beside": "angle",
        },
        {"driver": "netcdf 3", "dtype": "uint16", "packing": "scale", "mask": "valid_min"},  # no unsigned numbers
    ],
    ids=str,
)
def test_arrays_that_once_went_wrong(tmp_path, change):
    case(possible(STATED | change), tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {
            "dtype": "uint8",
            "packing": "scale",
            "dates": 2,
            "named": "tag",
        },  # four bytes: GDAL's red, green, blue, alpha
        {"dtype": "uint8", "packing": "scale", "dates": 2, "named": "silent", "mask": "internal mask"},
        {"units": "file", "beside": "angle"},  # decibels of the file, degrees of the angle
        {"crs": "2193", "said": "PROJ4"},
    ],
    ids=str,
)
def test_images_that_once_went_wrong(tmp_path, change):
    case(possible(IMAGE | change), tmp_path)


def test_a_file_with_coordinates_above_is_closed_again(tmp_path):
    """Handles that were left open piled up, and the NetCDF library crashed over them."""
    way = possible(STATED | ABOVE | {"form": "band dimension"})
    path, _, _ = write_arrays(tmp_path, way)
    for _ in range(20):
        with open_data(path, "measurement") as data:
            assert list(data.band.values) == list(POLARISATIONS)
    assert not [key for key in FILE_CACHE if str(path) in map(str, key[1])]


def test_numbered_rows_and_columns_are_no_place(tmp_path):
    image = (("y", "x"), DECIBELS[0, 0], {"units": "dB", "quantity": "sigma0", "grid_mapping": "crs"})
    coords = {"y": np.arange(ROWS), "x": np.arange(COLUMNS)}
    data = xr.Dataset({"vv": image, "crs": ((), 0, {"crs_wkt": system["3413"].to_wkt()})}, coords)
    data.to_netcdf(tmp_path / "a.nc")
    with pytest.warns(UserWarning, match="neither coordinates nor a transform"):
        assert "spatial_ref" not in open_scene(tmp_path / "a.nc").coords


def test_another_system_is_no_other_spelling(tmp_path):
    path, _, _ = write_arrays(tmp_path, possible(dict(STATED)))
    with pytest.raises(ValueError, match="states WGS 84 / UTM zone 33N, but crs=32634 was given"):
        open_scene(path, crs=32634)
