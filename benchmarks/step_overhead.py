"""
What the Nexus update costs per outer step, beside plain gradient accumulation and beside other uses of the same
micro-batches.

    python benchmarks/step_overhead.py                                            # 8 minutes on two CPU cores
    python benchmarks/step_overhead.py --models 15M --tokens 2048 --k 8 --repeats 20
    python benchmarks/step_overhead.py --models 1M --groups ddp fsdp2             # starts two ranks by itself

Time. Every arm is a real `train()` on the same micro-batches: the stock `Trainer` for plain accumulation, subclasses
of it for the peers, else `NexusTrainer`. A round is one outer step of each arm in random order, and ratios are taken
within a round, so that a drifting machine cancels. An outer step is everything from one `on_step_end` to the next:
data, k forward and backward passes, clipping, AdamW, counting. On a CPU the ratio is also given in CPU time, which
other processes disturb less. `extra` is the difference to plain accumulation. It hardly depends on the number of
tokens, and is measured best where little else happens: hence the 16 tokens, and the control arms there. SAM runs
2k passes; UPGrad holds the gradients of all k micro-batches at once.

Ranks. The DDP and FSDP2 arms run on two ranks, against plain accumulation in the same launch: on two GPUs if there
are, else on CPU processes with one thread each. Accelerate shards on accelerators only; on CPU it is told that it has
some, as in the tests, and FSDP2 shards, gathers and reduces over gloo. Time and memory are the first rank's. Of CPU
processes `held` is what the live tensors hold, and `peak` is not known: gloo releases memory where nothing counts it.

Memory. Each arm runs alone for two outer steps. Counted is every byte that torch allocates from before the model is
built: on CUDA by the allocator's statistics, on a CPU from each allocation and release in the profiler's trace. `held`
is what lives between outer steps (parameters, optimizer state, snapshot), `peak` the most that ever lived at once
(gradients and activations as well); both as differences to plain accumulation in bytes per trainable parameter.

On a GPU there are 130M and 3B shapes, and MFU: 6 FLOP per parameter and token, attention not counted.
"""

import argparse
import os
import platform
import re
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from arms import ARMS, CUDA, GROUPS, LENGTH, MODELS, Case
from measuring import RANKS, Measured, measure, ranks_on_gpu
from rich import box
from rich.console import Console
from rich.table import Table

from hf_nexus.trainer.meter import peak_flops

# Model, tokens per micro-batch, groups of arms measured together.
Plan = list[tuple[str, int, list[str]]]
CPU_PLAN: Plan = [
    ("1M", 16, ["nexus", "controls"]),
    ("15M", 16, ["nexus", "controls"]),
    ("15M", 512, ["nexus", "peers"]),
    ("15M", 2048, ["nexus"]),
    ("1M", 512, ["lora"]),
    ("15M", 512, ["ddp"]),
    ("15M", 512, ["fsdp2"]),
]
GPU_PLAN: Plan = [
    ("130M", 2048, ["nexus", "controls"]),
    ("130M", 8192, ["nexus", "peers"]),
    ("130M", 8192, ["lora"]),
    ("130M", 8192, ["offload"]),
    # Two copies with their optimizers fill a GPU of 141 GB.
    ("3B", 4096, ["nexus"]),
    ("3B", 4096, ["offload"]),
    *[("130M", 8192, [group]) if ranks_on_gpu() else ("1M", 512, [group]) for group in ("ddp", "fsdp2")],
]


def installed_arms(groups: list[str]) -> list[str]:
    """The arms of the groups, each once, without those whose package is missing."""
    arms = list(dict.fromkeys(arm for group in groups for arm in GROUPS[group]))
    missing = {arm for arm in arms if any(not find_spec(package) for package in ARMS[arm].needs)}
    for arm in missing:
        print(f"{arm}: left out; pip install {' '.join(ARMS[arm].needs)}", file=sys.stderr)
    return [arm for arm in arms if arm not in missing]


def choose_plan(models: list[str] | None, tokens: list[int] | None, groups: list[str] | None) -> Plan:
    """The whole table, or what was asked for."""
    if not (models or tokens or groups):
        return GPU_PLAN if CUDA else CPU_PLAN
    together: dict[str, list[str]] = {}  # by what they are compared with
    for group in groups or ["nexus"]:
        together.setdefault(GROUPS[group][0], []).append(group)
    return [(m, t, joined) for m in models or ["1M"] for t in tokens or [512] for joined in together.values()]


# ---- The table ----


def columns() -> list[str]:
    ratios = ["time / plain"] if CUDA else ["time / plain", "CPU time / plain"]
    speed = ["tokens/s", "peak, GiB"] + (["MFU"] if CUDA else [])
    head = ["parameters", "tokens", "arm", "outer step", "extra"]
    return [*head, *ratios, "held, B/param", "peak, B/param", *speed, "rounds"]


def add_rows(table: Table, case: Case, arms: list[str], measured: Measured) -> None:
    """One row for each arm."""
    rounds, memory = measured.rounds, measured.memory
    clocks = range(1 if CUDA else 2)
    for arm in arms:
        spec, (parameters, trained) = ARMS[arm], case.parameters(arm)
        where = f", {RANKS} {'GPUs' if ranks_on_gpu() else 'CPU processes'}" if spec.launch else ""
        typical = statistics.median(times[arm][0] for times in rounds)
        row = [f"{parameters / 1e6:.1f}M", str(case.tokens), arm + where, f"{typical * 1e3:,.0f} ms"]
        if arm == spec.against:
            row += ["", *["1"] * len(clocks), "", ""]
        else:
            extra = statistics.median(times[arm][0] - times[spec.against][0] for times in rounds)
            ratios = [quartiles([times[arm][i] / times[spec.against][i] for times in rounds]) for i in clocks]
            pairs = zip(memory[arm], memory[spec.against], strict=True)
            more = ["" if a is None or b is None else f"{(a - b) / trained:+.3f}" for a, b in pairs]
            row += [f"{extra * 1e3:+,.0f} ms", *ratios, *more]
        speed = case.k * case.tokens / typical  # of one rank
        peak = peak_flops(torch.device("cuda" if CUDA else "cpu"))
        mfu = [f"{6 * parameters * speed / peak:.1%}" if peak and not where else ""] if CUDA else []
        speed *= RANKS if spec.launch else 1
        most = memory[arm][1]
        table.add_row(*row, f"{speed:,.0f}", f"{most / 2**30:.2f}" if most else "", *mfu, str(len(rounds)))


def quartiles(values: list[float]) -> str:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return f"{median:.3f} ({low:.3f} to {high:.3f})"


def describe_machine(threads: int) -> str:
    if CUDA:
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16 autocast over fp32 weights"
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return (
        f"{(names or [platform.processor()])[0]}, {threads} of {os.cpu_count()} cores, torch {torch.__version__}, fp32"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="instead of the whole table")
    parser.add_argument("--tokens", nargs="+", type=int, help="per micro-batch and rank, instead of the whole table")
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), help="arms, instead of the whole table")
    parser.add_argument("--k", type=int, default=4, help="micro-batches per outer step (default: %(default)s)")
    parser.add_argument("--repeats", type=int, help="rounds of each case, instead of --minutes")
    parser.add_argument("--minutes", type=float, default=4, help="for all timed rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: %(default)s)")
    options = parser.parse_args()
    plan = choose_plan(options.models, options.tokens, options.groups)
    wrong = [tokens for _, tokens, _ in plan if tokens < 2 or (tokens > LENGTH and tokens % LENGTH)]
    if wrong:
        parser.error(f"--tokens {wrong}: use 2 to {LENGTH} (one row), or a multiple of {LENGTH}")
    torch.set_num_threads(options.threads)

    work = [(Case(model, tokens, options.k), installed_arms(groups)) for model, tokens, groups in plan]
    # A longer round gets more time, though not in proportion.
    shares = [len(arms) * (MODELS[case.model]["hidden_size"] ** 2 * case.tokens) ** 0.5 for case, arms in work]
    table = Table(*columns(), box=box.MARKDOWN)
    try:
        for (case, arms), share in zip(work, shares, strict=True):
            if arms != [ARMS[arm].against for arm in arms]:  # something is left to compare
                print(f"{case.model}, {case.tokens} tokens per micro-batch: {'; '.join(arms)} ...", file=sys.stderr)
                limit = 60 * options.minutes * share / sum(shares)
                add_rows(table, case, arms, measure(case, arms, options.repeats, limit, options.threads))
    finally:  # an interrupt leaves the rows there are
        print(f"{describe_machine(options.threads)}; k = {options.k}; median (quartiles) of paired ratios")
        if not CUDA:
            print("snapshot_device='cpu' needs a GPU: on a CPU the snapshot is there anyway.")
        Console(width=250).print(table)


if __name__ == "__main__":
    main()
