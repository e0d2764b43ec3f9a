"""What the tests of several scripts share."""

import pytest


@pytest.fixture
def refuses(tmp_path, capsys, monkeypatch):
    """Runs a script with bad arguments: one line tells of them, and nothing is written."""

    def check(main, arguments, message):
        monkeypatch.chdir(tmp_path)
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    return check
