import json
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from memfit.account.account import Account, Entry, Phase
from memfit.evaluate.quality import Quality
from memfit.evaluate.speed import Speed
from memfit.report import (
    Report,
    describe_machine,
    describe_versions,
    model_card,
    render_account,
    render_page,
    render_plan,
    render_report,
)
from memfit.report.card import is_hub_id
from memfit.report.choices import ranges, rows
from memfit.report.techniques import technique_rows
from memfit.report.terminal import plan_title

MiB = 2**20


def account(parameters: int, *, resident: int | None = None) -> Account:
    alive = {"parameter": parameters, "kv_cache": 5 * MiB, "temporary": 3 * MiB}
    return Account(
        phases=(
            Phase(
                name="load", peak_nbytes=parameters, end_nbytes=parameters, alive={"parameter": parameters}
            ),
            Phase(
                name="prefill",
                peak_nbytes=sum(alive.values()),
                end_nbytes=parameters,
                at="model.layers.1.mlp aten.mm",
                alive=alive,
            ),
        ),
        entries=(
            Entry(
                kind="parameter",
                module="model.layers.0",
                device="cpu",
                dtype="int8",
                nbytes=parameters,
                phases=("load", "prefill"),
            ),
        ),
        resident_nbytes=resident,
    )


def choice(layer: int, what: str, bits: int | None, *, nbytes: int = MiB) -> dict[str, Any]:
    members = {
        "qkv": [f"model.layers.{layer}.self_attn.{p}_proj" for p in "qkv"],
        "down": [f"model.layers.{layer}.mlp.down_proj"],
        "head": ["model.embed_tokens", "lm_head"],
    }[what]
    scheme = None if bits is None else {"bits": bits, "group": 128, "symmetric": True}
    return {"name": what, "members": members, "scheme": scheme, "nbytes": nbytes, "price": 0.001}


PLAN = {
    "budget_nbytes": 100 * MiB,
    "kv_bits": 8,
    "expected_kl": 0.0123,
    "average_bits": 4.5,
    "predicted": None,
    "predicted_fit": None,
    "choices": [
        choice(0, "head", 8),
        *(choice(i, "qkv", 4) for i in range(18)),
        *(choice(i, "down", 3 if 4 <= i < 9 else None) for i in range(18)),
    ],
}


def report(**changes: Any) -> Report:
    fields: dict[str, Any] = {
        "model": "<b>someone</b>/model",
        "budget_nbytes": 100 * MiB,
        "plan": PLAN,
        "task": {"task": "infer", "batch": 1, "prompt": 512, "new_tokens": 32, "kv_bits": 8},
        "predicted": account(80 * MiB, resident=300 * MiB),
        "measured": account(80 * MiB + 512, resident=301 * MiB),
        "predicted_fit": account(60 * MiB),
        "measured_fit": account(60 * MiB),
        "original": account(160 * MiB),
        "quality": Quality(
            kl=0.01,
            kl_interval=(0.008, 0.012),
            perplexity=20.5,
            perplexity_reference=20.1,
            top1=0.93,
            tokens=5110,
            windows=10,
        ),
        "speed": Speed(
            prompt_tokens_per_s=900.0,
            decode_tokens_per_s=40.0,
            batch=1,
            prompt=512,
            new_tokens=32,
            repeats=3,
            threads=2,
        ),
        "algorithm": "gptq",
        "text": {
            "name": "notes.txt", "sha256": "5e" * 32, "window": 256, "calibration_windows": 16,
            "evaluation_windows": 10,
        },
        "rounding": "GPTQ: 36 of 37 quantized modules, damping 0.01",
        "kernels": {"int8": 3, "nibbles": 18},
        "machine": {"cpu": "some cpu", "memory_nbytes": 24 * 2**30},
        "versions": {"memfit": "0.1.0", "torch": "2.13.0"},
    }
    return Report(**(fields | changes))


def text_of(renderable: Any) -> str:
    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_json_has_the_promised_keys_and_comes_back_as_the_same_report() -> None:
    data = json.loads(json.dumps(report().to_json(), allow_nan=False))
    of_fit = "budget_nbytes fits choices measured resident_nbytes quality speed"
    assert {"peak_nbytes", "peak_phase", "phases", "entries", *of_fit.split()} <= data.keys()
    assert {"peak_nbytes", "peak_phase", "phases", "entries"} <= data["measured"].keys()
    assert data["phases"] == {"load": 80 * MiB, "prefill": 88 * MiB}
    assert (data["fits"], data["resident_nbytes"]) == (True, 301 * MiB)
    assert Report.from_json(data) == report()
    bare = Report(model="m", predicted=account(MiB))
    assert Report.from_json(json.loads(json.dumps(bare.to_json()))) == bare


def test_fits_is_what_was_measured_where_it_was() -> None:
    assert report(budget_nbytes=88 * MiB).fits is False
    assert report(budget_nbytes=88 * MiB, measured=None).fits is True
    assert report(budget_nbytes=None).fits is None


def test_equal_layers_become_one_row() -> None:
    found = [(row.where, row.what, row.scheme, row.nbytes) for row in rows(PLAN["choices"])]  # type: ignore[arg-type]
    assert found == [
        ("", "model embed_tokens, lm_head", "int8 g128", MiB),
        ("0-17", "self_attn q/k/v_proj", "int4 g128", 18 * MiB),
        ("0-3, 9-17", "mlp down_proj", "bf16", 13 * MiB),
        ("4-8", "mlp down_proj", "int3 g128", 5 * MiB),
    ]
    assert ranges([5, 1, 2, 3]) == "1-3, 5"


def test_the_terminal_shows_plan_phases_and_errors() -> None:
    shown = text_of(render_report(report()))
    assert "88.00 MiB at the peak, measured, of 100.00 MiB allowed: it fits. The original needs 168.00 MiB." in shown
    assert re.search(r"0-17 +self_attn q/k/v_proj +int4 g128 +18\.00 MiB", shown)
    assert re.search(r"phase prefill +88\.00 MiB +88\.00 MiB +-0\.00 %", shown)
    assert re.search(r"kind kv_cache +5\.00 MiB +5\.00 MiB +exact", shown)
    assert "0.0100 (95 %: 0.0080 to 0.0120)" in shown
    assert "\nMade by gptq on 16 windows of 256 tokens of notes.txt, judged on 10 others.\nPlan: within" in shown
    planned = text_of(render_plan(PLAN))
    assert "within 100.00 MiB, 4.50 bits a weight, KV cache 8 bits, expected KL 0.0123" in planned
    accounted = text_of(render_account(account(80 * MiB), budget_nbytes=40 * MiB))
    assert re.search(r"prefill +88\.00 MiB +█+ +model\.layers\.1\.mlp aten\.mm", accounted)
    assert re.search(r"parameter +80\.00 MiB +90\.9 %", accounted)


def test_a_cache_that_is_never_long_enough_to_be_packed_is_told() -> None:
    tasks = [{"task": "infer", "batch": 1, "prompt": 95, "new_tokens": new} for new in (4, 5)]
    short, long = (text_of(render_plan({**PLAN, "task": task})) for task in tasks)
    assert "The KV cache has 8 bits from 100 tokens on; the 99 of this task stay in 16." in short
    assert "stay in 16." not in long
    assert "stay in 16." not in text_of(render_plan({**PLAN, "task": tasks[0], "kv_bits": 16}))


def test_a_run_that_went_on_says_what_was_not_measured() -> None:
    line = "It went on where a stopped run was: what was done before is predicted here, and not measured."
    fitted = account(MiB)
    went_on = report(resumed=True, predicted_fit=fitted, measured_fit=fitted)
    assert line in text_of(render_report(went_on)) and line in render_page(went_on)
    assert Report.from_json(went_on.to_json()).resumed
    for other in (report(predicted_fit=fitted, measured_fit=fitted), report(resumed=True, measured_fit=None)):
        assert line not in text_of(render_report(other)) and line not in render_page(other)


def test_the_terminal_says_which_peak_is_predicted_where_both_are_shown() -> None:
    both, one = (text_of(render_report(report(measured=measured))) for measured in (report().measured, None))
    assert "Phases, predicted" in both and "At the peak (prefill, predicted)" in both
    assert "Phases" in one and "At the peak (prefill)" in one and "Phases, predicted" not in one
    assert "At the peak (prefill)" in text_of(render_account(account(80 * MiB)))


@pytest.mark.parametrize(
    ("windows", "told"),
    [(1, "Calibrating: one window of"), (2, "Calibrating: 2 windows of"), (None, "Choosing integers: 4 windows of")],
)
def test_what_a_cap_made_of_the_windows_is_told(windows: int | None, told: str) -> None:
    sizes = {"predicted_nbytes": MiB, "measured_nbytes": MiB, "file_backed_nbytes": 0}
    job = sizes if windows is None else sizes | {"windows": windows}
    thrift = {"batch": 4, "hold": True, "spill": False}
    shown = text_of(render_report(report(ram={"cap_nbytes": MiB, "jobs": {"calibrate": job}, "thrift": thrift})))
    assert f"{told} the text at once" in shown
    assert ("Calibrating:" in shown) is (windows is not None)


def test_page_and_card_say_what_the_terminal_says_of_how_it_was_made() -> None:
    told = "Made by gptq on 16 windows of 256 tokens of notes.txt, judged on 10 others."
    page = render_page(report())
    assert told in page and "GPTQ: 36 of 37" in page and "expected KL 0.0123" in page
    assert re.search(r"88\.00 MiB measured, of 100\.00 MiB allowed:\s*<span class=\"good\">it fits", page)
    assert '<th class="number">price</th>' in page and '<td class="number">0.018</td>' in page
    card = model_card(report())
    assert f"{told} The SHA-256 of both parts together is `{'5e' * 32}`." in card
    nearest = report(algorithm="rtn", plan=PLAN | {"priced_by": "weights"})
    assert "Made by rtn, without a text, judged on 10 windows of 256 tokens of notes.txt." in render_page(nearest)
    assert "Made by rtn on 16 windows" in render_page(report(algorithm="rtn", plan=PLAN | {"priced_by": "text"}))
    bare = report(text=None, algorithm="search", quality=None)
    assert all("Made by search, without a text." in shown for shown in (render_page(bare), model_card(bare)))


def test_what_an_expected_divergence_owes_to_the_cache_is_told() -> None:
    prices = sum(choice["price"] for choice in PLAN["choices"])
    owed = plan_title(PLAN | {"expected_kl": prices + 0.0024})
    assert f"expected KL {prices + 0.0024:.4f} (0.0024 of it by the cache)" in owed
    assert "cache)" not in plan_title(PLAN | {"expected_kl": prices})


def test_a_card_says_how_to_make_it_again() -> None:
    same = "of the same model, with the same `--text`, `--window`, `--windows`, `--algorithm`."
    assert f"`memfit fit MODEL --plan plan.json` makes it again {same}" in model_card(report())
    assert f"`memfit fit MODEL --plan plan.json --format onnx` makes it again {same}" in model_card(report(), onnx=True)
    assert "again of the same model, with the same `--algorithm`." in model_card(report(text=None))
    capped = model_card(report(ram={"cap_nbytes": 600 * MiB, "jobs": {}}))
    assert f"`--windows`, `--algorithm`, `--ram {600 * MiB}`." in capped


def test_a_plan_that_nothing_priced_has_no_column_of_prices() -> None:
    """The table's column, that is; the line above says `not priced`."""
    free = PLAN | {"choices": [choice | {"price": 0.0} for choice in PLAN["choices"]]}
    with_prices, without = (text_of(render_report(report(plan=plan))).splitlines() for plan in (PLAN, free))
    assert any(line.split()[-2:] == ["bytes", "price"] for line in with_prices)
    assert not any("price" in line.split() for line in without)


class Page(HTMLParser):
    """Collects what a browser would fetch, and the tags that stay open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.fetched += [v or "" for k, v in attributes if k in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "br", "rect", "line", "polyline", "link") or tag == "rect":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag


@pytest.mark.parametrize("changes", [{}, {"measured": None, "plan": None, "quality": None, "speed": None}])
def test_the_page_is_whole_escaped_and_needs_nothing_outside_itself(changes: dict[str, Any]) -> None:
    points = [{"nbytes": n * MiB, "kl": 1 / n} for n in (50, 75, 88)]
    lines = {
        "<quantize>": {"points": points, "dominated_by": None},
        "prune": {"points": [{**point, "kl": 2.0} for point in points], "dominated_by": "<quantize>"},
    }
    html = render_page(report(**changes, fronts=lines))
    page = Page()
    page.feed(html)
    assert page.open == [] and page.fetched == []
    assert "script" not in page.seen and {"svg", "rect", "circle"} <= page.seen
    assert "url(" not in html and "@import" not in html
    assert "<b>someone</b>" not in html and "&lt;b&gt;someone&lt;/b&gt;" in html
    assert html == render_page(report(**changes, fronts=lines))
    assert "<quantize>" not in html and "<td>&lt;quantize&gt;</td>" in html
    assert html.count("polyline") == 2 and html.count("circle class") == 6 + (report(**changes).quality is not None)


def test_the_card_names_its_base_only_where_the_hub_knows_it() -> None:
    card = model_card(report(), base_model="google/gemma-3-270m", license="gemma")
    assert card.startswith(
        "---\nbase_model: google/gemma-3-270m\nbase_model_relation: quantized\nlibrary_name: transformers\n"
        "license: gemma\ntags:\n- memfit\n- compressed-tensors\n---\n"
    )
    assert "| 0-17 | self_attn q/k/v_proj | int4 g128 | 18.00 MiB |" in card
    assert "| peak | 88.00 MiB | 88.00 MiB | -0.00 % |" in card
    assert "AutoModelForCausalLM.from_pretrained" in card and "memfit" in card
    local = model_card(report(), base_model="/home/someone/model", license="no")
    assert "base_model" not in local.split("---")[1] and 'license: "no"' in local
    assert is_hub_id("a/b") and not is_hub_id("../b") and not is_hub_id("/a/b") and not is_hub_id("a")


def test_the_card_of_what_memfit_alone_reads_says_so() -> None:
    made = report()
    assert made.plan is not None
    nf4 = {"bits": 4, "group": 64, "symmetric": True, "values": "nf4"}
    choices = [dict(choice) | {"scheme": nf4} for choice in made.choices]
    card = model_card(replace(made, plan=dict(made.plan) | {"choices": choices}))
    assert "library_name: memfit\ntags:\n- memfit\n---" in card
    assert "nf4 g64" in card and "With memfit alone" in card and "from_pretrained" not in card


def test_the_card_of_a_narrower_model_in_16_bits_speaks_of_nothing_packed() -> None:
    whole = PLAN | {"choices": [choice | {"scheme": None} for choice in PLAN["choices"]], "narrowed": {"channels": 448}}
    card = model_card(report(plan=whole))
    assert "compressed-tensors" not in card and "packed" not in card and "In each block 448 channels stay." in card
    assert "expected KL" not in text_of(render_plan(whole)), "narrowing is measured, never expected"


def test_the_machine_and_versions_are_json() -> None:
    machine, versions = describe_machine(), describe_versions()
    json.dumps([machine, versions], allow_nan=False)
    assert machine["memory_nbytes"] > 0 and machine["cpu"]
    assert {"memfit", "torch", "transformers"} <= versions.keys()


def test_each_technique_alone_stands_beside_those_allowed_together() -> None:
    points = [{"nbytes": n * MiB, "kl": 1 / n} for n in (50, 75, 120)]
    lines = {
        "quantize": {"points": points, "dominated_by": None},
        "prune": {"points": [{"nbytes": 101 * MiB, "kl": 2.0}], "dominated_by": "quantize"},
    }
    assert technique_rows(report(fronts=lines)) == [
        ("quantize", "50.00 MiB", "0.02", "75.00 MiB", "0.013", ""),
        ("prune", "101.00 MiB", "2", "does not fit", "", "quantize"),
    ]
    assert technique_rows(report(fronts={"quantize": lines["quantize"]})) == []
    said = text_of(render_report(report(fronts=lines)))
    assert "dominated by another that is expected to lose no more at any peak" in " ".join(said.split())
    assert "alone dominated by" in said and "does not fit" in said
    assert "Taken" not in said
    said = text_of(render_report(report(fronts=lines, tried={"all together": 0.25, "quantize": 0.125})))
    assert "all together 0.25, quantize 0.125. Taken: quantize." in said


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"measured": None}, "nothing was run (--no-measure)"),
        ({"ram": {"cap_nbytes": MiB, "asking_nbytes": 2 * MiB, "jobs": {}}}, "takes 2.00 MiB, and the cap is 1.00 MiB"),
        ({}, "there was no text. Give --text"),
    ],
)
def test_a_report_without_quality_says_why(changes: dict[str, Any], why: str) -> None:
    without = report(quality=None, **changes)
    for shown in (text_of(render_report(without)), unescape(render_page(without))):
        assert why in shown
    assert "not judged" not in text_of(render_report(report())) + render_page(report())


def test_a_divergence_far_above_the_expected_one_is_told() -> None:
    def said(expected: float, **more: Any) -> str:
        return text_of(render_report(report(plan=PLAN | {"expected_kl": expected} | more)))

    assert "Expected was 0.001: what each choice costs alone, added up." in said(0.001)
    assert "0.001 above the narrower model's own" in said(0.001, narrowed={"channels": 0.7, "kept": {}, "kl": None})
    assert "Expected was" not in said(0.009)
