"""The output of a pretraining run: its plan, and a table of losses."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from transformers import SchedulerType

from ..hub.results import HeldOutLoss
from ..mixture.builtin.corpus import BUILTIN_SOURCES
from ..mixture.config import BUILTIN_PREFIX, SourceConfig
from ..mixture.loading import Mixture
from ..mixture.plan import PlanRow
from ..mixture.plan_tables import plan_table, stage_table
from ..terminal import format_bytes, format_number, new_table
from ..trainer.checks import ONE_INNER_STEP
from .advice import ENDS_EARLY, stable_steps, warnings_of
from .cost import CostEstimate
from .fields import HardwareArguments, PretrainArguments
from .memory import SYMBOLS, MemoryEstimate
from .model import config_of, planned_attention
from .plan import RunPlan

__all__ = ["cost_table", "loss_table", "print_plan", "say"]


def print_plan(arguments: PretrainArguments, plan: RunPlan, console: Console, loaded: Mixture | None = None) -> None:
    """Print a plan as tables, with the sizes and licenses of the mixture if it is loaded."""
    console.print(_two_columns(f"Plan of {arguments.name}", _run_rows(arguments, plan, loaded)))
    if plan.mixture is None:
        names = ", ".join(arguments.mixture.train_sources)
        console.print(f"The plan of the mixture needs the sizes of the sources ({names}): they are not tokenized yet.")
    else:
        sources, ood = arguments.mixture.sources, arguments.mixture.ood_sources
        licenses = {name: loaded.licenses[name] if loaded else _license(source) for name, source in sources.items()}
        sizes = {name: loaded.eval_tokens[name] if loaded else source.known_tokens for name, source in ood.items()}
        console.print(plan_table(plan.mixture, licenses=licenses, ood_tokens=sizes))
        for row in plan.mixture:
            if (part := sources[row.source].loss_on) != "all":
                console.print(f"{row.source}: {_targets(row, part, loaded)}", highlight=False)
        if len(plan.stages) > 1:
            assert plan.steps is not None
            borders = zip(plan.stages, [*plan.stages[1:], plan.steps], strict=True)
            console.print(stage_table(plan.mixture, [f"steps {first:,} to {end:,}" for first, end in borders]))
    console.print(_memory_table(plan.memory))
    symbols = f"\n({SYMBOLS})" if plan.memory.activations else "."
    console.print(f"Activations: {plan.memory.formula}{symbols}", highlight=False)
    # The hardware assumptions are those of an accelerator.
    if arguments.model.accelerators > 0 or (arguments.dry_run and arguments.hardware != HardwareArguments()):
        console.print(cost_table(plan.cost, arguments.hardware, plan.steps))
        console.print(f"Time: {plan.cost.formula}\n(N parameters, W devices)", highlight=False)
        if plan.sync is not None:
            console.print(f"Fastest inner_sync: {plan.sync}", highlight=False)
    for warning in warnings_of(arguments, plan):
        if loaded is None or warning != ONE_INNER_STEP:  # the trainer warns of it too
            console.print(warning, style="yellow")


def _license(source: SourceConfig) -> str | None:
    """The licence of a source that is not loaded."""
    builtin = BUILTIN_SOURCES.get(source.path.removeprefix(BUILTIN_PREFIX))
    return source.license or (builtin.license if builtin and source.path.startswith(BUILTIN_PREFIX) else None)


def _targets(row: PlanRow, part: str, loaded: Mixture | None) -> str:
    """How many of the tokens that are read from a source are trained on."""
    targets = None if loaded is None else loaded.targets.get(row.source)
    if targets is None or row.tokens is None:
        return f"loss on {part} tokens; their share is known once they are tokenized."
    share = targets / row.tokens
    return f"loss on {part} tokens: {share:.1%}, about {round(share * row.train_tokens):,} of {row.train_tokens:,}."


def _two_columns(title: str, rows: Mapping[str, str]) -> Table:
    table = new_table(title, "", "", texts=2)
    table.columns[0].no_wrap = True
    for row in rows.items():
        table.add_row(*row)
    return table


def _run_rows(arguments: PretrainArguments, plan: RunPlan, loaded: Mixture | None) -> dict[str, str]:
    t, m, tp = arguments.training, config_of(arguments), arguments.hardware.tp_size
    unit, groups = ("group", f", in groups of {tp} by tensor parallelism") if tp > 1 else ("device", "")
    origin = f", continued from {arguments.model.path}" if arguments.model.continues else ""
    layers, width = (getattr(m, name, "(not known)") for name in ("num_hidden_layers", "hidden_size"))
    rows = {
        "model": f"{m.model_type}, {layers} layers of width {width}, vocabulary {m.vocab_size}{origin}",
        "parameters": f"{plan.parameters:,}",
        "devices": f"{plan.devices}{groups}",
        "tokens per step": f"{plan.tokens_per_step:,} ({t.per_device_train_batch_size} rows x "
        f"{arguments.mixture.sequence_length} tokens x {t.gradient_accumulation_steps} inner steps on each {unit})",
        "steps": "unknown" if plan.steps is None else f"{plan.steps:,}",
    }
    if plan.tokens is not None:
        rows["tokens"] = f"{plan.tokens:,} ({plan.tokens / plan.parameters:.1f} per parameter)"
    nexus = f"inner_lr {t.inner_lr}" if t.nexus else "off (plain accumulation)"
    copy = plan.checkpoint_copy
    return rows | {
        "learning rate": _schedule(arguments, plan),
        "documents": _documents(arguments, plan, loaded),
        "Nexus": nexus,
        "checkpoint": f"{format_bytes(12 * plan.parameters)}, "
        + (f"written from a copy of {format_bytes(copy)} in host memory" if copy else "training waits for it"),
    }


def _documents(arguments: PretrainArguments, plan: RunPlan, loaded: Mixture | None) -> str:
    bos, why = arguments.mixture.add_bos_token, plan.joined
    if loaded is not None:
        bos = loaded.bos_token_id is not None
    elif bos is None and arguments.model.tokenizer == "train":
        bos = False  # it has none
    ends = "a BOS starts and an EOS ends each" if bos else "an EOS ends each"
    if bos is None:
        ends += ", and a BOS starts it if the tokenizer adds one"
    if why is None:
        return f"{ends}; no attention from one to another ({planned_attention(arguments)}, probed on a tiny model)"
    return f"{ends}; attention reaches across them in a row ({why})"


def _schedule(arguments: PretrainArguments, plan: RunPlan) -> str:
    t = arguments.training
    stable = None if plan.steps is None else stable_steps(t, plan.steps)
    if plan.steps is None or stable is None:
        return f"{t.learning_rate:g}, {SchedulerType(t.lr_scheduler_type).value}"
    warmup = t.get_warmup_steps(plan.steps)
    text = f"{t.learning_rate:g}: {warmup} steps up, {max(0, stable)} stable, {plan.steps - warmup - stable} down"
    return f"{text}\n{ENDS_EARLY}" if stable < 0 else text


def _memory_table(memory: MemoryEstimate) -> Table:
    table = new_table("Memory per device, computed (not measured)", "", "bytes per parameter", "size")
    shared = f" / {memory.shards}" if memory.shards > 1 else ""
    for purpose, size in memory.per_parameter.items():
        table.add_row(purpose, f"{size}{shared}", format_bytes(size * memory.parameters // memory.shards))
    if memory.gathered:
        table.add_row("gathered: embeddings, two layers", "", format_bytes(memory.gathered))
    known = memory.activations > 0
    activations = format_bytes(memory.activations) if known else "not known"
    table.add_row("activations of a micro-batch", "", activations, end_section=True)
    table.add_row("held between steps", "", format_bytes(memory.held))
    table.add_row("peak" if known else "peak without activations", "", format_bytes(memory.total))
    return table


def cost_table(cost: CostEstimate, hardware: HardwareArguments, steps: int | None) -> Table:
    """An estimate as a table, for the whole run if its number of steps is known."""
    assumed = f"--peak_tflops {hardware.peak_tflops:g} --mfu {hardware.mfu:g}"
    rows = {"arithmetic per step": f"{format_number(cost.compute, 3)} s ({assumed})"}
    if cost.devices > 1:
        links = " ".join(f"--{link} {getattr(hardware, link):g}" for link in cost.links)
        sent = f"{format_number(cost.during + cost.after, 3)} s for {format_bytes(cost.sent)} per device ({links})"
        hidden = "with or without overlap with the backward pass" if cost.during else "without overlap"
        rows |= {f"sent per step, {cost.sharding}": sent, "step": f"{_range(cost.best, cost.worst, 's')}, {hidden}"}
    if steps is not None:
        low, high = steps * cost.best, steps * cost.worst
        unit, size = ("days", 86400) if high >= 864 else ("s", 1)
        hours = cost.devices / 3600
        rows["run"] = f"{_range(low / size, high / size, unit)} for {steps:,} step{'s' * (steps != 1)}"
        rows["device hours"] = _range(low * hours, high * hours)
        if (price := hardware.price_per_hour) is not None:
            rows["price"] = f"{_range(low * hours * price, high * hours * price)} (--price_per_hour {price:g})"
    return _two_columns("Time, computed (not measured) from the inputs in brackets", rows)


def _range(low: float, high: float, unit: str = "") -> str:
    """Both numbers with three digits and no exponent, or one if they agree."""
    first, last = (format_number(value, 3) for value in (low, high))
    return f"{first if first == last else f'{first} to {last}'} {unit}".strip()


def say(console: Console, text: str) -> None:
    """Print text as it is, without breaking its lines."""
    console.print(text, highlight=False, soft_wrap=True)


def loss_table(rows: Sequence[HeldOutLoss]) -> Table:
    """First and last losses of a run."""
    table = new_table("Held-out loss (nats per token)", "", "role", "first", "last", "change", texts=2)
    for row in rows:
        first = "-" if row.first_loss is None else f"{row.first_loss:.4f}"
        change = "-" if row.first_loss is None else f"{row.last_loss - row.first_loss:+.4f}"
        table.add_row(row.name, row.role, first, f"{row.last_loss:.4f}", change, end_section=row.role == "macro")
    return table
