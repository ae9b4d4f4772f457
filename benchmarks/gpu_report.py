"""
What only a GPU shows, as Markdown for docs/results_cost.md, in less than ten minutes on one GPU.

    make gpu-report                                  # writes build/gpu_report.md
    make gpu-report ARGS=--tiny                      # on any machine: tiny models that show that the report works
    python benchmarks/gpu_report.py --minutes 20     # more rounds

The rows are those of `step_overhead.py`: outer steps of k = 4 micro-batches by the stock Trainer (plain accumulation)
and by `NexusTrainer`, with bfloat16 autocast over float32 weights. `held` is the memory between outer steps in bytes
per parameter. `planner` is the peak that `hf-nexus` computes for the same run. MFU counts 6 FLOP per parameter and
token.

Each group of arms is measured in another process, whose memory is free afterwards. Arms that fit into the memory
together take turns, and their ratio is paired. Other arms are measured one after the other. What does not fit by the
planner's formula is trained with activation checkpointing, or left out. An arm that runs out of memory is a row that
says so. Rows are written as they are measured, and the report ends with what the time was too short for. FSDP2 runs on
one rank, so its rows show the cost of the wrapper and not of communication. torch's SDPA runs its flash kernel in all
cases. The last table is that of `data_throughput.py`.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from arms import ARMS, CUDA, LENGTH, MODELS, NEXUS, NEXUS_FSDP2, OFFLOAD, PLAIN, Case
from measuring import Measurement, OutOfMemory, measure_apart
from quartiles import quartiles
from step_overhead import describe_machine, utilization

from hf_nexus import NexusTrainer
from hf_nexus.pretrain.layout import layout_of
from hf_nexus.pretrain.memory import MemoryEstimate, estimate_memory
from hf_nexus.pretrain.parsing import parse_arguments

K = 4
GIB = 2**30
SHORTEST = 20.0  # seconds below which nothing new is started
FSDP2 = [ARMS[NEXUS_FSDP2].baseline, NEXUS_FSDP2]
COLUMNS = ["parameters", "tokens", "setting", "arm", "outer step", "time / plain", "held, B/param", "peak, GiB"]
COLUMNS += ["planner, GiB", "tokens/s", "MFU", "rounds"]


@dataclass(frozen=True)
class Part:
    """Arms to compare in one case, and the time limit of their rounds in seconds."""

    case: Case
    arms: list[str]
    seconds: float = 10


_COMPILED = {"torch_compile": True}
# The most important first.
GPU_PARTS = [
    Part(Case("130M", 2048, K), [PLAIN, NEXUS], 15),
    Part(Case("3B", 2048, K), [PLAIN, NEXUS, OFFLOAD]),
    Part(Case("130M", 8192, K), [PLAIN, NEXUS, OFFLOAD], 15),
    Part(Case("3B", 8192, K), [PLAIN, NEXUS], 12),
    Part(Case("130M", 2048, K), FSDP2),
    Part(Case("130M", 2048, K, _COMPILED), [PLAIN, NEXUS]),
    Part(Case("130M", 8192, K, attention="flash_attention_2"), [PLAIN, NEXUS]),
]
TINY_PARTS = [
    Part(Case("1M", 64, K), [PLAIN, NEXUS], 0),
    Part(Case("1M", 512, K), [PLAIN, OFFLOAD], 0),  # fits only alone and with activation checkpointing
    Part(Case("1M", 64, K), FSDP2, 0),
    Part(Case("1M", 64, K, {**_COMPILED, "torch_compile_backend": "eager"}), [PLAIN, NEXUS], 0),
    Part(Case("1M", 64, K, attention="flash_attention_2"), [PLAIN, NEXUS], 0),
]
TINY_MEMORY = 42e6  # bytes, instead of those of a GPU
TINY_DATA = "--rows 2 --length 128 --rounds 1 --seconds 0.05 --megabytes 1"
GPU_DATA = "--rounds 5 --seconds 0.5 --megabytes 10"


# ---- What fits ----


def plan_memory(case: Case, arm: str) -> MemoryEstimate:
    """The planner's estimate for an arm on one device."""
    spec = ARMS[arm]
    flags: dict[str, Any] = {
        "per_device_train_batch_size": case.rows,
        "sequence_length": min(case.tokens, LENGTH),
        "isolate_documents": False,
        "gradient_accumulation_steps": case.k,
        "bf16": CUDA,
        "nexus": issubclass(spec.trainer, NexusTrainer),
        "activation_checkpointing": case.settings.get("activation_checkpointing", False),
        **{name: value for name, value in spec.settings.items() if name == "snapshot_device"},
        **MODELS[case.model],
    }
    argv = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    arguments = parse_arguments(["--config", "demo", "--dry_run", *argv])
    return estimate_memory(arguments, case.parameters(arm)[0], layout_of(arguments, 1))


def needed(case: Case, arms: list[str]) -> int:
    """Bytes at the peak of arms that take turns."""
    plans = [plan_memory(case, arm) for arm in arms]
    return sum(plan.held for plan in plans) + max(plan.total - plan.held for plan in plans)


def arrange(part: Part, memory: float) -> tuple[Case, list[list[str]]]:
    """The case, with activation checkpointing if an arm does not fit without, and its arms in groups that fit."""
    case, arms = part.case, part.arms
    if any(needed(case, [arm]) > memory for arm in arms):
        case = replace(case, settings={**case.settings, "activation_checkpointing": True})
    return case, [arms] if needed(case, arms) <= memory else [[arm] for arm in arms]


# ---- The report ----


class Report:
    """Lines that are printed and written to a file at once."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        self.path = path
        self.failed = False

    def line(self, text: str = "") -> None:
        print(text, flush=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{text}\n")

    def row(self, cells: list[str]) -> None:
        self.line(f"| {' | '.join(cells)} |")


def first_cells(case: Case, arm: str) -> list[str]:
    """What was measured."""
    settings = [
        case.attention,
        *(name for name in ("activation_checkpointing", "torch_compile") if case.settings.get(name)),
    ]
    rank = ", one rank" if ARMS[arm].launch else ""
    parameters = case.parameters(arm)[0]
    return [f"{parameters / 1e6:,.0f}M", f"{case.tokens}", ", ".join(settings).replace("_", " "), arm + rank]


def measured_cells(case: Case, arm: str, measured: dict[str, Measurement]) -> list[str]:
    """Time, memory and speed of an arm, given the measurements of the arms so far."""
    found, parameters = measured[arm], case.parameters(arm)[0]
    typical = median(times[arm][0] for times in found.rounds)
    base, ratio = ARMS[arm].baseline, ""
    if arm == base:
        ratio = "1"
    elif base in found.rounds[0]:
        ratio = quartiles([times[arm][0] / times[base][0] for times in found.rounds])
    elif base in measured:
        ratio = f"{typical / median(times[base][0] for times in measured[base].rounds):.3f}, not paired"
    held, peak = found.memory[arm]
    planned = "" if ARMS[arm].launch else f"{plan_memory(case, arm).total / GIB:.3g}"  # of a whole copy
    speed = case.k * case.tokens / typical
    gib = f"{peak / GIB:.3g}" if peak else ""
    numbers = [f"{typical * 1e3:,.1f} ms", ratio, f"{held / parameters:.2f}", gib, planned, f"{speed:,.0f}"]
    return [*numbers, utilization(parameters, speed), str(len(found.rounds))]


def measure_part(part: Part, report: Report, memory: float, deadline: float) -> None:
    """Measure the arms of a part and write their rows."""
    case, groups = arrange(part, memory)
    measured: dict[str, Measurement] = {}
    while groups:
        arms, problem = groups.pop(0), ""
        left = deadline - time.monotonic()
        if left < SHORTEST:
            problem = "left out: the time is over"
        elif case.attention == "flash_attention_2" and not find_spec("flash_attn"):
            problem = "left out: the package flash-attn is not installed"
        elif needed(case, arms) > memory:
            problem = f"left out: {needed(case, arms) / GIB:.3g} GiB by the planner, {memory / GIB:.3g} GiB allowed"
        else:
            ranks = 1 if ARMS[arms[0]].launch else None
            try:
                found = measure_apart(case, arms, None, part.seconds, ranks=ranks, timeout=left)
            except OutOfMemory:
                if len(arms) > 1:
                    groups = [[arm] for arm in arms] + groups
                    continue
                problem = "out of memory"
            except subprocess.TimeoutExpired:
                problem = "not finished when the time was over"
            except RuntimeError as error:
                print(error, file=sys.stderr, flush=True)
                problem, report.failed = "failed, see the output", True
            else:
                measured |= dict.fromkeys(arms, found)
        for arm in arms:
            cells = [problem] + [""] * (len(COLUMNS) - 5) if problem else measured_cells(case, arm, measured)
            report.row(first_cells(case, arm) + cells)


def report_data(report: Report, flags: str, deadline: float) -> None:
    """Add the table of `data_throughput.py`."""
    left = deadline - time.monotonic()
    if left < SHORTEST:
        report.line("Data loading was left out: the time is over.")
        return
    command = [sys.executable, str(Path(__file__).with_name("data_throughput.py")), *flags.split()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left, check=True)
        report.line("\n".join(line.rstrip() for line in done.stdout.splitlines()))
    except subprocess.TimeoutExpired:
        report.line("Data loading was not finished when the time was over.")
    except subprocess.CalledProcessError as error:
        print(error.stderr[-4000:], file=sys.stderr, flush=True)
        report.line("Data loading failed, see the output.")
        report.failed = True


def main() -> None:
    """Write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny models, also on a CPU")
    parser.add_argument("--minutes", type=float, default=9.5, help="time limit (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("build/gpu_report.md"), help="file (default: %(default)s)")
    options = parser.parse_args()
    if not (CUDA or options.tiny):
        parser.error("no GPU is available; --tiny shows on a CPU that the report works")
    deadline = time.monotonic() + 60 * options.minutes
    # A tenth is left for the context, the kernels and fragmentation.
    memory = TINY_MEMORY if options.tiny else 0.9 * torch.cuda.mem_get_info()[0]
    report = Report(options.output)
    report.line("```bash\nmake gpu-report" + (" ARGS=--tiny" if options.tiny else "") + "\n```\n")
    report.line(f"{describe_machine(1)}; {date.today()}; k = {K}; medians (quartiles of paired ratios)\n")
    report.row(COLUMNS)
    report.row(["---"] * len(COLUMNS))
    for part in TINY_PARTS if options.tiny else GPU_PARTS:
        measure_part(part, report, memory, deadline)
    report.line()
    report_data(report, TINY_DATA if options.tiny else GPU_DATA, deadline)
    sys.exit(report.failed)


if __name__ == "__main__":
    main()
