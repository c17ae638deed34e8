import errno
import os
import time
from pathlib import Path

import pytest

from memfit.errors import MemfitError, UsageError
from memfit.format import directory
from memfit.format.directory import OutputDirectory


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def test_the_directory_appears_at_the_end_and_not_before(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with OutputDirectory(target) as out:
        out.write_json("plan.json", {"b": 1, "a": 2})
        assert not target.exists()
        assert out.path.parent == target.parent
    assert names(target) == ["plan.json"]
    assert (target / "plan.json").read_text() == '{\n  "b": 1,\n  "a": 2\n}\n'
    assert names(target.parent) == ["out"]
    mask = os.umask(0)
    os.umask(mask)
    assert target.stat().st_mode & 0o777 == 0o777 & ~mask


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_ends_the_block_early_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), OutputDirectory(tmp_path / "out") as out:
        out.write_text("half", "done")
        raise error
    assert names(tmp_path) == []


def test_an_existing_output_is_kept_unless_it_may_be_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for text in ("old", "new"):
        with OutputDirectory(target, overwrite=text == "new") as out:
            out.write_text("config.json", text)
    assert (target / "config.json").read_text() == "new"
    with pytest.raises(UsageError, match="exists"):
        OutputDirectory(target)
    with pytest.raises(RuntimeError), OutputDirectory(target, overwrite=True) as out:
        out.write_text("config.json", "half")
        raise RuntimeError
    assert (target / "config.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_overwriting_works_where_directories_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "_exchange", lambda one, other: False)
    target = tmp_path / "out"
    for text in ("old", "new"):
        with OutputDirectory(target, overwrite=True) as out:
            out.write_text("config.json", text)
    assert (target / "config.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_what_is_no_model_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"no config\.json"):
        OutputDirectory(tmp_path, overwrite=True)
    # Said at once, whether it may be overwritten or not: to be told of --overwrite would be told in vain.
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="is a file"):
            OutputDirectory(tmp_path / "thesis.txt", overwrite=overwrite)


def test_a_message_has_the_path_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"^out exists\. Choose another place \(--out\)"):
        OutputDirectory("out")


def test_a_full_disk_is_said_clearly(tmp_path: Path) -> None:
    with pytest.raises(MemfitError, match="disk is full"), OutputDirectory(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_what_was_too_young_to_be_removed_first_is_removed_at_last(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "out"):
        young = tmp_path / ".out.memfit-partial-dead"
        young.mkdir()
        os.utime(young, (time.time() - 6, time.time() - 6))
    assert names(tmp_path) == ["out"]


def test_what_a_killed_run_left_is_removed_and_a_living_one_is_not(tmp_path: Path) -> None:
    stale = tmp_path / ".out.memfit-partial-dead"
    stale.mkdir()
    long_ago = time.time() - 3600
    os.utime(stale, (long_ago, long_ago))
    with OutputDirectory(tmp_path / "out") as living:
        os.utime(living.path, (long_ago, long_ago))
        assert names(tmp_path) == [living.path.name]
        with pytest.raises(RuntimeError), OutputDirectory(tmp_path / "out"):
            assert living.path.exists()
            raise RuntimeError
