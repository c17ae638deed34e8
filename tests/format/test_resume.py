"""A directory of work that outlives being stopped, and nothing else."""

import pytest

from memfit.errors import MemfitError, UsageError
from memfit.format.resume import WorkDirectory


def hidden(tmp_path):
    return [path.name for path in tmp_path.iterdir()]


def test_what_was_made_once_is_there_after_an_interrupt(tmp_path):
    with pytest.raises(KeyboardInterrupt), WorkDirectory(tmp_path / "out", key={"a": 1}) as work:
        assert work.once("it", lambda: {"n": 1}) == {"n": 1}
        raise KeyboardInterrupt
    with WorkDirectory(tmp_path / "out", key={"a": 1}) as work:
        assert work.resumed and work.holds("it") and work.once("it", lambda: {"n": 2}) == {"n": 1}
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("error", [MemfitError("no"), UsageError("no")])
def test_an_error_of_memfits_own_keeps_nothing(tmp_path, error):
    with pytest.raises(MemfitError), WorkDirectory(tmp_path / "out", key={}) as work:
        work.once("it", lambda: {})
        raise error
    assert hidden(tmp_path) == []


def test_another_key_starts_anew(tmp_path):
    with pytest.raises(KeyboardInterrupt), WorkDirectory(tmp_path / "out", key={"a": 1}) as work:
        (work.path / "more").mkdir()
        work.once("it", lambda: {"n": 1})
        assert not work.resumed
        raise KeyboardInterrupt
    with WorkDirectory(tmp_path / "out", key={"a": 2}) as work:
        assert not work.resumed
        assert not (work.path / "more").exists()
        assert work.once("it", lambda: {"n": 2}) == {"n": 2}


def test_what_was_stopped_while_it_was_made_is_made_again(tmp_path):
    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), WorkDirectory(tmp_path / "out", key={}) as work:
        work.once("it", stopped)
    with WorkDirectory(tmp_path / "out", key={}) as work:
        assert not work.holds("it")


def test_two_runs_to_one_place_do_not_meet(tmp_path):
    with WorkDirectory(tmp_path / "out", key={}) as work:
        work.once("it", lambda: {"n": 1})
        with pytest.raises(UsageError, match="another run"), WorkDirectory(tmp_path / "out", key={}):
            pass
        assert work.holds("it")
