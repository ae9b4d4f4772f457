"""
Time and memory of an outer step of Nexus, against plain gradient accumulation and other updates.

    python benchmarks/step_overhead.py                                            # 8 minutes on two CPU cores
    python benchmarks/step_overhead.py --models 15M --tokens 2048 --k 8 --repeats 20
    python benchmarks/step_overhead.py --models 1M --groups ddp fsdp2             # starts two ranks

Time. Each arm is a real `train()` on the same micro-batches: the stock `Trainer` for plain accumulation, subclasses of
it for the peers, and `NexusTrainer` otherwise. A round is one outer step of each arm in random order. Ratios are taken
within a round, which cancels a drift of the machine. An outer step lasts from one `on_step_end` to the next: data, k
forward and backward passes, clipping, AdamW, counting. On a CPU the ratio is also given in CPU time, which other
processes disturb less. `extra` is the difference to plain accumulation. It hardly depends on the number of tokens, and
is measured best with few tokens: hence the cases with 16. SAM takes 2k passes. UPGrad holds the gradients of all k
micro-batches at once.

Ranks. The DDP and FSDP2 arms run on two ranks and are compared with plain accumulation in the same launch. The ranks
use two GPUs, or else two CPU processes with one thread each, where FSDP2 shards, gathers and reduces over gloo. Time
and memory are those of the first rank. On CPU ranks `held` counts the live tensors, and `peak` is unknown.

Memory. Each arm runs alone for two outer steps. The allocator's statistics on CUDA, or the profiler's trace on a CPU,
count every byte that torch allocates, starting before the model is built. `held` is the memory between outer steps
(parameters, optimizer state, snapshot). `peak` includes gradients and activations. Both are differences to plain
accumulation, in bytes per trainable parameter.

A GPU also runs models of 130M and 3B parameters, and reports MFU: 6 FLOP per parameter and token, without attention.
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
from measuring import RANKS, Measurement, measure, on_gpu
from quartiles import quartiles
from rich import box
from rich.console import Console
from rich.table import Table

from hf_nexus.trainer.meter import peak_flops

# Model, tokens per micro-batch, groups of arms that are measured together.
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
    # Two models with their optimizers fill a GPU of 141 GB.
    ("3B", 4096, ["nexus"]),
    ("3B", 4096, ["offload"]),
    *[("130M", 8192, [group]) if on_gpu(RANKS) else ("1M", 512, [group]) for group in ("ddp", "fsdp2")],
]


def installed_arms(groups: list[str]) -> list[str]:
    """The arms of the groups, without duplicates and without arms whose package is missing."""
    arms = list(dict.fromkeys(arm for group in groups for arm in GROUPS[group]))
    missing = {arm for arm in arms if any(not find_spec(package) for package in ARMS[arm].needs)}
    for arm in missing:
        print(f"{arm} is skipped; pip install {' '.join(ARMS[arm].needs)} to include it.", file=sys.stderr)
    return [arm for arm in arms if arm not in missing]


def choose_plan(models: list[str] | None, tokens: list[int] | None, groups: list[str] | None) -> Plan:
    """The whole table, or the given cases."""
    if not (models or tokens or groups):
        return GPU_PLAN if CUDA else CPU_PLAN
    by_baseline: dict[str, list[str]] = {}
    for group in groups or ["nexus"]:
        by_baseline.setdefault(GROUPS[group][0], []).append(group)
    return [(m, t, together) for m in models or ["1M"] for t in tokens or [512] for together in by_baseline.values()]


# ---- The table ----


def columns() -> list[str]:
    ratios = ["time / plain"] if CUDA else ["time / plain", "CPU time / plain"]
    speed = ["tokens/s", "peak, GiB"] + (["MFU"] if CUDA else [])
    head = ["parameters", "tokens", "arm", "outer step", "extra"]
    return [*head, *ratios, "held, B/param", "peak, B/param", *speed, "rounds"]


def add_rows(table: Table, case: Case, arms: list[str], measurement: Measurement) -> None:
    """Add a row for each arm."""
    rounds, memory = measurement.rounds, measurement.memory
    clocks = range(1 if CUDA else 2)
    for arm in arms:
        spec, (parameters, trained) = ARMS[arm], case.parameters(arm)
        where = f", {RANKS} {'GPUs' if on_gpu(RANKS) else 'CPU processes'}" if spec.launch else ""
        typical = statistics.median(times[arm][0] for times in rounds)
        row = [f"{parameters / 1e6:.1f}M", str(case.tokens), arm + where, f"{typical * 1e3:,.0f} ms"]
        if arm == spec.baseline:
            row += ["", *["1"] * len(clocks), "", ""]
        else:
            extra = statistics.median(times[arm][0] - times[spec.baseline][0] for times in rounds)
            ratios = [quartiles([times[arm][i] / times[spec.baseline][i] for times in rounds]) for i in clocks]
            pairs = zip(memory[arm], memory[spec.baseline], strict=True)
            bytes_each = ["" if a is None or b is None else f"{(a - b) / trained:+.3f}" for a, b in pairs]
            row += [f"{extra * 1e3:+,.0f} ms", *ratios, *bytes_each]
        speed = case.k * case.tokens / typical  # of one rank
        mfu = ["" if where else utilization(parameters, speed)] if CUDA else []
        speed *= RANKS if spec.launch else 1
        peak_bytes = memory[arm][1]
        gib = f"{peak_bytes / 2**30:.2f}" if peak_bytes else ""
        table.add_row(*row, f"{speed:,.0f}", gib, *mfu, str(len(rounds)))


def utilization(parameters: int, tokens_per_second: float) -> str:
    """MFU of one GPU, if its peak is known: 6 FLOP per parameter and token, without attention."""
    flops = peak_flops(torch.device("cuda" if CUDA else "cpu"))
    return f"{6 * parameters * tokens_per_second / flops:.1%}" if flops else ""


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
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="models (default: the whole table)")
    parser.add_argument("--tokens", nargs="+", type=int, help="tokens per micro-batch and rank")
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), help="groups of arms")
    parser.add_argument("--k", type=int, default=4, help="micro-batches per outer step (default: %(default)s)")
    parser.add_argument("--repeats", type=int, help="rounds per case (default: as many as fit into --minutes)")
    parser.add_argument("--minutes", type=float, default=4, help="time limit of all rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    options = parser.parse_args()
    plan = choose_plan(options.models, options.tokens, options.groups)
    for _, tokens, _ in plan:
        if tokens < 2 or (tokens > LENGTH and tokens % LENGTH):
            parser.error(f"--tokens {tokens} is not allowed; use 2 to {LENGTH} (one row) or a multiple of {LENGTH}")
    torch.set_num_threads(options.threads)

    work = [(Case(model, tokens, options.k), installed_arms(groups)) for model, tokens, groups in plan]
    # Cases with longer rounds get more time, but not in proportion.
    times = [len(arms) * (MODELS[case.model]["hidden_size"] ** 2 * case.tokens) ** 0.5 for case, arms in work]
    table = Table(*columns(), box=box.MARKDOWN)
    try:
        for (case, arms), time in zip(work, times, strict=True):
            if arms != [ARMS[arm].baseline for arm in arms]:  # not only baselines
                print(f"{case.model}, {case.tokens} tokens per micro-batch: {'; '.join(arms)} ...", file=sys.stderr)
                limit = 60 * options.minutes * time / sum(times)
                add_rows(table, case, arms, measure(case, arms, options.repeats, limit, options.threads))
    finally:  # print the finished rows after an interrupt
        print(f"{describe_machine(options.threads)}; k = {options.k}; median (quartiles) of paired ratios")
        if not CUDA:
            print("The arm snapshot_device='cpu' needs a GPU.")
        Console(width=250).print(table)


if __name__ == "__main__":
    main()
