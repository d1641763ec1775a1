"""Adapters of others: taken over where they fit, refused where they are unsafe or do not."""

from __future__ import annotations

import http.server
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import rows, start, train_undisturbed

from lib import adapters, config, files, models, progress, qlora
from lib.config import Parameters
from lib.files import StudyError


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Parameters, Path]:
    return train_undisturbed(tiny_llama, tmp_path_factory.mktemp("undisturbed"))


def published(trained: tuple[Parameters, Path], tmp_path: Path) -> tuple[Path, Path]:
    folder = tmp_path / "published"
    shutil.copytree(qlora.checkpoints(trained[1])[14], folder)
    return folder, folder / adapters.SETTINGS


def test_a_published_adapter_stands_as_checkpoint_1(trained: tuple[Parameters, Path], tmp_path: Path) -> None:
    import torch
    from peft import PeftModel

    p, run = trained
    folder, settings = published(trained, tmp_path)
    files.write_json(settings, files.read_json(settings) | {"base_model_name_or_path": "/home/someone/llama", "target_modules": ".*"})
    q = p.model_copy(update={"adapter": str(folder), "results_dir": str(tmp_path)})
    record = qlora.train(q, rows(60), progress=False)
    assert list(qlora.checkpoints(config.run_dir(q))) == record["checkpoint_steps"] == [1]
    assert record["published_adapter"]["declared_base"] == "/home/someone/llama"
    assert record["published_adapter"]["layers"] == 14
    assert "rank 16 on 14 layers" in qlora.summary(record).loc["published adapter"].iloc[0]
    assert qlora.checkpoint_table(config.run_dir(q)).index.tolist() == [1]
    assert "published" in progress.loss_curve(files.read_csv(config.run_dir(q) / "training_log.csv")).data
    tokens = torch.arange(8).reshape(1, 8)
    ours, theirs = (
        PeftModel.from_pretrained(models.load_base(p), source).eval()(tokens).logits
        for source in (qlora.checkpoints(run)[14], qlora.checkpoints(config.run_dir(q))[1])
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adapter_read_for_decoding_is_what_peft_adds(trained: tuple[Parameters, Path], tmp_path: Path, use_rslora: bool) -> None:
    import torch
    from peft import PeftModel

    folder, settings = published(trained, tmp_path)
    files.write_json(settings, files.read_json(settings) | {"use_rslora": use_rslora})
    theirs = PeftModel.from_pretrained(models.load_base(trained[0]), folder).base_model.model
    ours = adapters.read(folder)
    assert len(ours) == 14
    for name, (a, b) in ours.items():
        torch.testing.assert_close(b @ a, theirs.get_submodule(name).get_delta_weight("default"))


def test_adapters_that_cannot_be_read_for_decoding_say_why(trained: tuple[Parameters, Path], tmp_path: Path) -> None:
    import safetensors.torch

    folder, _ = published(trained, tmp_path)
    weights = safetensors.torch.load_file(folder / adapters.WEIGHTS)
    first = next(iter(weights))
    for changed, why in (
        ({"other.weight": weights[first]}, "other.weight is no plain LoRA weight"),
        ({first: weights[first]}, "lacks one of its two matrices"),
    ):
        safetensors.torch.save_file(changed, folder / adapters.WEIGHTS)
        with pytest.raises(StudyError, match=why):
            adapters.read(folder)
    (folder / adapters.WEIGHTS).write_bytes(b"no safetensors")
    with pytest.raises(StudyError, match="cannot be read"):
        adapters.read(folder)


def test_a_published_adapter_that_is_unsafe_or_does_not_fit_is_refused(trained: tuple[Parameters, Path], tmp_path: Path) -> None:
    import safetensors.torch
    import torch

    folder, path = published(trained, tmp_path)
    settings, weights = files.read_json(path), safetensors.torch.load_file(folder / adapters.WEIGHTS)
    q = trained[0].model_copy(update={"results_dir": str(tmp_path), "adapter": str(folder)})

    def refused(reason: str, **changes: Any) -> None:
        with pytest.raises(StudyError, match=reason):
            qlora.train(q.model_copy(update=changes), rows(60), progress=False)

    for change, reason in [
        ({"peft_type": "IA3"}, "peft_type must be LORA"),
        ({"use_dora": True}, "use_dora = True is more than plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": "16"}, "r must be a number above 0"),
        ({"bias": "all"}, "bias = 'all'"),
    ]:
        files.write_json(path, settings | change)
        refused(reason)
    files.write_json(path, settings)
    name = next(n for n in weights if "lora_A" in n)
    for changed, reason in [
        ({name: torch.zeros(16, 33)}, "its weights have the shapes"),
        ({"base_model.model.lm_head.weight": torch.zeros(2)}, "is no LoRA weight of a linear layer"),
        ({name.replace("layers.0", "layers.9"): torch.zeros(16, 32)}, "is no LoRA weight of a linear layer"),
    ]:
        safetensors.torch.save_file(weights | changed, folder / adapters.WEIGHTS)
        refused(reason)
    (folder / adapters.WEIGHTS).write_bytes(b"not safetensors")
    refused("is damaged or no safetensors file")
    (folder / adapters.WEIGHTS).rename(folder / "adapter_model.bin")
    refused("holds adapter_model.bin, a pickle that could run code: refused")
    refused("holds no adapter_model.safetensors", adapter=str(tmp_path / "nowhere"))
    refused("must read hf:ORG/NAME@REVISION", adapter="hf:org/name")
    refused("the Hub cannot be reached for org/name", adapter="hf:org/name@0123abc")  # tests are offline
    assert qlora.checkpoints(config.run_dir(q)) == {}


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as a download of single files asks for: one repository, made of a folder."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        name, file = self.path.split("/", 5)[2::3]
        path = self.folder / file
        self.asked.append(file)
        self.send_response(200 if path.is_file() else 404)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("X-Error-Code" if not path.is_file() else "ETag", "EntryNotFound" if not path.is_file() else f'"{name}-{file}"')
        self.send_header("Content-Length", str(path.stat().st_size) if path.is_file() else "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write((self.folder / self.path.split("/", 5)[5]).read_bytes())

    def log_message(self, *args: Any) -> None:
        return


def test_a_published_adapter_is_fetched_from_the_hub(trained: tuple[Parameters, Path], tmp_path: Path) -> None:
    folder, _ = published(trained, tmp_path)
    (folder / "adapter_model.bin").write_bytes(b"a pickle")
    handler = type("Handler", (Hub,), {"folder": folder, "asked": []})
    q = trained[0].model_copy(update={"results_dir": str(tmp_path / "results"), "adapter": "hf:org/name@" + "0" * 40})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        done = start(q, 60, **hub)
        assert done.communicate()[1].decode().strip().splitlines()[-1:] == []
        (folder / adapters.WEIGHTS).unlink()
        pickled = start(q.model_copy(update={"adapter": "hf:org/name@" + "1" * 40}), 60, **hub)
        assert b"has no adapter_config.json with adapter_model.safetensors; pickled weights are refused" in pickled.communicate()[1]
        server.shutdown()
    assert set(handler.asked) == {adapters.SETTINGS, adapters.WEIGHTS}
    assert done.returncode == 0
    assert pickled.returncode == 1
