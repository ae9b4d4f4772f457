"""Runs one task. Started as a script with settings as JSON on stdin; writes the results to a file."""

import json
import os
import sys
from typing import Any

# Facts about the machine and the current repository. Raw results may be published.
_PRIVATE = ("pretty_env_info", "git_hash", "upper_git_hash")


def main(settings: dict[str, Any]) -> None:
    """
    Run a task and write its `results` to that file. A local task file has a `folder`, the base of its relative paths,
    and `defaults`, whether it needs the tasks of lm-eval. Listing those is slow.
    """
    import torch
    from lm_eval import simple_evaluate  # type: ignore[import-not-found, unused-ignore]
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found, unused-ignore]
    from lm_eval.utils import handle_non_serializable  # type: ignore[import-not-found, unused-ignore]

    folder = settings.get("folder")
    if folder is not None:
        os.chdir(folder)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    shortened = _shorten_answers()
    results = simple_evaluate(
        model="hf",
        model_args=settings["model_args"],
        tasks=[settings["task"]],
        num_fewshot=settings["num_fewshot"],
        batch_size=settings["batch_size"],
        device=settings["device"] or str(accelerator or "cpu"),
        limit=settings["limit"],
        task_manager=TaskManager(include_path=folder, include_defaults=settings.get("defaults", True)),
        confirm_run_unsafe_code=settings["allow_code_execution"],
        log_samples=False,
    )
    assert results is not None, "one process is rank 0"
    kept: dict[str, Any] = {name: value for name, value in results.items() if name not in _PRIVATE}
    kept |= shortened
    kept["config"].pop("model_args")  # has local paths, as has `config_source`
    for config in kept["configs"].values():
        (config.get("metadata") or {}).pop("config_source", None)
    with open(settings["results"], "w", encoding="utf-8") as file:
        json.dump(kept, file, indent=1, ensure_ascii=False, default=handle_non_serializable)


def _shorten_answers() -> dict[str, int]:
    """
    Let answers take half of a context that is too short for those of a task. lm-eval refuses such a task.

    Returns a dictionary with the `answer_tokens` that were allowed, which is filled when a task is shortened.
    """
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found, unused-ignore]

    shortened: dict[str, int] = {}
    generate_until = HFLM.generate_until

    def within_context(self: Any, requests: list[Any], **options: Any) -> list[str]:
        for request in requests:
            prompt, generation = request.args
            if self.backend == "causal" and generation.get("max_gen_toks", self.max_gen_toks) >= self.max_length:
                shortened["answer_tokens"] = self.max_length // 2
                request.arguments = (prompt, {**generation, "max_gen_toks": shortened["answer_tokens"]})
        return generate_until(self, requests, **options)

    HFLM.generate_until = within_context
    return shortened


if __name__ == "__main__":
    main(json.load(sys.stdin))
