"""Run by torchrun on 2 CPU processes: push to the Hub at HF_ENDPOINT, first without write access."""

import sys
from pathlib import Path
from typing import Any

from tests.support.launcher import report
from tests.support.tiny import Rows
from tests.trainer.distributed.worker import make


def main(out: Path) -> None:
    found: dict[str, Any] = {}
    data = {"text": Rows(40, 0), "code": Rows(32, 1)}
    config: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "push_to_hub": True}
    try:
        make(out / "refused", data, hub_model_id="alice/model", hub_token="hf_unknown", **config)
    except ValueError as error:
        found["refusal"] = str(error)
    trainer = make(out / "run", data, hub_model_id="alice/model", hub_strategy="checkpoint", **config)
    trainer.train()
    trainer.push_to_hub(blocking=False)
    trainer.accelerator.wait_for_everyone()
    found["waiting"] = None if trainer.publisher is None else trainer.publisher.status().waiting
    del trainer
    report(found, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
