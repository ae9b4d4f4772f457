"""
Time of an outer step on two machines with a slow network between them, for each `inner_sync`.

    sudo python benchmarks/slow_network.py                      # 400 Mbit/s, 15M parameters, 5 minutes
    sudo python benchmarks/slow_network.py --mbit 1000 --k 8

The machines are two network namespaces of this one, with two ranks each. `tc` limits the rate at which they send to
each other. Ranks of one machine talk to each other without a limit. The arms take turns in one launch, one outer step
each, so their ratios are paired. Few tokens per micro-batch leave the time to the reductions. It needs Linux, root and
the commands `ip` and `tc`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch.distributed as dist
from arms import GROUPS, MODELS, Case
from quartiles import quartiles
from rich import box
from rich.console import Console
from rich.table import Table
from timing import measure_time

MACHINES = {"nexus-a": "10.77.0.1", "nexus-b": "10.77.0.2"}
ARMS = GROUPS["machines"]
RANKS = 2  # per machine


def build_network(mbit: float) -> None:
    """Two namespaces, joined by a pair of limited interfaces that are named like them."""
    for machine in MACHINES:
        _run(f"ip netns add {machine}")
        _run(f"ip -n {machine} link set lo up")
    first, second = MACHINES
    _run(f"ip link add {first} netns {first} type veth peer name {second} netns {second}")
    for machine, address in MACHINES.items():
        _run(f"ip -n {machine} addr add {address}/24 dev {machine}")
        _run(f"ip -n {machine} link set {machine} up")
        _run(f"tc -n {machine} qdisc add dev {machine} root tbf rate {mbit}mbit burst 256kb latency 100ms")


def remove_network() -> None:
    for machine in MACHINES:
        subprocess.run(["ip", "netns", "del", machine], capture_output=True, check=False)


def _run(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command}: {done.stderr.strip()}. The benchmark needs root, ip and tc.")


def launch(request: dict, out: Path) -> list[dict]:
    """Start the ranks of both machines, and return the rounds that the first rank measured."""
    children = []
    for number, machine in enumerate(MACHINES):
        torchrun = f"-m torch.distributed.run --nnodes 2 --node_rank {number} --nproc_per_node {RANKS}"
        torchrun += f" --master_addr {next(iter(MACHINES.values()))} --master_port 29577"
        command = ["ip", "netns", "exec", machine, sys.executable, *torchrun.split(), __file__]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": machine}
        command += ["--worker", json.dumps(request), str(out)]
        children.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for child in children:
        error = child.communicate()[1]
        if child.returncode:
            raise SystemExit(f"The ranks failed:\n{error[-4000:]}")
    return json.loads(out.read_text())


def work(request: dict, out: Path) -> None:
    """Measure on this rank."""
    case = Case(request["model"], request["tokens"], request["k"])
    rounds = measure_time(case, ARMS, request["repeats"], limit=0, threads=1)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(rounds))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=float, default=400, help="Mbit/s between the machines (default: %(default)s)")
    parser.add_argument("--model", default="15M", choices=list(MODELS), help="model (default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=16, help="tokens per micro-batch and rank (default: %(default)s)"
    )
    parser.add_argument("--k", type=int, default=4, help="micro-batches per outer step (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default: %(default)s)")
    options = parser.parse_args()
    request = {key: value for key, value in vars(options).items() if key != "mbit"}
    remove_network()
    build_network(options.mbit)
    try:
        with tempfile.TemporaryDirectory() as folder:
            rounds = launch(request, Path(folder, "rounds.json"))
    finally:
        remove_network()
    table = Table("arm", "outer step", "time / plain", "rounds", box=box.MARKDOWN)
    for arm in ARMS:
        typical = statistics.median(times[arm][0] for times in rounds)
        ratio = "1" if arm == ARMS[0] else quartiles([times[arm][0] / times[ARMS[0]][0] for times in rounds])
        table.add_row(arm, f"{typical:,.2f} s", ratio, str(len(rounds)))
    print(f"2 machines x {RANKS} ranks, {options.mbit:g} Mbit/s; {options.model}, {options.tokens} tokens")
    Console(width=120).print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(json.loads(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
