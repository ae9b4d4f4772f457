"""
Render the cards of this folder from their `run_summary.json`, and `pretraining-3b` from its plan:

    python model_cards/render.py

For new numbers, pass the folder of `make demo`. `--lora` fine-tunes its model, which takes a minute or two on a CPU:

    python model_cards/render.py --demo runs/nexus-demo
    python model_cards/render.py --lora runs/nexus-demo
"""

import argparse
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from hf_nexus.hub.card import save_card
from hf_nexus.hub.facts import hub_id, public_path
from hf_nexus.hub.run_summary import MixtureRow, RunSummary
from hf_nexus.mixture.stages import Stage
from hf_nexus.pretrain.model import model_config
from hf_nexus.pretrain.parsing import changed_fields, parse_arguments
from hf_nexus.pretrain.plan import plan_run
from hf_nexus.trainer.card import CARD_FILES
from hf_nexus.trainer.config import nexus_settings

FOLDER = Path(__file__).resolve().parent
# Facts that a trainer cannot know. The built-in corpus is English text and code.
PUBLISHED = {"license": "apache-2.0", "languages": ["en", "code"]}
LORA_MIXTURE = {
    "sequence_length": 256,
    "sources": {
        "logic": {"path": "builtin/logic", "weight": 0.5, "eval_rows": 12, "max_tokens": 200_000},
        "reasoning": {"path": "builtin/reasoning", "weight": 0.5, "eval_rows": 12, "max_tokens": 200_000},
        "mathematics": {"path": "builtin/mathematics", "role": "ood", "max_tokens": 20_000},
        "code": {"path": "builtin/code", "role": "ood", "max_tokens": 20_000},
    },
}


def render() -> None:
    """Render all cards."""
    plan().save(FOLDER / "pretraining-3b")
    for summary in sorted(FOLDER.glob("*/run_summary.json")):
        print(f"rendered {save_card(RunSummary.load(summary.parent), summary.parent)}")


def plan() -> RunSummary:
    """The summary of the configuration `3b`, whose run has not been started."""
    arguments = parse_arguments(["--config", "3b", "--dry_run"])
    plan, sources = plan_run(arguments, arguments.model.accelerators), arguments.mixture.sources
    assert plan.mixture is not None and plan.steps is not None
    rows = [
        MixtureRow(
            source=row.source,
            weight=row.share,
            share=row.train_tokens / sum(row.train_tokens for row in plan.mixture),
            epochs=row.epochs,
            tokens=row.train_tokens,
            license=sources[row.source].license,
            dataset=public_path(sources[row.source].path),
        )
        for row in plan.mixture
    ]
    shares = [{row.source: row.stage_shares[i] for row in plan.mixture} for i in range(len(plan.stages))]
    ends = [end / plan.steps for end in (*plan.stages[1:], plan.steps)]
    return RunSummary(
        model_name=arguments.folder.name,
        model_type=model_config(arguments.model, arguments.mixture.sequence_length).model_type,
        parameters=plan.parameters,
        nexus=nexus_settings(arguments.training),
        planned=True,
        mixture=rows,
        stages=[Stage(*stage) for stage in zip(ends, shares, strict=True)],
        hyperparameters=arguments.resolved["training"],
        changed_hyperparameters=changed_fields(arguments),
        datasets=[row.dataset for row in rows if row.dataset and hub_id(row.dataset)],
        hardware=f"planned for {plan.devices} accelerators",
        **PUBLISHED,
    )


def record(run: Path, name: str) -> None:
    """Copy the summary and the plots of a run."""
    target = FOLDER / name
    target.mkdir(exist_ok=True)
    for file in CARD_FILES:
        if file != "README.md" and (run / file).exists():
            shutil.copyfile(run / file, target / file)
    replace(RunSummary.load(run), **PUBLISHED).save(target)


def finetune(base: Path, folder: Path) -> None:
    """Fine-tune the model in `base` with LoRA."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_nexus import MixtureConfig, NexusConfig, NexusTrainer, load_mixture

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    adapter = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj"])
    trainer = NexusTrainer(
        model=get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter),
        args=NexusConfig(
            output_dir=str(folder),
            per_device_train_batch_size=4,
            per_device_eval_batch_size=16,
            gradient_accumulation_steps=4,
            max_steps=60,
            learning_rate=5e-3,
            lr_scheduler_type="linear",
            # 0.05 at the demo's million parameters, scaled to the size of the adapter.
            inner_lr=0.01,
            gradient_cosine_steps=10,
            logging_steps=5,
            eval_strategy="steps",
            eval_steps=20,
            eval_on_start=True,
            prediction_loss_only=True,
            dataloader_pin_memory=False,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=load_mixture(MixtureConfig.from_dict(LORA_MIXTURE), tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    trainer.write_card(model_name=f"{base.resolve().name}-lora", prompt="If")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, metavar="RUN", help="folder of a demo run, whose numbers are copied")
    parser.add_argument("--lora", type=Path, metavar="RUN", help="folder of a demo run, whose model is fine-tuned")
    arguments = parser.parse_args()
    if arguments.demo is not None:
        record(arguments.demo, "demo")
    if arguments.lora is not None:
        with tempfile.TemporaryDirectory() as folder:
            finetune(arguments.lora, Path(folder))
            record(Path(folder), "lora")
    render()


if __name__ == "__main__":
    main()
