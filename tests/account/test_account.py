import json

import pytest

from memfit.account.account import Account, Entry, Phase, compare


def account(scale: int = 1) -> Account:
    return Account(
        phases=(
            Phase(name="load", peak_nbytes=100 * scale, end_nbytes=90, alive={"parameter": 100 * scale}),
            Phase(name="decode", peak_nbytes=150, end_nbytes=90, alive={"parameter": 100, "kv_cache": 50}),
        ),
        entries=(
            Entry(kind="parameter", module="a", device="cpu", dtype="bfloat16", nbytes=100, phases=("load", "decode")),
        ),
        resident_nbytes=1000 * scale,
        routing="balanced",
    )  # fmt: skip


def test_an_account_survives_json() -> None:
    once = account()
    assert Account.from_json(json.loads(json.dumps(once.to_json()))) == once


def test_json_has_the_promised_keys() -> None:
    found = account().to_json()
    assert found["peak_nbytes"] == 150
    assert found["peak_phase"] == "decode"
    assert found["phases"] == {"load": 100, "decode": 150}
    assert set(found["entries"][0]) == {"kind", "module", "device", "dtype", "nbytes", "phases"}


def test_an_unknown_phase_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(KeyError, match="load, decode"):
        account().phase("step")


def test_comparing_an_account_with_itself_shows_no_error() -> None:
    assert all(line.error == 0 for line in compare(account(), account()))


def test_compare_lists_phases_kinds_entries_and_resident() -> None:
    lines = {line.what: line for line in compare(account(2), account())}
    assert lines["phase load"].error == 1.0
    assert lines["phase decode"].error == 0.0
    assert lines["kind parameter"].predicted_nbytes == 200
    assert lines["entry parameter a bfloat16"].measured_nbytes == 100
    assert lines["resident"].error == 1.0


def test_what_a_measurement_cannot_tell_apart_is_compared_as_one() -> None:
    def of(**alive: int) -> Account:
        nbytes = sum(alive.values())
        return Account(phases=(Phase(name="load", peak_nbytes=nbytes, end_nbytes=nbytes, alive=alive),), entries=())

    told, found = of(parameter=9, activation=2, temporary=3), of(parameter=9, activation=5)
    lines = {line.what: line for line in compare(told, found)}
    assert set(lines) == {"phase load", "kind parameter", "kind activation, temporary"}
    assert lines["kind activation, temporary"].error == 0
    assert "kind temporary" in {line.what for line in compare(of(temporary=3), of(temporary=2))}
