# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-nexus"]
#
# [tool.uv.sources]
# hf-nexus = { path = "..", editable = true }
# ///
"""
Train with the Nexus update in a plain `accelerate` loop, without Trainer.

The model is a tiny Llama, and the data are three sources of the built-in corpus, which needs no download. The script
prints the held-out loss of each source before and after training. It takes half a minute on one CPU core:

    python recipes/plain_accelerate.py
    accelerate launch recipes/plain_accelerate.py --steps 100 --inner_lr 0.1
    torchrun --nproc_per_node 2 recipes/plain_accelerate.py

Each process adds its own rows to every micro-batch. For weights that FSDP2 shards, `Nexus` needs a `norm`: see
docs/distributed_sharded.md.
"""

import argparse
import os

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import LlamaConfig, LlamaForCausalLM

from hf_nexus import Nexus
from hf_nexus.mixture import SourceSchedule
from hf_nexus.mixture.builtin.corpus import builtin_documents
from hf_nexus.mixture.builtin.tokenizer import train_tokenizer

WEIGHTS = {"code": 0.5, "mathematics": 0.25, "reasoning": 0.25}  # mixture weights
INNER_STEPS, ROWS, LENGTH = (
    4,
    4,
    128,
)  # per outer step and process: 4 micro-batches of (4, 128) tokens


def main(steps: int, inner_lr: float) -> None:
    # On a CPU, `cpu=True` makes the processes of torchrun work together. On an Apple GPU, they cannot.
    device = torch.accelerator.current_accelerator(check_available=True)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    accelerator = Accelerator(cpu=device is None or (several and device.type == "mps"))
    set_seed(0)  # the same initial weights on every process

    texts = {name: builtin_documents(name)[:300] for name in WEIGHTS}
    tokenizer = train_tokenizer([text for documents in texts.values() for text in documents], vocab_size=1024)

    def pack(documents: list[str]) -> torch.Tensor:  # (rows, LENGTH)
        ids = [i for tokens in tokenizer(documents)["input_ids"] for i in [*tokens, tokenizer.eos_token_id]]
        return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)

    train = {name: pack(documents[10:]) for name, documents in texts.items()}
    held_out = {name: pack(documents[:10])[:32].to(accelerator.device) for name, documents in texts.items()}

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=4e-3))
    nexus = Nexus(model.parameters(), inner_lr=inner_lr)
    schedule = SourceSchedule(WEIGHTS, kind="stratified")  # the same source on every process at each inner step
    generator = torch.Generator().manual_seed(accelerator.process_index)  # different rows on every process

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        unwrapped = accelerator.unwrap_model(model)
        return {name: unwrapped(input_ids=rows, labels=rows).loss.item() for name, rows in held_out.items()}

    before = evaluate()
    for step in range(steps):
        with nexus.window():
            for source in schedule.sources(step * INNER_STEPS, (step + 1) * INNER_STEPS):
                rows = train[schedule.names[source]]
                batch = rows[torch.randint(len(rows), (ROWS,), generator=generator)].to(accelerator.device)
                accelerator.backward(model(input_ids=batch, labels=batch).loss)
                nexus.inner_step()
        # The weights are restored, and `.grad` holds the pseudo-gradient.
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 9:
            accelerator.print(f"step {step + 1}: path cosine {nexus.path_cosine:.3f}")
    for name, loss in evaluate().items():
        accelerator.print(f"{name}: loss {before[name]:.3f} -> {loss:.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="outer steps (default: %(default)s)")
    parser.add_argument("--inner_lr", type=float, default=0.05, help="inner learning rate (default: %(default)s)")
    main(**vars(parser.parse_args()))
