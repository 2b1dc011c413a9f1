"""The command line: light, clear, with exit codes that a script can trust."""

import subprocess
import sys

import pytest
from patience import PATIENCE_S

from sarfm.cli import main


def run(*words, **options):
    """Call sarfm in a process of its own."""
    command = [sys.executable, "-c", "from sarfm.cli import main; raise SystemExit(main())", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, **options)


def test_importing_the_command_line_imports_nothing_heavy():
    code = "import sys, sarfm.cli; print([m for m in ('torch', 'numpy', 'pandas', 'xarray', 'papermill', 'matplotlib', 'pydantic', 'yaml') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["run", "--help"],
        ["evaluate", "--help"],
        ["sweep", "--help"],
        ["data", "--help"],
        ["data", "fetch", "--help"],
        ["data", "prepare", "--help"],
    ],
)
def test_help(words):
    found = run(*words)
    assert found.returncode == 0 and found.stdout.startswith("usage: sarfm") and not found.stderr


def test_version_as_an_option():
    import sarfm

    found = run("--version")
    assert (found.returncode, found.stdout.strip(), found.stderr) == (0, f"sarfm {sarfm.__version__}", "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run", "pretrain", "-p", "settings.mask_ration=0.5"], "did you mean 'settings.mask_ratio'"),
        (["run", "pretrain", "-p", "settings.mask_ratio=1.0"], "in (0, 1)"),
        (["run", "pretrain", "-p", "learn.steps=many"], "type int"),
        (["run", "pretrain", "-p", "learn.steps"], "NAME=VALUE"),
        (["run", "pretrain", "-p", "learn.steps=1", "-p", "learn.steps=2"], "given twice"),
        (["run", "pretrain", "-p", "out=a", "--out", "b"], "given twice"),
        (["run", "pretrained"], "evaluate', 'finetune', 'predict'"),
        (["run", "missing.ipynb"], "no notebook missing.ipynb"),
        (["run", "pretrain", "--kernel", "nowhere"], "no Jupyter kernel"),
        (["evaluate", "nowhere", "--images", "."], "no nowhere/model.json"),
        (["sweep", "missing.yaml", "--out", "x"], "missing.yaml"),
        (["data", "show", "nothing"], "nothing"),
    ],
)
def test_what_a_user_did_wrong_is_one_message_and_exit_code_2(words, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    said = capsys.readouterr()
    assert expected in said.err and said.err.startswith("sarfm: ") and "Traceback" not in said.err
    assert not list(tmp_path.iterdir()), "something was left behind"


def test_unknown_commands_are_refused():
    assert run("frobnicate").returncode == 2


def test_version(capsys):
    from sarfm import __version__

    assert main(["version"]) == 0
    assert capsys.readouterr().out.startswith(f"sarfm {__version__}")


def test_describe_lists_every_parameter(capsys):
    assert main(["run", "pretrain", "--describe"]) == 0
    assert "settings.mask_ratio: float = 0.75\n    fraction of patches hidden, in (0, 1)" in capsys.readouterr().out


def test_data_list_show_and_check(capsys):
    assert main(["data", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("borneo", "ombria", "terramesh"))
    assert main(["data", "show", "borneo"]) == 0
    assert "attribution" in capsys.readouterr().out.lower()
    assert main(["data", "check", "borneo"]) == 0
    assert "borneo.nc" in capsys.readouterr().out


def test_a_damaged_file_gives_exit_code_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SARFM_DATA", str(tmp_path))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.nc").write_bytes(b"not what it was")
    entry = {
        "id": "own",
        "title": "own",
        "readable": False,
        "files": [{"path": "a.nc", "bytes": 3, "sha256": "0" * 64}],
    }
    import yaml

    (tmp_path / "own.yaml").write_text(yaml.safe_dump(entry))
    assert main(["data", "check", str(tmp_path / "own.yaml"), "--folder", str(tmp_path / "own")]) == 1
    assert "False" in capsys.readouterr().out


def test_nothing_to_check_is_said(tmp_path, capsys):
    (tmp_path / "own.yaml").write_text(
        "id: own\ntitle: Own\nchannels: {vv: {units: dB, quantity: sigma0}}\nread: {scenes: '{scene}.tif'}\n"
    )
    assert main(["data", "check", str(tmp_path / "own.yaml")]) == 2
    assert "lists no files, so there is nothing to check" in capsys.readouterr().err


def test_a_stride_of_zero_is_no_default(tmp_path, capsys):
    words = ["data", "prepare", "borneo", "--folder", str(tmp_path), "--stride", "0"]
    assert main(words) == 2 and "stride" in capsys.readouterr().err


def test_prepare_cuts_at_several_scales(tmp_path, capsys):
    words = ["data", "prepare", "borneo", "--scales", "2..3", "--size", "32", "--cache", str(tmp_path)]
    assert main(words) == 0
    said = capsys.readouterr().out.splitlines()
    assert "from 2 scenes" in said[0] and said[1].split() == ["spacing_m", "scenes", "patches", "valid"]
    assert [line.split()[1:3] for line in said[2:4]] == [["1", "32"], ["1", "15"]] or len(said) == 5
    from sarfm.patches.store import open_store

    store = open_store(said[-1])
    assert set(store.index["scene"]) == {"borneo@2x", "borneo@3x"} and (store.index["height"] == 32).all()
    assert main(words) == 0 and capsys.readouterr().out.splitlines()[-1] == said[-1]
    assert main([*words[:4], "2,3", *words[5:]]) == 0 and capsys.readouterr().out.splitlines()[-1] == said[-1]
    assert main([*words, "--average", "db"]) == 0 and capsys.readouterr().out.splitlines()[-1] != said[-1]


def test_prepare_without_scales_pads(tmp_path, capsys):
    assert main(["data", "prepare", "borneo", "--size", "128", "--cache", str(tmp_path)]) == 0
    from sarfm.patches.prepare import prepare_store

    path = capsys.readouterr().out.splitlines()[-1]
    assert str(prepare_store("borneo", size=128, stride=128, cache=tmp_path, progress=False).path) == path


@pytest.mark.parametrize("scales", ["2..", "..5", "5..2", "0..2", "2,x", "2.5", "-1"])
def test_scales_that_are_none(scales, capsys):
    with pytest.raises(SystemExit) as refused:
        main(["data", "prepare", "borneo", f"--scales={scales}"])
    assert refused.value.code == 2 and "as 2..10 or 2,5" in capsys.readouterr().err


def test_stores_are_listed_and_cleared(tmp_path, capsys):
    cache = ["--cache", str(tmp_path)]
    for size in ("24", "48"):
        assert main(["data", "prepare", "borneo", "--size", size, *cache]) == 0
    (tmp_path / "of-somebody-else.zarr").mkdir()
    capsys.readouterr()
    assert main(["data", "stores", *cache]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("borneo-")]
    assert len(names) == 2
    assert main(["data", "stores", "--clear", names[0], *cache]) == 0
    assert main(["data", "stores", "--clear", "../tests", *cache]) == 2
    assert "holds no store ../tests" in capsys.readouterr().err
    assert main(["data", "stores", "--clear", "all", *cache]) == 0
    assert [path.name for path in tmp_path.glob("*.zarr")] == ["of-somebody-else.zarr"]
