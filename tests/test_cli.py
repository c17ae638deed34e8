"""The commands: one object on stdout, messages on stderr, exit codes as promised."""

import json

import pytest
import transformers as hf

from memfit.cli import main

DECODER = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "architectures": ["LlamaForCausalLM"],
}  # fmt: skip
SMALL = ("--prompt", "16", "--new-tokens", "5")
FEW = ("--bits", "8,4", "--groups", "64", "--kv-bits", "16")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A config without weights."""
    directory = tmp_path_factory.mktemp("model")
    hf.LlamaConfig(**DECODER).save_pretrained(directory)
    return str(directory)


@pytest.fixture
def memfit(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # Wide enough that no word is broken.
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERM", "dumb")

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["memfit", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("account", ["--batch", "--prompt", "--new-tokens", "--kv-bits", "--device", "--routing", "--json"]),
        ("plan", ["--budget", "--text", "--bits", "--groups", "--kv-bits", "--keep", "--asymmetric", "--output",
                  "--activations", "--smooth"]),
        ("fit", ["--budget", "--out", "--plan", "--enforce", "--max-kl", "--overwrite", "--dry-run", "--quiet"]),
        ("eval", ["--reference", "--text", "--threads", "--json", "--quiet"]),
        ("report", ["--json"]),
    ],
)
def test_help_names_every_option(memfit, command, options):
    code, out, err = memfit(command, "--help")
    assert code == 0 and not err
    assert all(option in out for option in options)


def test_help_tells_commands_sizes_and_exit_codes(memfit):
    code, out, _ = memfit("--help")
    assert code == 0
    assert all(word in out for word in ("account", "plan", "fit", "eval", "report", "400MiB", "50%", "75"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--bits", "4", "--activations", "8"), "allowed is 4 bits. Allow 8 bits (--bits 8)"),
        (("--bits", "8", "--group", "128", "--activations", "8"), "groups of 128. Leave --group out"),
        (("--bits", "8", "--no-smooth"), "add --activations 8"),
        (("--bits", "8", "--activations", "7"), "16 or 8 bits, got 7"),
    ],
)
def test_activations_go_with_8_bits_alone(memfit, model, words, told):
    code, out, err = memfit("fit", model, "--technique", "quantize", *words, *SMALL, "--dry-run", "-q")
    assert code == 2 and not out and told in err


def test_a_plain_setting_with_activations_is_planned(memfit, model):
    words = ("--technique", "quantize", "--bits", "8", "--activations", "8", "--dry-run", "--json", "-q")
    code, out, _ = memfit("fit", model, *words, *SMALL)
    schemes = {choice["name"]: choice["scheme"] for choice in json.loads(out)["choices"]}
    assert code == 0 and schemes["model.layers.0.mlp.down_proj"]["activations"] == 8
    assert "activations" not in schemes["model.embed_tokens"]


def test_account_prints_one_object(memfit, model):
    code, out, err = memfit("account", model, *SMALL, "--json")
    told = json.loads(out)
    assert code == 0 and not err and out.count("\n") == 1
    assert told["phases"][told["peak_phase"]] == told["peak_nbytes"] == max(told["phases"].values())
    assert {"kind", "module", "dtype", "nbytes", "phases"} <= told["entries"][0].keys()


def test_account_for_people_is_a_table(memfit, model):
    code, out, err = memfit("account", model, *SMALL)
    assert code == 0 and not err
    assert "prefill" in out and "KiB" in out


def test_plan_prints_one_object_and_its_file_can_be_read(memfit, model, tmp_path):
    code, out, err = memfit("plan", model, "-b", "75%", *SMALL, *FEW, "--json", "-q", "-o", "plan.json")
    told = json.loads(out)
    assert code == 0 and not err
    assert told["fits"] is True and told["peak_nbytes"] <= told["budget_nbytes"]
    assert told["choices"] and {"members", "scheme"} <= told["choices"][0].keys()
    assert json.loads((tmp_path / "plan.json").read_text())["choices"] == told["choices"]


def test_what_does_not_fit_exits_with_3_and_says_what_would(memfit, model):
    code, out, err = memfit("plan", model, "-b", "10KiB", *SMALL, *FEW, "--json", "--quiet")
    told = json.loads(out)
    assert code == 3 and err.startswith("DoesNotFit: 10.00 KiB allowed")
    assert told["fits"] is False and told["smallest_nbytes"] > 10 << 10 and told["levers"]
    assert str(told["smallest_nbytes"]) in err


def test_progress_goes_to_stderr(memfit, model, monkeypatch):
    monkeypatch.setattr("memfit.fit", lambda *args, progress, **more: progress("counting beans") or 1 / 0)
    monkeypatch.setattr("sys.argv", ["memfit", "fit", model])
    with pytest.raises(ZeroDivisionError):
        main()


@pytest.mark.parametrize(
    "words",
    [
        ("account", "no-such-directory/of/models"),
        ("plan", "{model}", "--budget", "much"),
        ("plan", "{model}", "--bits", "9"),
        ("plan", "{model}", "--bits", "eight"),
        ("plan", "{model}", "--kv-bits", "3"),
        ("account", "{model}", "--kv-bits", "5"),
        ("account", "{model}", "--prompt", "0"),
        ("fit", "{model}", "--budget", "50%"),
        ("fit", "{model}", "--technique", "quantize"),
        ("fit", "{model}", "--format", "onnx"),
        ("fit", "{model}", "--format", "gguf:q4_k_m", "--bits", "4"),
        ("fit", "{model}", "--format", "gguf:q4_k_m", "--dry-run"),
        ("fit", "{model}", "--technique", "quantize", "--bits", "8,4"),
        ("fit", "{model}", "--technique", "quantize", "--bits", "16"),
        ("fit", "{model}", "--technique", "prune", "--bits", "4"),
        ("fit", "{model}", "--technique", "prune", "--sparsity", "0.5", "--algorithm", "gptq-plain"),
        ("fit", "{model}", "--technique", "quantize", "--values", "nf4,fp8"),
        ("fit", "{model}", "--technique", "quantize", "--values", "codebook"),
        ("plan", "{model}", "--values", "nf5"),
        ("plan", "{model}", "--vector", "2"),
        ("plan", "{model}", "--values", "codebook", "--vector", "3"),
        ("fit", "{model}", "--technique", "prune", "--sparsity", "0.5", "--vector", "4"),
        ("plan", "{model}", "--values", "nf4", "--asymmetric"),
        ("report", "{model}"),
        ("report", "no-such-directory"),
        ("plan", "{model}", "--task", "train", "--bits", "4"),
        ("plan", "{model}", "--sequence", "64"),
        ("account", "{model}", "--task", "train", "--prompt", "9"),
        ("train", "{model}", "--data", "text.txt", "--resume", "--overwrite"),
        ("train", "{model}", "--data", "text.txt", "--epochs", "0"),
        ("frobnicate",),
    ],
)
def test_a_call_that_is_off_exits_with_2_and_a_message(memfit, model, words, tmp_path):
    code, out, err = memfit(*(word.format(model=model) for word in words))
    assert code == 2 and not out and err.strip()
    assert "Traceback" not in err and not any(tmp_path.iterdir())


@pytest.mark.parametrize(("words", "told"), [
    (("--values", "nf4", "--bits", "3"), "--bits 3: nf4 has 4 bits. Leave --bits out"),
    (("--values", "mxfp4", "--group", "64"), "--group 64: mxfp4 has groups of 32. Leave --group out"),
])  # fmt: skip
def test_what_values_cannot_hold_is_told_with_the_next_move(memfit, model, words, told):
    code, out, err = memfit("fit", model, "--technique", "quantize", *words)
    assert code == 2 and not out and told in " ".join(err.split())


@pytest.mark.parametrize(("words", "told"), [
    (("--sparsity", "half"), "--sparsity 'half': write the share that goes, as 0.5 or 50%"),
    (("--sparsity", "100%"), "sparsity must be 0 or more and less than 1, got 1.0"),
    (("--algorithm", "svd"), "--algorithm svd: prune has magnitude, wanda, sparsegpt"),
    (("--sparsity", "6%"), "takes 6.25% of the bytes, so a smaller share that goes makes the model no smaller"),
    (("--sparsity", "0", "--pattern", "blocks"), "takes 0.39% of the bytes"),
    ((), "give --sparsity, as 0.5, or --pattern"),
])  # fmt: skip
def test_what_pruning_is_told_wrongly_is_told_with_the_next_move(memfit, model, words, told):
    code, out, err = memfit("fit", model, "--technique", "prune", *words)
    assert code == 2 and not out and told in " ".join(err.split())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--ram", "1GiB"), "it is written tensor by tensor, and no cap is kept to there"),
        (("--algorithm", "rtn"), "its integers are chosen by GPTQ where there is a --text"),
        (("--max-kl", "0.1"), "another program runs it"),
        (("--bits", "4"), "a mixture has widths of its own"),
    ],
)
def test_what_a_gguf_has_no_use_for_is_told_with_the_reason(memfit, model, words, told):
    code, _, err = memfit("fit", model, "--format", "gguf:q4_k_m", *words)
    assert code == 2 and told in err


def test_one_setting_that_does_not_fit_names_the_budget_that_does(memfit, model):
    words = ("fit", model, "--technique", "quantize", "--bits", "8", *SMALL, "--dry-run", "--json", "--quiet")
    code, out, err = memfit(*words, "--budget", "10KiB")
    smallest = json.loads(out)["smallest_nbytes"]
    assert code == 3 and f"Give that budget (--budget {smallest})" in err
    assert "(parameter " in err and "kv_cache " in err and "--kv-bits and a shorter --prompt" in err
    assert memfit(*words, "--budget", str(smallest))[0] == 0


def test_a_report_of_a_file_is_told_where_reports_are(memfit, tmp_path):
    (tmp_path / "model.gguf").write_text("")
    code, _, err = memfit("report", str(tmp_path / "model.gguf"))
    assert code == 2 and "is a file, and reports are in directories" in err


def test_a_model_of_which_all_would_stay_is_refused(memfit, model):
    for words in (("--channels", "100%"), ("--heads", "99%")):
        code, out, err = memfit("fit", model, *SMALL, *words, "--dry-run", "-q")
        assert code == 2 and not out and f"{' '.join(words)}: to the nearest" in " ".join(err.split())


@pytest.mark.parametrize(("allow", "told"), [
    ("quantize,lowrank", "'lowrank' is no technique for weights; known: quantize, prune, low-rank, share."),
    ("narrow", "Narrowing goes by --blocks, --heads, --channels, --experts."),
    ("", "'' is no technique"),
])  # fmt: skip
def test_a_technique_that_is_none_is_told_with_those_that_are(memfit, model, allow, told):
    for command in ("fit", "plan"):
        code, out, err = memfit(command, model, "--allow", allow)
        assert code == 2 and not out and told in " ".join(err.split())


def test_a_rank_that_nothing_has_is_told_with_the_largest(memfit, model):
    code, out, err = memfit("fit", model, *SMALL, "--technique", "low-rank", "--rank", "9999", "--dry-run", "-q")
    assert code == 2 and not out and "has no rank 9999, at most " in " ".join(err.split())


def test_a_share_of_the_bytes_is_written_either_way(memfit, model):
    words = ("--technique", "low-rank", "--dry-run", "--json", "-q", "--rank")
    plans = [json.loads(memfit("fit", model, *SMALL, *words, share)[1])["choices"] for share in ("80%", "0.8")]
    assert plans[0] == plans[1] and any(choice["scheme"] for choice in plans[0])
    for wrong in ("0", "1.5", "0.0", "100%", "much"):
        code, out, err = memfit("fit", model, *SMALL, *words, wrong)
        assert code == 2 and f"--rank '{wrong}': write a number from 1" in json.loads(out)["message"], err


def test_factors_larger_than_their_weights_are_not_taken(memfit, model):
    """Of 128 x 256 those of rank 100 would be; of the head's 512 x 128 they are a little smaller."""
    words = ("--technique", "low-rank", "--rank", "100", "--keep", "embeddings", "--dry-run", "-q", "--json")
    code, out, err = memfit("fit", model, *SMALL, *words)
    stored = {choice["name"] for choice in json.loads(out)["choices"] if choice["scheme"]}
    assert code == 0 and stored == {"lm_head"}, err
    code, out, err = memfit("fit", model, *SMALL, *words, "--keep", "lm_head", "--keep", "self_attn")
    assert code == 2 and "would be 150.00 KiB in place of 128.00 KiB" in json.loads(out)["message"], out


def test_a_sparsity_that_keeps_nothing_is_told_with_the_reason(memfit, model):
    words = ("--technique", "prune", "--sparsity", "0.9999", "--keep", "embeddings", "--dry-run", "-q")
    code, out, err = memfit("fit", model, *SMALL, *words)
    assert code == 2 and not out and "keeps none" in " ".join(err.split())


def test_a_student_is_not_made_for_data_that_cannot_be_read(memfit, model, tmp_path):
    words = ("--channels", "50%", "--distil", tmp_path / "none.txt", "--steps", "2", "--out", tmp_path / "out", "-q")
    code, out, err = memfit("fit", model, *SMALL, *words)
    assert code == 2 and not out and "none.txt" in err
    assert not any(tmp_path.iterdir())


def test_a_sparsity_may_be_a_share_in_percent(memfit, model):
    words = ("--technique", "prune", "--sparsity", "50%", "--dry-run", "--json", "-q")
    code, out, err = memfit("fit", model, *SMALL, *words)
    assert code == 0, err
    assert {choice["scheme"]["sparsity"] for choice in json.loads(out)["choices"] if choice["scheme"]} == {0.5}


def test_one_kind_of_values_for_everything(memfit, model):
    words = (
        "--technique", "quantize", "--values", "codebook", "--bits", "3", "--vector", "4", "--dry-run", "--json", "-q"
    )  # fmt: skip
    code, out, err = memfit("fit", model, *SMALL, *words)
    assert code == 0, err
    schemes = [choice["scheme"] for choice in json.loads(out)["choices"] if choice["scheme"]]
    assert schemes and all(
        scheme == {"bits": 3, "group": None, "symmetric": True, "values": "codebook", "vector": 2} for scheme in schemes
    )


def test_broken_input_exits_with_4(memfit, tmp_path):
    bad = tmp_path / "bad"
    hf.LlamaConfig(**DECODER).save_pretrained(bad)
    (bad / "pytorch_model.bin").write_bytes(b"pickle")
    code, out, err = memfit("account", str(bad), "--json")
    assert code == 4 and err.startswith("BrokenInput") and "pytorch_model.bin" in err
    assert json.loads(out)["error"] == "BrokenInput"


def test_an_interrupt_exits_with_75(memfit, model, monkeypatch):
    def stop(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("memfit.account", stop)
    code, out, err = memfit("account", model)
    assert code == 75 and not out and err.strip() == "Interrupted; no half-written output is left."


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["fit", "demo", "-o", "out"], "stays in a hidden directory beside it, .NAME.memfit-work"),
        (["fit", "demo", "--format=gguf:q4_k_m"], "A GGUF file is begun anew."),
        (["train", "demo", "--data", "a.txt"], "from its last checkpoint with --resume"),
    ],
)
def test_an_interrupt_says_how_its_own_command_goes_on(words, told):
    from memfit.cli.app import _goes_on

    assert told in _goes_on(words)
    others = ("memfit-work", "GGUF", "checkpoint")
    assert sum(other in _goes_on(words) for other in others) == 1


@pytest.mark.parametrize(("name", "code"), [("OverBudget", 6), ("QualityMissed", 5)])
def test_a_missed_promise_has_its_own_code_and_the_output_is_kept(memfit, model, monkeypatch, name, code):
    import memfit.errors as errors

    def miss(*args, **more):
        raise getattr(errors, name)("missed it")

    monkeypatch.setattr("memfit.fit", miss)
    found, out, err = memfit("fit", model, "--json")
    assert found == code and f"{name}: missed it" in err
    assert json.loads(out) == {"error": name, "message": "missed it", "kept": True}


def test_a_dry_run_writes_nothing_and_prints_the_plan(memfit, model, tmp_path):
    code, out, _ = memfit("fit", model, "-b", "80%", "-o", "out", *SMALL, *FEW, "--dry-run", "--json")
    assert code == 0 and json.loads(out)["fits"] is True
    assert not any(tmp_path.iterdir())


def test_full_and_adapters_exclude_each_other(memfit, model):
    for words in (("plan", model, "-b", "60%", "--task", "train"), ("train", model, "--data", "text.txt")):
        code, out, err = memfit(*words, "--full", "--adapters")
        assert code == 2 and "--full and --adapters exclude each other" in err and not out


def test_a_plan_to_train_is_not_one_to_fit(memfit, model, tmp_path):
    words = ("-b", "90%", "--task", "train", "--batch", "2", "--sequence", "16", "-o", "plan.json")
    assert memfit("plan", model, *words)[0] == 0
    code, _, err = memfit("fit", model, "--plan", "plan.json", "-o", "out")
    assert code == 4 and "one to train: give it to `memfit train --plan`" in " ".join(err.split())
    assert memfit("plan", model, "-b", "60%", "-o", "run.json")[0] == 0
    code, _, err = memfit("train", model, "--data", "text.txt", "--plan", "run.json")
    assert code == 4 and "this is a plan to run a model" in " ".join(err.split())


@pytest.mark.parametrize("option", [("--batch", "4"), ("--budget", "1GiB"), ("--full",), ("--lr", "1e-3")])
def test_what_contradicts_a_training_plan_is_refused(memfit, option):
    code, out, err = memfit("train", "model", "--data", "text.txt", "--plan", "plan.json", *option)
    assert code == 2
    assert f"{option[0]} beside --plan" in err
    assert not out


def test_every_option_that_has_a_panel_is_an_option_and_few_have_none():
    from typer.main import get_command

    from memfit.cli.app import app
    from memfit.cli.panels import _PANELS

    commands = get_command(app).commands
    names = {parameter.name for command in commands.values() for parameter in command.params}
    told = [name for panel in _PANELS.values() for name in panel]
    assert len(told) == len(set(told))
    assert sorted(set(told) - names) == []
    for command in commands.values():
        alone = [p.name for p in command.params if getattr(p, "rich_help_panel", None) is None and p.name != "help"]
        assert len(alone) <= 9, (command.name, alone)


@pytest.mark.parametrize(
    "words", [("--prompt", "16", "--new-tokens", "4"), ("--task", "train", "--batch", "2", "--sequence", "16")]
)
def test_an_account_is_measured_where_that_is_asked_for(memfit, model, words):
    code, out, _ = memfit("account", model, *words, "--measure", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["measured"]["phases"] == pytest.approx(told["phases"], abs=64)
    assert told["measured"]["resident_nbytes"] > told["peak_nbytes"]
    code, out, _ = memfit("account", model, *words, "--measure")
    assert code == 0
    assert "measured" in out and "exact" in out


@pytest.mark.parametrize("quiet", [False, True])
def test_measuring_the_machine_tells_how_far_it_is_and_is_remembered(memfit, model, tmp_path, monkeypatch, quiet):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("memfit.outside.run_job", lambda job: {"nbytes": 1 << 20})
    monkeypatch.setattr("memfit.outside._runtime_nbytes", lambda *given: 300 << 20)
    words = ("account", model, "--prompt", "16", "--new-tokens", "2", "--json")
    code, out, err = memfit(*words, "--resident", *(["--quiet"] if quiet else []))
    told = json.loads(out)
    assert code == 0 and told["resident_nbytes"] > told["peak_nbytes"] + (300 << 20)
    lines = [line for line in err.splitlines() if "measuring this machine, once" in line]
    assert len(lines) == (0 if quiet else 43)
    assert quiet or ("1 of 43 runs" in lines[0] and "43 of 43 runs" in lines[-1])
    code, out, err = memfit(*words)
    assert code == 0 and not err and json.loads(out) == told


@pytest.mark.parametrize(
    "words", [("account", "--device", "cuda", "--measure"), ("train", "--data", "x.txt", "--device", "cuda")]
)
def test_cuda_is_asked_for_where_there_is_none(memfit, model, words, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = memfit(words[0], model, *words[1:])
    assert code == 2
    assert "no CUDA device is here" in err
