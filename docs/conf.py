"""Sphinx's configuration: the site is made from the notebooks as they are stored; nothing is executed."""

import sys
from configparser import ConfigParser
from pathlib import Path

here = Path(__file__).parent
sys.path.insert(0, str(here))
parser = ConfigParser(delimiters=["="])
parser.read(here.parent / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

project, author, release = cfg["title"], cfg["author"], cfg["version"]
copyright = cfg["copyright"].replace("2026 onwards, ", "2026, ")
language = "en"
extensions = ["myst_nb", "sphinx.ext.mathjax", "sarfm_docs"]
exclude_patterns = ["**/.ipynb_checkpoints", "**.running.ipynb", "*/runs", "**/lightning_logs", "**/checkpoints"]
html_title = cfg["title"]

# Notebooks as they are: stored outputs, markdown with $maths$, links to headings.
nb_execution_mode = "off"
nb_output_stderr = "remove"
nb_merge_streams = True
nb_code_prompt_show = "Source"
nb_code_prompt_hide = "Source"
nb_ipywidgets_js = {"widgets.js": {}, "require.js": {}, "embed-amd.js": {}}
myst_enable_extensions = ["colon_fence", "dollarmath", "deflist", "attrs_inline"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header"]
mathjax_path = "tex-svg.js"
add_module_names = False
toc_object_entries = False
python_use_unqualified_type_names = True

html_theme = "sphinx_book_theme"
html_static_path = ["_static", "_assets"]
html_css_files = ["sarfm.css"]
html_logo = "_static/logo.svg"
html_favicon = "_static/logo.svg"
html_copy_source = False
html_show_sourcelink = False
html_domain_indices = True
html_context = {"default_mode": "auto"}
html_theme_options = {
    "repository_url": cfg["git_url"],
    "repository_branch": cfg["branch"],
    "path_to_docs": cfg["nbs_path"],
    "use_repository_button": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "home_page_in_toc": False,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "navbar_persistent": [],
    "logo": {"text": cfg["title"], "alt_text": cfg["title"]},
}
