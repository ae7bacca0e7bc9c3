"""Names that a person types: what is refused, and what may have been meant."""

from pathlib import Path

import pytest

from ftkit.core.errors import UsageError
from ftkit.launch.choices import chosen, near, steps_or_auto
from ftkit.launch.cli import absolute
from ftkit.launch.drill_plan import choose
from ftkit.launch.job import python_command
from ftkit.launch.modules import check_module
from ftkit.launch.run_folder import newest_run


def test_names_are_taken_once_in_the_order_given() -> None:
    assert chosen("stop, kill,stop,", ("kill", "stop"), option="--fault") == ["stop", "kill"]


def test_a_name_that_there_is_not_is_refused_with_the_near_one() -> None:
    with pytest.raises(UsageError, match=r"--fault: 'kil' is none of kill, stop; did you mean ki"):
        chosen("stop,kil", ("kill", "stop"), option="--fault")
    with pytest.raises(UsageError, match=r"is none of kill, stop$"):
        chosen("nonsense", ("kill", "stop"), option="--fault")


def test_capitals_do_not_hide_what_was_meant() -> None:
    assert near("KILL", ("kill", "stop")) == "; did you mean kill?"


@pytest.mark.parametrize(
    ("fault", "meant"), [("kil", "kill"), ("lose-nod", "lose-node"), ("seg-fault", "segfault")]
)
def test_a_drill_that_there_is_not(fault: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"no drill {fault!r}; .*; did you mean {meant}\\?"):
        choose(fault, None, seed=0, nproc=3, steps=100)


@pytest.mark.parametrize(
    ("at", "meant"),
    [("backwards", "backward"), ("backwrd:2", "backward"), ("all_reduce", "all-reduce")],
)
def test_a_phase_that_there_is_not(at: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"no phase {at!r}; .*; did you mean {meant}\\?"):
        choose("kill", at, seed=0, nproc=3, steps=100)


def test_nothing_is_suggested_where_nothing_is_near() -> None:
    with pytest.raises(UsageError, match=r"in-collective, .*recovery$"):
        choose("kill", "x", seed=0, nproc=3, steps=100)


def test_a_url_with_one_slash_is_no_folder_here() -> None:
    with pytest.raises(
        UsageError, match=r"s3:/bucket/ck is neither .* did you mean s3://bucket/ck"
    ):
        absolute("s3:/bucket/ck")
    assert absolute("s3://bucket/ck") == "s3://bucket/ck"
    assert absolute("") == ""
    assert absolute("runs/ck") == str(Path("runs/ck").resolve())


def test_a_script_a_run_and_an_interval_that_there_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "pretrain.py").touch()
    (tmp_path / "runs" / "monday" / "events").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"no script 'trian.py' in .*; did you mean train.py\?"):
        python_command("trian.py", ())
    with pytest.raises(UsageError, match=r"; did you mean jobs/pretrain.py\?"):
        python_command("jobs/pretrian.py", ())
    with pytest.raises(UsageError, match=r"the name of a module$"):
        python_command("nowhere/else.py", ())
    with pytest.raises(UsageError, match=r"; did you mean monday\?"):
        newest_run(Path("modnay"))
    with pytest.raises(UsageError, match=r"--checkpoint-every: 'atuo' .*; did you mean auto\?"):
        steps_or_auto("atuo")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Here: a package that must not be imported, one that can be run, a namespace and a script."""
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "closed/__init__.py": "raise SystemExit('it was imported')",
        "closed/train.py": "",
        "open/__init__.py": "",
        "open/__main__.py": "",
        "loose/train.py": "",
        "loose/more/train.py": "",
        "moved/__init__.py": "__path__ = ['elsewhere']",
        "script.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    "name",
    ["closed.train", "open", "open.__main__", "loose.train", "loose.more.train", "script", "moved.x", "timeit",
     "ftkit.launch.cli"],
)  # fmt: skip
def test_a_module_is_found_and_not_imported(name: str, packages: Path) -> None:
    check_module(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nosuchmod", r"no module 'nosuchmod'"),
        ("scirpt", r"; did you mean script\?"),
        ("closed.trian", r"closed has no 'trian'; .*; did you mean train\?"),
        ("closed", r"closed: it is a package without a __main__ .*: train$"),
        ("script.train", r"script has no 'train'"),
        ("script.py", r"that is a file, not a module's name; leave -m out"),
        ("closed/train.py", r"that is a file, not a module's name; leave -m out"),
        ("script.", r"no module 'script.'"),
        (".script", r"no module '.script'"),
        ("", r"no module ''"),
        ("/", r"no module '/'"),
        ("a\0b", r"no module"),
    ],
)
def test_a_module_that_there_is_not(name: str, words: str, packages: Path) -> None:
    with pytest.raises(UsageError, match=words):
        check_module(name)
