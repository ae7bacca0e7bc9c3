"""Commands that are imported when they are called."""

import subprocess
import sys

from click.testing import CliRunner

from ftkit.launch.cli import main
from ftkit.launch.detect_command import detect
from ftkit.launch.later import Later


def test_the_help_lists_it_by_its_own_words() -> None:
    later = main.commands["detect"]
    assert isinstance(later, Later)
    assert later.command is detect
    assert later.get_short_help_str(200) == detect.get_short_help_str(200)


def test_it_runs_with_its_own_commands() -> None:
    done = CliRunner().invoke(main, ["detect", "replay", "--help"])
    assert done.exit_code == 0
    assert "--alarms-per-day" in done.output


def test_a_help_text_imports_no_detector_and_no_torch() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from ftkit.launch.cli import main; "
        "CliRunner().invoke(main, ['--help']); "
        "sys.exit(' '.join(m for m in sys.modules if m in "
        "('torch', 'numpy', 'ray', 'ftkit.detection.step_detector')) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
