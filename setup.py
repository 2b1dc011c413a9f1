"""Build sarfm from `settings.ini`, the project's one list of metadata and dependencies."""

import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(root / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
lib, suffix = cfg["lib_name"], "_requirements"
readme = root / "README.md"

# What a user needs at run time beside the modules: catalogues with the embedded sample, and the run notebooks.
carried = {"sarfm.data_catalogs": "data_catalogs", "sarfm.run_notebooks": "nbs/runs"}

registered: dict[str, list[str]] = {}
for line in cfg["entry_points"].strip().splitlines():
    group, point = line.split()
    registered.setdefault(group, []).append(point)

setup(
    name=lib,
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=cfg["keywords"].split(),
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Framework :: Jupyter",
        "Topic :: Scientific/Engineering :: GIS",
        f"Programming Language :: Python :: {cfg['min_python']}",
    ],
    packages=[*find_packages(include=[f"{lib}*"]), *carried],
    package_dir=carried,
    package_data={
        **{
            name: ["*.yaml", "*.json", "*.nc", "*.ipynb", "sweeps/*.yaml", "presets/*.yaml", "published/*.yaml"]
            for name in carried
        },
        lib: ["py.typed"],
        f"{lib}.viz": ["*.json.gz", "*.html", "*.css", "*.js", "*.txt", "leaflet/*"],
    },
    python_requires=f">={cfg['min_python']}",
    install_requires=shlex.split(cfg["requirements"]),
    extras_require={key.removesuffix(suffix): shlex.split(cfg[key]) for key in cfg if key.endswith(suffix)},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{lib}={lib}._modidx:d"],
        **registered,
    },
)
