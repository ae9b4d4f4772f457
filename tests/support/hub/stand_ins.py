"""
Stand-ins for the repositories that the large configurations name: card, files, columns and tokenizer settings.

The shapes are those of the public repositories; only the texts and their number differ:

- `HuggingFaceFW/fineweb-edu`: dataset card, sections `configs` and "Data fields"
- `HuggingFaceTB/finemath`: `dataset_info` of its README
- `allenai/olmo-mix-1124`: gzipped JSON lines of the Dolma toolkit; `metadata` differs from row to row
- `nvidia/OpenMathReasoning`: dataset card, splits `cot`, `tir`, `genselect`, `additional_problems`
- `EleutherAI/lambada_openai`: one JSON lines file per language
- `openai/gsm8k`: Parquet of the configs `main` and `socratic`
- `cais/mmlu`: Parquet of a config for each subject
- `HuggingFaceTB/SmolLM2-1.7B`: `tokenizer_config.json`; 49152 entries, no padding token, `model_max_length` 8192
"""

import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from huggingface_hub import HfApi
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.support.hub.server import HubServer

__all__ = ["upload_benchmarks", "upload_stand_ins"]

Row = dict[str, Any]
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>"]


def upload_stand_ins(hub: HubServer, scratch: Path) -> None:
    """Create all repositories on the Hub. `scratch` is an empty folder for their files."""
    for repo_id, write in _DATASETS.items():
        _upload_dataset(hub, scratch, repo_id, write)
    folder = scratch / "HuggingFaceTB/SmolLM2-1.7B"
    write_smollm2(folder)
    _upload(hub, "HuggingFaceTB/SmolLM2-1.7B", "model", folder)


def upload_benchmarks(hub: HubServer, scratch: Path, subjects: list[str]) -> None:
    """Create the repositories of the benchmarks GSM8K and MMLU with few questions, MMLU with these subjects."""
    writers = {"openai/gsm8k": lambda folder: _gsm8k(folder, 16), "cais/mmlu": lambda folder: _mmlu(folder, subjects)}
    for repo_id, write in writers.items():
        _upload_dataset(hub, scratch, repo_id, write)


def _upload_dataset(hub: HubServer, scratch: Path, repo_id: str, write: Callable[[Path], Row]) -> None:
    folder = scratch / repo_id
    card = write(folder)
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n# {repo_id}\n", encoding="utf-8")
    _upload(hub, repo_id, "dataset", folder)


def _upload(hub: HubServer, repo_id: str, kind: str, folder: Path) -> None:
    owner = repo_id.split("/")[0]
    hub.users[owner] = {"name": owner, "role": "write"}  # the token has the name of the user
    api = HfApi(endpoint=hub.endpoint, token=owner)
    api.create_repo(repo_id, repo_type=kind)
    api.upload_folder(repo_id=repo_id, repo_type=kind, folder_path=folder)


# ---- Datasets ----


def _texts(count: int, words: str, seed: int) -> Iterator[str]:
    """Different texts of 5 to 60 words, with signs outside of ASCII."""
    chance, vocabulary = random.Random(seed), words.split()
    for number in range(count):
        yield f"№ {number}: " + " ".join(chance.choices(vocabulary, k=chance.randrange(5, 60))) + ".\n"


_PROSE = "the history of science is also — in part — a history of instruments, café talk and chance discoveries which"
_MATH = "let $x$ be a real number such that f(x) = 0 then we have \\frac{a}{b} \\le 1 and therefore the sum converges"
_CODE = "def main(argv): \n    return sum(range(10)) if argv else None # TODO naïve \t int *p = &x; } {"
_ROWS = 1500


def _parquet(path: Path, rows: list[Row], schema: pa.Schema | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=200)


def _fineweb_edu(folder: Path) -> Row:
    rows = [
        {
            "text": text,
            "id": f"<urn:uuid:{number:032x}>",
            "dump": "CC-MAIN-2024-10",
            "url": f"https://example.org/{number}",
            "file_path": "s3://commoncrawl/crawl-data/CC-MAIN-2024-10/segments/0.warc.gz",
            "language": "en",
            "language_score": 0.97,
            "token_count": len(text) // 4,
            "score": 3.1,
            "int_score": 3,
        }
        for number, text in enumerate(_texts(_ROWS, _PROSE, 1))
    ]
    for sample in ("10BT", "100BT"):
        for shard in range(3):
            _parquet(folder / "sample" / sample / f"{shard:03}_00000.parquet", rows[shard::3])
    _parquet(folder / "data" / "CC-MAIN-2024-10" / "train-00000-of-00001.parquet", rows[:10])
    samples = [
        {"config_name": f"sample-{s}", "data_files": [{"split": "train", "path": f"sample/{s}/*"}]}
        for s in ("10BT", "100BT")
    ]
    crawl = {"config_name": "CC-MAIN-2024-10", "data_files": [{"split": "train", "path": "data/CC-MAIN-2024-10/*"}]}
    default = {"config_name": "default", "data_files": [{"split": "train", "path": "data/*/*"}]}
    return {"license": "odc-by", "language": ["en"], "configs": [default, *samples, crawl]}


_FINEMATH = {
    "url": "string",
    "fetch_time": "int64",
    "content_mime_type": "string",
    "warc_filename": "string",
    "warc_record_offset": "int32",
    "warc_record_length": "int32",
    "text": "string",
    "token_count": "int32",
    "char_count": "int32",
    "metadata": "string",
    "score": "float64",
    "int_score": "int64",
    "crawl": "string",
    "snapshot_type": "string",
    "language": "string",
    "language_score": "float64",
}


def _finemath(folder: Path) -> Row:
    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in _FINEMATH.items()])
    rows = [{"url": "https://example.org", "text": text, "score": 4.2} for text in _texts(_ROWS, _MATH, 2)]
    configs, infos = [], []
    for name in ("finemath-3plus", "finemath-4plus"):
        for shard in range(2):
            _parquet(folder / name / f"train-{shard:05}-of-00002.parquet", rows[shard::2], schema)
        configs.append({"config_name": name, "data_files": [{"split": "train", "path": f"{name}/train-*"}]})
        features = [{"name": column, "dtype": kind} for column, kind in _FINEMATH.items()]
        # As on the Hub, where num_bytes is not a whole number.
        split = {"name": "train", "num_bytes": 39101488149.09091, "num_examples": _ROWS}
        infos.append({"config_name": name, "features": features, "splits": [split], "dataset_size": 39101488149.09091})
    return {"license": "odc-by", "configs": configs, "dataset_info": infos}


def _olmo_mix(folder: Path) -> Row:
    data = folder / "data" / "starcoder"
    data.mkdir(parents=True)
    texts = list(_texts(_ROWS, _CODE, 3))
    for shard in range(3):
        with gzip.open(data / f"starcoder-{shard:04}.json.gz", "wt", encoding="utf-8") as file:
            for number, text in enumerate(texts[shard::3]):
                row: Row = {"id": str(number), "text": text, "added": "2024-01-01", "created": None, "source": "stack"}
                # The keys and their types differ from row to row.
                more = {"max_stars_count": number, "ext": "py"} if number % 2 else {"max_stars_count": None}
                if number > 100:
                    more |= {
                        "licenses": ["MIT"] if number % 3 else [],
                        "span": {"first": 1.5, number % 5 or "a": None},
                    }
                file.write(json.dumps(row | {"metadata": more}) + "\n")
    other = folder / "data" / "wiki"
    other.mkdir()
    with gzip.open(other / "wiki-0000.json.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps({"id": 1, "text": "a wiki page", "revision": 7}) + "\n")
    configs = [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/*/*"}]},
        *(
            {"config_name": n, "data_files": [{"split": "train", "path": f"data/{n}/*"}]}
            for n in ("starcoder", "wiki")
        ),
    ]
    features = [{"name": name, "dtype": "string"} for name in ("id", "text", "added", "created")]
    return {"license": "odc-by", "configs": configs, "dataset_info": {"features": features}}


def _open_math_reasoning(folder: Path) -> Row:
    problems, solutions = _texts(_ROWS, _MATH, 4), _texts(_ROWS, _MATH, 5)
    rows = [
        {
            "expected_answer": "4",
            "problem_type": "has_answer_extracted",
            "problem_source": "aops_c4_high_school_math",
            "generation_model": "DeepSeek-R1",
            "pass_rate_72b_tir": "0.96875" if number % 2 else "n/a",
            "problem": problem,
            "generated_solution": f"<think>\n{solution}</think>\n\\boxed{{4}}",
            "inference_mode": "cot",
            "used_in_kaggle": number % 2 == 0,
        }
        for number, (problem, solution) in enumerate(zip(problems, solutions, strict=True))
    ]
    files = []
    for split in ("cot", "tir", "genselect", "additional_problems"):
        part = rows if split == "cot" else rows[:5]
        for shard in range(2):
            _parquet(folder / "data" / f"{split}-{shard:05}-of-00002.parquet", part[shard::2])
        files.append({"split": split, "path": f"data/{split}-*"})
    return {"license": "cc-by-4.0", "configs": [{"config_name": "default", "data_files": files}]}


def _lambada(folder: Path) -> Row:
    (folder / "data").mkdir(parents=True)
    configs = []
    for language in ("en", "de"):
        name = f"data/lambada_test_{language}.jsonl"
        lines = (json.dumps({"text": text}) + "\n" for text in _texts(300, _PROSE, 6))
        (folder / name).write_text("".join(lines), encoding="utf-8")
        configs.append({"config_name": language, "data_files": [{"split": "test", "path": name}]})
    default = {"config_name": "default", "data_files": [{"split": "test", "path": "data/lambada_test_en.jsonl"}]}
    return {"license": "mit", "configs": [default, *configs]}


def _gsm8k(folder: Path, count: int = 300) -> Row:
    configs = []
    for config in ("main", "socratic"):
        rows = [{"question": text, "answer": f"{text}#### 4"} for text in _texts(count, _MATH, 7)]
        for split in ("train", "test"):
            _parquet(folder / config / f"{split}-00000-of-00001.parquet", rows)
        files = [{"split": split, "path": f"{config}/{split}-*"} for split in ("train", "test")]
        configs.append({"config_name": config, "data_files": files})
    return {"license": ["mit"], "configs": configs}


def _mmlu(folder: Path, subjects: list[str]) -> Row:
    configs = []
    for subject in subjects:
        rows = [
            {"question": text, "subject": subject, "choices": ["0", "1", "x", "none"], "answer": number % 4}
            for number, text in enumerate(_texts(5, _PROSE, 8))
        ]
        for split in ("test", "validation", "dev"):
            _parquet(folder / subject / f"{split}-00000-of-00001.parquet", rows)
        files = [{"split": split, "path": f"{subject}/{split}-*"} for split in ("test", "validation", "dev")]
        configs.append({"config_name": subject, "data_files": files})
    return {"license": "mit", "configs": configs}


_DATASETS: dict[str, Callable[[Path], Row]] = {
    "HuggingFaceFW/fineweb-edu": _fineweb_edu,
    "HuggingFaceTB/finemath": _finemath,
    "allenai/olmo-mix-1124": _olmo_mix,
    "nvidia/OpenMathReasoning": _open_math_reasoning,
    "EleutherAI/lambada_openai": _lambada,
    "openai/gsm8k": _gsm8k,
}


# ---- Tokenizer ----


def write_smollm2(folder: Path, entries: int = 49152) -> None:
    """The files of a tokenizer with the settings of SmolLM2's. Entries that the texts do not need are fillers."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=_SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([words for words in (_PROSE, _MATH, _CODE) for _ in range(2)], trainer)
    content = json.loads(backend.to_str())
    vocabulary = content["model"]["vocab"]
    for number in range(entries - len(vocabulary)):
        vocabulary[f"filler{number}"] = len(vocabulary)
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    end = "<|endoftext|>"
    settings = {
        "add_prefix_space": False,
        "additional_special_tokens": _SPECIAL,
        "bos_token": end,
        "clean_up_tokenization_spaces": False,
        "eos_token": end,
        "model_max_length": 8192,
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": end,
        "vocab_size": entries,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokens = {"bos_token": end, "eos_token": end, "unk_token": end, "additional_special_tokens": _SPECIAL}
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": entries}), encoding="utf-8")
