"""The command line's own behaviour; what its commands do is tested with them."""

import subprocess
import sys

import pytest

import fusionpass
from fusionpass import cli


def test_version_of_the_module_run_as_a_program():
    done = subprocess.run([sys.executable, "-m", "fusionpass", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"fusionpass {fusionpass.__version__}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["dmeo"], "invalid choice: 'dmeo'"),
        (["demo", "--numerics", "exact"], "invalid choice: 'exact'"),
        (["demo", "--tokens", "1"], "1 is less than 2"),
    ],
)
def test_usage_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    assert "demo" in capsys.readouterr().out
