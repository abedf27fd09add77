"""lmms-eval on local tasks, and a real language model, in environments of `make ecosystem`."""

import json
import shutil
from pathlib import Path

import pytest

from tests.ecosystem.test_ecosystem import FOLDER, ROOT, croc, run

pytestmark = pytest.mark.ecosystem

HERE = Path(__file__).parent
NEW_TOKENS = 24
IN_LMMS = dict(
    pope=dict(
        accuracy="pope_accuracy",
        precision="pope_precision",
        recall="pope_recall",
        f1="pope_f1_score",
        true_yes_ratio="pope_yes_ratio",
    ),
    vqa=dict(accuracy="exact_match"),
    exact_match=dict(accuracy="exact_match"),
)


def write_tasks(demo: Path) -> list[Path]:
    """One task of each kind from the demo's records."""
    records = json.loads((demo / "finetune.json").read_text())
    yes_or_no, people = [], []
    for record in records:
        about = {name: record[name] for name in ("id", "image")}
        for human, gpt in zip(
            record["conversations"][::2], record["conversations"][1::2], strict=True
        ):
            if gpt["value"] in ("yes", "no"):
                text = human["value"].replace("<image>", "").strip()
                yes_or_no.append(about | {"text": text, "answer": gpt["value"], "type": "y"})
        first = record["conversations"][:2]
        said = [first[1]["value"]] * 4 + ["three"] * 3 + ["No."] * 3
        people.append(about | {"conversations": first, "answers": said})
    questions = dict(pope=yes_or_no, vqa=people, exact_match=records)
    paths = []
    for kind, rows in questions.items():
        (demo / f"{kind}.json").write_text(json.dumps(rows))
        task = dict(task=f"demo_{kind}", kind=kind, questions=f"{kind}.json", images="images")
        paths.append(demo / f"{kind}.yaml")
        paths[-1].write_text(json.dumps(task | {"max_new_tokens": NEW_TOKENS}))
    return paths


def test_lmms_eval_gives_the_answers_and_numbers_of_croc_eval(tmp_path: Path):
    from megatron_croc.convert.exporting import export_huggingface
    from megatron_croc.data.demo.small import write_demo
    from tests.distributed.test_answers import train_small, write_first_task
    from tests.support.distributed import run_distributed

    demo = write_demo(tmp_path, ("finetune",))
    write_first_task(demo)
    run_distributed(train_small, 1, demo, tmp_path / "save", {})  # some answers are then right
    export_huggingface(tmp_path / "save", tmp_path / "hf", tokenizer=demo / "tokenizer.model")
    tasks = [word for path in write_tasks(demo) for word in ("--task", path)]
    croc("eval", "--model", tmp_path / "hf", *tasks, "--output", tmp_path / "ours")
    croc("lmms-task", *tasks, "--to", tmp_path / "lmms")
    arguments = f"pretrained={tmp_path / 'hf'},dtype=float32,device=cpu"
    names = ",".join(f"demo_{kind}" for kind in IN_LMMS)
    done = run(
        *(FOLDER / "lmms-eval" / "bin" / "python", "-m", "lmms_eval", "--model", "croc"),
        *("--model_args", arguments, "--include_path", tmp_path / "lmms", "--tasks", names),
        *("--batch_size", 8, "--output_path", tmp_path / "theirs", "--log_samples"),
        HF_DATASETS_CACHE=str(tmp_path / "cache"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "theirs").rglob("*results.json")
    theirs = json.loads(results.read_text())["results"]
    num_right = 0
    for kind, pairs in IN_LMMS.items():
        lines = (tmp_path / "ours" / f"demo_{kind}.jsonl").read_text().splitlines()
        (samples,) = (tmp_path / "theirs").rglob(f"*samples_demo_{kind}.jsonl")
        rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda r: r["doc_id"])
        said = [row["filtered_resps"] for row in rows]
        assert [s[0] if isinstance(s, list) else s for s in said] == [
            json.loads(line)["text"] for line in lines
        ]
        ours = json.loads((tmp_path / "ours" / f"demo_{kind}.json").read_text())
        for name, other in pairs.items():
            value = theirs[f"demo_{kind}"][f"{other},none"]
            assert ours["metrics"][name] == pytest.approx(value, abs=1e-12), (kind, name)
        num_right += ours["metrics"]["accuracy"] > 0
    assert num_right == len(IN_LMMS), "the test says nothing"


def test_metrics_on_random_answers():
    python = FOLDER / "lmms-eval" / "bin" / "python"
    done = run(python, "-W", "ignore", HERE / "judge_at_random.py")
    assert done.returncode == 0 and "same numbers" in done.stdout, done.stderr[-2000:]


def test_a_real_language_model(tmp_path: Path):
    """SmolLM2-135M-Instruct beside a random tower: both layouts, bit for bit, and an answer."""
    import torch
    import transformers

    llm, clip, start = (tmp_path / name for name in ("llm", "clip", "start"))
    script = ROOT / "benchmarks" / "evidence" / "smollm2_to_hf.py"
    done = run(FOLDER / "smollm2" / "bin" / "python", "-W", "ignore", script, llm)
    assert done.returncode == 0 and "Paris" in done.stdout, done.stderr[-2000:]
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    tower = transformers.CLIPVisionConfig(**sizes, image_size=28, patch_size=14)
    transformers.CLIPVisionModel(tower).save_pretrained(clip)

    croc("convert", "import", "--from-hf", llm, "--vision", clip, "--save", start)
    croc("convert", "export", "--load", start, "--to", tmp_path / "hf", "--tokenizer", llm)
    croc("convert", "verify", "--load", start, "--hf", tmp_path / "hf")
    asked = ["--prompt", "What is the capital of France?", "--max-new-tokens", 24]
    said = croc("generate", "--model", tmp_path / "hf", *asked, "--device", "cpu")
    assert "Paris" in said, said

    release, again = tmp_path / "release", tmp_path / "again"
    to_release = ["--to", release, "--layout", "release", "--tokenizer", llm]
    croc("convert", "export", "--load", start, *to_release)
    croc("convert", "import", "--from-hf", release, "--save", again)
    croc("convert", "export", "--load", again, "--to", tmp_path / "hf2", "--tokenizer", llm)
    first, second = (sorted((tmp_path / name).glob("*.safetensors")) for name in ("hf", "hf2"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    shutil.rmtree(tmp_path)  # two GB
