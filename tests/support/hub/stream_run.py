"""
Trains on a stream from the test Hub, and again when the Hub goes away. Runs in another process, whose clients use the
test Hub from the start. Writes its results to `<out>/found.json`.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.support.hub.server import ALICE, HubServer

REPO = "alice/texts"
FILES = f"/datasets/{REPO}/resolve/.*jsonl"
ROWS = 60
URLS = [("", True), ("", False), ("/*.jsonl", False), ("/0.jsonl", True)]


def upload(hub: HubServer) -> None:
    from datasets import Dataset
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.endpoint, token=ALICE)
    api.create_repo(REPO, repo_type="dataset")
    for shard in range(3):
        lines = [f"{x} the quick fox number {x}" for x in range(shard * ROWS // 3, (shard + 1) * ROWS // 3)]
        path = Path(os.environ["HF_HOME"], f"{shard}.jsonl")
        Dataset.from_dict({"text": lines}).to_json(path)
        api.upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id=REPO, repo_type="dataset")


def be_impatient() -> None:
    """Shorten the waits of the clients, minutes in all, and ours."""
    import datasets
    from huggingface_hub.utils import _http

    from hf_nexus.mixture.stream import reader

    sleep = _http.time.sleep
    _http.time = SimpleNamespace(**{**vars(_http.time), "sleep": lambda seconds: sleep(min(seconds, 0.01))})
    datasets.config.STREAMING_READ_MAX_RETRIES = 2
    datasets.config.STREAMING_READ_RETRY_INTERVAL = 0.01
    reader.wait = lambda failed: 0.01 * 2**failed


def data() -> Any:
    from hf_nexus.mixture import MixtureConfig, load_mixture
    from tests.support.streams import LENGTH
    from tests.support.tiny_tokenizer import tiny_tokenizer

    sources = {"web": {"path": REPO, "streaming": True, "weight": 1, "eval_rows": 2}}
    config = MixtureConfig.from_dict({"sources": sources, "sequence_length": LENGTH, "buffer_size": 10})
    return load_mixture(config, tiny_tokenizer())


def texts(path: str, streaming: bool) -> int:
    """The number of different texts that a path means."""
    from hf_nexus.mixture import SourceConfig
    from hf_nexus.mixture.documents import load_documents

    documents, _ = load_documents("web", SourceConfig(path), "train", streaming=streaming)
    return len({row["text"] for row in documents})


def main(out: Path) -> None:
    with HubServer(out / "hub") as hub:
        os.environ.update(HF_ENDPOINT=hub.endpoint, HF_TOKEN=ALICE, HF_HOME=str(out / "home"), HF_HUB_OFFLINE="0")
        (out / "home").mkdir()
        from hf_nexus.mixture.stream.reader import SourceError
        from tests.support.streams import AtEvents, differences, make, run

        be_impatient()
        upload(hub)
        whole = run(out / "whole", data())
        found: dict[str, Any] = {"files": hub.count("GET", FILES)}
        found["by URL"] = [texts(f"hf://datasets/{REPO}{path}", streaming) for path, streaming in URLS]
        before: list[int] = []
        trainer = make(out / "broken", data(), save_strategy="no")

        def go_away(event: str) -> None:
            if trainer.state.global_step == 1:
                before.append(hub.count("GET", FILES))
                hub.fail("jsonl", status=503, times=10_000)

        trainer.add_callback(AtEvents(go_away, "on_step_end"))
        try:
            trainer.train()
        except SourceError as error:
            found["error"] = str(error)
        found["step"] = trainer.state.global_step
        found["failed"] = hub.count("GET", FILES) - before[0]
        hub.heal()
        found["differences"] = differences(run(out / "broken", data(), resume=True), whole, found["step"])
    (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
